"""Estimates of the adaptation learning rate alpha* from feature matrices, before any training.

A task has K samples with features Phi `[K, d]`, noise-free labels Phi a with an optimum a of mean 0 and isotropic
covariance, and the loss |Phi (w - a)|^2 / K (no 1/2; with a 1/2 every rate here doubles). G = Phi^T Phi. One inner step
of rate alpha leaves (I - 2 alpha / K G)(w - a), and with many tasks the alpha whose meta-loss is least tends to

    alpha*_lim = K tr E[G^2] / (2 tr E[G^3])                                                  (Theorem 1, eq. 3.3)

Zou, Liu & Li, "Unraveling Model-Agnostic Meta-Learning via the Adaptation Learning Rate", ICLR 2022.

What is printed there and does not hold (`tests/test_alpha_star.py` has each counter-example):

- Corollary 1, lower bound 1 / (2 d sigma^2) <= alpha*_lim: fails for random features (one Gaussian feature is enough,
  any K), because Jensen's inequality is used the wrong way for the expectation over samples. For fixed G even
  1 / (2 sigma^2) is a lower bound. The upper bound always holds; its form in the appendix (D.6) lacks a factor 2.
- H.15 is no simplification of H.14: for i.i.d. entries and N K << d, H.14 tends to N K / (2 d sigma^2), not to
  1 / (2 N K sigma^2). On tangent features H.15 is 1.1 to 7 times the best
  rate (`docs/unravel.md`, `tests/test_tangent_quadratic.py`).
- Example 2 at K = 1, alpha = E[Y^4] / (2 E[Y^6]), is right for d = 1 alone (see `iid_limit`).

Shape letters: `T` tasks, `K` samples, `d` features. Features are one tensor `[T, K, d]` or an iterable of `[K, d]`,
where K may differ (`metalearn.theory.stacks`). Everything is float64, on the smaller of G and Phi Phi^T, which have the
same tr G^p. Tasks with other K weigh as in the meta-loss: G / K takes the place of G.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, ParamSpec

import torch
from torch import Tensor

from metalearn.random import Key
from metalearn.theory.stacks import Features, pairs, stacks, tasks_at_once

P = ParamSpec("P")


class Estimate(NamedTuple):
    """A value and its Monte-Carlo standard error: jackknife over tasks, NaN for a single task."""

    value: float
    se: float


class Interval(NamedTuple):
    """Two ends."""

    low: float
    high: float


def positive(**values: float) -> None:
    """Refuse what is not a positive number, by its name.

    Raises:
        ValueError: for the first of these.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: must be > 0 and finite")


# ---- functions of sums over tasks --------------------------------------------------------------------------------


class Terms(NamedTuple):
    """An estimate before its sums are taken: `of` maps sums over tasks `[..., m]` of `values` `[T, m]` to `[...]`.

    So each estimate is a ratio of sums, never a mean of ratios, and its standard error and bootstrap interval cost no
    further pass through the features.
    """

    values: Tensor
    of: Callable[[Tensor], Tensor]
    drawn: Callable[[Tensor], Tensor] | None = None
    """What maps sums over tasks drawn with replacement, where that is not `of`."""

    def left_out(self) -> Tensor:
        """The estimate without task i, for each i: `[T]`."""
        return self.of(self.values.sum(0) - self.values)

    def estimate(self) -> Estimate:
        """Value and jackknife standard error.

        Raises:
            ValueError: if there are no tasks or the value is not a positive number (features without any spread).
        """
        tasks = len(self.values)
        if not tasks:
            raise ValueError("an estimate of alpha* needs at least one task")
        value = float(self.of(self.values.sum(0)))
        if not 0 < value < math.inf:
            raise ValueError(f"alpha* would be {value:g}: these features are all zero, constant or not finite")
        if tasks == 1:
            return Estimate(value, math.nan)
        left = self.left_out()
        return Estimate(value, float((left - left.mean()).square().sum().mul((tasks - 1) / tasks).sqrt()))

    def interval(self, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
        """Percentile bootstrap interval over tasks, which are drawn with replacement; NaN for a single task.

        Raises:
            ValueError: if there are no tasks or resamples, or the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level}: must be > 0 and < 1")
        positive(tasks=len(self.values), resamples=resamples)
        tasks, key, found = len(self.values), Key(seed, "bootstrap"), []
        if tasks == 1:
            return Interval(math.nan, math.nan)
        of = self.drawn or self.of
        for rows in torch.arange(resamples).split(tasks_at_once(self.values.numel())):
            which = key.integers(tasks, rows, size=tasks).to(self.values.device)
            found.append(of(self.values[which].sum(1)))
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=self.values.dtype, device=self.values.device)
        values = torch.cat(found)
        low, high = values.quantile(ends).tolist()
        if math.isnan(high) and not values.isnan().any():  # between two infinite rates
            high = math.inf
        return Interval(low, high)


class Estimator(Generic[P]):
    """A function from features to `Terms`, whose call goes on to the estimate. `terms` stops before."""

    def __init__(self, terms: Callable[P, Terms]):
        functools.update_wrapper(self, terms)
        self.terms = terms

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Estimate:
        return self.terms(*args, **kwargs).estimate()


def bootstrap(
    estimator: Estimator, *features: Features, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile interval over tasks of any estimator of this module: `bootstrap(limit, features)`.

    For the value as well from one pass through the features: `terms = limit.terms(features)`, then `terms.estimate()`
    and `terms.interval()`.
    """
    return estimator.terms(*features).interval(level=level, resamples=resamples, seed=seed)


def _half_ratio(sums: Tensor) -> Tensor:
    return sums[..., 0] / (2 * sums[..., 1])


def _ratio(sums: Tensor) -> Tensor:
    return sums[..., 0] / sums[..., 1]


# ---- estimators --------------------------------------------------------------------------------------------------


@Estimator
def limit(features: Features) -> Terms:
    """alpha*_lim = K tr E[G^2] / (2 tr E[G^3]) (Theorem 1, eq. 3.3): support and query samples are the same.

    Also the default for over-parameterised models (K < d), on the K x K Gram matrices.
    """
    terms = []
    for phi in stacks(features):
        g = _gram(phi) / phi.shape[1]
        terms.append(torch.stack([_trace(g, g), _trace(g @ g, g)], -1))
    return Terms(_joined(terms), _half_ratio)


@Estimator
def split(train: Features, validation: Features) -> Terms:
    """alpha* = k1 E tr(G_u G_t) / (2 E tr(G_u G_t G_u)): adapted on G_u, judged on G_t (Corollary 2, H.1; sums as H.6).

    Args:
        train: support features Phi_u, `[T, k1, d]`.
        validation: query features Phi_t of the same tasks, `[T, k2, d]`.
    """
    terms = []
    for u, t in pairs(train, validation):
        u, t = u / math.sqrt(u.shape[1]), t / math.sqrt(t.shape[1])
        if u.shape[2] < u.shape[1]:
            g_u, g_t = u.mT @ u, t.mT @ t
            pair = _trace(g_u, g_t), _trace(g_u @ g_u, g_t)
        else:
            cross = t @ u.mT
            pair = cross.square().sum((1, 2)), _trace(cross.mT @ cross, u @ u.mT)
        terms.append(torch.stack(pair, -1))
    return Terms(_joined(terms), _half_ratio)


@Estimator
def of_curvature(support: Features, query: Features | None = None) -> Terms:
    """alpha* = E tr(A B) / E tr(A B A) for quadratic losses of any curvature.

    The support loss has the Hessian A, so that a step leaves (I - alpha A)(w - a), and the query loss the Hessian B.
    For the mean squared error A = B = 2 G / K, and this is `limit`; Gram matrices 2 Phi Phi^T / K do as well.

    Args:
        support: A, `[T, p, p]`, symmetric.
        query: B, `[T, p, p]`; A if None.
    """
    both = ((a, a) for a in stacks(support)) if query is None else pairs(support, query)
    terms = [torch.stack([_trace(a, b), _trace(a.mT @ b, a.mT)], -1) for a, b in both]
    return Terms(_joined(terms), _ratio)


@Estimator
def deviation(features: Features, *, unbiased: bool = False) -> Terms:
    """alpha = 1 / (2 N K sigma^2), sigma the standard deviation of all entries (H.15).

    Printed as a simplification of `stacked`, from which it does not follow: reported beside it, not used for training.

    Args:
        features: `[N, K, d]`.
        unbiased: divide by one less than the number of entries, as `torch.std` does.
    """
    return Terms(_entries(features), lambda sums: 1 / (2 * sums[..., 0] * _variance(sums, unbiased)))


@Estimator
def heuristic(features: Features, *, unbiased: bool = False) -> Terms:
    """alpha = 1 / (2 min(N K, d) sigma^2), sigma the standard deviation of all entries (H.18)."""

    def of(sums: Tensor) -> Tensor:
        smaller = torch.minimum(sums[..., 0], sums[..., 1] / sums[..., 0])
        return 1 / (2 * smaller * _variance(sums, unbiased))

    return Terms(_entries(features), of)


@Estimator
def stacked(features: Features) -> Terms:
    """alpha = N K tr(G^2) / (2 tr(G^3)) with G of all tasks' samples together, Psi `[N K, d]` (H.14).

    Psi as a whole is held in memory, and the smaller of Psi^T Psi and Psi Psi^T.
    """
    chunks = list(stacks(features))
    sizes = [chunk.shape[1] for chunk in chunks for _ in chunk]
    psi = torch.cat([chunk.flatten(0, 1) for chunk in chunks]) if chunks else torch.empty(0, 1, dtype=torch.float64)
    if psi.shape[1] >= psi.shape[0]:
        return _of_kernel(psi @ psi.mT, sizes)
    g = psi.mT @ psi
    square = g @ g
    blocks = ((c @ c.mT, c @ g @ c.mT, (c @ square * c).sum((1, 2))) for c in chunks)
    return _linearised(torch.stack([g.square().sum(), (square * g).sum()]), blocks, sizes)


@Estimator
def stacked_kernel(kernel: Tensor, sizes: Sequence[int]) -> Terms:
    """`stacked` from the kernel Psi Psi^T `[N K, N K]`, for features too many to hold; `sizes` are the tasks' K."""
    if kernel.shape != (sum(sizes), sum(sizes)):
        raise ValueError(f"a kernel of shape {list(kernel.shape)} is not that of {sum(sizes)} samples")
    return _of_kernel(kernel.detach().double(), list(sizes))


def _of_kernel(k: Tensor, sizes: list[int]) -> Terms:
    square, ends = k @ k, list(itertools.accumulate(sizes))
    own = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    blocks = ((k[i, i][None], square[i, i][None], (square[i] * k[i]).sum()[None]) for i in own)
    return _linearised(torch.stack([k.square().sum(), (square * k).sum()]), blocks, sizes)


def _linearised(powers: Tensor, blocks: Iterable[tuple[Tensor, Tensor, Tensor]], sizes: list[int]) -> Terms:
    """H.14 as a mean over tasks of its value plus their influences, whose standard error is exactly the jackknife's.

    The bootstrap then draws influences: a task drawn twice would make Psi Psi^T singular, and the estimate smaller. It
    draws those on log alpha (the same, divided by alpha), so that no end of an interval is negative.

    Args:
        powers: tr G^2 and tr G^3 of all tasks.
        blocks: for each task or stack of them, its block of Psi Psi^T and of the square, `[t, K, K]`, and the trace of
            its block of the cube, `[t]`; tr (G - G_i)^p follows by expanding it.
        sizes: each task's K.
    """
    lost = [
        torch.stack([2 * _diagonal(b) - _trace(a, a), 3 * c - 3 * _trace(b, a) + _trace(a @ a, a)], -1)
        for a, b, c in blocks
    ]
    tasks, rows = len(sizes), sum(sizes)
    value = rows * powers[0] / (2 * powers[1])
    influence = value.expand(tasks)
    if tasks > 1:
        rest = powers - torch.cat(lost)
        left = (rows - powers.new_tensor(sizes)) * rest[:, 0] / (2 * rest[:, 1])
        influence = value - (tasks - 1) * (left - left.mean())
    values = torch.stack([influence, torch.ones_like(influence)], -1)
    return Terms(values, _ratio, lambda sums: value * (_ratio(sums) / value - 1).exp())


def heuristic_range(
    tasks: int, samples: int, width: int, observations: int | None = None, low: float = 0.0, high: float = 1.0
) -> Interval:
    """2 / min(N K, d) <= alpha <= n / min(N K, d), over the squared range of the features (H.18 to H.25).

    `heuristic` with the least and largest variance that n numbers can have whose extremes are `low` and `high`:
    (high - low)^2 / (2 n) (Nagy) and (high - low)^2 / 4 (Popoviciu).

    Args:
        tasks: N.
        samples: K.
        width: d.
        observations: n, the entries that sigma is of; the paper does not fix it, N K if None.
        low: least feature.
        high: largest feature.

    Raises:
        ValueError: if a number is not positive or the range of features is empty.
    """
    n = tasks * samples if observations is None else observations
    positive(tasks=tasks, samples=samples, width=width, observations=n)
    if not low < high:
        raise ValueError(f"the range of features [{low}, {high}] is empty")
    smaller = min(tasks * samples, width)
    return Interval(2 / smaller / (high - low) ** 2, n / smaller / (high - low) ** 2)


def corollary1(features: Features, *, deterministic: bool = False) -> Interval:
    """1 / (2 d sigma^2) and d / (2 sigma^2), sigma^2 = tr E[G] / K (Corollary 1, eq. 3.5).

    A diagnostic: the lower one is no bound for random features. `deterministic` gives 1 / (2 sigma^2) in its place,
    which is a bound when all tasks have the same G.

    Raises:
        ValueError: if there are no tasks, or their features are all zero or not finite.
    """
    total, tasks, width = 0.0, 0, 0
    for phi in stacks(features):
        total, tasks, width = total + float(phi.square().sum()) / phi.shape[1], tasks + len(phi), phi.shape[2]
    if not tasks:
        raise ValueError("there are no tasks")
    if not 0 < total < math.inf:
        raise ValueError(f"sigma^2 would be {total / tasks:g}: these features are all zero or not finite")
    variance = total / tasks
    return Interval(1 / (2 * (1 if deterministic else width) * variance), width / (2 * variance))


def head_rate(features: Tensor, kind: str = "gram_mean") -> Tensor:
    """The estimate 1 / (2 n sigma^2) of the head's rate from a batch of support features (online ANIL, Figure 3).

    n = way x shot rows, each divided by its norm (F); sigma^2 is the "mean of covariance of F^T F", which can mean

    - `gram_mean`: the mean entry of the n x n matrix of cosines, in (0, 1] for features of one sign;
    - `feature_mean`: the mean entry of the d x d matrix F^T F;
    - `diag`: the mean of its diagonal, n / d: nothing is estimated then.

    Derived for the mean squared error without 1/2. The logits' curvature of cross-entropy is at most a quarter of that,
    so that its best rate is larger.

    Args:
        features: `[..., n, d]`, what enters the head.
        kind: one of the three.

    Returns:
        `[...]`, a rate for each task, without gradient; infinite where features cancel.

    Raises:
        ValueError: for another kind.
    """
    if kind not in SPREADS:
        raise ValueError(f"{kind!r} is none of {', '.join(SPREADS)}")
    f = torch.nn.functional.normalize(features.detach(), dim=-1)
    return 1 / (2 * f.shape[-2] * SPREADS[kind](f))


SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "gram_mean": lambda f: f.sum(-2).square().sum(-1) / f.shape[-2] ** 2,
    "feature_mean": lambda f: f.sum(-1).square().sum(-1) / f.shape[-1] ** 2,
    "diag": lambda f: f.square().sum((-2, -1)) / f.shape[-1],
}
"""Readings of sigma^2 in `head_rate`, from normalised rows `[..., n, d]`."""


def epsilon(alpha: float, samples: int, smallest: float, largest: float) -> float:
    """How far the meta-loss of N tasks may be from its mean: the factor epsilon of Proposition 1, informative only.

    epsilon = (l_S - 4 alpha l_I^2 / K + 4 alpha^2 l_S^3 / K^2) / (l_I - 4 alpha l_S^2 / K + 4 alpha^2 l_I^3 / K^2)^2.
    The distance is at most of the order of sqrt(d) epsilon / (N K), with constants that are not given. The denominator
    may vanish between the ends of `linear_meta.forbidden_rates`; infinite there.

    Args:
        alpha: adaptation rate.
        samples: K.
        smallest: l_I, the least eigenvalue that G may have.
        largest: l_S, the largest.

    Raises:
        ValueError: if samples or eigenvalues are not positive, or the largest is below the smallest.
    """
    eigenvalues_between(samples, smallest, largest)
    rate = 2 * alpha / samples
    above = largest - 2 * rate * smallest**2 + rate**2 * largest**3
    below = smallest - 2 * rate * largest**2 + rate**2 * smallest**3
    return above / below**2 if below else math.inf


def eigenvalues_between(samples: int, smallest: float, largest: float) -> None:
    """Refuse what cannot be K and the range [l_I, l_S] of the eigenvalues of G.

    Raises:
        ValueError: naming the first that cannot be.
    """
    positive(samples=samples, smallest=smallest, largest=largest)
    if largest < smallest:
        raise ValueError(f"largest={largest}: must be >= smallest={smallest}")


# ---- closed forms ------------------------------------------------------------------------------------------------


def gaussian_limit(K: int, d: int, s: float = 1.0) -> float:
    """`limit` for entries N(0, s^2): K (K + d + 1) / (2 s^2 (K^2 + d^2 + 3 K d + 3 K + 3 d + 4))."""
    positive(K=K, d=d, s=s)
    return K * (K + d + 1) / (2 * s**2 * (K * K + d * d + 3 * K * d + 3 * K + 3 * d + 4))


def gaussian_split(K: int, d: int, s: float = 1.0) -> float:
    """`split` for i.i.d. entries N(0, s^2) and validation samples of their own: K / (2 s^2 (K + d + 1))."""
    positive(K=K, d=d, s=s)
    return K / (2 * s**2 * (K + d + 1))


def iid_limit(K: int, d: int, moments: Sequence[float]) -> float:
    """`limit` for features whose K d entries are i.i.d. of any law, exactly.

    tr E[G^p] is a sum over p rows and p columns of E prod_i x[k_i, j_i] x[k_i, j_{i+1}], each of which depends only on
    which of the rows and which of the columns coincide.

    Args:
        K: samples.
        d: features.
        moments: E x^0, ..., E x^6 at least.
    """
    return K * _iid_trace(2, K, d, moments) / (2 * _iid_trace(3, K, d, moments))


def rows_limit(samples: int, rows: Tensor, weights: Tensor) -> float:
    """`limit` for K independent rows of features, each one of `rows` `[n, d]` with probability `weights` `[n]`.

    With C = E x x^T of a row x, tr E[G^2] = K E|x|^4 + K (K - 1) tr C^2 and
    tr E[G^3] = K E|x|^6 + 3 K (K - 1) E|x|^2 x^T C x + K (K - 1) (K - 2) tr C^3.
    """
    c = rows.mT @ (weights[:, None] * rows)
    square, through = rows.square().sum(1), ((rows @ c) * rows).sum(1)
    k, two, three = samples, math.perm(samples, 2), math.perm(samples, 3)
    second = k * (weights @ square**2) + two * c.square().sum()
    third = k * (weights @ square**3) + 3 * two * (weights @ (square * through)) + three * torch.trace(c @ c @ c)
    return float(k * second / (2 * third))


def _iid_trace(power: int, K: int, d: int, moments: Sequence[float]) -> float:
    total = 0.0
    for rows, columns in itertools.product(list(_patterns(power)), repeat=2):
        entries = [(k, columns[(i + step) % power]) for i, k in enumerate(rows) for step in (0, 1)]
        expected = math.prod(moments[entries.count(entry)] for entry in set(entries))
        total += math.perm(K, max(rows) + 1) * math.perm(d, max(columns) + 1) * expected
    return total


def _patterns(n: int) -> Iterator[tuple[int, ...]]:
    """All ways in which n indices can coincide: each is 0 at first, then at most one more than those before."""
    for labels in itertools.product(range(n), repeat=n):
        if all(label <= max(labels[:i], default=-1) + 1 for i, label in enumerate(labels)):
            yield labels


# ---- the smaller side --------------------------------------------------------------------------------------------


def _joined(terms: list[Tensor]) -> Tensor:
    return torch.cat(terms) if terms else torch.empty(0, 2, dtype=torch.float64)


def _gram(phi: Tensor) -> Tensor:
    return phi.mT @ phi if phi.shape[2] < phi.shape[1] else phi @ phi.mT


def _trace(a: Tensor, b: Tensor) -> Tensor:
    """tr(A^T B) of each pair."""
    return (a * b).sum((1, 2))


def _diagonal(a: Tensor) -> Tensor:
    """tr A of each."""
    return a.diagonal(dim1=1, dim2=2).sum(1)


def _entries(features: Features) -> Tensor:
    """For each task: rows, entries, their sum and sum of squares, less the mean over all tasks: `[T, 4]`.

    Within a task the squares are those of deviations from its own mean, so that nothing cancels.
    """
    terms = []
    for phi in stacks(features):
        counts = phi.new_tensor([phi.shape[1], phi[0].numel()]).expand(len(phi), 2)
        mean = phi.mean((1, 2))
        own = (phi - mean[:, None, None]).square().sum((1, 2))
        terms.append(torch.cat([counts, mean[:, None], own[:, None]], 1))
    if not terms:
        return torch.empty(0, 4, dtype=torch.float64)
    rows, n, mean, own = torch.cat(terms).unbind(1)
    away = mean - (n @ mean) / n.sum()
    return torch.stack([rows, n, n * away, own + n * away.square()], 1)


def _variance(sums: Tensor, unbiased: bool) -> Tensor:
    n, squares = sums[..., 1], sums[..., 3]
    spread = squares - sums[..., 2] ** 2 / n
    none = spread <= 64 * torch.finfo(spread.dtype).eps * squares  # rounding is all that is left of equal entries
    return torch.where(none, 0, spread) / (n - 1 if unbiased else n)
