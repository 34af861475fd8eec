"""The meta-loss over the adaptation rate on linear tasks with a Gaussian basis: Figure 9 of "Unraveling MAML"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.random import Key
from metalearn.schema import BadInput
from metalearn.studies.base import Measured, State, Study, repeated
from metalearn.studies.laws import law_of
from metalearn.theory import designs
from metalearn.theory.linear_meta import Moments


class RateCurve(Study):
    """min_w L(w, alpha) of tasks with features of a Gaussian basis, and what alpha*_lim of their features costs.

    Centres lie evenly in the range of the data, each as wide as the distance to the next. Each draw has its own rate
    alpha*_lim and its own minimum over the grid; losses are divided by the latter.

    Args:
        inputs: law of the data, and its numbers.
        optima: law of each coordinate of the tasks' optima.
        tasks: N.
        samples: K.
        width: d.
        reach: distance of the outermost centres from the mean of the data, in standard deviations.
        scalar: one number for each sample in all features, in the place of one for each feature.
        span: the largest rate, as a multiple of alpha*_lim of the first draw.
        points: rates from 0 to the largest.
        draws: draws of all tasks.
    """

    title = "the meta-loss over the adaptation rate"

    def __init__(
        self,
        *,
        inputs: list[str],
        optima: list[str],
        tasks: int,
        samples: int,
        width: int,
        reach: float,
        scalar: bool,
        span: float,
        points: int,
        draws: int,
    ):
        law, self.optima = law_of(inputs), law_of(optima)
        half = reach * math.sqrt(law.variance)
        centres, widths = designs.even_centres(width, law.mean - half, law.mean + half)
        self.design = designs.gaussian(law, centres, widths, scalar=scalar)
        self.tasks, self.samples = tasks, samples
        self.span, self.points, self.draws = span, points, draws

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields `excess` = L(alpha*_lim) / min L over the grid, `alpha_lim`, `best_alpha` and `relative_loss`.

        `loss` has `at=0`, `at=lim` and `at=best`.

        Raises:
            BadInput: if one w solves all tasks of a draw.
        """
        moments = [self._moments(key.sub(str(i))) for i in range(self.draws)]
        if any(m.solved() for m in moments):
            raise BadInput("study.optima, study.inputs: one w solves all tasks of a draw, and every rate is as good")
        rates = torch.linspace(0, self.span * moments[0].limit(), self.points, dtype=torch.float64)
        found = [_curve(m, rates) for m in moments]
        yield repeated("excess", [c.at_limit / c.least for c in found])
        yield repeated("alpha_lim", [c.limit for c in found])
        yield repeated("best_alpha", [float(rates[c.losses.argmin()]) for c in found])
        for name, values in (("0", [float(c.losses[0]) for c in found]), ("lim", [c.at_limit for c in found])):
            yield repeated("loss", values, "target units squared", at=name)
        yield repeated("loss", [c.least for c in found], "target units squared", at="best")
        for i, alpha in enumerate(rates.tolist()):
            yield repeated("relative_loss", [float(c.losses[i]) / c.least for c in found], alpha=alpha)

    def _moments(self, key: Key) -> Moments:
        generator = torch.Generator().manual_seed(key.integer())
        features = self.design.draw(self.tasks, self.samples, generator)
        return Moments.of(features, self.optima.draw(self.tasks, self.design.width, generator=generator))


class Curve(NamedTuple):
    """One draw: alpha*_lim, the loss there, losses over the grid `[rates]` and the least of them."""

    limit: float
    at_limit: float
    losses: Tensor
    least: float


def _curve(moments: Moments, rates: Tensor) -> Curve:
    limit, losses = moments.limit(), moments.least_risk(rates)
    return Curve(limit, float(moments.least_risk(limit)), losses, float(losses.min()))
