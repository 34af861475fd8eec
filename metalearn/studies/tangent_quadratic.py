"""Quadratic regression in tangent features: the loss after one step over alpha, and what the estimates say of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn.datasets.base import Dataset
from metalearn.datasets.quadratic import Quadratic
from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, estimate, exact, over
from metalearn.studies.episodes import drawn
from metalearn.theory import alpha_star
from metalearn.theory.kernel_meta import adapted_loss
from metalearn.theory.one_step import Directions, OneStep
from metalearn.theory.two_layer import TwoLayer

CHUNK = 2**23
"""Features that are held at once."""
FINER = 21
"""Rates between the neighbours of the best of the grid, among which the optimum is looked for again."""


class Curves(NamedTuple):
    """Losses `[A, T]` of test tasks after one step: on fresh points, and on the points that it was taken on."""

    fresh: Tensor
    same: Tensor

    @classmethod
    def joined(cls, chunks: Sequence[Curves]) -> Curves:
        """Those of all tasks."""
        return cls(*(torch.cat(c, 1) for c in zip(*chunks, strict=True)))


class TangentQuadratic(Study):
    """Tasks of `Quadratic`, a model that is linear in the tangent features of a two-layer net.

    For each pair of N tasks and K samples the minimum-norm start w_m(alpha) of all tasks is computed and, on new tasks,
    the loss after one step of the same rate; beside it eq. 3.3 on K x K kernels, H.14 and H.15. The tangent kernel of
    few inputs has eigenvalues down to rounding. A start that follows these is wild between the samples, so directions
    below a share of the largest eigenvalue are cut.

    Args:
        tasks: numbers of tasks N.
        samples: numbers of samples K, one for each of `tasks`.
        init: initialisation of the net.
        width: hidden units h.
        inputs: p.
        nu: spread of the tasks, see `Quadratic`.
        sigma: standard deviation of the noise.
        low: end of the grid of alpha, times h.
        high: other end.
        points: rates of the grid.
        zoom: above 1, the grid has as many rates again between `low / zoom` and `high / zoom`.
        test_tasks: new tasks.
        queries: fresh points of each.
        cutoffs: least eigenvalues of the kernel, as shares of the largest.
    """

    title = "Quadratic regression in tangent features"

    def __init__(
        self,
        *,
        tasks: list[int],
        samples: list[int],
        init: str,
        width: int,
        inputs: int,
        nu: float,
        sigma: float,
        low: float,
        high: float,
        points: int,
        zoom: float,
        test_tasks: int,
        queries: int,
        cutoffs: list[float],
    ):
        self.pairs = list(zip(tasks, samples, strict=True))
        self.init, self.width, self.inputs, self.nu, self.sigma = init, width, inputs, nu, sigma
        grid = torch.cat([torch.linspace(low, high, points, dtype=torch.float64) / z for z in (1, zoom)])
        self.grid = grid.round(decimals=9).unique() / width  # 0 as such
        self.test_tasks, self.queries, self.cutoffs = test_tasks, queries, cutoffs

    def data(self, samples: int) -> Quadratic:
        """Tasks of so many support points, and of `queries` more."""
        return Quadratic(p=self.inputs, nu=self.nu, sigma=self.sigma, shot=samples, queries=self.queries)

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields `alpha_lim` of the first pair; then for each pair its `estimate`, `loss`, `best` and `rank`."""
        net = TwoLayer.drawn(key.sub("net"), self.inputs, self.width, self.init)
        for i, (tasks, samples) in enumerate(self.pairs):
            problem = Problem(net, self.data(samples), key.sub(f"tasks of {tasks} and {samples}"), tasks)
            estimates = problem.estimates()
            if i == 0:
                yield estimate("alpha_lim", *estimates["eq3.3"], tasks)
            pair: dict[str, Any] = {"N": tasks, "K": samples}
            yield from (estimate("estimate", *e, tasks, by=by, **pair) for by, e in estimates.items())
            new = partial(problem.losses, self.test_tasks)
            for cutoff in self.cutoffs:
                kept = problem.directions.cut(cutoff)
                yield exact("rank", len(kept.values), cutoff=cutoff, **pair)
                curves = new(kept, self.grid)
                fine = _around(self.grid, curves.fresh), _around(self.grid, curves.same)
                best = float(_best(fine[0], new(kept, fine[0]).fresh)), float(_best(fine[1], new(kept, fine[1]).same))
                yield exact("best", best[0], query="fresh", cutoff=cutoff, **pair)
                yield exact("best", best[1], query="same", cutoff=cutoff, **pair)
                yield from _curve(curves, self.grid, {"cutoff": cutoff} | pair)
                marked = {"optimum": best[0]} | {by: e.value for by, e in estimates.items()}
                at = new(kept, torch.tensor([0.0, *marked.values()], dtype=torch.float64)).fresh
                yield over("loss_before", at[0].tolist(), cutoff=cutoff, **pair)
                for by, values in zip(marked, at[1:], strict=True):
                    yield over("loss_at", values.tolist(), by=by, cutoff=cutoff, **pair)


class Problem:
    """N training tasks of K samples in a net's tangent features, and new tasks of the same law.

    Args:
        net: see `TwoLayer`.
        data: see `Dataset`; regression.
        key: stream of the tasks.
        tasks: N.
    """

    def __init__(self, net: TwoLayer, data: Dataset, key: Key, tasks: int):
        self.net, self.data, self.key = net, data, key
        self.support, _ = drawn(data, "train", key.sub("training"), torch.arange(tasks))
        self.tasks, self.samples = self.support.y.shape
        self.psi = net.features(self.support.x.flatten(0, 1))
        self.kernel = self.psi @ self.psi.mT
        self.directions = Directions.of(self.kernel)

    @property
    def own_kernels(self) -> Tensor:
        """Each task's, `[N, K, K]`."""
        blocks = self.kernel.view(self.tasks, self.samples, self.tasks, self.samples)
        return torch.stack([blocks[i, :, i] for i in range(self.tasks)])

    def estimates(self) -> dict[str, alpha_star.Estimate]:
        """Eq. 3.3 on the tasks' own kernels, H.14 and H.15."""
        return {
            "eq3.3": alpha_star.of_curvature(self.own_kernels * (2 / self.samples)),
            "H.14": alpha_star.stacked_kernel.terms(self.kernel, [self.samples] * self.tasks).estimate(),
            "H.15": alpha_star.deviation(self.psi.view(self.tasks, self.samples, -1)),
        }

    def starts(self, kept: Directions, alphas: Tensor) -> Tensor:
        """w_m(alpha) `[A, d]`, the shortest within the directions."""
        rows = kept.vectors.unflatten(0, (self.tasks, self.samples))
        return kept.coefficients(OneStep.of(rows, self.own_kernels, self.support.y).minimisers(alphas)) @ self.psi

    def losses(self, tasks: int, kept: Directions, alphas: Tensor) -> Curves:
        """Of the same new tasks for all `kept` and alphas, after one step from w_m(alpha)."""
        w = self.starts(kept, alphas)
        return Curves.joined([self._tested(w, t, alphas) for t in torch.arange(tasks).split(self._chunk())])

    def _chunk(self) -> int:
        """How many new tasks' features are held at once."""
        one = drawn(self.data, "test", self.key, torch.arange(1))
        return max(1, CHUNK // (sum(e.y.numel() for e in one) * self.psi.shape[1]))

    def _tested(self, w: Tensor, tasks: Tensor, alphas: Tensor) -> Curves:
        support, query = drawn(self.data, "test", self.key.sub("test"), tasks)
        r, q = (torch.einsum("tnd,ad->atn", self.net.features(e.x), w) - e.y for e in (support, query))
        own, across = (self.net.kernel(e.x, support.x) for e in (support, query))
        rates = alphas.tolist()
        same = [adapted_loss(x, own, a) for x, a in zip(r, rates, strict=True)]
        fresh = [adapted_loss(x, own, a, 1, (y, across)) for x, y, a in zip(r, q, rates, strict=True)]
        return Curves(torch.stack(fresh), torch.stack(same))


def _curve(curves: Curves, grid: Tensor, where: dict[str, Any]) -> Iterator[Measured]:
    for query, losses in curves._asdict().items():
        for alpha, values in zip(grid.tolist(), losses, strict=True):
            yield over("loss", values.tolist(), alpha=alpha, query=query, **where)


def _best(alphas: Tensor, losses: Tensor) -> Tensor:
    """The rate whose mean loss over tasks is least."""
    return alphas[losses.mean(1).argmin()]


def _around(grid: Tensor, losses: Tensor) -> Tensor:
    """`FINER` rates between the neighbours of the best of a grid."""
    i = int(losses.mean(1).argmin())
    low, high = float(grid[max(i - 1, 0)]), float(grid[min(i + 1, len(grid) - 1)])
    return torch.linspace(low, high, FINER, dtype=grid.dtype)
