"""Corollary 1 of "Unraveling MAML" (3.5): bounds of alpha*_lim beside alpha*_lim, for random and fixed designs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, estimate, exact
from metalearn.theory import alpha_star

CHUNK = 500
Draw = Callable[[Key, Tensor], Tensor]
"""Features of tasks, by their indices."""


class Corollary1(Study):
    """alpha*_lim with its standard error, and 1 / (2 d sigma^2), d / (2 sigma^2), sigma^2 = tr E[G] / K.

    Designs: `gaussian` (i.i.d. N(0, 1) features), `polynomial` (1, x, ..., x^(d-1), x from N(0, 1) or N(0, 2^2)), and
    `fixed` (one Gaussian design that all tasks share, for which the bounds are a theorem).

    Args:
        tasks: tasks of each design.
        samples: numbers of samples K.
        widths: numbers of features d of the Gaussian designs; polynomials have five.
    """

    title = "Corollary 1: bounds of alpha*_lim"

    def __init__(self, *, tasks: int, samples: list[int], widths: list[int]):
        self.tasks, self.samples, self.widths = tasks, samples, widths

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields for each design `alpha_lim`, `lower`, `upper`, and the share of `lower` in `alpha_lim`."""
        found = [(where, self._measured(draw, key.sub(str(where)))) for where, draw in self._designs()]
        ratios = [lower / value.value for _, (value, lower, _) in found]
        yield exact("lower_over_alpha", max(ratios))
        for (where, (value, lower, upper)), ratio in zip(found, ratios, strict=True):
            yield estimate("alpha_lim", value.value, value.se, self.tasks, **where)
            yield exact("lower", lower, **where)
            yield exact("upper", upper, **where)
            yield exact("lower_over_alpha", ratio, **where)

    def _designs(self) -> Iterator[tuple[dict[str, Any], Draw]]:
        for k in self.samples:
            for d in self.widths:
                yield {"design": "gaussian", "K": k, "d": d}, partial(_gaussian, samples=k, width=d)
                yield {"design": "fixed", "K": k, "d": d}, partial(_fixed, samples=k, width=d)
            for s in (1, 2):
                yield {"design": f"polynomial_s{s}", "K": k, "d": 5}, partial(_polynomial, samples=k, deviation=s)

    def _measured(self, draw: Draw, key: Key) -> tuple[alpha_star.Estimate, float, float]:
        which = torch.arange(self.tasks).split(CHUNK)

        def features() -> Iterator[Tensor]:
            return (phi for i in which for phi in draw(key, i))

        bounds = alpha_star.corollary1(features())
        return alpha_star.limit(features()), bounds.low, bounds.high


def _gaussian(key: Key, tasks: Tensor, *, samples: int, width: int) -> Tensor:
    """`[T, K, d]` draws from N(0, 1), each task's own."""
    return key.normal(samples * width, tasks).double().unflatten(1, (samples, width))


def _fixed(key: Key, tasks: Tensor, *, samples: int, width: int) -> Tensor:
    """The first task's, for all."""
    return _gaussian(key, tasks.new_zeros(1), samples=samples, width=width).expand(len(tasks), -1, -1)


def _polynomial(key: Key, tasks: Tensor, *, samples: int, deviation: int) -> Tensor:
    """Powers 0 to 4 of draws from N(0, deviation^2)."""
    return (deviation * _gaussian(key, tasks, samples=samples, width=1)) ** torch.arange(5)
