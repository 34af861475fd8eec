"""`metalearn alpha`: what it says against explicit features and steps, its files, and what it refuses."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from oracles import build as build_float64
from oracles import conv_net, meta_batch, pictures

from metalearn import cells
from metalearn.algorithms import MAML
from metalearn.alpha import command, estimate, picture
from metalearn.alpha.study import study
from metalearn.cells import Cell
from metalearn.run import build, build_data, build_learner
from metalearn.schema import BadInput
from metalearn.theory import tangent
from metalearn.theory.alpha_star import limit, split

pytestmark = pytest.mark.usefixtures("compose_once")
SMALL = ("dataset=sinusoid", "backbone=mlp", "backbone.hidden=[5]", "trainer.precision=64", "trainer.threads=1")
SAME = 1e-9


def cell_of(*overrides: str) -> Cell:
    (cell,) = cells.expand([*SMALL, *overrides])
    return cell


def objects(cell: Cell, alpha: float, tasks: int):
    config = cell.config | {"algorithm": cell.config["algorithm"] | {"alpha": alpha}}
    dataset = build("dataset", config["dataset"])
    learner, data = build_learner(config, dataset), build_data(config, dataset)
    return learner, estimate.tasks_of(learner, data, tasks)


@pytest.fixture(scope="module")
def report() -> dict:
    return study(cell_of(), tasks=6, alphas=[0.01, 0.05, 0.2])


def test_the_estimate_is_that_of_explicit_tangent_features(report):
    learner, batch = objects(cell_of(), 0.3, 6)
    found = tangent.tangent(learner, learner.constants(), batch.episodes, batch.key)
    (support,), (query,) = (tangent.features(jacobian) for jacobian in found)
    for name, expected in (("alpha_star", split(support, query)), ("alpha_star_same_set", limit(support))):
        assert report[name]["value"] == pytest.approx(expected.value, rel=SAME)
        assert report[name]["se"] == pytest.approx(expected.se, rel=1e-6)
        assert report[name]["low"] < report[name]["value"] < report[name]["high"]
        assert (report[name]["tasks"], report[name]["probes"]) == (6, 0)
    assert report["about"]["moving"] == support.shape[2] == 16
    heuristic = report["heuristic"]
    assert (heuristic["least"], heuristic["largest"]) == (float(support.min()), float(support.max()))
    assert (heuristic["width"], heuristic["observations"]) == (16, 60)
    assert heuristic["low"] == pytest.approx(2 / 16) and heuristic["high"] == pytest.approx(60 / 16)


@pytest.mark.parametrize("algorithm", ["maml", "anil", "meta_sgd", "mtnet"])
def test_the_curve_is_one_step_of_a_learner_with_that_alpha(algorithm):
    cell, alphas = cell_of(f"algorithm={algorithm}", "algorithm.alpha=0.3"), [0.02, 0.1]
    learner, batch = objects(cell, 1.0, 5)
    found = estimate.curve(learner, batch, alphas)
    after = []
    for alpha in (0.0, *alphas):
        other, same = objects(cell, alpha, 5)
        theta = other.constants()
        phi = other.adapt(theta, same.episodes.support, steps=1, key=same.key)[-1]
        prediction = other.predict(theta, phi, same.episodes.query.x, support=same.episodes.support, bn="batch")
        after.append(other.loss(prediction, same.episodes.query.y).detach())
    assert found.start == pytest.approx(float(after[0].mean()), rel=SAME)
    for mean, half, losses in zip(found.losses, found.halves, after[1:], strict=True):
        assert mean == pytest.approx(float(losses.mean()), rel=1e-7)  # Meta-SGD's rates are made in float32
        assert half == pytest.approx(1.96 * float((losses - after[0]).std()) / 5**0.5, rel=1e-4)
    assert learner.alpha == 1.0  # as it was


def test_seeds_draw_other_networks_and_tasks_and_the_same_seed_the_same():
    def value(*overrides: str) -> float:
        learner, batch = objects(cell_of(*overrides), 1.0, 3)
        return estimate.star(learner, batch).estimate.value

    assert value() == value("algorithm.alpha=0.7", "trainer.max_steps=7")
    assert value("seed=1") != value()


def of_pictures(reduction: str = "mean"):
    learner = build_float64(MAML, conv_net(), "classification", alpha=1.0, inner_loss_reduction=reduction)
    return learner, meta_batch(pictures(4))


def test_support_sets_of_many_outputs_are_probed():
    learner, batch = of_pictures()
    probed, exact = estimate.star(learner, batch), estimate.star(learner, batch, probes=0)
    assert (probed.probes, exact.probes) == (estimate.PROBES, 0)
    many = estimate.star(learner, batch, probes=400)
    assert many.estimate.value == pytest.approx(exact.estimate.value, rel=0.1)
    assert many.estimate.value != exact.estimate.value
    assert estimate.heuristic(learner, batch, 10) is None  # cross-entropy


def test_the_sum_over_shots_divides_alpha_by_the_number_of_classes():
    values = [estimate.star(*of_pictures(r)).estimate.value for r in ("mean", "sum_over_shots")]
    assert values[0] / values[1] == pytest.approx(3, rel=SAME)


def test_stability_is_where_steps_on_the_support_loss_diverge():
    """For the head alone with the mean squared error the support loss is a quadratic form: 2 / lambda_max exactly."""
    learner, batch = objects(cell_of("algorithm=anil"), 1.0, 4)
    found = estimate.stability(learner, batch)
    features, _ = tangent.last_layer(learner, learner.constants(), batch.episodes)
    largest = torch.linalg.eigvalsh(2 / features.shape[1] * features.mT @ features)[:, -1]
    assert found.median == pytest.approx(float((2 / largest).median()), rel=0.02)
    assert found.least == pytest.approx(float((2 / largest).min()), rel=0.02)
    assert found.tasks == 4 and found.residual <= estimate.TOLERANCE


def test_best_alpha_and_its_interval_come_from_the_losses():
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.9, 1.9, 2.9, 4.1], [math.nan, 0.0, 0.0, 0.0]])
    best, ends = estimate._least(losses, [0.1, 0.2, 0.4])
    assert best == 0.2 and set(ends) <= {0.1, 0.2, 0.4} and ends.low <= best <= ends.high
    sure, ends = estimate._least(torch.tensor([[2.0, 3.0], [1.0, 2.0]]), [0.1, 0.2])
    assert (sure, *ends) == (0.2, 0.2, 0.2)


@pytest.mark.parametrize(("star", "best"), [(0.04, 0.02), (0.017, 0.27), (1.0, 1.0), (0.3, 0.001)])
def test_values_to_sweep_surround_the_estimate_and_the_best_step(star, best):
    found = estimate.sweep(star, best)
    assert found == sorted(set(found)) and 5 <= len(found) <= 7
    assert found[0] <= min(star, best) / 1.9 and found[-1] >= 1.9 * max(star, best)
    assert all(float(f"{v:.2g}") == v for v in found)


def test_files_and_the_printed_sweep(tmp_path, capsys):
    folder = tmp_path / "here"
    assert (
        command.main([*SMALL, "algorithm.alpha=0.3", "--tasks", "4", "--alphas", "0.1,0.01", "--output", str(folder)])
        == 0
    )
    printed, written = capsys.readouterr().out, json.loads((folder / "alpha.json").read_text())
    star = written["alpha_star"]
    line = next(row for row in printed.splitlines() if row.startswith("alpha*"))
    assert line.split()[1:5] == [f"{star['value']:.3g}", f"{star['low']:.3g}", "..", f"{star['high']:.3g}"]
    words = shlex.split(next(row for row in printed.splitlines() if row.startswith("metalearn -m ")))[2:]
    assert [c.config["algorithm"]["alpha"] for c in cells.expand(words)] == written["sweep"]
    assert all(c.config["backbone"]["hidden"] == [5] for c in cells.expand(words))
    assert (folder / "alpha.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "alpha.svg").read_text()
    assert written["curve"]["alphas"] == [0.01, 0.1]


def test_the_picture_names_what_it_marks(report):
    drawn = picture.figure(report)
    (axis,) = drawn.axes
    assert axis.get_ylabel() == "query MSE (target units$^2$) after one step" and axis.get_xscale() == "log"
    words = " ".join(t.get_text() for t in drawn.legends[0].get_texts())
    for part in (f"{report['alpha_star']['value']:.3g}", "same set", "median", "least", "heuristic range", "no step"):
        assert part in words
    low, high = axis.get_xlim()
    assert low < report["alpha_star"]["value"] < high


def test_a_picture_of_losses_that_are_not_finite(report):
    curve = report["curve"] | {"losses": [*report["curve"]["losses"][:2], None], "halves": [1.0, 1.0, None]}
    bounds = report["stability"] | {"median": None, "least": None}
    changed = report | {"curve": curve, "stability": bounds, "heuristic": None}
    (axis,) = picture.figure(changed).axes
    assert all(math.isfinite(v) for v in axis.get_ylim())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm=protonet"], "alpha: algorithm=protonet: trains without plain gradient steps"),
        (["algorithm=reptile"], "alpha: algorithm=reptile: trains without plain"),
        (["algorithm=imaml"], "alpha: algorithm=imaml: trains without plain"),
        (["algorithm=erm"], "alpha: algorithm=erm: trains without plain"),
        (["algorithm=meta_sgd", "algorithm.rate_init=uniform"], "algorithm.rate_init=uniform: must be constant"),
        (["seed=0,1"], "alpha: seed=0,1: names several runs"),
        (["--tasks", "1"], "1: must be a whole number >= 2"),
        (["--alphas", "0.1"], "0.1: must be at least two numbers > 0"),
        (["--alphas", "0.1,-1"], "0.1,-1: must be at least two numbers > 0"),
        (["algorithm.alpah=1"], "did you mean"),
    ],
)
def test_what_it_refuses(arguments, message, tmp_path):
    with pytest.raises(BadInput) as refused:
        command.main([*SMALL, *arguments, f"output_dir={tmp_path}"])
    assert message in str(refused.value) and str(refused.value).count("\n") < 3
    assert not list(Path(tmp_path).iterdir())
