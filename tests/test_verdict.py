"""Verdicts against simulation: how often intervals hold, that the named numbers suffice, and where the bounds lie."""

import math

import numpy as np
import pytest
from scipy import stats

from metalearn.statistics import (
    Components,
    components,
    half_width,
    over_seeds,
    over_tasks,
    p_value,
    summarized_components,
)
from metalearn.tables import verdict
from metalearn.tables.verdict import DIFFERS, REPRODUCED, UNDERPOWERED, judge


def scores(rng, mean, seed, task, rest, seeds, tasks):
    """`[seeds, tasks]` with these standard deviations."""
    shared = rng.normal(size=tasks) * task + rng.normal(size=(seeds, 1)) * seed
    return mean + shared + rng.normal(size=(seeds, tasks)) * rest


def test_components_are_found_again_in_many_draws():
    rng = np.random.default_rng(0)
    found = [components(scores(rng, 5, 0.5, 1.0, 2.0, 6, 40)) for _ in range(800)]
    for name, true in (("mean", 5), ("seed", 0.25), ("task", 1.0), ("rest", 4.0)):
        x = np.array([getattr(c, name) for c in found])
        assert x.mean() == pytest.approx(true, abs=4 * x.std() / math.sqrt(len(x)) + 0.01), name


def error(c, *numbers):
    return sum(variance for variance, _ in c.parts(*numbers))


def test_error_of_a_mean_is_that_of_simulated_means():
    rng = np.random.default_rng(1)
    means = [scores(rng, 0, 0.5, 1.0, 2.0, 4, 30).mean() for _ in range(4000)]
    found = Components(0, 0.25, 1.0, 4.0, 9, 99)
    assert error(found, 4, 30) == pytest.approx(np.var(means), rel=0.07)
    assert error(found, 4, 30) == pytest.approx(0.25 / 4 + 1 / 30 + 4 / 120)
    assert error(found.scaled(10)) == pytest.approx(100 * error(found))


def test_one_model_has_the_ordinary_interval_over_tasks():
    x = np.random.default_rng(2).normal(size=50)
    low, high = stats.t.interval(0.95, 49, loc=x.mean(), scale=stats.sem(x))
    assert half_width(components(x).parts()) == pytest.approx((high - low) / 2)
    assert over_tasks(x).half == pytest.approx(1.959964 * math.sqrt(error(components(x))))


def test_models_that_agree_on_every_task_have_the_interval_over_tasks_and_those_without_tasks_that_over_seeds():
    rng = np.random.default_rng(3)
    x = rng.normal(size=50)
    assert half_width(components(np.stack([x, x, x])).parts()) == pytest.approx(half_width(components(x).parts()))
    y = rng.normal(size=(4, 1)) + np.zeros((4, 50))
    assert half_width(components(y).parts()) == pytest.approx(over_seeds(y[:, 0]).half)


def test_p_is_where_the_interval_reaches_zero_and_students_for_one_part():
    x = np.random.default_rng(4).normal(size=12)
    part = (stats.sem(x) ** 2, 11)
    assert p_value(x.mean(), [part]) == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
    assert p_value(1.96, [(1.0, math.inf)]) == pytest.approx(2 * stats.norm.sf(1.96))
    for difference in (0.01, 0.5, 3.0):
        p = p_value(difference, [part, (0.04, math.inf)])
        assert half_width([part, (0.04, math.inf)], 1 - p) == pytest.approx(difference)
    assert (p_value(0.0, [part]), p_value(1.0, [(0.0, 3)])) == (1.0, 0.0)
    assert p_value(-1e9, [(1.0, math.inf)]) == 0.0


def test_summaries_alone_never_give_a_narrower_interval():
    rng = np.random.default_rng(3)
    for _ in range(50):
        x = scores(rng, 0, 0.3, 1.0, 0.5, 3, 40)
        known = components(x)
        blind = summarized_components(x.mean(1), x.std(1, ddof=1), 40, shared=True)
        assert blind.mean == pytest.approx(known.mean)
        assert error(blind) >= error(known) * (1 - 1e-9)
    apart = summarized_components([1.0, 1.2], [0.5, 0.5], 25, shared=False)
    assert error(apart) == pytest.approx(0.02 / 2)  # seeds' own tasks are already in the spread of their means


@pytest.mark.parametrize(("seeds", "seed"), [(1, 0.0), (3, 0.02), (10, 0.5)])
def test_the_interval_of_a_difference_holds_in_95_of_100(seeds, seed):
    rng, held = np.random.default_rng(4), []
    for _ in range(400):
        ours = components(scores(rng, 1.0, seed, 1.0, 0.5, seeds, 50))
        published = 1.0 + 0.1 * rng.normal()
        j = judge(ours, published, 1.959964 * 0.1, None)
        held.append(abs(j.difference) <= j.half)
    assert 0.93 <= np.mean(held) <= 0.998


def test_the_difference_counts_seeds_tasks_and_the_published_interval():
    x = scores(np.random.default_rng(5), 1.0, 0.3, 1.0, 0.5, 4, 60)
    j = judge(components(x), 0.8, 0.2, 1.0)
    seeds = over_seeds(x.mean(1)).half
    tasks = stats.t.ppf(0.975, 59) * math.sqrt(components(x).task / 60)
    assert j.half == pytest.approx(math.sqrt(seeds**2 + tasks**2 + 0.2**2))
    assert (j.p < 0.05) == (abs(j.difference) > j.half)
    assert math.isnan(judge(components(x), 0.8, None, 1.0).p)  # published without an interval


def exact(mean, half):
    """One model whose 95 % half-width over many tasks is this."""
    n = 10**6
    return Components(mean, 0.0, (half / 1.959964) ** 2 * n, 0.0, 1, n)


@pytest.mark.parametrize(
    ("difference", "half", "expected"),
    [
        (0.0, 0.99, REPRODUCED), (0.0, 1.01, UNDERPOWERED), (0.5, 0.49, REPRODUCED), (-0.5, 0.51, UNDERPOWERED),
        (1.5, 0.49, DIFFERS), (1.5, 0.51, UNDERPOWERED), (-1.5, 0.49, DIFFERS), (1.0, 0.01, UNDERPOWERED),
        (0.0, 3.0, UNDERPOWERED), (40.0, 3.0, DIFFERS),
    ],
)  # fmt: skip
def test_bounds(difference, half, expected):
    assert judge(exact(50 + difference, half), 50, None, 1.0).verdict == expected
    theirs = half / math.sqrt(2)  # half of the variance in the published number changes no verdict
    assert judge(exact(50 + difference, theirs), 50, theirs, 1.0).verdict == expected


def decided(rng, truth, published, half, *, seeds, tasks, times=150):
    """How often the verdict is not open, and how often it is the right one."""
    with pytest.MonkeyPatch.context() as patch:  # what would decide is not asked here
        patch.setattr(verdict, "_what_decides", lambda *_: (None, None, None))
        draws = (components(scores(rng, *truth, seeds, tasks)) for _ in range(times))
        found = [judge(ours, published, half, 1.0).verdict for ours in draws]
    right = REPRODUCED if abs(truth[0] - published) < 1 else DIFFERS
    return np.mean([v != UNDERPOWERED for v in found]), np.mean([v == right for v in found])


@pytest.mark.parametrize("half", [None, 0.3])
@pytest.mark.parametrize("difference", [0.0, 0.5, 2.0])
def test_the_named_number_of_episodes_suffices(difference, half):
    rng = np.random.default_rng(6)
    n = judge(Components(50 + difference, 0.0, 8.0**2, 0.0, 1, 20), 50, half, 1.0).tasks
    often, right = decided(rng, (50 + difference, 0, 8.0, 0), 50, half, seeds=1, tasks=n)
    assert 0.75 <= often and right >= often - 0.03
    fewer, _ = decided(rng, (50 + difference, 0, 8.0, 0), 50, half, seeds=1, tasks=n // 3)
    assert fewer < 0.7  # and it is not far more than needed


def test_more_seeds_are_asked_for_where_seeds_limit_and_suffice():
    rng = np.random.default_rng(7)
    found = judge(Components(50.0, 1.0**2, 3.0**2, 3.0**2, 3, 600), 50, None, 1.0)
    assert found.tasks is None and 3 < found.seeds < 40
    often, right = decided(rng, (50, 1.0, 3.0, 3.0), 50, None, seeds=found.seeds, tasks=600, times=150)
    assert often >= 0.72 and right >= often - 0.03


def test_both_are_named_where_neither_alone_suffices():
    found = judge(Components(50.0, 1.0, 20.0**2, 0.0, 3, 300), 50, None, 1.0)
    assert found.tasks and found.seeds and found.reason is None
    often, _ = decided(
        np.random.default_rng(8), (50, 1.0, 20.0, 0), 50, None, seeds=found.seeds, tasks=found.tasks, times=60
    )
    assert often >= 0.7


def test_with_no_true_difference_and_enough_of_both_the_verdict_is_reproduced():
    _, right = decided(np.random.default_rng(9), (50, 0.3, 8.0, 2.0), 50, 0.2, seeds=8, tasks=3000)
    assert right > 0.95


def test_what_no_number_of_ours_can_decide_is_said():
    wide = judge(exact(50.0, 0.1), 50, 1.84, 1.0)
    assert wide.verdict == UNDERPOWERED and wide.tasks is wide.seeds is None
    assert "published interval alone is wider than the margin" in wide.reason
    assert "reaches across the margin" in judge(exact(50.9, 0.3), 50, 0.4, 1.0).reason
    assert "at the margin" in judge(exact(51.0, 0.3), 50, None, 1.0).reason
    assert judge(exact(60.0, 0.1), 50, 1.84, 1.0).verdict == DIFFERS


def test_without_a_margin_there_is_no_verdict_and_without_an_error_no_interval():
    assert judge(exact(50.0, 0.1), 50, None, None).verdict is None
    one = judge(components(np.array([[3.0]])), 3.0, None, 1.0)
    assert one.verdict == UNDERPOWERED and math.isnan(one.half) and one.reason
