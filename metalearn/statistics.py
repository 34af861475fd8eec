"""Intervals and tests of scores: what varies (tasks of one model, or seeds) is always said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
"""Half-width of a 95 % interval in standard errors."""


class Estimate(NamedTuple):
    """A mean, the half-width of its 95 % interval (NaN for a single value), and how many values it is of."""

    mean: float
    half: float
    n: int


def over_seeds(means: Sequence[float]) -> Estimate:
    """The mean of runs' means and its interval over seeds (Student's t with n - 1 degrees of freedom)."""
    x = np.asarray(means, "f8")
    return Estimate(float(x.mean()), _student(x), len(x))


def over_tasks(values: np.ndarray) -> Estimate:
    """The mean of per-task values and its interval over tasks: 1.96 standard errors.

    Args:
        values: `[tasks]`, or `[seeds, tasks]` of models tested on the same tasks, whose per-task means are taken.
    """
    x = np.atleast_2d(np.asarray(values, "f8")).mean(0)
    half = Z * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return Estimate(float(x.mean()), float(half), len(x))


class Paired(NamedTuple):
    """A difference of two methods on the same episodes and seeds, with an interval of each kind."""

    mean: float
    over_tasks: float
    over_seeds: float
    seeds: int
    tasks: int


def paired(ours: Mapping[int, np.ndarray], base: Mapping[int, np.ndarray]) -> Paired | None:
    """The difference `ours - base`, seed by seed and episode by episode.

    Args:
        ours: per-episode values `[tasks]` by seed.
        base: the same of the other method, on equal episodes.

    Returns:
        None if no seed is common. The interval over tasks is of the per-episode differences averaged over seeds, the
        one over seeds (Student's t, NaN for one seed) of the per-seed mean differences.

    Raises:
        ValueError: if the numbers of episodes differ.
    """
    seeds = sorted(ours.keys() & base.keys())
    if not seeds:
        return None
    difference = np.stack([np.asarray(ours[s], "f8") - np.asarray(base[s], "f8") for s in seeds])
    tasks = over_tasks(difference)
    return Paired(tasks.mean, tasks.half, _student(difference.mean(1)), len(seeds), tasks.n)


def _student(x: np.ndarray) -> float:
    if len(x) < 2:
        return math.nan
    from scipy.stats import t

    return float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))


def detectable(std: float, n: int, *, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided 5 % test of a mean of n values finds with this power.

    Args:
        std: standard deviation of the values (per-task differences of a paired comparison, or scores).
        n: how many.
        power: the probability of finding it.
    """
    from scipy.stats import norm

    return float((Z + norm.ppf(power)) * std / math.sqrt(n))


class Components(NamedTuple):
    """A mean score of models tested on the same tasks, and the variances that a new seed, a new task, and both bring.

    The model is `score = mean + seed + task + rest` with independent random effects. With a single seed its variance is
    unknown and taken as 0 (`seeds == 1` says so), and `task` holds all that varies among tasks.
    """

    mean: float
    seed: float
    task: float
    rest: float
    seeds: int
    tasks: int

    def parts(self, seeds: int | None = None, tasks: int | None = None) -> list[tuple[float, float]]:
        """The squared standard errors of the mean, each with its degrees of freedom, for other numbers if given.

        With several seeds these are what varies among their means, and what their tasks bring that is common to all;
        with one seed, what varies among tasks. NaN for one seed and one task.
        """
        s, n = seeds or self.seeds, tasks or self.tasks
        if s > 1:
            return [(self.seed / s + self.rest / (s * n), s - 1), (self.task / n, max(n - 1, 1))]
        return [(self.task / n, n - 1)] if n > 1 else [(math.nan, math.nan)]

    def scaled(self, factor: float) -> Components:
        """The same in another unit."""
        squared = factor * factor
        return self._replace(
            mean=factor * self.mean, seed=squared * self.seed, task=squared * self.task, rest=squared * self.rest
        )


Parts = Sequence[tuple[float, float]]
"""Squared standard errors of independent parts of an error, each with its degrees of freedom (may be infinite)."""


LEAST = -100
"""Decimal exponent of the least p that is told from 0."""


def half_width(parts: Parts, level: float = 0.95) -> float:
    """Half-width of an interval: those of the parts (Student's t), the root of the sum of their squares."""
    return _width(parts, (1 - level) / 2)


def p_value(difference: float, parts: Parts) -> float:
    """The two-sided p at which the interval of `half_width` reaches from the difference to 0; NaN without an error."""
    if any(math.isnan(v) for v, _ in parts):
        return math.nan
    if difference == 0 or all(v == 0 for v, _ in parts):
        return 1.0 if difference == 0 else 0.0
    from scipy.optimize import brentq

    def beyond(exponent: float) -> float:
        return _width(parts, 10**exponent / 2) - abs(difference)

    return 0.0 if beyond(LEAST) < 0 else float(10 ** brentq(beyond, LEAST, 0))


def _width(parts: Parts, tail: float) -> float:
    return math.hypot(*(math.sqrt(v) * _student_quantile(tail, df) for v, df in parts if v != 0))


def _student_quantile(tail: float, df: float) -> float:
    """The value above which this probability lies; `scipy.stats` gives the same a hundred times more slowly."""
    from scipy.special import ndtri, stdtrit

    return float(-ndtri(tail) if math.isinf(df) else -stdtrit(df, tail))


def components(values: np.ndarray) -> Components:
    """Variance components of scores by analysis of variance, two-way without replication; negative ones become 0.

    Args:
        values: `[seeds, tasks]` of models tested on the same tasks, or `[tasks]` of one model.
    """
    x = np.atleast_2d(np.asarray(values, "f8"))
    s, n = x.shape
    mean, by_seed, by_task = float(x.mean()), x.mean(1), x.mean(0)
    if s == 1 or n == 1:
        return Components(mean, _variance(by_seed), _variance(by_task), 0.0, s, n)
    residual = x - by_seed[:, None] - by_task[None, :] + mean
    rest = float((residual**2).sum() / ((s - 1) * (n - 1)))
    seed, task = _variance(by_seed) - rest / n, _variance(by_task) - rest / s
    return Components(mean, max(seed, 0.0), max(task, 0.0), rest, s, n)


def summarized_components(means: Sequence[float], stds: Sequence[float], tasks: int, *, shared: bool) -> Components:
    """Variance components where only each model's mean and deviation over tasks are known.

    Args:
        means: of the models, one a seed.
        stds: sample deviations over tasks.
        tasks: of each model.
        shared: whether all models were tested on the same tasks; then everything that varies among tasks is taken as
            shared, which can only widen an interval.
    """
    means_, within = np.asarray(means, "f8"), float(np.mean(np.square(stds)))
    mean, seed = float(means_.mean()), _variance(means_)
    if shared or len(means_) == 1:
        return Components(mean, seed, within, 0.0, len(means_), tasks)
    return Components(mean, max(seed - within / tasks, 0.0), 0.0, within, len(means_), tasks)


def _variance(x: np.ndarray) -> float:
    return float(x.var(ddof=1)) if len(x) > 1 else 0.0
