"""The outer gradient as one recorded program, where the time would otherwise be spent between operators.

On a CPU that is so for tiny networks: a meta-step is hundreds of operators on a few thousand numbers. They are recorded
once, whatever the algorithm, and compiled by TorchInductor. On a GPU it is so for all but large networks: the meta-step
is captured as a CUDA graph and replayed. A program is checked against the plain step before it is used.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from metalearn import parallel
from metalearn.episode import Episode, MetaBatch
from metalearn.meta_gradient import Differentiated, differentiate
from metalearn.ops import native
from metalearn.random import TaskKey
from metalearn.regularizers import Regularizer
from metalearn.schema.groups import LONG_RUN

if TYPE_CHECKING:
    from metalearn.learner import MetaLearner

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
"""Relative difference from the plain step above which a program is not used."""


TINY_BYTES = 2**20  # of activations of a meta-batch: beyond it the time is in the operators themselves


class Unfit(Exception):
    """Why a meta-step cannot be compiled."""


class _Form(NamedTuple):
    """How tensors make a result again: `grads` gradients, then those of the outputs, then the flag.

    `leaves` are the outputs', with `Tensor` itself in place of every tensor.
    """

    grads: int
    leaves: list[Any]
    structure: Any


def _taken_apart(result: Differentiated) -> tuple[list[Tensor], _Form]:
    grads, out, finite = result
    leaves, structure = pytree.tree_flatten(out)
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    return [*grads, *tensors, finite], _Form(
        len(grads), [Tensor if isinstance(t, Tensor) else t for t in leaves], structure
    )


def _read(learner: MetaLearner, episodes: Episode) -> list[str]:
    """Names of the latent tensors that the meta-step depends on."""
    return [name for name in learner.latent_reads if name in episodes.latent]


class _Program(NamedTuple):
    """A function from tensors to the tensors of a result."""

    function: Any
    form: _Form

    def run(self, inputs: list[Tensor]) -> Differentiated:
        with torch.no_grad(), parallel.one_thread():  # nothing in it is worth dividing
            *out, finite = self.function(*inputs)
        count, leaves, structure = self.form
        rest = iter(out[count:])
        return out[:count], structure.unflatten([next(rest) if leaf is Tensor else leaf for leaf in leaves]), finite


class Compiler:
    """Compiles one learner's gradient for each shape of meta-batch, or says why not and leaves it plain.

    Args:
        always: whether or not it is likely to pay.
    """

    def __init__(self, *, always: bool) -> None:
        self.always = always
        self.programs: dict[Any, _Program | None] = {}
        self.state: list[Tensor] = []
        self.first: Tensor | None = None

    def __call__(self, learner: MetaLearner, episodes: Episode, batch: MetaBatch) -> Differentiated:
        """The same as `differentiate(learner, episodes, batch)`."""
        if (
            not self.state or self.first is None or self.state[0].data_ptr() != self.first.data_ptr()
        ):  # at the start, and when they moved
            self.first = next(learner.parameters())
            self.state = [*(p.detach() for p in learner.parameters()), *learner.buffers()]  # changed in place
            self.programs.clear()
        read = _read(learner, episodes)
        own = [batch.key.step, batch.key.task, *(episodes.latent[name] for name in read)]
        inputs = [*self.state, *episodes.support, *episodes.query, *own]
        alpha = getattr(learner, "alpha", None)
        options = (learner.inner_steps, None if isinstance(alpha, Tensor) else alpha, *read)  # a tensor is a buffer
        shapes = (batch.total, options, *((t.shape, t.stride(), t.dtype) for t in inputs))
        if shapes not in self.programs:
            self.programs[shapes] = self._build(learner, episodes, batch, inputs)
        program = self.programs[shapes]
        if program is None:
            return differentiate(learner, episodes, batch)
        return program.run(inputs)

    def _build(
        self, learner: MetaLearner, episodes: Episode, batch: MetaBatch, inputs: list[Tensor]
    ) -> _Program | None:
        size = episodes.tasks * learner.net.activation_bytes(episodes.support.x.shape[1] + episodes.query.x.shape[1])
        record = _compile if inputs[0].is_cpu else _capture
        if not self.always and inputs[0].is_cpu and (size > TINY_BYTES or learner.max_steps < LONG_RUN):
            return None
        began = time.monotonic()
        try:
            if inputs[0].is_cpu and (chunks := len(learner.chunks(episodes))) > 1:
                raise Unfit(f"its tasks are computed in {chunks} chunks")
            if type(learner.regularizer) is not Regularizer:
                raise Unfit("a regularizer may change from step to step")
            program = record(learner, episodes, batch, inputs)
            grads, out, _ = program.run(inputs)
            expected, plain_out, _ = differentiate(learner, episodes, batch)
            error = max(_difference(grads, expected), _difference([out.loss], [plain_out.loss]))
            if not error < TOLERANCE[inputs[0].dtype]:
                raise Unfit(f"the compiled step differs from the plain one by {error:.1e}")
        except Exception as met:  # whatever the compiler met: the plain step needs none of it
            first = (str(met).strip().splitlines() or [""])[0]
            log.warning("meta-steps are not compiled: %s: %s", type(met).__name__, first[:200])
            return None
        log.info("meta-steps are compiled (%.0f s), equal to the plain ones to %.1e", time.monotonic() - began, error)
        return program


def _compile(learner: MetaLearner, episodes: Episode, batch: MetaBatch, inputs: list[Tensor]) -> _Program:
    parameters, buffers = [n for n, _ in learner.named_parameters()], [n for n, _ in learner.named_buffers()]
    form: _Form | None = None

    def step(*leaves: Tensor) -> tuple[Tensor, ...]:
        nonlocal form
        rest = list(leaves[len(parameters) + len(buffers) :])
        state = dict(zip([*parameters, *buffers], leaves, strict=False))
        support, query = type(episodes.support)(*rest[:2]), type(episodes.query)(*rest[2:4])
        key = TaskKey(batch.key.key, rest[4], rest[5])
        part = Episode(support, query, dict(zip(_read(learner, episodes), rest[6:], strict=True)))
        with torch.nn.utils.stateless._reparametrize_module(learner, state):
            result = differentiate(learner, part, batch._replace(episodes=part, key=key))
        tensors, form = _taken_apart(result)
        return tuple(tensors)

    enabled, native.enabled = native.enabled, False
    try:
        graph = make_fx(step, tracing_mode="fake")(*inputs)
    finally:
        native.enabled = enabled
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about itself
        options = {"cpp_wrapper": True, "cpp.threads": 1}
        function = torch._inductor.compile(graph, list(inputs), options=options)
    assert form is not None
    return _Program(function, form)


def _capture(learner: MetaLearner, episodes: Episode, batch: MetaBatch, inputs: list[Tensor]) -> _Program:
    """A CUDA graph: parameters and buffers are read where they are, everything else is copied in."""
    read = _read(learner, episodes)
    fresh = 6 + len(read)  # tensors of one meta-step's tasks: the last of the inputs
    held = [t.clone() for t in inputs[-fresh:]]
    support, query = type(episodes.support)(*held[:2]), type(episodes.query)(*held[2:4])
    part = Episode(support, query, dict(zip(read, held[6:], strict=True)))
    fixed = batch._replace(episodes=part, key=TaskKey(batch.key.key, held[4], held[5]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose their kernels and allocate before the capture
        for _ in range(3):
            differentiate(learner, part, fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = differentiate(learner, part, fixed)
    tensors, form = _taken_apart(result)

    def replay(*now: Tensor) -> list[Tensor]:
        torch._foreach_copy_(held, list(now[-fresh:]))
        graph.replay()
        return tensors  # overwritten by the next replay

    return _Program(replay, form)


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    a, b = (torch.cat([t.detach().flatten().double() for t in part]) for part in (actual, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
