"""Bernacchia's linear regression (section H.5, Fig. 11): the best adaptation rate with separate query data and noise.

Task: w ~ N(w_0, nu^2 / p I_p), x ~ N(0, I_p), y ~ N(x^T w, sigma^2). One inner step of rate alpha_t on n_t support
samples, theta = omega - alpha_t / n_t X_t^T (X_t omega - y_t), is judged on n_v query samples, over m tasks; the
meta-parameters omega are the least squares of all tasks' query residuals, the ones of least norm if m n_v < p. The same
step of rate alpha_r on n_r samples adapts to new tasks.

Losses have the factor 1/2 here, so that alpha = 2 alpha of `metalearn.theory.alpha_star`: `estimate` is twice
`alpha_star.gaussian_split`.

Bernacchia, "Meta-learning with negative learning rates", ICLR 2021, as used by Zou, Liu & Li, ICLR 2022. Everything is
float64 and batched over `R` runs; `A` are any axes of rates (none for a number).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from metalearn.theory.alpha_star import gaussian_split
from metalearn.theory.stacks import tasks_at_once
from metalearn.theory.symmetric import inverse

Rate = float | Tensor


@dataclass(frozen=True)
class Setting:
    """Sizes and spreads; the defaults are those of Fig. 11.

    Attributes:
        tasks: m.
        support: n_t, samples for the step in training.
        query: n_v, samples that judge it.
        test_support: n_r, samples for the step in tests.
        width: p.
        noise: sigma, of labels.
        spread: nu; w differs from w_0 by a vector of mean squared length nu^2.
        centre: each entry of w_0.
    """

    tasks: int = 40
    support: int = 5
    query: int = 25
    test_support: int = 10
    width: int = 30
    noise: float = 0.2
    spread: float = 0.2
    centre: float = 0.0

    def estimate(self) -> float:
        """alpha* of many tasks in this convention, n_t / (n_t + p + 1): Corollary 2, doubled."""
        return 2 * gaussian_split(self.support, self.width)


class Samples(NamedTuple):
    """x `[..., n, p]` and y `[..., n]`."""

    x: Tensor
    y: Tensor


class Tasks(NamedTuple):
    """Support and query samples of m tasks in each of R runs: leading axes `[R, m]`."""

    support: Samples
    query: Samples


def draw(setting: Setting, runs: int, generator: Generator) -> Tasks:
    """Training tasks of so many runs."""
    return _draw(setting, (runs, setting.tasks), setting.support, setting.query, generator)


def minimiser(tasks: Tasks, alpha: Rate) -> Tensor:
    """omega, `[A, R, p]`: the least squares of all query residuals after a step of rate alpha on the support samples.

    The residuals of a task are B omega - c, B = X_v - alpha / n_t X_v X_t^T X_t, c = y_v - alpha / n_t X_v X_t^T y_t.
    The normal equations are parabolas in alpha; with m n_v < p those of the dual, which give the least norm.
    """
    (x, y), (z, v) = tasks
    cross = z @ x.mT / x.shape[2]
    b, b_step = (t.flatten(1, 2) for t in (z, cross @ x))
    c, c_step = (t.flatten(1, 2)[..., None] for t in (v, (cross @ y[..., None])[..., 0]))
    rate = torch.as_tensor(alpha, dtype=x.dtype)[..., None, None, None]
    if b.shape[1] >= b.shape[2]:
        gram = b.mT @ b - rate * (b.mT @ b_step + b_step.mT @ b) + rate**2 * (b_step.mT @ b_step)
        right = b.mT @ c - rate * (b.mT @ c_step + b_step.mT @ c) + rate**2 * (b_step.mT @ c_step)
        return (inverse(gram) @ right)[..., 0]
    gram = b @ b.mT - rate * (b @ b_step.mT + b_step @ b.mT) + rate**2 * (b_step @ b_step.mT)
    dual = inverse(gram) @ (c - rate * c_step)
    return (b.mT @ dual - rate * (b_step.mT @ dual))[..., 0]


def expected_loss(omega: Tensor, setting: Setting, alpha: Rate) -> Tensor:
    """Mean loss over new tasks after a step of rate alpha = alpha_r on n_r samples, exactly.

    1/2 sigma^2 (1 + alpha^2 p / n_r) + 1/2 R ((1 - alpha)^2 + alpha^2 (p + 1) / n_r), R = E|omega - w|^2.

    Args:
        omega: `[..., p]`.
        setting: of the new tasks.
        alpha: rates, broadcast against the leading axes of omega.
    """
    return loss_at(distance(omega, setting), setting, alpha)


def distance(omega: Tensor, setting: Setting) -> Tensor:
    """R = E|omega - w|^2 over tasks, `[...]`: |omega - w_0|^2 + nu^2."""
    return (omega - setting.centre).square().sum(-1) + setting.spread**2


def loss_at(distance: float | Tensor, setting: Setting, alpha: Rate) -> Tensor:
    """`expected_loss` from R."""
    r, rate = (torch.as_tensor(v, dtype=torch.float64) for v in (distance, alpha))
    n, p, variance = setting.test_support, setting.width, setting.noise**2
    return variance / 2 * (1 + rate**2 * p / n) + r / 2 * ((1 - rate) ** 2 + rate**2 * (p + 1) / n)


def best_test_rate(distance: float | Tensor, setting: Setting) -> Tensor:
    """alpha_r whose loss is least for this R: n_r R / (R (n_r + p + 1) + sigma^2 p), positive for any omega."""
    r = torch.as_tensor(distance, dtype=torch.float64)
    n, p = setting.test_support, setting.width
    return n * r / (r * (n + p + 1) + setting.noise**2 * p)


def sampled_loss(
    omega: Tensor, setting: Setting, alpha: Rate, generator: Generator, *, tasks: int = 100, points: int = 50
) -> Tensor:
    """`expected_loss` of each run by sampling, as in the paper: the same new tasks for all rates.

    Args:
        omega: `[A, R, p]`.
        setting: of the new tasks.
        alpha: alpha_r, a number or `[A]`.
        generator: of the new tasks.
        tasks: of each run.
        points: on which a task is judged.

    Returns:
        `[A, R]`, mean over tasks.
    """
    rate = torch.as_tensor(alpha, dtype=torch.float64)[..., None, None, None]
    room = tasks * (setting.test_support + points) * (setting.width + max(1, omega[..., 0, 0].numel()))
    found = []
    for own in omega.split(tasks_at_once(room), -2):
        new = _draw(setting, (own.shape[-2], tasks), setting.test_support, points, generator)
        start = own[..., None, :]
        residual = torch.einsum("rtnp,...rtp->...rtn", new.support.x, start.expand(*own.shape[:-1], tasks, -1))
        step = torch.einsum("rtnp,...rtn->...rtp", new.support.x, residual - new.support.y) / setting.test_support
        theta = start - rate * step
        error = torch.einsum("rtnp,...rtp->...rtn", new.query.x, theta) - new.query.y
        found.append(error.square().mean((-2, -1)) / 2)
    return torch.cat(found, -1)


def losses(setting: Setting, train_rate: Rate, test_rate: Rate, runs: int, generator: Generator) -> Tensor:
    """Exact test losses of so many runs, `[A, R]`, all rates on the same tasks: the curves of Fig. 11.

    Args:
        setting: sizes.
        train_rate: alpha_t, a number or `[A]`.
        test_rate: alpha_r, a number or `[A]`.
        runs: R.
        generator: of the training tasks.
    """
    train, test = torch.broadcast_tensors(
        *(torch.as_tensor(rate, dtype=torch.float64) for rate in (train_rate, test_rate))
    )
    samples, p = setting.tasks * (setting.support + setting.query), setting.width
    fit, found = tasks_at_once(3 * samples * p + train.numel() * min(samples, p) ** 2), []
    for start in range(0, runs, fit):
        tasks = draw(setting, min(fit, runs - start), generator)
        found.append(expected_loss(minimiser(tasks, train), setting, test[..., None]))
    return torch.cat(found, -1)


def _draw(setting: Setting, shape: tuple[int, int], support: int, query: int, generator: Generator) -> Tasks:
    def randn(*size: int) -> Tensor:
        return torch.randn(*shape, *size, dtype=torch.float64, generator=generator)

    p = setting.width
    w = setting.centre + setting.spread / math.sqrt(p) * randn(p)

    def samples(n: int) -> Samples:
        x = randn(n, p)
        return Samples(x, (x @ w[..., None])[..., 0] + setting.noise * randn(n))

    return Tasks(samples(support), samples(query))
