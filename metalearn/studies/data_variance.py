"""alpha*_lim against the variance of the data, Gaussian basis: Figure 4(a) of "Unraveling MAML"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, estimate, exact
from metalearn.theory import alpha_star, designs
from metalearn.theory.designs import Design, Law

LAWS = ("N", "U", "Exp")
"""Names of `designs.of_deviation`."""


class DataVariance(Study):
    """alpha*_lim and the second moment of the features for data of one standard deviation but different laws.

    Bases: `raw` (the data themselves), `centred` and `shifted` (fixed centres around 0 and beside it), `scaled`
    (centres and widths are multiples of the standard deviation). Data of one law differ between variances by a factor
    alone.

    Args:
        variances: of the data.
        tasks: of each estimate.
        samples: K.
        width: d.
        centred: lowest and highest centre, and the width of each.
        shifted: the same.
        reach: outermost centres of `scaled`, in standard deviations on both sides of 0.
        scalar: one number for each sample in all features, in the place of one for each feature.
    """

    title = "alpha*_lim over the variance of the data"

    def __init__(
        self,
        *,
        variances: list[float],
        tasks: int,
        samples: int,
        width: int,
        centred: list[float],
        shifted: list[float],
        reach: float,
        scalar: bool,
    ):
        self.variances, self.tasks, self.samples, self.width = sorted(variances), tasks, samples, width
        self.centred, self.shifted, self.reach, self.scalar = centred, shifted, reach, scalar

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields `growth`: alpha*_lim at the largest variance over that at the least, normal data, basis `centred`.

        Then, for each law, basis and variance, `alpha_lim` with its standard error and `second_moment` (the mean square
        of an entry of the features).
        """
        found = [
            point for law, name in enumerate(LAWS) for v in self.variances for point in self._points(key, law, name, v)
        ]
        ends = [m.summary["mean"] for m in found if m.metric == "alpha_lim" and m.where["basis"] == "centred"]
        yield exact("growth", ends[len(self.variances) - 1] / ends[0])
        yield from found

    def _points(self, key: Key, index: int, law: str, variance: float) -> Iterator[Measured]:
        deviation = math.sqrt(variance)
        for basis, design in self._designs(designs.of_deviation(deviation)[index], deviation).items():
            where: dict[str, Any] = {"basis": basis, "law": law, "variance": variance}
            generator = torch.Generator().manual_seed(key.sub(law).integer())
            features = design.draw(self.tasks, self.samples, generator)
            value = alpha_star.limit(features)
            yield estimate("alpha_lim", value.value, value.se, self.tasks, **where)
            yield exact("second_moment", float(features.square().mean()), **where)

    def _designs(self, law: Law, deviation: float) -> dict[str, Design]:
        half = self.reach * deviation
        centres, widths = designs.even_centres(self.width, -half, half)
        return {
            "raw": designs.random_matrix(law, self.width),
            "centred": self._fixed(law, *self.centred),
            "shifted": self._fixed(law, *self.shifted),
            "scaled": designs.gaussian(law, centres, widths, scalar=self.scalar),
        }

    def _fixed(self, law: Law, low: float, high: float, width: float) -> Design:
        centres, _ = designs.even_centres(self.width, low, high)
        return designs.gaussian(law, centres, torch.full_like(centres, width), scalar=self.scalar)
