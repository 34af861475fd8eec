"""What MAML, FOMAML and Reptile ascend to first order in the inner rate: the Taylor analysis of the overview (P3).

k minibatch losses L_1..L_k, phi_1 = phi, phi_{i+1} = phi_i - alpha g_i, g_i = L_i'(phi_i); bars mean "at phi_1":
gbar_i = L_i'(phi_1), Hbar_i = L_i''(phi_1). The last minibatch is the test loss of MAML and FOMAML, and one more
training step of Reptile. Shape letters: `B` tasks, `P` parameters. A loss maps phi `[B, P]` to one value per task,
`[B]`.

Sun, "Overview of Meta-Learning", eq. 33-41, after Nichol, Achiam & Schulman 2018, https://arxiv.org/abs/1803.02999,
section 5. Signs as in the equations (the overview's running text has slips: U(phi) = phi + g_1 + ...).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn.random import Key

Loss = Callable[[Tensor], Tensor]
ALGORITHMS = ("maml", "fomaml", "reptile")
COEFFICIENTS: dict[str, Callable[[int], tuple[float, float]]] = {
    "maml": lambda k: (1.0, 2.0 * (k - 1)),
    "fomaml": lambda k: (1.0, 1.0 * (k - 1)),
    "reptile": lambda k: (1.0 * k, 0.5 * k * (k - 1)),
}
"""E[g] = a AvgGrad - b alpha AvgGradInner + O(alpha^2): (a, b) for k minibatches (eq. 33-35 for k = 2, 36-41)."""


class Gradients(NamedTuple):
    """One vector per task and algorithm, `[B, P]` each."""

    maml: Tensor
    fomaml: Tensor
    reptile: Tensor

    def map(self, *others: Gradients, by: Callable[..., Tensor]) -> Gradients:
        """The three results of `by` on the entries of these and the others."""
        return Gradients(*(by(*entries) for entries in zip(self, *others, strict=True)))


# ---- gradients and their expansions ------------------------------------------------------------------------------


def gradients(losses: Sequence[Loss], phi: Tensor, alpha: float) -> Gradients:
    """The outer gradients themselves, by automatic differentiation through all steps.

    g_MAML = d L_k(phi_k) / d phi_1 = prod_{j<k} (I - alpha L_j''(phi_j)) g_k, g_FOMAML = g_k,
    g_Reptile = (phi_1 - phi_{k+1}) / alpha = sum_i g_i.

    Args:
        losses: L_1, ..., L_k in the order of the steps, k >= 1.
        phi: phi_1, `[B, P]`.
        alpha: inner rate; any sign, since all three are smooth in it.
    """
    start = phi.detach().requires_grad_()
    at, total = start, torch.zeros_like(start)
    for loss in losses[:-1]:
        g = _slope(loss, at)
        at, total = at - alpha * g, total + g
    value = losses[-1](at).sum()
    last, maml = torch.autograd.grad(value, [at, start])
    return Gradients(maml, last, (total + last).detach())


def expansion(losses: Sequence[Loss], phi: Tensor, alpha: float) -> Gradients:
    """The same up to O(alpha^2), for any k (section 20 of the specification; eq. 36-38).

    g_MAML = gbar_k - alpha Hbar_k sum_{j<k} gbar_j - alpha sum_{j<k} Hbar_j gbar_k, FOMAML without the last term,
    g_Reptile = sum_i gbar_i - alpha sum_i Hbar_i sum_{j<i} gbar_j.
    """
    bars, hessians = _at_start(losses, phi)
    before = [torch.zeros_like(bars[0]), *itertools.accumulate(bars)]  # before[i] = sum_{j<i} gbar_j
    inner = [h(b) for h, b in zip(hessians, before[:-1], strict=True)]
    last = bars[-1]
    fomaml = last - alpha * inner[-1]
    maml = fomaml - alpha * _total([h(last) for h in hessians[:-1]], last)
    return Gradients(maml, fomaml, before[-1] - alpha * _total(inner, last))


def averages(losses: Sequence[Loss], phi: Tensor) -> tuple[Tensor, Tensor]:
    """What AvgGrad and AvgGradInner are expectations of, for each task: `[B, P]` both.

    The mean of gbar_i over minibatches, and that of Hbar_i gbar_j over ordered pairs i != j (k >= 2). The second is
    half the slope of gbar_i . gbar_j averaged over pairs, so -AvgGradInner makes the minibatches of a task agree.
    """
    bars, hessians = _at_start(losses, phi)
    total, k = _total(bars, bars[0]), len(losses)
    inner = [h(total - own) for h, own in zip(hessians, bars, strict=True)]
    return total / k, _total(inner, total) / (k * (k - 1))


def mean_over_orders(losses: Sequence[Loss], phi: Tensor, alpha: float) -> Gradients:
    """`gradients` averaged over all k! orders of the minibatches, which are exchangeable in expectation."""
    total = Gradients(*(torch.zeros_like(phi) for _ in ALGORITHMS))
    for order in itertools.permutations(losses):
        total = total.map(gradients(order, phi, alpha), by=torch.add)
    return total.map(by=lambda g: g / math.factorial(len(losses)))


def _slope(loss: Loss, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss(at).sum(), at, create_graph=True)[0]


def _at_start(losses: Sequence[Loss], phi: Tensor) -> tuple[list[Tensor], list[Callable[[Tensor], Tensor]]]:
    """gbar_i and products with Hbar_i."""
    start = phi.detach().requires_grad_()
    slopes = [_slope(loss, start) for loss in losses]

    def product(slope: Tensor) -> Callable[[Tensor], Tensor]:
        if not slope.requires_grad:  # a linear loss: its gradient is a constant
            return torch.zeros_like
        return lambda v: torch.autograd.grad(slope, start, v, retain_graph=True, materialize_grads=True)[0]

    return [slope.detach() for slope in slopes], [product(slope) for slope in slopes]


def _total(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    return sum(terms, torch.zeros_like(like))


# ---- coefficients by regression ----------------------------------------------------------------------------------


class Fit(NamedTuple):
    """Coefficients of AvgGrad and of -AvgGradInner, and their standard errors over tasks; `[2]` both."""

    value: Tensor
    error: Tensor


def regress(samples: Tensor, avg_grad: Tensor, avg_grad_inner: Tensor) -> Fit:
    """Least-squares coefficients of the mean of `samples` `[T, P]` on (AvgGrad, -AvgGradInner), `[P]` each.

    They are linear in the samples, so their standard error is that of a mean of T independent values.

    Raises:
        ValueError: if the two vectors are parallel to rounding, as when E[A] is a multiple of I.
    """
    basis = torch.stack([avg_grad, -avg_grad_inner], 1)
    sizes = torch.linalg.svdvals(basis / basis.norm(dim=0))
    if sizes[1] < 1e-6 * sizes[0]:
        raise ValueError("AvgGrad and AvgGradInner are parallel: their coefficients cannot be told apart")
    own = samples @ torch.linalg.pinv(basis).mT
    return Fit(own.mean(0), own.std(0) / math.sqrt(len(own)))


class Quadratics(NamedTuple):
    """Random quadratic tasks with i.i.d. minibatches: losses 1/2 (phi - c)^T A (phi - c), and their expectations.

    losses: L_1..L_k, each for all B tasks. phi: `[B, P]`, the same for all. avg_grad, avg_grad_inner: `[P]`, exact.
    """

    losses: list[Loss]
    phi: Tensor
    avg_grad: Tensor
    avg_grad_inner: Tensor


def quadratic(a: Tensor, c: Tensor) -> Loss:
    """1/2 (phi - c)^T A (phi - c) for each task: a `[B, P, P]` symmetric, c `[B, P]`."""
    return lambda phi: 0.5 * torch.einsum("bi,bij,bj->b", phi - c, a, phi - c)


def random_quadratics(key: Key, tasks: int, k: int, *, dimension: int = 4, examples: int = 10) -> Quadratics:
    """Linear regression without noise, a minibatch being `examples` Gaussian inputs.

    A task has input variances s (E s = 1/4, 1/2, 1, ..., so that E[A] is no multiple of I) and a minimum
    c ~ N(0, I / 16); a minibatch of it has A = X^T X / n and its own minimum c + N(0, I / 16). Given the task,
    minibatches are i.i.d. with E[A] = diag(s), so AvgGrad = diag(E s) phi and AvgGradInner = diag(E s^2) phi. Of all
    phi, (E s)^(-3/2) makes the two least parallel.
    """
    where = torch.arange(tasks)
    usual = 2.0 ** torch.arange(-2, dimension - 2).double()
    u = key.sub("variances").uniform(dimension, where).double()
    s = usual * (0.5 + u)  # E s^2 = usual^2 (1 + 1/12)
    c = 0.25 * key.sub("minimum").normal(dimension, where).double()
    losses = []
    for i in range(k):
        z = key.sub("inputs").normal(examples * dimension, where, i).double().unflatten(1, (examples, dimension))
        x = z * s.sqrt()[:, None, :]
        own = c + 0.25 * key.sub("minibatch minimum").normal(dimension, where, i).double()
        losses.append(quadratic(x.mT @ x / examples, own))
    phi = usual**-1.5
    return Quadratics(losses, phi.expand(tasks, -1), usual * phi, usual.square() * (13 / 12) * phi)


def coefficients(
    key: Key, k: int, *, tasks: int = 40_000, chunk: int = 10_000, alpha: float = 1e-4
) -> dict[str, tuple[Fit, Fit]]:
    """Coefficients of E[g] at alpha = 0, and those of its slope in alpha, over random quadratics.

    The value at 0 should be (a, 0) and the slope (0, b). The slope is the central difference at +-alpha on the same
    tasks: what varies from task to task at alpha = 0 cancels, instead of being amplified by 1 / alpha, and the error
    of the difference itself is O(alpha^2), far below the standard error. The basis is the exact one, not an estimate.

    Returns:
        algorithm -> (value, slope).
    """
    values: dict[str, list[Tensor]] = {name: [] for name in ALGORITHMS}
    slopes: dict[str, list[Tensor]] = {name: [] for name in ALGORITHMS}
    for i, first in enumerate(range(0, tasks, chunk)):
        q = random_quadratics(key.sub(f"chunk {i}"), min(chunk, tasks - first), k)
        low, zero, high = (gradients(q.losses, q.phi, rate) for rate in (-alpha, 0.0, alpha))
        for name, a, b, c in zip(ALGORITHMS, low, zero, high, strict=True):
            values[name].append(b)
            slopes[name].append((c - a) / (2 * alpha))
    basis = q.avg_grad, q.avg_grad_inner
    return {
        name: (regress(torch.cat(values[name]), *basis), regress(torch.cat(slopes[name]), *basis))
        for name in ALGORITHMS
    }


def in_sample_coefficients(q: Quadratics, alpha: float) -> dict[str, tuple[float, float]]:
    """(a, b) from the tasks' own AvgGrad and AvgGradInner and all k! orders: no Monte-Carlo error, only O(alpha)."""
    avg_grad, avg_grad_inner = (mean.mean(0) for mean in averages(q.losses, q.phi))
    found = {}
    for name, g in zip(ALGORITHMS, mean_over_orders(q.losses, q.phi, alpha), strict=True):
        a, b = regress(g, avg_grad, avg_grad_inner).value.tolist()
        found[name] = a, b / alpha
    return found


# ---- the study ---------------------------------------------------------------------------------------------------


def log_cosh(key: Key, tasks: int, k: int, *, dimension: int = 5, examples: int = 8) -> tuple[list[Loss], Tensor]:
    """Smooth losses mean_n log cosh(x_n . phi - y_n) with x, y ~ N(0, 1), and phi ~ N(0, I): L_1..L_k, `[B, P]`."""
    where = torch.arange(tasks)

    def loss(i: int) -> Loss:
        x = key.sub("x").normal(examples * dimension, where, i).double().unflatten(1, (examples, dimension))
        y = key.sub("y").normal(examples, where, i).double()

        def value(phi: Tensor) -> Tensor:
            z = torch.einsum("bnp,bp->bn", x, phi) - y
            return (torch.logaddexp(z, -z) - math.log(2)).mean(1)

        return value

    return [loss(i) for i in range(k)], key.sub("phi").normal(dimension, where).double()


def linear(key: Key, tasks: int, k: int, *, dimension: int = 5) -> tuple[list[Loss], Tensor]:
    """Losses a . phi, without curvature, and phi."""
    where = torch.arange(tasks)
    slopes = [key.sub("a").normal(dimension, where, i).double() for i in range(k)]
    return [lambda phi, a=a: (a * phi).sum(1) for a in slopes], key.sub("phi").normal(dimension, where).double()  # type: ignore[misc]


def residual(losses: Sequence[Loss], phi: Tensor, alpha: float) -> Gradients:
    """|exact - expansion| over |exact|, all tasks as one vector; scalars."""
    exact = gradients(losses, phi, alpha)
    return exact.map(expansion(losses, phi, alpha), by=lambda g, e: (g - e).norm() / g.norm())


def study(seed: int, *, tasks: int, ks: Sequence[int] = (2, 3, 4, 5)) -> dict[str, Any]:
    """Every number of `metalearn report taylor`, as plain lists of records."""
    key = Key(seed, "taylor")
    found: dict[str, list[dict[str, Any]]] = {"coefficients": [], "orders": [], "linear": [], "in_sample": []}
    for k in ks:
        found["coefficients"] += _coefficient_rows(key.sub(f"k = {k}"), k, tasks)
        losses, phi = log_cosh(key.sub(f"log cosh {k}"), 20, k)
        rates = [10 ** (-5 + j / 4) for j in range(21)]
        curve = [residual(losses, phi, rate) for rate in rates]
        halves = [residual(losses, phi, rate) for rate in (1e-4, 5e-5)]
        exact = residual(*linear(key.sub(f"linear {k}"), 20, k), 0.1)
        q = random_quadratics(key.sub(f"in sample {k}"), 200, k)
        errors = [in_sample_coefficients(q, rate) for rate in (1e-3, 5e-4)]
        for i, name in enumerate(ALGORITHMS):
            where = {"algorithm": name, "k": k}
            ratio = float(halves[0][i] / halves[1][i])
            points = [[rate, float(r[i])] for rate, r in zip(rates, curve, strict=True)]
            found["orders"].append(where | {"ratio": ratio, "holds": abs(ratio - 4) < 0.02, "residuals": points})
            found["linear"].append(where | {"residual": float(exact[i]), "holds": float(exact[i]) < 1e-13})
            off = [abs(e[name][1] - COEFFICIENTS[name](k)[1]) for e in errors]
            found["in_sample"].append(where | {"alpha": 1e-3, "error": off[0], "error_at_half": off[1]})
    return found


def _coefficient_rows(key: Key, k: int, tasks: int) -> list[dict[str, Any]]:
    rows = []
    for name, (value, slope) in coefficients(key, k, tasks=tasks).items():
        a, b = COEFFICIENTS[name](k)
        entries = [
            ("AvgGrad", a, value, 0),
            ("-alpha AvgGradInner", b, slope, 1),
            ("AvgGrad at order alpha", 0.0, slope, 0),
            ("AvgGradInner at order 1", 0.0, value, 1),
        ]
        for term, theory, fit, i in entries:
            measured, bound = float(fit.value[i]), 3 * float(fit.error[i])
            holds = abs(measured - theory) <= bound
            rows.append(
                {"algorithm": name, "k": k, "term": term, "theory": theory, "measured": measured}
                | {"three_se": bound, "holds": holds}
            )
    return rows
