"""What Figures 3, 10 and 12 of Unraveling MAML show of trained cells, from results whose numbers the test knows."""

import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

from metalearn.cells import expand
from metalearn.figures import draw
from metalearn.paths import conf_dir
from metalearn.results import Result
from metalearn.run import build, build_data, build_learner
from metalearn.shown import Shown
from metalearn.unravel import fig3, fig10a, fig10b, fig12, heuristic_range, rates

TASKS = np.random.default_rng(0).gamma(1.0, size=40)
TASKS /= TASKS.mean()
"""Errors of test tasks, as multiples of their mean."""


class Kept(Result):
    """A result whose tasks' errors are in memory, in proportion to TASKS if nothing else is said."""

    __slots__ = ()

    def values(self, **_):
        mean = self.data["metrics"]["mse"]["mean"]
        return np.empty(0) if mean is None else self.data.get("tasks", mean * TASKS)


def result_of(config, alpha, test_alpha, seed, mean, **more):
    config = config | {"seed": seed, "algorithm": config["algorithm"] | {"alpha": alpha, "test_alpha": test_alpha}}
    data = {"config": config, "seed": seed, "status": "done", "metrics": {"mse": {"mean": mean}}}
    return Kept(Path("nowhere"), data | {"protocol": {"bn": "batch"}} | more)


@functools.cache
def file_of(experiment):
    return yaml.safe_load(Path(conf_dir(), "experiment", "unravel", f"{experiment}.yaml").read_text())


@functools.cache
def config_of(experiment):
    """Of a cell of an experiment."""
    return expand([f"experiment=unravel/{experiment}", "seed=0"], to_run=False)[0].config


def results_of(experiment, score):
    """Results of an experiment's cells; `score` maps (alpha, test_alpha, seed) to a mean, None for nothing finite."""
    return [
        result_of(config_of(experiment), alpha, test_alpha, seed, score(alpha, test_alpha, seed))
        for block in file_of(experiment)["grid"]
        for alpha in block["algorithm.alpha"]
        for test_alpha in block.get("algorithm.test_alpha", [None])
        for seed in block["seed"]
    ]


def drawn(shown: Shown):
    """Every figure can be made into a file."""
    return [draw.encoded(figure, "png") for figure in shown.figures.values()]


# ---- rates -------------------------------------------------------------------------------------------------------


def rate_of(errors, rate=0.1, lost=0, tasks=TASKS):
    """A rate with these errors of seeds 0, 1, ..."""
    seeds = dict(enumerate(errors))
    return rates.Scored(rate, seeds, {k: m * tasks for k, m in seeds.items()}, lost)


def test_an_interval_over_seeds_is_that_of_logarithms():
    errors = [0.1, 1.0, 20.0]
    found, logs = rate_of(errors), np.log(errors)
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(logs)
    assert math.isclose(found.mean, scipy.stats.gmean(errors))
    assert np.allclose(found.ends, [math.exp(logs.mean() - half), math.exp(logs.mean() + half)]) and found.ends[0] > 0
    assert rate_of([0.5]).ends == (0.5, 0.5) and rate_of([0.5]).text() == "0.5 at 0.1"


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_rates_are_told_apart_as_a_paired_t_test_of_logarithms_tells_them(spread):
    """Where all tasks' errors are in proportion to those of the other rate, seeds are all that varies."""
    one = np.exp(spread * np.random.default_rng(1).normal(size=5))
    for factor in (0.5, 0.8, 0.97, 1.03, 1.3, 2.0):
        other = factor * np.exp(spread * np.random.default_rng(2).normal(size=5))
        p = scipy.stats.ttest_rel(np.log(one), np.log(other)).pvalue
        clear = bool(np.log(one / other).mean() < 0) if p < 0.05 else None
        assert rates.below(rate_of(one), rate_of(other)) is clear


def test_an_error_without_bounds_is_told_from_a_small_one_however_much_its_seeds_differ():
    assert rates.below(rate_of([0.2, 0.21, 0.2]), rate_of([1e4, 1e9, 1e6])) is True
    assert rates.below(rate_of([1e4, 1e9, 1e6]), rate_of([0.2, 0.21, 0.2])) is False


def test_few_tasks_that_decide_leave_rates_untold():
    """Seeds agree, but all of the difference is one task's."""
    tasks = TASKS.copy()
    tasks[3] += 0.4 * len(tasks)
    assert rates.below(rate_of([1.0, 1.0, 1.0]), rate_of([1.0, 1.0, 1.0], tasks=tasks)) is None
    assert rates.below(rate_of([1.0, 1.0, 1.0]), rate_of([1.4, 1.4, 1.4])) is True


def test_rates_without_an_error_of_each_seed():
    """One that lost a seed is worse, two that did cannot be told apart; the text says how many were lost."""
    whole, lost = rate_of([1.0, 1.1, 1.2]), rate_of([0.1, 0.2], lost=1)
    assert [rates.below(whole, lost), rates.below(lost, whole), rates.below(lost, lost)] == [True, False, None]
    assert lost.text() == "no finite error in 1 of 3 seeds at 0.1"
    assert rates.below(rate_of([1.0]), rate_of([9.0])) is None
    assert rates.below(rate_of([1.0, 1.0], tasks=np.empty(0)), rate_of([9.0, 9.0])) is None


# ---- Figure 12 ---------------------------------------------------------------------------------------------------


def valley(at):
    """An error that is least at a rate, of test if there is one, and not finite below -0.004."""

    def score(alpha, test_alpha, seed):
        rate = alpha if test_alpha is None else test_alpha
        return None if rate < -0.004 else 0.1 + 100 * (rate - at) ** 2 + 0.001 * seed

    return score


@pytest.mark.parametrize(("at", "left", "right"), [(0.02, True, True), (-0.002, False, False), (0.0, False, False)])
def test_figure_12_asks_whether_the_best_rate_is_positive(at, left, right):
    found = fig12.show(results_of("fig12", valley(at)))
    assert [f.holds for f in found.findings] == [left, right]
    assert "trained at 0.01" in found.findings[0].claim and "same rate" in found.findings[1].claim
    assert len(drawn(found)) == 1
    if at > 0:
        assert "0.101 (" in found.findings[0].measured and " at 0.02" in found.findings[0].measured


def test_figure_12_says_that_no_network_is_trained_at_a_negative_rate():
    left, right = fig12.show(results_of("fig12", valley(0.02))).findings
    assert "the best rate is positive" in left.claim and "best of 2 negative rates" in left.measured
    assert "better than none" in right.claim and "no negative rate is tested" in right.criterion


def test_figure_12_needs_more_than_one_seed_and_a_clear_difference():
    one = [r for r in results_of("fig12", valley(0.02)) if r.data["seed"] == 0]
    assert [f.holds for f in fig12.show(one).findings] == [None, None]

    def noise(alpha, test_alpha, seed):
        return [1.0, 1.3, 1.6][seed] - (0.1, -0.2, 0.3)[seed] * (test_alpha == 0.02)

    mixed = [r for r in results_of("fig12", noise) if r.config["algorithm"]["test_alpha"] is not None]
    (finding,) = fig12.show(mixed).findings
    assert finding.holds is None and " at 0.02" in finding.measured


def test_figure_12_ends_its_axes_at_ten_times_the_error_without_a_step():
    """What is beyond is a triangle at the edge and a number in the notes; a rate without an error is a cross."""

    def score(alpha, test_alpha, seed):
        rates_of = {-0.005: None, 0.03: 30.5, 0.05: 1e30}
        return rates_of.get(test_alpha, 3.0 - 20 * (test_alpha if test_alpha is not None else alpha))

    found = fig12.show(results_of("fig12", score))
    left, right = found.figures["fig12"].axes
    assert math.isclose(left.get_ylim()[1], 30) and math.isclose(right.get_ylim()[1], 30)
    marks = {m.get_marker(): list(m.get_xdata()) for m in left.lines if m.get_marker() in ("^", "x")}
    assert marks == {"^": [0.03, 0.05], "x": [-0.005]}
    assert found.notes[-1] == "beyond the axis, trained at 0.01: 30 at 0.03, 1e+30 at 0.05"
    assert len(drawn(found)) == 1


# ---- Figure 10 ---------------------------------------------------------------------------------------------------

PANELS = {"fig10a": fig10a, "fig10b": fig10b}
SIZES = {"fig10a": (3 * 64 + 1, 3000 * 250), "fig10b": (1761, 5000 * 250)}
"""Parameters d, and support points N K of all meta-steps."""


def slopes(at, width=0.05):
    """An error that grows in both directions from a rate, too little to be seen within a relative width."""

    def score(alpha, _, seed):
        away = abs(math.log(alpha / at))
        return math.exp(0.0 if away < width else away) * (1 + 0.01 * ((seed * round(1e6 * alpha)) % 3))

    return score


@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize(("at", "width", "holds"), [(0.03, 0.05, True), (0.03, 20, None), (0.0003, 0.05, False)])
def test_figure_10_asks_whether_all_of_the_best_alphas_are_in_the_range(panel, at, width, holds):
    """From 2 / d on: 0.0104 for the quadratic net, 0.00114 for the sine net, to n / d."""
    found = PANELS[panel].show(results_of(panel, slopes(at, width)))
    point, paper, own = found.findings
    d, n = SIZES[panel]
    assert paper.holds is holds and [f.ours for f in found.findings] == [False, True, True]
    if width < 1:  # else any rate may have the least error
        assert point.holds is (2 / d <= at <= n / d) and point.measured.startswith(f"{at:g}, ")
    assert f"range {2 / d:.3g} to {n / d:.3g} (min(N K, d) = {d}, n = {n})" in paper.measured
    assert "none above" not in paper.measured
    assert ("not told from it: none" in paper.measured) == (width < 1)
    assert list(found.figures) == [panel] and len(drawn(found)) == 1


def test_figure_10_decides_nothing_of_a_range_that_no_rate_passes():
    """Unless the largest rate diverges, which larger ones then do as well."""
    within = [r for r in results_of("fig10a", slopes(0.03)) if r.config["algorithm"]["alpha"] < 1000]
    for finding in fig10a.show(within).findings[:2]:
        assert finding.holds is None and "none above" in finding.measured

    def diverging(alpha, _, seed):
        return None if alpha == 100 and seed else slopes(0.03)(alpha, _, seed)

    lost = [r for r in results_of("fig10a", diverging) if r.config["algorithm"]["alpha"] < 1000]
    point, finding, _ = fig10a.show(lost).findings
    assert point.holds is finding.holds is True and "no finite error in 2 of 3 seeds at 100" in finding.measured


def test_figure_10_passes_over_rates_that_lost_a_seed():
    finding = fig10a.show(results_of("fig10a", lambda a, _, seed: None if a == 0.0003 and seed else a)).findings[1]
    assert finding.holds is False and " at 0.001" in finding.measured


def test_a_panel_of_figure_10_takes_any_data_set():
    found = fig10a.show(results_of("fig10b", slopes(0.03)))
    assert list(found.figures) == ["fig10a"] and found.findings[0].holds is True


@pytest.mark.parametrize("panel", PANELS)
def test_figure_10_takes_the_range_of_its_network_s_own_features(panel):
    """One gradient of the output after another, for the tasks of the estimate; the range over their range squared."""
    config = config_of(panel)
    paper, own = heuristic_range.ranges(config)
    dataset = build("dataset", config["dataset"])
    net, data = build_learner(config, dataset).net, build_data(config, dataset)
    support = data.stream("alpha", 0, 32).episodes.support
    weights = list(net.parameters())

    def output(x):
        for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
            x = torch.relu(weight @ x + bias)
        return weights[-2] @ x + weights[-1]

    points = support.x.flatten(0, 1)
    gradients = (torch.autograd.grad(output(x), weights) for x in points)
    entries = torch.stack([torch.cat([g.flatten() for g in each]) for each in gradients])
    assert entries.shape == (320, SIZES[panel][0])
    spread = float(entries.max() - entries.min())
    n = int(re.match(r"n = (\d+)", own.parts)[1])
    assert np.allclose([own.low, own.high], [2 / SIZES[panel][0] / spread**2, n / SIZES[panel][0] / spread**2])
    assert np.isclose(paper.low / own.low, spread**2)


# ---- Figure 3 ----------------------------------------------------------------------------------------------------


def curves(tmp_path, speed):
    """Results with logs in which accuracy nears 0.9 at a speed of each rate."""
    steps, found = range(50, 1001, 50), []
    for i, result in enumerate(results_of("fig3", lambda *_: 0.9)):
        rate, folder = result.config["algorithm"]["alpha"], tmp_path / str(i)
        folder.mkdir()
        rows = [
            {"attempt": 1, "step": s, "val_accuracy": 0.9 * (1 - np.exp(-speed(rate) * s / 200))}
            | ({"alpha": 0.2 + 1 / s} if rate == "online" else {})
            for s in steps
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        found.append(result._replace(folder=folder))
    return found


@pytest.mark.parametrize(("online", "holds"), [(2.0, True), (1.0, True), (0.5, False)])
def test_figure_3_asks_who_is_first(tmp_path, online, holds):
    found = fig3.show(curves(tmp_path, lambda rate: online if rate == "online" else 1.0))
    faster, fastest = found.findings
    assert faster.holds is fastest.holds is holds and "and 1000 meta-steps" in faster.measured
    assert {2.0: "after 500 ", 1.0: "after 1000 ", 0.5: "after inf "}[online] in faster.measured
    assert (
        "0.03 never" if online == 2.0 else "0.03 after 1000" if online == 1 else "0.03 after 500"
    ) in fastest.measured
    assert len(drawn(found)) == 1


def test_figure_3_says_if_another_fixed_rate_is_first(tmp_path):
    found = fig3.show(curves(tmp_path, lambda rate: {"online": 2.0, 1.0: 4.0}.get(rate, 1.0)))
    assert [f.holds for f in found.findings] == [True, False]
    assert "of the fixed rates 0.03 never" in found.findings[1].measured
    assert "1.0 after 500 meta-steps, 90.0 +- 0.0 % at the end" in found.findings[1].measured


def test_figure_3_is_undecided_without_logs():
    found = fig3.show(results_of("fig3", lambda *_: 0.9))
    assert found.figures == {} and [f.holds for f in found.findings] == [None, None]
