"""Corollary 1 of "Unraveling MAML" (3.5): bounds of alpha*_lim beside alpha*_lim, for random and fixed designs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, exact
from metalearn.theory import alpha_star, designs

DEVIATIONS = (1, 2)
"""Of x in polynomials."""
STACKED = (20, 2000), (100, 100)
"""Samples in all and features at which H.15 is held against H.14."""
POWERS = 5
"""Features d of polynomials."""


class Rates(NamedTuple):
    """alpha*_lim of one design, and the two ends that Corollary 1 gives for it."""

    limit: float
    lower: float
    upper: float


class Corollary1(Study):
    """alpha*_lim, 1 / (2 d sigma^2) and d / (2 sigma^2), sigma^2 = tr E[G] / K, without sampling error.

    Designs: `gaussian` (i.i.d. N(0, 1) features, closed form), `polynomial` (1, x, ..., x^4, x from N(0, 1) or
    N(0, 2^2), from the moments of x: up to x^24 enters, so that sample means of any affordable size are far off), and
    `fixed` (one Gaussian design that all tasks share, for which the bounds are a theorem).

    Args:
        samples: numbers of samples K.
        widths: numbers of features d of the Gaussian designs; polynomials have five.
    """

    title = "Corollary 1: bounds of alpha*_lim"

    def __init__(self, *, samples: list[int], widths: list[int]):
        self.samples, self.widths = samples, widths

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields for each design `alpha_lim`, `lower`, `upper`, and `lower_over_alpha`: above 1, it is no bound.

        Also two of the paper's formulas that are no consequence of its own: `example2`, E[Y^4] / (2 E[Y^6]) for one
        sample of N(0, 1) features, and `h15` beside `h14` for N K samples of d such features.
        """
        found = list(self._designs(key))
        yield exact("lower_over_alpha", max(rates.lower / rates.limit for _, rates in found))
        for where, rates in found:
            yield exact("alpha_lim", rates.limit, "rate", **where)
            yield exact("lower", rates.lower, "rate", **where)
            yield exact("upper", rates.upper, "rate", **where)
            yield exact("lower_over_alpha", rates.lower / rates.limit, **where)
        moments = designs.normal().moments()
        yield exact("example2", moments[4] / (2 * moments[6]), "rate")
        for rows, width in STACKED:
            yield exact("h14", alpha_star.gaussian_limit(rows, width), "rate", NK=rows, d=width)
            yield exact("h15", 1 / (2 * rows), "rate", NK=rows, d=width)

    def _designs(self, key: Key) -> Iterator[tuple[dict[str, Any], Rates]]:
        for k in self.samples:
            for d in self.widths:
                yield {"design": "gaussian", "K": k, "d": d}, _rates(alpha_star.gaussian_limit(k, d), d, variance=d)
                yield {"design": "fixed", "K": k, "d": d}, _fixed(key.sub(f"{k}/{d}"), k, d)
            for s in DEVIATIONS:
                yield {"design": f"polynomial_s{s}", "K": k, "d": POWERS}, _polynomial(k, s)


def _rates(limit: float, width: int, variance: float) -> Rates:
    return Rates(limit, 1 / (2 * width * variance), width / (2 * variance))


def _fixed(key: Key, samples: int, width: int) -> Rates:
    features = key.normal(samples * width, torch.zeros(1, dtype=torch.int64)).double().view(1, samples, width)
    return Rates(alpha_star.limit(features).value, *alpha_star.corollary1(features))


def _polynomial(samples: int, deviation: float) -> Rates:
    moments = designs.normal(0, deviation).moments(6 * (POWERS - 1))
    first, second, third = designs.polynomial_traces(samples, POWERS, moments)
    return _rates(samples * second / (2 * third), POWERS, first / samples)
