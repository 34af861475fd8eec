"""Sine curves: MAML with one step on the last layer of a network that was trained jointly, over alpha."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metalearn.backbones import MLP
from metalearn.datasets.sinusoid import Sinusoid
from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, estimate, over
from metalearn.studies.episodes import drawn
from metalearn.theory import alpha_star
from metalearn.theory.kernel_meta import adapted_loss
from metalearn.theory.one_step import OneStep

CHUNK = 500
"""Test tasks at once."""
UNIT = "target units squared"
METRICS = ("mse_before", "mse_after", "mse_after_same")


class SineLastLayer(Study):
    """Features are the second hidden layer of a trained network with 1 appended, for the bias.

    The network is the run that the study's schema needs. The last layer before adaptation is, for each alpha, the least
    of the training tasks' loss after one step of that rate on the same points (eq. 3.1); test tasks step from there.

    Args:
        shot: points of a task K.
        tasks: training tasks that the estimate and the last layers are of.
        test_tasks: new tasks.
        queries: points that these are judged on.
        alphas: the grid.
    """

    title = "Sine curves: one step on the last layer"

    def __init__(self, *, shot: int, tasks: int, test_tasks: int, queries: int, alphas: list[float]):
        self.tasks, self.test_tasks, self.shot, self.queries = tasks, test_tasks, shot, queries
        self.alphas = torch.tensor(alphas, dtype=torch.float64)

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields `alpha_lim`, `alpha_split`, and for each alpha `mse_before`, `mse_after` and `mse_after_same`.

        `mse_after_same` is of the points that the step was taken on, as eq. 3.3 supposes; the others are of queries, as
        Corollary 2, whose estimate is `alpha_split`.
        """
        curves = Sinusoid(variant="unravel", shot=self.shot, queries=self.shot, test_queries=self.queries)
        layers = Layers(starts[0])
        support, query = drawn(curves, "train", key.sub("training"), torch.arange(self.tasks))
        features = layers(support.x)
        yield estimate("alpha_lim", *alpha_star.limit(features), self.tasks)
        yield estimate("alpha_split", *alpha_star.split(features, layers(query.x)), self.tasks)
        problem = OneStep.of(features, features @ features.mT, support.y)
        heads = problem.minimisers(self.alphas)
        losses = [self._tested(curves, layers, heads, key, t) for t in torch.arange(self.test_tasks).split(CHUNK)]
        found = torch.cat(losses, -1)
        for i, alpha in enumerate(self.alphas.tolist()):
            for metric, values in zip(METRICS, found[:, i], strict=True):
                yield over(metric, values.tolist(), UNIT, alpha=alpha)

    def _tested(self, curves: Sinusoid, layers: Layers, heads: Tensor, key: Key, tasks: Tensor) -> Tensor:
        """Losses `[3, A, T]` of tasks, in the order of `METRICS`."""
        support, query = drawn(curves, "test", key.sub("test"), tasks)
        phi, psi = layers(support.x), layers(query.x)
        own, across = phi @ phi.mT, psi @ phi.mT
        found = []
        for alpha, head in zip(self.alphas.tolist(), heads, strict=True):
            r, q = phi @ head - support.y, psi @ head - query.y
            before, after = q.square().mean(-1), adapted_loss(r, own, alpha, 1, (q, across))
            found.append(torch.stack([before, after, adapted_loss(r, own, alpha)]))
        return torch.stack(found, 1)


class Layers:
    """The frozen layers of a trained `MLP` in float64: x `[T, n, 1]` to features with 1 appended, `[T, n, d]`.

    Args:
        state: of a learner.
    """

    def __init__(self, state: State):
        self.parameters = {k.removeprefix("net."): p.double() for k, p in state.items() if k.startswith("net.")}
        widths = [len(p) for k, p in self.parameters.items() if k.endswith(".bias") and k != "head.bias"]
        inputs = self.parameters["h1.weight"].shape[1]
        self.net = MLP(input_shape=(inputs,), outputs=self.parameters["head.bias"].numel(), hidden=widths).double()

    def __call__(self, x: Tensor) -> Tensor:
        features = self.net.run(self.parameters, x, stop="feat")
        return torch.cat([features, torch.ones_like(features[..., :1])], -1)
