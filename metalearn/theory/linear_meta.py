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
from metalearn.theory.alpha_star import Interval, eigenvalues_between, positive
from metalearn.theory.stacks import Features, ranges, stacks, tasks_at_once
from metalearn.theory.symmetric import SINGULAR, inverse, largest

Rate = float | Tensor
ROUNDING = 1e-14
"""Eigenvalues of a sum over tasks below this share of its terms are zero: rounding leaves 1e-15 of them at most."""
STEP = 1.05
"""Ratio of neighbours in the grid on which the best rate is looked for."""
RESOLVED = 1e-9
"""Sums over tasks are not relied on for a risk that is a smaller share of their terms."""


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
        """Of tasks with these optima `[N, d]` (all zero, if None), each counted `weights[i]` times.

        Raises:
            ValueError: if there are no tasks, other numbers of optima or weights, or anything is not finite.
        """
        found: list[Tensor] | None = None
        count = 0.0
        for own, phi in ranges(features, 2 * _shape(features)[1] ** 2, optima=optima, weights=weights):
            a = _rows(optima, own, phi)
            weight = phi.new_ones(len(phi)) if weights is None else weights[own].to(phi)
            sums = _power_sums(phi.mT @ phi / phi.shape[1], a, weight, powers)
            found = sums if found is None else [x + y for x, y in zip(found, sums, strict=True)]
            count += float(weight.sum())
        assert found is not None  # `ranges` refuses no tasks
        if not all(bool(sums.isfinite().all()) for sums in found):
            raise ValueError("features, optima or weights are not finite")
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
        """w_m(alpha) `[A, d]`, the one of least norm where there are several.

        A direction of which a step leaves less than 1e-7 (`ROUNDING` of its curvature) counts as one without curvature.
        """
        vector = torch.einsum("...p,pi->...i", _weights(alpha, self.matrices), self.vectors[:3])
        return (self.inverse(alpha) @ vector[..., None])[..., 0]

    def inverse(self, alpha: Rate) -> Tensor:
        """Pseudo-inverse of `matrix`, `[A, d, d]`; its terms H, -4 alpha H^2 and 4 alpha^2 H^3 may cancel."""
        terms = _weights(alpha, self.matrices).abs() @ largest(self.matrices[:3])
        return inverse(self.matrix(alpha), terms, ROUNDING)

    def slope(self, alpha: Rate = 0.0) -> Tensor:
        """d w_m / d alpha `[A, d]`; at 0 it is (sum G_i)^-1 sum_j 4 / K G_j^2 (w_r - a_j)."""
        at = torch.as_tensor(alpha, dtype=self.matrices.dtype, device=self.matrices.device)
        change = torch.stack([torch.zeros_like(at), torch.full_like(at, -4.0), 8 * at], -1)
        w = self.minimiser(at)
        moved = torch.einsum("...p,pij,...j->...i", change, self.matrices[:3], w)
        right = torch.einsum("...p,pi->...i", change, self.vectors[:3]) - moved
        return (self.inverse(at) @ right[..., None])[..., 0]

    def risk(self, w: Tensor, alpha: Rate) -> Tensor:
        """L(w, alpha), mean over tasks: `[A]` for w `[A, d]`."""
        c = _weights(alpha, self.matrices)
        square = torch.einsum("...i,...ij,...j->...", w, self.matrix(alpha), w)
        cross = torch.einsum("...p,pi,...i->...", c, self.vectors[:3], w)
        return (square - 2 * cross + c @ self.scalars[:3]) / self.tasks

    def least_risk(self, alpha: Rate) -> Tensor:
        """min_w L(w, alpha): `[A]`."""
        return self.risk(self.minimiser(alpha), alpha)

    def solved(self) -> bool:
        """Whether one w solves all tasks, so that every rate is as good as any other."""
        return float(self.least_risk(0.0)) <= SINGULAR * float(self.scalars[0]) / self.tasks

    def limit(self) -> float:
        """`alpha_star.limit` of these tasks.

        Raises:
            ValueError: if all features are zero.
        """
        second, third = (float(torch.trace(self.matrices[p])) for p in (1, 2))
        if not third > 0:
            raise ValueError("all features are zero: there is no best adaptation rate")
        return second / (2 * third)


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
    if sum(map(len, tasks)) >= optima.shape[-1]:
        return Moments.of(tasks, optima).minimiser(alpha)
    psi: list[Tensor] = []
    labels: list[Tensor] = []
    for own, phi in ranges(tasks, optima=optima):
        psi += phi
        labels += torch.einsum("tkd,td->tk", phi, _rows(optima, own, phi))
    flat = torch.cat(psi)
    return kernel_meta.coefficients(flat @ flat.mT, torch.cat(labels), alpha, [*map(len, psi)]) @ flat


def slope(features: Features, optima: Tensor, alpha: Rate = 0.0) -> Tensor:
    """d w_m / d alpha, `[A, d]`."""
    return Moments.of(features, optima).slope(alpha)


def best_alpha(features: Features, optima: Tensor) -> float:
    """alpha*(N, K) = argmin_alpha min_w L(w, alpha): a grid, then a search around each of its minima (section H.3).

    For any w the best rate is a mean of K / (2 l) over eigenvalues l of the tasks' G, so that the grid need only go
    from the least to the largest of these. Between them there may be several minima, if tasks curve differently: each
    kind has a rate that solves it in one step.

    Raises:
        ValueError: if one w solves all tasks, and every rate is as good; and as `Moments.of`.
    """
    tasks = features if isinstance(features, Tensor) else list(features)
    moments = Moments.of(tasks, optima)
    ends = _best_rates(tasks)
    if moments.solved():
        raise ValueError("one w solves all tasks: no adaptation rate is better than another")
    low, high = ends.low / STEP, ends.high * STEP
    grid = torch.logspace(0, 1, math.ceil(math.log(high / low) / math.log(STEP)) + 1, high / low, dtype=torch.float64)

    def loss(alpha: Tensor) -> Tensor:
        return torch.cat([_least_risk(moments, tasks, optima, part) for part in alpha.split(fit)])

    fit = tasks_at_once(4 * moments.matrices[0].numel())
    rates = low * grid.to(moments.matrices.device)
    losses = loss(rates)
    found = [(float(x), float(a)) for x, a in zip(losses, rates, strict=True)]
    for i in range(1, len(rates) - 1):
        if losses[i] <= losses[i - 1] and losses[i] <= losses[i + 1]:
            near = minimize_scalar(
                lambda a: float(loss(rates.new_tensor([a]))),
                bounds=(float(rates[i - 1]), float(rates[i + 1])),
                method="bounded",
                options={"xatol": 1e-9 * float(rates[i])},
            )
            found.append((float(near.fun), float(near.x)))
    return min(found)[1]


def _best_rates(features: Features) -> Interval:
    """The least and the largest K / (2 l) over all positive eigenvalues l of all tasks' G."""
    low, high = math.inf, 0.0
    for phi in stacks(features):
        values = _spectrum(phi)[0]
        top = values[:, -1]
        seen = values[(values > SINGULAR * top[:, None]) & (values > 0)]
        if len(seen):
            low, high = min(low, 1 / (2 * float(seen.max()))), max(high, 1 / (2 * float(seen.min())))
    if not high:
        raise ValueError("all features are zero: there is no best adaptation rate")
    return Interval(low, high)


def _least_risk(moments: Moments, features: Features, optima: Tensor, alpha: Tensor) -> Tensor:
    """min_w L(w, alpha) for rates `[A]`, from the tasks themselves where too little is left of the sums over them."""
    w = moments.minimiser(alpha)
    found = moments.risk(w, alpha)
    terms = _weights(alpha, moments.matrices).abs() @ moments.scalars[:3] / moments.tasks
    rough = ~(found > RESOLVED * terms)
    if rough.any():
        found[rough] = risk(w[rough], features, optima, alpha[rough])
    return found


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
    for own, phi in ranges(features, rate.numel() * sum(_shape(features)), optima=optima, query=query):
        v = w.double().unsqueeze(-2) - _rows(optima, own, phi)
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
    inverted = moments.inverse(alpha)
    return inverted @ squares @ inverted


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

    Raises:
        ValueError: if samples or eigenvalues are not positive, or the largest is below the smallest.
    """
    eigenvalues_between(samples, smallest, largest)
    root = math.sqrt(largest**4 - smallest**4)
    high = samples * (largest**2 + root) / (2 * smallest**3)
    return Interval(samples**2 / (4 * smallest**2) / high, high)  # the product of both is K^2 / (4 l_I^2)


def theorem2_rate(samples: int, smallest: float, largest: float, c: float) -> float:
    """The largest rate for which Theorem 2 promises that w_m(alpha) is nearer to new optima than w_r, as printed.

    (-2 l_S^4 K + K sqrt(4 l_S^8 + 1.5 c l_I^4 (4 l_S^6 - l_I^6) / l_S^3)) / (l_I^2 (4 l_S^6 - l_I^6)). The paper does
    not say what c > 0 is, and its proof takes all G_i to have the same eigenvectors.

    Raises:
        ValueError: as of `forbidden_rates`, or if c is not positive.
    """
    eigenvalues_between(samples, smallest, largest)
    positive(c=c)
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
    for own, phi in ranges(features, len(counts) * sum(_shape(features)), optima=optima):
        v = start.to(phi).unsqueeze(-2) - _rows(optima, own, phi)
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


def _rows(optima: Tensor | None, own: slice, phi: Tensor) -> Tensor:
    """Those optima, `[t, d]`; zeros for None."""
    if optima is None:
        return phi.new_zeros(len(phi), phi.shape[2])
    if optima.shape[1:] != phi.shape[2:]:
        raise ValueError(f"optima have shape {list(optima.shape)}, not [T, {phi.shape[2]}]")
    return optima[own].to(phi)


def _shape(features: Features) -> tuple[int, int]:
    """K and d of a tensor; zeros for an iterable, whose tasks come one at a time."""
    return (features.shape[1], features.shape[2]) if isinstance(features, Tensor) else (0, 0)
