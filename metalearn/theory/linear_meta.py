"""MAML on linear tasks in closed form: minimisers, risks, the best adaptation rate, distances under fast adaptation.

Task i has features Phi_i `[K, d]`, the optimum a_i and the loss |Phi_i (w - a_i)|^2 / K (no 1/2). One inner step of
rate alpha leaves M_i (w - a_i), M_i = I - 2 alpha H_i, H_i = Phi_i^T Phi_i / K, so that the meta-loss of N tasks is

    L(w, alpha) = 1/N sum_i (w - a_i)^T S_i (w - a_i),    S_i = M_i H_i M_i = H_i - 4 alpha H_i^2 + 4 alpha^2 H_i^3,

support and query samples being the same. Its minimiser is w_m(alpha) = (sum_i S_i)^-1 sum_j S_j a_j (eq. 3.1, where
a_i is printed for a_j); alpha = 0 is joint training (ERM), w_r. All of this is polynomial in alpha: `Moments` are
summed over the tasks once, and a grid of rates costs no more passes.

Zou, Liu & Li, "Unraveling Model-Agnostic Meta-Learning via the Adaptation Learning Rate", ICLR 2022, sections 3, 4, G
and H.

Shape letters: `N` or `T` tasks, `K` samples, `d` features, `A` any axes of rates (none for a number). Features are as
in `metalearn.theory.stacks`; everything is float64 and in chunks of tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from metalearn.theory import kernel_meta
from metalearn.theory.alpha_star import Interval
from metalearn.theory.stacks import Features, ranges

Rate = float | Tensor
SINGULAR = 1e-12
"""Eigenvalues below this share of the largest are zero, where a minimiser is not unique."""


class Moments(NamedTuple):
    """Sums over tasks of H^p, H^p a and a^T H^p a, p = 1, 2, ...: all that the closed forms need.

    matrices: `[p, d, d]`; vectors: `[p, d]`; scalars: `[p]`; tasks: their number, or the sum of their weights.
    """

    matrices: Tensor
    vectors: Tensor
    scalars: Tensor
    tasks: float

    @classmethod
    def of(
        cls, features: Features, optima: Tensor | None = None, weights: Tensor | None = None, powers: int = 3
    ) -> Moments:
        """Of tasks with these optima `[N, d]` (all zero, if None), each counted `weights[i]` times."""
        found: list[Tensor] | None = None
        count = 0.0
        for own, phi in ranges(features, 2 * _shape(features)[1] ** 2):
            a = phi.new_zeros(len(phi), phi.shape[2]) if optima is None else optima[own].to(phi)
            weight = phi.new_ones(len(phi)) if weights is None else weights[own].to(phi)
            sums = _power_sums(phi.mT @ phi / phi.shape[1], a, weight, powers)
            found = sums if found is None else [x + y for x, y in zip(found, sums, strict=True)]
            count += float(weight.sum())
        if found is None:
            raise ValueError("there are no tasks")
        return cls(found[0], found[1], found[2], count)

    def plus(self, other: Moments) -> Moments:
        """Those of both sets of tasks."""
        return Moments(
            self.matrices + other.matrices,
            self.vectors + other.vectors,
            self.scalars + other.scalars,
            self.tasks + other.tasks,
        )

    def matrix(self, alpha: Rate) -> Tensor:
        """Sum of S_i: `[A, d, d]`."""
        return torch.einsum("...p,pij->...ij", _weights(alpha, self.matrices), self.matrices[:3])

    def minimiser(self, alpha: Rate) -> Tensor:
        """w_m(alpha) `[A, d]`, the one of least norm where there are several."""
        vector = torch.einsum("...p,pi->...i", _weights(alpha, self.matrices), self.vectors[:3])
        return (_inverse(self.matrix(alpha)) @ vector[..., None])[..., 0]

    def slope(self, alpha: Rate = 0.0) -> Tensor:
        """d w_m / d alpha `[A, d]`; at 0 it is (sum G_i)^-1 sum_j 4 / K G_j^2 (w_r - a_j)."""
        at = torch.as_tensor(alpha, dtype=self.matrices.dtype, device=self.matrices.device)
        change = torch.stack([torch.zeros_like(at), torch.full_like(at, -4.0), 8 * at], -1)
        w = self.minimiser(at)
        moved = torch.einsum("...p,pij,...j->...i", change, self.matrices[:3], w)
        right = torch.einsum("...p,pi->...i", change, self.vectors[:3]) - moved
        return (_inverse(self.matrix(at)) @ right[..., None])[..., 0]

    def risk(self, w: Tensor, alpha: Rate) -> Tensor:
        """L(w, alpha), mean over tasks: `[A]` for w `[A, d]`."""
        c = _weights(alpha, self.matrices)
        square = torch.einsum("...i,...ij,...j->...", w, self.matrix(alpha), w)
        cross = torch.einsum("...p,pi,...i->...", c, self.vectors[:3], w)
        return (square - 2 * cross + c @ self.scalars[:3]) / self.tasks

    def least_risk(self, alpha: Rate) -> Tensor:
        """min_w L(w, alpha): `[A]`."""
        return self.risk(self.minimiser(alpha), alpha)

    def limit(self) -> float:
        """`alpha_star.limit` of these tasks."""
        second, third = (float(torch.trace(self.matrices[p])) for p in (1, 2))
        return second / (2 * third)

    def best_alpha(self, points: int = 61) -> float:
        """alpha*(N, K) = argmin_alpha min_w L(w, alpha): the best of a grid, then a bracketed search (section H.3).

        L falls in alpha at 0 for any w that does not solve all tasks, so the search goes from 0 up.

        Raises:
            ValueError: if one w solves all tasks, and every rate is as good.
        """
        high = 3 * self.limit()
        for _ in range(20):
            grid = torch.linspace(0, high, points, dtype=torch.float64)
            risks = self.least_risk(grid.to(self.matrices.device))
            if float(risks[0]) <= 1e-12 * float(self.scalars[0].abs()) / self.tasks:
                raise ValueError("one w solves all tasks: no adaptation rate is better than another")
            best = int(risks.argmin())
            if best < points - 1:
                ends = float(grid[max(best - 1, 0)]), float(grid[best + 1])
                tolerance = 1e-9 * high
                found = minimize_scalar(
                    lambda a: float(self.least_risk(a)), bounds=ends, method="bounded", options={"xatol": tolerance}
                )
                return float(found.x)
            high *= 2
        raise ValueError(f"the meta-loss still falls at alpha = {high:g}")


def minimiser(features: Features, optima: Tensor, alpha: Rate) -> Tensor:
    """w_m(alpha) of eq. 3.1, `[A, d]`; w_r at alpha = 0.

    The minimiser of least norm where it is not unique. With fewer samples than features in all (N K < d) nothing of
    d x d numbers is formed (`kernel_meta`); the result is then the same for all rates that keep every M_i invertible.

    Args:
        features: `[N, K, d]`.
        optima: a_i, `[N, d]`.
        alpha: a number or any tensor of rates.
    """
    tasks = features if isinstance(features, Tensor) else list(features)
    if sum(len(phi) for phi in tasks) >= tasks[0].shape[1]:
        return Moments.of(tasks, optima).minimiser(alpha)
    psi = torch.cat([phi.detach().double() for phi in tasks])
    labels = torch.cat([phi.detach().double() @ a.to(psi) for phi, a in zip(tasks, optima, strict=True)])
    return kernel_meta.coefficients(psi @ psi.mT, labels, alpha, [len(phi) for phi in tasks]) @ psi


def slope(features: Features, optima: Tensor, alpha: Rate = 0.0) -> Tensor:
    """d w_m / d alpha, `[A, d]`."""
    return Moments.of(features, optima).slope(alpha)


def best_alpha(features: Features, optima: Tensor) -> float:
    """alpha*(N, K) of these tasks; see `Moments.best_alpha`."""
    return Moments.of(features, optima).best_alpha()


def task_risks(w: Tensor, features: Features, optima: Tensor, alpha: Rate, query: Tensor | None = None) -> Tensor:
    """Each task's loss after one step of rate alpha from w: `[A, N]`.

    Args:
        w: `[d]`, or `[A, d]` with a start for each rate.
        features: `[N, K, d]`, on which tasks adapt.
        optima: `[N, d]`.
        alpha: rates.
        query: `[N, Q, d]`, on which they are judged; `features`, if None.
    """
    rate = torch.as_tensor(alpha, dtype=torch.float64, device=w.device)[..., None, None]
    found = []
    for own, phi in ranges(features, rate.numel() * sum(_shape(features))):
        v = w.double().unsqueeze(-2) - optima[own].to(phi)
        step = torch.einsum("tkd,...tk->...td", phi, torch.einsum("tkd,...td->...tk", phi, v)) / phi.shape[1]
        judged = phi if query is None else query[own].to(phi)
        found.append(torch.einsum("tkd,...td->...tk", judged, v - 2 * rate * step).square().mean(-1))
    return torch.cat(found, -1)


def risk(w: Tensor, features: Features, optima: Tensor, alpha: Rate, query: Tensor | None = None) -> Tensor:
    """L(w, alpha), the mean of `task_risks`: `[A]`."""
    return task_risks(w, features, optima, alpha, query).mean(-1)


# ---- means over the optima ---------------------------------------------------------------------------------------


def spread(features: Features, alpha: Rate) -> Tensor:
    """Covariance of w_m(alpha) over optima of covariance I, `[A, d, d]`: sum_j Lambda_j Lambda_j^T.

    w_m = sum_j Lambda_j a_j with Lambda_j = (sum_i S_i)^-1 S_j.
    """
    moments = Moments.of(features, powers=6)
    rate = 2 * torch.as_tensor(alpha, dtype=torch.float64, device=moments.matrices.device)
    binomial = torch.stack([rate**0, -4 * rate, 6 * rate**2, -4 * rate**3, rate**4], -1)
    squares = torch.einsum("...p,pij->...ij", binomial, moments.matrices[1:])
    inverse = _inverse(moments.matrix(alpha))
    return inverse @ squares @ inverse


def population_risk(features: Features, fresh: Features, alpha: Rate, variance: float = 1.0) -> Tensor:
    """Risk of w_m(alpha) on new tasks after a step of the same rate, in expectation over all optima.

    variance (tr(S V) + tr S), V = `spread` of the training tasks and S the mean of S_i over fresh ones: exact for these
    features. The first term is of the order of 1 / N.

    Args:
        features: of the N training tasks, `[N, K, d]`.
        fresh: of other tasks, `[M, K, d]`, whose mean stands for the expectation.
        alpha: rates.
        variance: sigma_a^2, of each entry of the optima, which have mean 0.
    """
    moments = Moments.of(fresh)
    s = moments.matrix(alpha) / moments.tasks
    return variance * ((s * spread(features, alpha)).sum((-2, -1)) + s.diagonal(dim1=-2, dim2=-1).sum(-1))


def forbidden_rates(samples: int, smallest: float, largest: float) -> Interval:
    """K (l_S^2 -+ sqrt(l_S^4 - l_I^4)) / (2 l_I^3): rates between these ends are outside the convergence proof.

    Eigenvalues of G lie in [l_I, l_S]. The ends are the zeros of l_I - 4 alpha l_S^2 / K + 4 alpha^2 l_I^3 / K^2, a
    lower bound on the eigenvalues of C^T C.
    """
    root = math.sqrt(largest**4 - smallest**4)
    high = samples * (largest**2 + root) / (2 * smallest**3)
    return Interval(samples**2 / (4 * smallest**2) / high, high)  # the product of both is K^2 / (4 l_I^2)


def theorem2_rate(samples: int, smallest: float, largest: float, c: float) -> float:
    """The largest rate for which Theorem 2 promises that w_m(alpha) is nearer to new optima than w_r, as printed.

    (-2 l_S^4 K + K sqrt(4 l_S^8 + 1.5 c l_I^4 (4 l_S^6 - l_I^6) / l_S^3)) / (l_I^2 (4 l_S^6 - l_I^6)). The paper does
    not say what c > 0 is, and its proof takes all G_i to have the same eigenvectors.
    """
    square = smallest**2 * (4 * largest**6 - smallest**6)
    linear, constant = 2 * largest**4 * samples, 1.5 * c * smallest**2 * samples**2 / largest**3
    return constant / (linear + math.sqrt(linear**2 + square * constant))


# ---- fast adaptation ---------------------------------------------------------------------------------------------


def adapted_distance(
    start: Tensor, features: Features, optima: Tensor | None, rate: float, steps: int | Sequence[int]
) -> Tensor:
    """|w^t - a|^2 of each task after t steps of gradient descent; the mean over tasks is F_t(start) (Definition 1).

    w^t - a = (I - 2 rate H)^t (start - a). The distance is squared; the sum in (3.6) starts one step late in print.

    Args:
        start: w^0, `[d]` or several, `[S, d]`.
        features: `[T, K, d]`.
        optima: `[T, d]`; None for zeros, which is enough for differences between starts: if optima have mean 0 and do
            not depend on the starts, E|Q (w - a)|^2 = E|Q w|^2 + E|Q a|^2.
        rate: eta.
        steps: those t, or all from 0 to this one.

    Returns:
        `[steps, S, T]`.
    """
    return _adapted(start, features, optima, rate, steps, loss=False)


def adapted_loss(
    start: Tensor, features: Features, optima: Tensor | None, rate: float, steps: int | Sequence[int]
) -> Tensor:
    """|Phi (w^t - a)|^2 / K of each task after t steps; arguments and result as of `adapted_distance`."""
    return _adapted(start, features, optima, rate, steps, loss=True)


def gap(
    features: Features,
    fresh: Features,
    alpha: Rate,
    rate: float,
    steps: int | Sequence[int],
    *,
    variance: float = 1.0,
    loss: bool = False,
) -> Tensor:
    """F_t(w_m(alpha)) - F_t(w_r) for each new task, in expectation over the optima of training and new tasks.

    What is left to average over are features, so that it has far less noise than a difference of sampled distances.

    Args:
        features: of the training tasks, `[N, K, d]`.
        fresh: of new tasks, `[T, K, d]`.
        alpha: rate of MAML.
        rate: eta, of adaptation to the new tasks.
        steps: those t, or all from 0 to this one.
        variance: of each entry of the optima.
        loss: losses after t steps in the place of distances.

    Returns:
        `[steps, A, T]`.
    """
    both = spread(features, alpha)
    difference = variance * (both - spread(features, 0.0))
    counts, found = _counts(steps), []
    for _, phi in ranges(fresh, len(counts) * sum(_shape(fresh))):
        values, axes = _spectrum(phi)
        squares = torch.einsum("tmi,...ij,tmj->...tm", axes, difference, axes)
        total = None if axes.shape[1] == axes.shape[2] else difference.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None]
        found.append(_after(squares, total, values, rate, counts, loss))
    return torch.cat(found, -1)


def _adapted(
    start: Tensor, features: Features, optima: Tensor | None, rate: float, steps: int | Sequence[int], *, loss: bool
) -> Tensor:
    counts, found = _counts(steps), []
    for own, phi in ranges(features, len(counts) * sum(_shape(features))):
        v = start.to(phi).unsqueeze(-2) - (phi.new_zeros(len(phi), 1) if optima is None else optima[own].to(phi))
        values, axes = _spectrum(phi)
        squares = torch.einsum("tmd,...td->...tm", axes, v).square()
        total = None if axes.shape[1] == axes.shape[2] else v.square().sum(-1)
        found.append(_after(squares, total, values, rate, counts, loss))
    return torch.cat(found, -1)


def _spectrum(phi: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of H `[T, m]` and unit eigenvectors as rows `[T, m, d]`, m = min(K, d).

    With K < d the rows of zero eigenvalues are zero.
    """
    samples, width = phi.shape[1:]
    if width <= samples:
        values, vectors = torch.linalg.eigh(phi.mT @ phi / samples)
        return values, vectors.mT
    values, vectors = torch.linalg.eigh(phi @ phi.mT / samples)
    seen = values > SINGULAR * values[:, -1:]
    length = torch.where(seen, samples * values, torch.inf).rsqrt()
    return torch.where(seen, values, 0), length[..., None] * (vectors.mT @ phi)


def _after(
    squares: Tensor, total: Tensor | None, values: Tensor, rate: float, steps: Sequence[int], loss: bool
) -> Tensor:
    """Squared distances (or losses) after t steps, `[steps, ..., T]`.

    Args:
        squares: squared coordinates of w^0 - a along the axes of H, `[..., T, m]`.
        total: its squared length `[..., T]`, if these axes are not all; what lies across never moves and has no loss.
        values: eigenvalues of H, `[T, m]`.
        rate: eta.
        steps: those t.
        loss: weigh each axis with its eigenvalue.
    """
    shrink = (1 - 2 * rate * values).square()
    factor = torch.stack([shrink**t for t in steps])
    moved = torch.einsum("ntm,...tm->n...t", factor * values if loss else factor, squares)
    return moved if loss or total is None else moved + (total - squares.sum(-1))


def _counts(steps: int | Sequence[int]) -> Sequence[int]:
    return range(steps + 1) if isinstance(steps, int) else steps


# ---- sums --------------------------------------------------------------------------------------------------------


def _power_sums(h: Tensor, a: Tensor, weight: Tensor, powers: int) -> list[Tensor]:
    """Weighted sums over tasks of H^p, H^p a, a^T H^p a."""
    matrices, vectors, scalars, power = [], [], [], h
    for p in range(powers):
        power = power @ h if p else h
        turned = (power @ a[..., None])[..., 0]
        matrices.append(torch.einsum("t,tij->ij", weight, power))
        vectors.append(weight @ turned)
        scalars.append(weight @ (turned * a).sum(1))
    return [torch.stack(parts) for parts in (matrices, vectors, scalars)]


def _weights(alpha: Rate, like: Tensor) -> Tensor:
    """1, -4 alpha, 4 alpha^2: of H, H^2 and H^3 in S; `[A, 3]`."""
    rate = torch.as_tensor(alpha, dtype=like.dtype, device=like.device)
    return torch.stack([torch.ones_like(rate), -4 * rate, 4 * rate**2], -1)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.pinv(matrix, rtol=SINGULAR, hermitian=True)


def _shape(features: Features) -> tuple[int, int]:
    """K and d of a tensor; zeros for an iterable, whose tasks come one at a time."""
    return (features.shape[1], features.shape[2]) if isinstance(features, Tensor) else (0, 0)
