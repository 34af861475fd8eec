"""The outer gradient of tiny networks as one compiled program.

A meta-step of a small network is hundreds of operators on a few thousand numbers, and nearly all of its time is spent
between them. Here the operators of one meta-step are recorded once, whatever the algorithm, and compiled by
TorchInductor. The program is checked against the plain step before it is used.
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
        if not self.always and (size > TINY_BYTES or learner.max_steps < LONG_RUN or not inputs[0].is_cpu):
            return None
        began = time.monotonic()
        try:
            if (chunks := len(learner.chunks(episodes))) > 1:
                raise Unfit(f"its tasks are computed in {chunks} chunks")
            program = _compile(learner, plain, episodes, batch, inputs)
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


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    a, b = (torch.cat([t.detach().flatten().double() for t in part]) for part in (actual, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
