"""What Figures 3, 10 and 12 of Unraveling MAML show of trained cells, from results whose numbers the test knows."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from metalearn.figures import draw
from metalearn.paths import conf_dir
from metalearn.results import Result
from metalearn.shown import Shown
from metalearn.unravel import fig3, fig10, fig12

QUADRATIC = {"name": "quadratic", "p": 1, "sigma": 0.2, "nu": 0.2}


def grid_of(experiment):
    """The experiment's file, and the (alpha, test_alpha, seed) of its cells."""
    file = yaml.safe_load(Path(conf_dir(), "experiment", "unravel", f"{experiment}.yaml").read_text())
    points = [
        (alpha, test_alpha, seed)
        for block in file["grid"]
        for alpha in block["algorithm.alpha"]
        for test_alpha in block.get("algorithm.test_alpha", [None])
        for seed in block["seed"]
    ]
    return file, points


def results_of(experiment, score, dataset=QUADRATIC):
    """Results of an experiment's cells; `score` maps (alpha, test_alpha, seed) to a mean, None for nothing finite."""
    file, points = grid_of(experiment)
    found = []
    for alpha, test_alpha, seed in points:
        config = {
            "algorithm": {"alpha": alpha, "test_alpha": test_alpha}, "dataset": {"shot": 10} | dataset,
            "backbone": file.get("backbone", {"hidden": [40, 40]}),
            "trainer": {"meta_batch_size": 25} | file["trainer"],
        }  # fmt: skip
        metrics = {"mse": {"mean": score(alpha, test_alpha, seed)}}
        data = {"config": config, "seed": seed, "status": "done", "metrics": metrics, "protocol": {"bn": "batch"}}
        found.append(Result(Path("nowhere"), data))
    return found


def drawn(shown: Shown):
    """Every figure can be made into a file."""
    return [draw.encoded(figure, "png") for figure in shown.figures.values()]


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
        assert "0.101 +- " in found.findings[0].measured and " at 0.02" in found.findings[0].measured


def test_figure_12_needs_more_than_one_seed_and_a_clear_difference():
    one = [r for r in results_of("fig12", valley(0.02)) if r.data["seed"] == 0]
    assert [f.holds for f in fig12.show(one).findings] == [None, None]

    def noise(alpha, test_alpha, seed):
        return [1.0, 1.3, 1.6][seed] - (0.1, -0.2, 0.3)[seed] * (test_alpha == 0.02)

    mixed = [r for r in results_of("fig12", noise) if r.config["algorithm"]["test_alpha"] is not None]
    (finding,) = fig12.show(mixed).findings
    assert finding.holds is False and " at 0.02" in finding.measured


# ---- Figure 10 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "dataset", "parameters", "observations"),
    [("fig10a", QUADRATIC, 3 * 64 + 1, 3000 * 250), ("fig10b", {"name": "sinusoid"}, 1761, 5000 * 250)],
)
@pytest.mark.parametrize("at", [0.03, 0.001])
def test_figure_10_asks_whether_the_best_alpha_is_in_the_range(experiment, dataset, parameters, observations, at):
    """From 2 / d on: 0.0104 for the quadratic net, 0.00114 for the sine net."""
    results = results_of(experiment, lambda a, _, seed: abs(np.log(a / at)) + 1 + 0.01 * seed, dataset)
    assert fig10.parameters(results[0].config) == parameters
    found = fig10.show(results)
    (finding,) = found.findings
    assert finding.holds == (at >= 2 / parameters) and f" at {at:g}" in finding.measured
    assert f"d = {parameters}, n = N K = {observations}" in finding.measured
    assert list(found.figures) == [experiment] and len(drawn(found)) == 1


def test_figure_10_passes_over_rates_that_lost_a_seed():
    (finding,) = fig10.show(results_of("fig10a", lambda a, _, seed: None if a == 0.001 and seed else a)).findings
    assert finding.holds is False and " at 0.003" in finding.measured


# ---- Figure 3 ----------------------------------------------------------------------------------------------------


def curves(tmp_path, speed):
    """Results with logs in which accuracy nears 0.9 at a speed of each rate."""
    picture = {"name": "omniglot", "way": 5}
    steps, found = range(50, 1001, 50), []
    for i, result in enumerate(results_of("fig3", lambda *_: 0.9, picture)):
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
    found = fig3.show(results_of("fig3", lambda *_: 0.9, {"name": "omniglot", "way": 5}))
    assert found.figures == {} and [f.holds for f in found.findings] == [None, None]
