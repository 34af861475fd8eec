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
