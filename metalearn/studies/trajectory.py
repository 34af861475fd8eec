"""The path of MAML's minimiser over the adaptation rate in the plane: Figures 1 and 7 of "Unraveling MAML"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, exact, over, repeated
from metalearn.studies.laws import law_of
from metalearn.theory.linear_meta import Moments

READINGS = ("loss", "outer")


class Trajectory(Study):
    """w_m(alpha) of tasks with two features and a small far cluster of tasks with a higher penalty.

    A penalty has two readings. `loss`: it multiplies a task's loss wherever that is used, also in the inner step, which
    is the same as features times its square root. `outer`: it multiplies the loss after adaptation alone, as copies
    of the task would. Rates are multiples of alpha*_lim of all tasks, each with its penalty.

    Args:
        tasks: tasks.
        samples: samples K of each.
        inputs: law of each feature, and its numbers.
        optima: law of each coordinate of the tasks' optima.
        far_tasks: tasks of the far cluster.
        far: both coordinates of its middle.
        far_deviation: standard deviation of its optima.
        penalty: factor of its losses.
        penalties: such factors for which the rate of the least mean distance is sought (reading `loss`).
        span: the largest rate.
        points: rates from 0 to the largest.
        draws: draws of all tasks, over which distances are averaged.
    """

    title = "MAML's minimiser over the adaptation rate, in the plane"

    def __init__(
        self,
        *,
        tasks: int,
        samples: int,
        inputs: list[str],
        optima: list[str],
        far_tasks: int,
        far: float,
        far_deviation: float,
        penalty: float,
        penalties: list[float],
        span: float,
        points: int,
        draws: int,
    ):
        self.tasks, self.samples, self.inputs, self.optima = tasks, samples, law_of(inputs), law_of(optima)
        self.far_tasks, self.far, self.far_deviation = far_tasks, far, far_deviation
        self.penalty, self.penalties, self.draws = penalty, penalties, draws
        self.ratios = torch.linspace(0, span, points, dtype=torch.float64)

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields, for both readings, distances and where they are least, and the path of the first draw.

        `nearest`: the rate of the least mean distance, in multiples of `alpha_lim`; `fall`: minus the derivative of the
        mean distance at rate 0, per alpha*_lim and as a share of the distance there; `w`, `tangent` (its derivative at
        rate 0, per alpha*_lim) and `optimum` have an `axis`.
        """
        drawn = [self._drawn(key.sub(str(i))) for i in range(self.draws)]
        paths = {how: [self._path(tasks, how, self.penalty) for tasks in drawn] for how in READINGS}
        yield repeated("nearest", [p.nearest for p in paths["loss"]])
        for how, found in paths.items():
            yield repeated("nearest", [p.nearest for p in found], penalty=how)
            yield repeated("fall", [p.fall for p in found], penalty=how)
            yield repeated("alpha_lim", [p.limit for p in found], penalty=how)
            for i, ratio in enumerate(self.ratios.tolist()):
                yield repeated("distance", [float(p.distance[i]) for p in found], penalty=how, ratio=ratio)
            yield from self._first(found[0], how)
        for axis in (1, 2):
            yield over("optimum", drawn[0].optima[:, axis - 1].tolist(), axis=axis)
        for penalty in self.penalties:
            yield repeated("nearest", [self._path(t, "loss", penalty).nearest for t in drawn], factor=penalty)

    def _first(self, path: Path, how: str) -> Iterator[Measured]:
        for axis in (1, 2):
            yield exact("tangent", float(path.slope[axis - 1] * path.limit), axis=axis, penalty=how)
            for ratio, w in zip(self.ratios.tolist(), path.w[:, axis - 1].tolist(), strict=True):
                yield exact("w", w, axis=axis, penalty=how, ratio=ratio)

    def _drawn(self, key: Key) -> Tasks:
        generator = torch.Generator().manual_seed(key.integer())
        n, m = self.tasks, self.far_tasks
        x = self.inputs.draw(n + m, self.samples, 2, generator=generator)
        near = self.optima.draw(n, 2, generator=generator)
        far = self.far + self.far_deviation * torch.randn(m, 2, generator=generator, dtype=torch.float64)
        return Tasks(x, torch.cat([near, far]), torch.arange(n + m) >= n)

    def _path(self, tasks: Tasks, how: str, penalty: float) -> Path:
        factors = torch.where(tasks.is_far, penalty, 1.0).double()
        if how == "loss":
            moments = Moments.of(tasks.features * factors.sqrt()[:, None, None], tasks.optima)
        else:
            moments = Moments.of(tasks.features, tasks.optima, factors)
        limit = moments.limit()
        w, slope = moments.minimiser(self.ratios * limit), moments.slope()
        apart = w[:, None] - tasks.optima
        distance = apart.norm(dim=-1)
        fall = -limit * ((apart[0] / distance[0][:, None]).mean(0) @ slope) / distance[0].mean()
        means = distance.mean(1)
        return Path(limit, w, slope, means, float(fall), float(self.ratios[means.argmin()]))


class Tasks(NamedTuple):
    """Features `[N, K, 2]`, optima `[N, 2]`, and which tasks belong to the far cluster `[N]`."""

    features: Tensor
    optima: Tensor
    is_far: Tensor


class Path(NamedTuple):
    """One draw's path; see `Trajectory.measure`.

    limit: alpha*_lim; w: `[ratios, 2]`; slope: dw / dalpha at 0, `[2]`; distance: mean over tasks, `[ratios]`.
    """

    limit: float
    w: Tensor
    slope: Tensor
    distance: Tensor
    fall: float
    nearest: float
