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

from metalearn.episode import Episode, MetaBatch, TaskOutput
from metalearn.ops import native
from metalearn.random import TaskKey

if TYPE_CHECKING:
    from metalearn.learner import MetaLearner

log = logging.getLogger(__name__)

Result = tuple[list[Tensor], TaskOutput]
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
"""Relative difference from the plain step above which a program is not used."""


TINY_BYTES = 2**20  # of activations of a meta-batch: beyond it the time is in the operators themselves
LONG_RUN = 10_000  # meta-steps: fewer do not earn the compiler's time back


class Unfit(Exception):
    """Why a meta-step cannot be compiled."""


class _Program(NamedTuple):
    """A function of tensors; `template` are the leaves of a result, `Tensor` itself where a tensor comes out."""

    function: Any
    template: list[Any]
    structure: Any

    def run(self, inputs: list[Tensor]) -> Result:
        with torch.no_grad():
            out = iter(self.function(*inputs))
        return self.structure.unflatten(next(out) if leaf is Tensor else leaf for leaf in self.template)  # type: ignore[no-any-return]


class Compiler:
    """Compiles one learner's gradient for each shape of meta-batch, or says why not and leaves it plain.

    Args:
        always: whether or not it is likely to pay.
    """

    def __init__(self, *, always: bool) -> None:
        self.always = always
        self.programs: dict[Any, _Program | None] = {}
        self.state: list[Tensor] = []

    def __call__(self, learner: MetaLearner, plain: Any, episodes: Episode, batch: MetaBatch) -> Result:
        """The same as `plain(learner, episodes, batch)`."""
        if not self.state:  # as parameters and buffers are at any time: they are changed in place
            self.state = [*(p.detach() for p in learner.parameters()), *learner.buffers()]
        inputs = [*self.state, *episodes.support, *episodes.query, batch.key.step, batch.key.task]
        shapes = (batch.total, *((t.shape, t.dtype) for t in inputs))
        if shapes not in self.programs:
            self.programs[shapes] = self._build(learner, plain, episodes, batch, inputs)
        program = self.programs[shapes]
        if program is None:
            return plain(learner, episodes, batch)  # type: ignore[no-any-return]
        return program.run(inputs)

    def _build(
        self, learner: MetaLearner, plain: Any, episodes: Episode, batch: MetaBatch, inputs: list[Tensor]
    ) -> _Program | None:
        size = episodes.tasks * learner.net.activation_bytes(episodes.support.x.shape[1] + episodes.query.x.shape[1])
        record = _compile if inputs[0].is_cpu else _capture
        if not self.always and inputs[0].is_cpu and (size > TINY_BYTES or learner.max_steps < LONG_RUN):
            return None
        began = time.monotonic()
        try:
            if inputs[0].is_cpu and (chunks := len(learner.chunks(episodes))) > 1:
                raise Unfit(f"its tasks are computed in {chunks} chunks")
            program = record(learner, plain, episodes, batch, inputs)
            grads, out = program.run(inputs)
            expected, plain_out = plain(learner, episodes, batch)
            error = max(_difference(grads, expected), _difference([out.loss], [plain_out.loss]))
            if not error < TOLERANCE[inputs[0].dtype]:
                raise Unfit(f"the compiled step differs from the plain one by {error:.1e}")
        except Exception as met:  # whatever the compiler met: the plain step needs none of it
            first = (str(met).strip().splitlines() or [""])[0]
            log.warning("meta-steps are not compiled: %s: %s", type(met).__name__, first[:200])
            return None
        log.info("meta-steps are compiled (%.0f s), equal to the plain ones to %.1e", time.monotonic() - began, error)
        return program


def _compile(learner: MetaLearner, plain: Any, episodes: Episode, batch: MetaBatch, inputs: list[Tensor]) -> _Program:
    parameters, buffers = [n for n, _ in learner.named_parameters()], [n for n, _ in learner.named_buffers()]
    template: list[Any] = []
    structure: Any = None

    def step(*leaves: Tensor) -> tuple[Tensor, ...]:
        nonlocal template, structure
        rest = list(leaves[len(parameters) + len(buffers) :])
        state = dict(zip([*parameters, *buffers], leaves, strict=False))
        support, query = type(episodes.support)(*rest[:2]), type(episodes.query)(*rest[2:4])
        key = TaskKey(batch.key.key, rest[4], rest[5])
        part = Episode(support, query, {})
        with torch.nn.utils.stateless._reparametrize_module(learner, state):
            result = plain(learner, part, batch._replace(episodes=part, key=key))
        flat, structure = pytree.tree_flatten(result)
        template = [Tensor if isinstance(t, Tensor) else t for t in flat]
        return tuple(t for t in flat if isinstance(t, Tensor))

    enabled, native.enabled = native.enabled, False
    try:
        graph = make_fx(step, tracing_mode="fake")(*inputs)
    finally:
        native.enabled = enabled
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about itself
        function = torch._inductor.compile(graph, list(inputs), options={"cpp_wrapper": True})
    return _Program(function, template, structure)


def _capture(learner: MetaLearner, plain: Any, episodes: Episode, batch: MetaBatch, inputs: list[Tensor]) -> _Program:
    """A CUDA graph: parameters and buffers are read where they are, everything else is copied in."""
    fresh = 6  # tensors of one meta-step's tasks: the last of the inputs
    held = [t.clone() for t in inputs[-fresh:]]
    support, query = type(episodes.support)(*held[:2]), type(episodes.query)(*held[2:4])
    part = Episode(support, query, {})
    fixed = batch._replace(episodes=part, key=TaskKey(batch.key.key, held[4], held[5]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose their kernels and allocate before the capture
        for _ in range(3):
            plain(learner, part, fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = plain(learner, part, fixed)
    flat, structure = pytree.tree_flatten(result)
    tensors = [t for t in flat if isinstance(t, Tensor)]

    def replay(*now: Tensor) -> list[Tensor]:
        torch._foreach_copy_(held, list(now[-fresh:]))
        graph.replay()
        return tensors  # overwritten by the next replay

    return _Program(replay, [Tensor if isinstance(t, Tensor) else t for t in flat], structure)


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    a, b = (torch.cat([t.detach().flatten().double() for t in part]) for part in (actual, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
