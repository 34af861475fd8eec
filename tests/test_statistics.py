"""Intervals over tasks and over seeds against scipy and by hand; the smallest difference against simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from metalearn.statistics import detectable, over_seeds, over_tasks, paired


def test_over_seeds_is_student():
    x = [0.5, 0.7, 0.9]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(x), scale=stats.sem(x))
    assert over_seeds(x) == pytest.approx((0.7, (high - low) / 2, 3))
    assert math.isnan(over_seeds([1.0]).half)


def test_over_tasks_averages_models_first():
    one, other = np.array([0.0, 1.0, 2.0]), np.array([2.0, 1.0, 0.0])
    assert over_tasks(np.stack([one, other])) == (1.0, 0.0, 3)
    assert over_tasks(one).half == pytest.approx(1.959964 / math.sqrt(3))


def test_paired_differences_take_out_what_episodes_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=500)
    ours = {s: hard + 0.1 + 0.01 * rng.normal(size=500) for s in range(4)}
    base = {s: hard + 0.01 * rng.normal(size=500) for s in range(1, 5)}
    found = paired(ours, base)
    assert (found.seeds, found.tasks) == (3, 500)
    assert found.mean == pytest.approx(0.1, abs=0.01)
    assert found.over_tasks < 0.002 < over_tasks(hard).half
    by_seed = [np.mean(ours[s] - base[s]) for s in (1, 2, 3)]
    assert found.over_seeds == pytest.approx(over_seeds(by_seed).half)
    assert paired({0: hard}, {1: hard}) is None
    with pytest.raises(ValueError):
        paired({0: hard}, {0: hard[:-1]})


def test_detectable_difference_is_found_that_often():
    rng = np.random.default_rng(1)
    n, std = 50, 2.0
    true = detectable(std, n)
    x = true + std * rng.normal(size=(4000, n))
    z = x.mean(1) / (std / math.sqrt(n))
    assert np.mean(abs(z) > 1.959964) == pytest.approx(0.8, abs=0.02)
