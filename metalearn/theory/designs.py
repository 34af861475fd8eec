"""Random designs of the studies of alpha*: laws of the data with exact moments, and bases that make features of them.

Zou, Liu & Li, "Unraveling Model-Agnostic Meta-Learning via the Adaptation Learning Rate", ICLR 2022, sections 4, 5
and H.

Everything is float64 and drawn from a `torch.Generator`, which callers seed with `metalearn.random.Key(...).integer()`.
Shape letters: `T` tasks, `K` samples, `d` features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

# ---- laws --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """A law of real numbers.

    Attributes:
        name: as in figures, such as `U(-5, 5)`.
        sampler: shape and generator -> draws.
        moment: p -> E x^p, exactly.
    """

    name: str
    sampler: Callable[[Sequence[int], Generator], Tensor]
    moment: Callable[[int], float]

    def draw(self, *shape: int, generator: Generator) -> Tensor:
        """Independent draws, float64."""
        return self.sampler(shape, generator)

    def moments(self, highest: int = 6) -> list[float]:
        """E x^0, ..., E x^highest."""
        return [self.moment(p) for p in range(highest + 1)]

    @property
    def mean(self) -> float:
        """E x."""
        return self.moment(1)

    @property
    def variance(self) -> float:
        """E (x - E x)^2."""
        return self.moment(2) - self.moment(1) ** 2

    def centred(self) -> Law:
        """The law of x - E x."""
        mean = self.mean

        def moment(p: int) -> float:
            return math.fsum(math.comb(p, k) * self.moment(k) * (-mean) ** (p - k) for k in range(p + 1))

        return Law(f"{self.name} - {mean:g}", lambda shape, g: self.sampler(shape, g) - mean, moment)


def normal(mean: float = 0.0, deviation: float = 1.0) -> Law:
    """N(mean, deviation^2)."""

    def moment(p: int) -> float:
        even = range(0, p + 1, 2)
        return math.fsum(math.comb(p, k) * mean ** (p - k) * deviation**k * _double_factorial(k - 1) for k in even)

    def sampler(shape: Sequence[int], g: Generator) -> Tensor:
        return mean + deviation * torch.randn(*shape, dtype=torch.float64, generator=g)

    return Law(f"N({mean:g}, {deviation**2:g})", sampler, moment)


def uniform(low: float, high: float) -> Law:
    """U(low, high)."""

    def moment(p: int) -> float:
        return (high ** (p + 1) - low ** (p + 1)) / ((p + 1) * (high - low))

    return Law(f"U({low:g}, {high:g})", lambda shape, g: low + (high - low) * _unit(shape, g), moment)


def exponential(rate: float = 1.0) -> Law:
    """Exp(rate), of mean and standard deviation 1 / rate."""
    return Law(
        f"Exp({rate:g})",
        lambda shape, g: -torch.log1p(-_unit(shape, g)) / rate,
        lambda p: math.factorial(p) / rate**p,
    )


def chi2(degrees: int) -> Law:
    """Chi-squared with whole degrees of freedom: a sum of so many squares of N(0, 1)."""

    def sampler(shape: Sequence[int], g: Generator) -> Tensor:
        total = torch.zeros(*shape, dtype=torch.float64)
        for _ in range(degrees):
            total += torch.randn(*shape, dtype=torch.float64, generator=g).square()
        return total

    return Law(f"chi2({degrees})", sampler, lambda p: math.prod(degrees + 2 * k for k in range(p)))


def zipf(exponent: float, largest: int) -> Law:
    """P(k) proportional to k^-exponent for k = 1..largest.

    The paper does not give its parameters; without a largest value the variance is finite for exponents above 3 only.
    """
    chances = [k**-exponent for k in range(1, largest + 1)]
    whole = math.fsum(chances)

    def sampler(shape: Sequence[int], g: Generator) -> Tensor:
        ends = torch.tensor(chances, dtype=torch.float64).cumsum(0) / whole
        return 1 + torch.searchsorted(ends, _unit(shape, g), right=True).clamp_max(largest - 1).double()

    def moment(p: int) -> float:
        return math.fsum(k**p * chance for k, chance in enumerate(chances, 1)) / whole

    return Law(f"Zipf({exponent:g}, {largest})", sampler, moment)


def of_deviation(deviation: float) -> list[Law]:
    """N(0, s^2), U(-sqrt(3) s, sqrt(3) s) and Exp(1 / s), which all have the standard deviation s (Fig. 4)."""
    half = math.sqrt(3) * deviation
    return [normal(0, deviation), uniform(-half, half), exponential(1 / deviation)]


def _unit(shape: Sequence[int], g: Generator) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=g)


def _double_factorial(n: int) -> int:
    return math.prod(range(n, 0, -2))


# ---- bases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """Random features.

    Attributes:
        name: as in figures.
        width: d.
        features: (tasks, samples, generator) -> `[T, K, d]`.
    """

    name: str
    width: int
    features: Callable[[int, int, Generator], Tensor]

    def draw(self, tasks: int, samples: int, generator: Generator) -> Tensor:
        """Features of new tasks, `[T, K, d]`."""
        return self.features(tasks, samples, generator)


def random_matrix(law: Law, width: int) -> Design:
    """I.i.d. entries of the law; `alpha_star.iid_limit` knows its alpha*_lim exactly."""
    return Design(f"random matrix, {law.name}", width, lambda t, k, g: law.draw(t, k, width, generator=g))


def gaussian(law: Law, centres: Tensor, widths: Tensor, *, scalar: bool = False) -> Design:
    """Phi_kj = exp(-(x_kj - centres_j)^2 / (2 widths_j^2)).

    The paper does not give centres and widths ("depending on the range of the data"); `even_centres` has some. With
    fixed ones features vanish as the data spread, and alpha*_lim grows; if they scale with the data it is constant.

    Args:
        law: of x.
        centres: mu, `[d]`.
        widths: sigma, `[d]`.
        scalar: one x for each sample, in all features, in the place of one for each entry.
    """
    width = len(centres)

    def features(tasks: int, samples: int, generator: Generator) -> Tensor:
        x = law.draw(tasks, samples, 1 if scalar else width, generator=generator)
        return gaussian_basis(x, centres, widths)

    return Design(f"Gaussian basis, {law.name}", width, features)


def polynomial(law: Law, width: int, coefficients: Sequence[float] | None = None) -> Design:
    """phi(x) = (1, x, ..., x^(d-1)), times `coefficients` if given (Example 1).

    The condition number explodes: keep d at 6 or below. `polynomial_limit` knows its alpha*_lim exactly.
    """
    scale = _coefficients(width, coefficients)
    powers = torch.arange(width)
    return Design(f"polynomial, {law.name}", width, lambda t, k, g: scale * law.draw(t, k, 1, generator=g) ** powers)


def gaussian_basis(x: Tensor, centres: Tensor, widths: Tensor) -> Tensor:
    """exp(-(x - centres)^2 / (2 widths^2)), broadcast: `[..., d]`."""
    return torch.exp(-((x - centres) ** 2) / (2 * widths**2))


def even_centres(width: int, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Centres at equal distances from low to high, and that distance as the width of each: `[d]` both."""
    centres = torch.linspace(low, high, width, dtype=torch.float64)
    return centres, torch.full_like(centres, (high - low) / max(1, width - 1))


def gaussian_basis_moment(p: int, centre: float, width: float, mean: float, deviation: float) -> float:
    """E phi^p of one Gaussian feature of x ~ N(mean, deviation^2)."""
    spread = width**2 + p * deviation**2
    return width / math.sqrt(spread) * math.exp(-p * (mean - centre) ** 2 / (2 * spread))


def taylor_coefficients(width: int) -> list[float]:
    """1 / n!, n = 0..d-1: those of exp, for the Taylor-weighted basis of section H.4.2, which names none."""
    return [1 / math.factorial(n) for n in range(width)]


# ---- moments of polynomial features ------------------------------------------------------------------------------


def index_sums(width: int, *multiples: int) -> Tensor:
    """How many tuples of indices 0..d-1 have sum_k multiples_k i_k = 0, 1, ...: int64, exact.

    The coefficients of prod_k (1 + z^m_k + ... + z^(m_k (d - 1))).
    """
    counts = torch.ones(1, dtype=torch.int64)
    for m in multiples:
        total = torch.zeros(len(counts) + m * (width - 1), dtype=torch.int64)
        for i in range(width):
            total[m * i : m * i + len(counts)] += counts
        counts = total
    return counts


def g1(width: int) -> Tensor:
    """Pairs i + j = n, n = 0..2d-2: (n + 1) - 2 max(0, n - d + 1); they sum to d^2 (Example 1, Fig. 6).

    With features (1, x, ..., x^(d-1)), tr E[G^2] = sum_n g1[n] (K E x^2n + K (K - 1) (E x^n)^2).
    """
    return index_sums(width, 1, 1)


def g2(width: int) -> Tensor:
    """Triples i + j + h = n, n = 0..3d-3, which sum to d^3: of E x^2n in tr E[G^3], where all three samples are one.

    g2 and g3 are what the expansion of tr E[G^3] asks for; the notes at hand give the paper's formula for g1 alone.
    """
    return index_sums(width, 1, 1, 1)


def g3(width: int) -> Tensor:
    """Triples i + 2j + h = n, n = 0..4d-4, which sum to d^3: of E x^n E x^(i+h), where two of three samples are one."""
    return index_sums(width, 1, 2, 1)


def polynomial_traces(
    samples: int, width: int, moments: Sequence[float], coefficients: Sequence[float] | None = None
) -> tuple[float, float, float]:
    """tr E[G], tr E[G^2] and tr E[G^3] of features c_j x^j, exactly.

    tr G^p is a sum over p samples and p indices of products of x_k^(i_k + i_(k+1)), which depend on the samples that
    coincide.

    Args:
        samples: K.
        width: d.
        moments: E x^0, ..., E x^(6 (d - 1)).
        coefficients: c.
    """
    m, w = torch.tensor(moments, dtype=torch.float64), _coefficients(width, coefficients).square()
    i = torch.arange(width)
    j, h = i[:, None], i[:, None, None]
    single, pair, triple = samples, math.perm(samples, 2), math.perm(samples, 3)
    second = single * m[2 * (i + j)] + pair * m[i + j] ** 2
    third = single * m[2 * (i + j + h)] + 3 * pair * m[i + 2 * j + h] * m[i + h]
    third = third + triple * m[i + j] * m[j + h] * m[h + i]
    return (
        float(samples * (w * m[2 * i]).sum()),
        float(torch.einsum("i,j,ij->", w, w, second)),
        float(torch.einsum("i,j,h,ijh->", w, w, w, third)),
    )


def polynomial_limit(
    samples: int, width: int, moments: Sequence[float], coefficients: Sequence[float] | None = None
) -> float:
    """alpha*_lim = K tr E[G^2] / (2 tr E[G^3]) of a polynomial basis, exactly; arguments as of `polynomial_traces`."""
    _, second, third = polynomial_traces(samples, width, moments, coefficients)
    return samples * second / (2 * third)


def _coefficients(width: int, coefficients: Sequence[float] | None) -> Tensor:
    if coefficients is not None and len(coefficients) != width:
        raise ValueError(f"{len(coefficients)} coefficients for {width} powers")
    return (
        torch.ones(width, dtype=torch.float64)
        if coefficients is None
        else torch.tensor(coefficients, dtype=torch.float64)
    )
