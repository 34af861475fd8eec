"""The bounds of TSA-MAML's theorems as diagnostics: excess risk and expected gradient of q steps from theta*.

Task T has the population risk L_T, minimal at theta_T*; theta_T^q is q gradient steps of rate alpha <= 1 / L_s from
theta* on the risk L_{D_T} of K samples D_T. The loss is G-Lipschitz and L_s-smooth in theta, rho = 1 + 2 alpha L_s.

    ER(q)  = E_T E_D [L_T(theta_T^q) - L_T(theta_T*)]
    EPG(q) = E_T |E_D grad L_T(theta_T^q)|^2                                    (the norm is outside E_D)
    ER  <= (a) 2 G^2 (rho^q - 1) / (K L_s) + E[L_{D_T}(theta_T^q) - L_T(theta_T*)]
        <= (b) 2 G^2 (rho^q - 1) / (K L_s) + E|theta* - theta_T*|^2 / (2 alpha)                       (Theorem 1)
    EPG <= 8 G^2 (rho^q - 1)^2 / K^2 + 2 E|grad L_{D_T}(theta_T^q)|^2                                 (Theorem 2)

Corollary 1 is the same with the initialisation that task T is routed to in the place of theta*. Zhou et al.,
"Task Similarity Aware Meta Learning", UAI 2021. Its proof never defines the L of rho apart from L_s; they are one here.
The bounds are loose and explode with q. Two things hold that the paper does not say (`docs/theory.md`): stability needs
only rho = 1 + alpha L_s, and 2 alpha G^2 q / K in the place of the first term for convex losses
(Hardt, Recht & Singer 2016, https://arxiv.org/abs/1509.01240, section 3, for single examples; the argument is the same
for whole gradients: exchanging one sample changes a step by at most 2 alpha G / K).

Shape letters: `T` tasks, `R` data sets of each, `K` samples, `M` points of the population, `P` parameters, `d` inputs.
Everything is float64 and batched over tasks and data sets. A population here is finite, M points, and data sets are
drawn from it with replacement: L_T, its minimum and the theorems' premises then hold exactly, and only E_T and E_D are
means over what was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.random import Key

SampleLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(phi `[B, P]`, x `[B, n, d]`, y `[B, n]`) -> the loss of every example, `[B, n]`."""


class Constants(NamedTuple):
    """G (Lipschitz) and L_s (smoothness) of the per-sample loss."""

    lipschitz: float
    smoothness: float


# ---- the terms ---------------------------------------------------------------------------------------------------


def generalization_term(c: Constants, alpha: float, q: int, samples: int) -> float:
    """2 G^2 (rho^q - 1) / (K L_s), the first term of Theorem 1; tends to 4 G^2 alpha q / K as alpha goes to 0."""
    growth = math.expm1(q * math.log1p(2 * alpha * c.smoothness))
    return 2 * c.lipschitz**2 * growth / (samples * c.smoothness)


def convex_generalization_term(c: Constants, alpha: float, q: int, samples: int) -> float:
    """2 alpha G^2 q / K: what uniform stability gives for convex losses and alpha <= 2 / L_s."""
    return 2 * alpha * c.lipschitz**2 * q / samples


def gradient_term(c: Constants, alpha: float, q: int, samples: int) -> float:
    """8 G^2 (rho^q - 1)^2 / K^2, the first term of Theorem 2."""
    growth = math.expm1(q * math.log1p(2 * alpha * c.smoothness))
    return 8 * c.lipschitz**2 * growth**2 / samples**2


def distance_factor(alpha: float, smoothness: float, *, convex: bool) -> float:
    """What multiplies |theta* - theta_T*|^2 in (b): 1 / (2 alpha), and L_s / 2 more without convexity.

    The larger one holds for each data set by itself. In expectation over D, which is what the theorem is about, L_s / 2
    alone is enough, convex or not: E_D L_D(theta^q) <= L_T(theta*) because descent lowers every L_D, and L_T is
    L_s-smooth with slope 0 at its minimum.

    Raises:
        ValueError: if alpha > 1 / L_s, where steps need not descend.
    """
    if alpha * smoothness > 1 + 1e-12:
        raise ValueError(f"alpha = {alpha} exceeds 1 / L_s = {1 / smoothness:g}")
    return 1 / (2 * alpha) + (0.0 if convex else smoothness / 2)


# ---- what is measured --------------------------------------------------------------------------------------------


def slopes(loss: SampleLoss, phi: Tensor, x: Tensor, y: Tensor, *, create_graph: bool = False) -> Tensor:
    """Gradient of the mean loss of each stack, `[B, P]`."""
    at = phi if phi.requires_grad else phi.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(loss(at, x, y).mean(1).sum(), at, create_graph=create_graph)[0]


def descend(loss: SampleLoss, start: Tensor, x: Tensor, y: Tensor, alpha: float, steps: int) -> list[Tensor]:
    """theta^0, ..., theta^steps on the mean loss of each data set: `[B, P]` each."""
    path = [start]
    for _ in range(steps):
        path.append(path[-1] - alpha * slopes(loss, path[-1], x, y))
    return path


def newton(
    loss: SampleLoss, start: Tensor, x: Tensor, y: Tensor, *, steps: int = 50, tolerance: float = 1e-10
) -> Tensor:
    """Minimum of each mean loss, `[B, P]`, for smooth and strictly convex ones of few parameters.

    Newton steps, halved for a task until they lower its loss.

    Raises:
        ArithmeticError: if some gradient is larger than `tolerance` after all steps.
    """
    phi = start.detach()
    for _ in range(steps):
        at = phi.clone().requires_grad_()
        g = slopes(loss, at, x, y, create_graph=True)
        rows = [torch.autograd.grad(g[:, i].sum(), at, retain_graph=True)[0] for i in range(phi.shape[1])]
        g = g.detach()
        if float(g.norm(dim=1).max()) <= tolerance:
            return phi
        direction = torch.linalg.solve(torch.stack(rows, 1), g)
        value, rate = loss(phi, x, y).mean(1), torch.ones(len(phi), 1, dtype=phi.dtype)
        for _ in range(30):
            worse = loss(phi - rate * direction, x, y).mean(1) > value + 1e-14
            if not worse.any():
                break
            rate = torch.where(worse[:, None], rate / 2, rate)
        phi = phi - rate * direction
    raise ArithmeticError(f"a gradient of {float(g.norm(dim=1).max()):.1e} is left after {steps} Newton steps")


def empirical_constants(
    loss: SampleLoss, path: Sequence[Tensor], x: Tensor, y: Tensor, *, steps: int = 30
) -> Constants:
    """G and L_s as they appear along adaptation paths: lower estimates, no certificate.

    G is the largest norm of one example's gradient; L_s the largest |eigenvalue| of one example's Hessian, by power
    iteration from the gradient's direction plus a fixed one. Every example is a stack of its own meanwhile.

    Args:
        loss: of every example.
        path: parameters `[B, P]` at which to look.
        x: `[B, n, d]`.
        y: `[B, n]`.
        steps: of the power iteration, from below.
    """
    n, lipschitz, smoothness = y.shape[1], 0.0, 0.0
    alone = x.flatten(0, 1).unsqueeze(1), y.flatten(0, 1).unsqueeze(1)
    for phi in path:
        at = phi.detach().repeat_interleave(n, 0).requires_grad_()
        g = slopes(loss, at, *alone, create_graph=True)
        lipschitz = max(lipschitz, float(g.detach().norm(dim=1).max()))
        if not g.requires_grad:  # linear: no curvature
            continue
        v = g.detach() / g.detach().norm(dim=1, keepdim=True).clamp_min(1e-300)
        v = v + torch.linspace(0.5, 1.0, v.shape[1], dtype=v.dtype)
        size = v.new_zeros(len(v))
        for _ in range(steps):
            v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-300)
            (v,) = torch.autograd.grad(g, at, v, retain_graph=True)
            size = v.norm(dim=1)
        smoothness = max(smoothness, float(size.max()))
    return Constants(lipschitz, smoothness)


def squared_norm_of_mean(samples: Tensor, *, unbiased: bool = True) -> Tensor:
    """|E v|^2 from samples `[..., R, P]` of v: `[...]`.

    The square of the mean is too large by tr Cov(v) / R on average; the mean of v_r . v_s over pairs r != s is not,
    and may be negative.
    """
    r = samples.shape[-2]
    of_sum, own = samples.sum(-2).square().sum(-1), samples.square().sum((-2, -1))
    if not unbiased:
        return of_sum / r**2
    if r < 2:
        raise ValueError("an unbiased square of a mean needs at least two samples")
    return (of_sum - own) / (r * (r - 1))


def dist2(points: Tensor, optima: Tensor) -> Tensor:
    """|theta - theta_T*|^2 of `[..., P]`."""
    return (points - optima).square().sum(-1)


class Measured(NamedTuple):
    """Per-task means over data sets, `[T]` each, after q steps.

    excess: L_T(theta^q) - L_T(theta_T*). empirical: L_D(theta^q) - L_T(theta_T*). gradient: |E_D grad L_T(theta^q)|^2.
    own_gradient: |grad L_D(theta^q)|^2. start: |theta* - theta_T*|^2. distance: |theta^q - theta_T*|^2.
    """

    excess: Tensor
    empirical: Tensor
    gradient: Tensor
    own_gradient: Tensor
    start: Tensor
    distance: Tensor

    def mean(self) -> dict[str, float]:
        """Means over tasks."""
        return {name: float(value.mean()) for name, value in self._asdict().items()}


class Tasks(NamedTuple):
    """Finite populations and data sets from them.

    x: `[T, M, d]`, y: `[T, M]`: the population. optima: theta_T*, `[T, P]`. rows: `[T, R, K]`, the data sets.
    """

    x: Tensor
    y: Tensor
    optima: Tensor
    rows: Tensor

    def draw(self, key: Key, sets: int, samples: int) -> Tasks:
        """The same tasks with other data sets, drawn with replacement."""
        tasks, points = self.y.shape
        where = torch.arange(tasks)[:, None], torch.arange(sets)
        return self._replace(rows=key.sub("data sets").integers(samples, *where, size=points))

    def datasets(self) -> tuple[Tensor, Tensor]:
        """All data sets as stacks: `[T R, K, d]` and `[T R, K]`."""
        task = torch.arange(len(self.x))[:, None, None]
        return self.x[task, self.rows].flatten(0, 1), self.y[task, self.rows].flatten(0, 1)


def measure(loss: SampleLoss, tasks: Tasks, starts: Tensor, alpha: float, steps: Sequence[int]) -> dict[int, Measured]:
    """ER, EPG and what bounds them after each number of steps in `steps`, from the starts `[T, P]`."""
    sets = tasks.rows.shape[1]
    x, y = tasks.datasets()
    path = descend(loss, starts.repeat_interleave(sets, 0), x, y, alpha, max(steps))
    least = loss(tasks.optima, tasks.x, tasks.y).mean(1)

    def per_task(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, sets))

    found = {}
    for q in steps:
        phi, optima = per_task(path[q]), tasks.optima.unsqueeze(1)
        risk, gradient = _population(loss, phi, tasks)
        found[q] = Measured(
            excess=(risk - least[:, None]).mean(1),
            empirical=per_task(loss(path[q], x, y).mean(1)).mean(1) - least,
            gradient=squared_norm_of_mean(gradient),
            own_gradient=per_task(slopes(loss, path[q], x, y).square().sum(1)).mean(1),
            start=dist2(starts, tasks.optima),
            distance=dist2(phi, optima).mean(1),
        )
    return found


def _population(loss: SampleLoss, phi: Tensor, tasks: Tasks) -> tuple[Tensor, Tensor]:
    """L_T and its gradient at phi `[T, R, P]`: `[T, R]`, `[T, R, P]`; one data set of every task at a time."""
    risks, gradients = [], []
    for own in phi.unbind(1):
        at = own.detach().requires_grad_()
        risk = loss(at, tasks.x, tasks.y).mean(1)
        gradients.append(torch.autograd.grad(risk.sum(), at)[0])
        risks.append(risk.detach())
    return torch.stack(risks, 1), torch.stack(gradients, 1)


def bound_terms(
    m: Measured, c: Constants, alpha: float, q: int, samples: int, *, convex: bool = True
) -> dict[str, float]:
    """ER and EPG beside the right-hand sides of Theorems 1 and 2 (Corollary 1, if the starts are groups')."""
    mean, first = m.mean(), generalization_term(c, alpha, q, samples)
    return {
        "er": mean["excess"],
        "gap": mean["excess"] - mean["empirical"],
        "first": first,
        "convex_first": convex_generalization_term(c, alpha, q, samples),
        "a": first + mean["empirical"],
        "b": first + distance_factor(alpha, c.smoothness, convex=convex) * mean["start"],
        "b_smooth": first + c.smoothness / 2 * mean["start"],
        "epg": mean["gradient"],
        "epg_bound": gradient_term(c, alpha, q, samples) + 2 * mean["own_gradient"],
    }
