"""Means over tasks, and the names that results give them (contract, section 3)."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalearn.evaluation.metrics import TaskMean, metric_name, summarize

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(NUMBERS)
def test_mean_and_interval_over_tasks_are_numpys(values):
    found = TaskMean(values).compute("fraction")
    std = np.std(values, ddof=1)
    expected = [np.mean(values), std, 1.96 * std / math.sqrt(len(values))]
    np.testing.assert_allclose([found["mean"], found["std"], found["ci95"]], expected, rtol=1e-9, atol=1e-9)
    assert (found["n"], found["interval"], found["unit"]) == (len(values), "tasks", "fraction")


def test_batches_and_order_do_not_matter():
    """Values are per task: unequal batches weigh nothing, and sums are exact."""
    values = np.random.default_rng(0).normal(size=101) * 10.0 ** np.arange(101) / 1e50
    whole = TaskMean(values).compute("x")
    for cut in (1, 50, 100):
        parts = TaskMean(values[cut:])
        parts.update(values[:cut])
        assert parts.compute("x") == whole


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([], None),
        ([0.5], 0.5),
        ([1.0, math.nan], None),
        ([1.0, math.inf], None),
        ([math.inf, -math.inf], None),
        ([1e308, 1e308], None),
        ([1e200, 3e200], 2e200),
    ],
)
def test_what_is_not_finite_is_none(values, mean):
    """Never NaN, and no error, however a run ended."""
    found = TaskMean(values).compute("x")
    assert found["mean"] == mean and found["std"] is None and found["ci95"] is None and found["n"] == len(values)
    json.dumps(found, allow_nan=False)


def test_names():
    assert metric_name("accuracy") == "accuracy" == metric_name("accuracy", bn=None, step=None)
    assert metric_name("accuracy", step=0) == "accuracy@step=0"
    assert metric_name("accuracy", step=3, bn="batch", group=None) == "accuracy@bn=batch,step=3"
    assert metric_name("mse", step=1, group="line", bn="batch") == "mse@bn=batch,group=line,step=1"


def episodes(points, metric="accuracy", groups=(None,), n=4) -> pd.DataFrame:
    """Rows of n episodes at each (mode, step); the value of episode e at point p is 10 p + e."""
    rows = [
        {
            "episode": e,
            "bn": bn,
            "step": step,
            "metric": metric,
            "value": 10.0 * p + e,
            "group": groups[e % len(groups)],
        }
        for p, (bn, step) in enumerate(points)
        for e in range(n)
    ]
    return pd.DataFrame(rows).astype({"group": "object"})


def test_the_bare_name_is_the_headline():
    points = [("batch", 0), ("batch", 1), ("batch", 2), ("support_plus_one", 2)]
    found = summarize(episodes(points), "batch", 2)
    assert {name: m["mean"] for name, m in found.items()} == {
        "accuracy@step=0": 1.5,
        "accuracy@step=1": 11.5,
        "accuracy": 21.5,
        "accuracy@bn=support_plus_one": 31.5,
    }
    assert list(found) == sorted(found)
    assert all((m["n"], m["unit"], m["interval"]) == (4, "fraction", "tasks") for m in found.values())


def test_every_step_of_every_mode_has_a_name():
    points = list(itertools.product(("running", "batch"), (0, 3, 5)))
    assert set(summarize(episodes(points), "running", 5)) == {
        *("accuracy", "accuracy@step=0", "accuracy@step=3"),
        *("accuracy@bn=batch", "accuracy@bn=batch,step=0", "accuracy@bn=batch,step=3"),
    }


def test_nets_without_batch_norm_and_groups_of_tasks():
    found = summarize(episodes([("none", 0), ("none", 1)], "mse", ("line", "sine")), "none", 1)
    assert set(found) == {"mse", "mse@step=0", "mse@group=line", "mse@group=sine"}
    assert [found[f"mse@group={g}"]["mean"] for g in ("line", "sine")] == [11.0, 12.0]
    assert found["mse@group=line"]["n"] == 2 and found["mse"]["unit"] == "target units squared"


def test_a_summary_of_diverged_predictions_is_json():
    rows = episodes([("none", 0), ("none", 1)], "mse")
    rows.loc[5, "value"] = math.nan
    found = summarize(rows, "none", 1)
    assert found["mse"]["mean"] is None and found["mse@step=0"]["mean"] == 1.5
    assert "NaN" not in json.dumps(found, allow_nan=False)
