"""Figure 8 of "Unraveling MAML": how fast alpha*(N) of N tasks approaches alpha*_lim."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from numpy.polynomial.legendre import leggauss
from torch import Generator

from metalearn.random import Key
from metalearn.schema import BadInput
from metalearn.studies.base import Measured, State, Study, estimate, exact, repeated
from metalearn.theory import alpha_star, designs, linear_meta

QUADRATURE = 2000
"""Points of the Gauss-Legendre rule over the range of x."""


class EstimationError(Study):
    """|alpha*(N) - alpha*_lim| over the number of tasks, x from U(low, high), and the slope of its logarithm.

    alpha*(N) is the minimiser over alpha of the meta-loss of N tasks at its minimiser w_m(alpha), with optima from
    N(0, I); alpha*_lim is exact, from the moments of x or by quadrature.

    Bases: `matrix` (i.i.d. entries), `gaussian` (one x for each sample, in features with equally spaced centres between
    low and high and one width), `polynomial` (1, x, x^2 / 2!, ..., x^(d-1) / (d-1)!).

    Args:
        basis: one of the three.
        low: least x.
        high: largest x.
        samples: K.
        width: d.
        bandwidth: sigma of all Gaussian features.
        tasks: numbers of tasks N.
        slope_from: the slope is of the numbers of tasks from this one on.
        repetitions: of each N, all with tasks of their own.
    """

    title = "alpha*(N) of N tasks beside alpha*_lim"

    def __init__(
        self,
        *,
        basis: str,
        low: float,
        high: float,
        samples: int,
        width: int,
        bandwidth: float,
        tasks: list[int],
        slope_from: int,
        repetitions: int,
    ):
        self.samples, self.tasks, self.slope_from, self.repetitions = samples, sorted(tasks), slope_from, repetitions
        self.basis = BASES[basis](designs.uniform(low, high), low, high, samples, width, bandwidth)

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields the slope from `slope_from` on, the slope of all N (`tasks=all`), alpha*_lim, and numbers by N.

        `difference` is alpha*(N) - alpha*_lim over draws of the tasks, `error` its absolute value.
        """
        found = {n: [self._difference(n, key.sub(f"{n}/{r}")) for r in range(self.repetitions)] for n in self.tasks}
        errors = {n: [abs(d) for d in differences] for n, differences in found.items()}
        slope = loglog_slope({n: e for n, e in errors.items() if n >= self.slope_from})
        yield estimate("slope", slope.value, slope.se, self.repetitions, of="repetitions")
        slope = loglog_slope(errors)
        yield estimate("slope", slope.value, slope.se, self.repetitions, of="repetitions", tasks="all")
        yield exact("alpha_lim", self.basis.limit, "rate")
        for n in self.tasks:
            yield repeated("error", errors[n], "rate", N=n)
            yield repeated("difference", found[n], "rate", N=n)

    def _difference(self, tasks: int, key: Key) -> float:
        generator = Generator().manual_seed(key.integer())
        features = self.basis.design.draw(tasks, self.samples, generator)
        optima = torch.randn(tasks, self.basis.design.width, generator=generator, dtype=torch.float64)
        try:
            return linear_meta.best_alpha(features, optima) - self.basis.limit
        except ValueError as error:  # such as a basis whose features all round to 0
            raise BadInput(f"study.tasks={tasks}: {error}") from None


class Basis(NamedTuple):
    """Random features and their alpha*_lim."""

    design: designs.Design
    limit: float


def _matrix(law: designs.Law, low: float, high: float, samples: int, width: int, bandwidth: float) -> Basis:
    return Basis(designs.random_matrix(law, width), alpha_star.iid_limit(samples, width, law.moments()))


def _gaussian(law: designs.Law, low: float, high: float, samples: int, width: int, bandwidth: float) -> Basis:
    centres = torch.linspace(low, high, width, dtype=torch.float64)
    widths = torch.full_like(centres, bandwidth)
    nodes, weights = (torch.from_numpy(v) for v in leggauss(QUADRATURE))
    x = (low + high) / 2 + (high - low) / 2 * nodes
    rows = designs.gaussian_basis(x[:, None], centres, widths)
    return Basis(designs.gaussian(law, centres, widths, scalar=True), alpha_star.rows_limit(samples, rows, weights / 2))


def _polynomial(law: designs.Law, low: float, high: float, samples: int, width: int, bandwidth: float) -> Basis:
    scale = designs.taylor_coefficients(width)
    limit = designs.polynomial_limit(samples, width, law.moments(6 * (width - 1)), scale)
    return Basis(designs.polynomial(law, width, scale), limit)


BASES = {"matrix": _matrix, "gaussian": _gaussian, "polynomial": _polynomial}


def loglog_slope(errors: dict[int, list[float]]) -> alpha_star.Estimate:
    """The slope of log(mean error) over log N by least squares, with the standard error that the means' leave it."""
    x = torch.tensor([math.log(n) for n in errors], dtype=torch.float64)
    values = torch.tensor(list(errors.values()), dtype=torch.float64)
    mean = values.mean(1)
    relative = values.var(1) / (values.shape[1] * mean**2)
    x = (x - x.mean()) / (x - x.mean()).square().sum()
    return alpha_star.Estimate(float(x @ mean.log()), float((x.square() @ relative).sqrt()))
