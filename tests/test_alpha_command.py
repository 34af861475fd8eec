"""`metalearn alpha`: what it says against explicit features and steps, its files, and what it refuses."""

import json
import math
import shlex
from pathlib import Path

import pytest
import runs
import torch
from oracles import build as build_float64
from oracles import conv_net, meta_batch, pictures

from metalearn import cells
from metalearn.algorithms import MAML
from metalearn.alpha import command, estimate, picture, stacked
from metalearn.alpha.study import study
from metalearn.cells import Cell
from metalearn.ledger import given_checkpoint
from metalearn.prerequisites import state_of
from metalearn.run import build, build_data, build_learner, run
from metalearn.schema import BadInput
from metalearn.theory import tangent
from metalearn.theory.alpha_star import limit, split

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
    trainer, shot = cell_of().config["trainer"], 10
    n = trainer["max_steps"] * trainer["meta_batch_size"] * shot  # of all training, as in unravel/fig10
    assert (heuristic["width"], heuristic["observations"]) == (16, n)
    assert heuristic["low"] == pytest.approx(2 / 16) and heuristic["high"] == pytest.approx(n / 16)


def test_the_heuristic_range_is_of_training_and_not_of_the_drawn_tasks():
    """Those say how far features go, and nothing else: for features in [0, 1] the range is the same for any number."""
    found = [estimate.heuristic(*objects(cell_of(), 1.0, tasks), 7) for tasks in (4, 24)]
    assert [(f.low, f.high, f.width, f.observations) for f in found] == [(2 / 16, 70 / 16, 16, 70)] * 2
    for f in found:
        assert (f.scaled_low, f.scaled_high) == pytest.approx([v / (f.largest - f.least) ** 2 for v in (f.low, f.high)])
    small = estimate.heuristic(*objects(cell_of(), 1.0, 4), 1)  # N K = 10 < d = 16
    assert (small.low, small.high, small.width) == (2 / 10, 1, 10)


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


def test_no_alpha_is_best_where_none_helps():
    learner, batch = objects(cell_of(), 1.0, 4)
    found = estimate.curve(learner, batch, [10.0, 1e3, 1e300])
    assert (found.best, found.low, found.high) == (None, None, None)
    assert found.losses[0] > found.start and found.losses[2] is None and found.halves[2] is None
    helped = estimate.curve(learner, batch, [1e-3, 10.0])
    assert (helped.best, helped.start) == (1e-3, found.start) and helped.losses[0] < helped.start


def test_a_sweep_follows_no_alpha_that_does_not_help():
    assert estimate.sweep(0.04, None) == estimate.sweep(0.04, 0.04) == [0.01, 0.02, 0.04, 0.08, 0.16]


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


@pytest.mark.parametrize("given", [["--alphas", "1e300,1e301"], ["study=corollary1"], ["experiment=unravel/fig1"]])
def test_bad_input_is_one_line_and_leaves_nothing(given, tmp_path):
    small = [] if "=" in given[0] else [*SMALL, "--tasks", "3"]
    with pytest.raises(BadInput) as refused:
        command.main([*small, *given, f"output_dir={tmp_path}"])
    assert str(refused.value).startswith(("alpha: --alphas=1e+300 .. 1e+301: ", "alpha: study=")) and not list(
        tmp_path.iterdir()
    )
    assert "\n" not in str(refused.value)


def test_a_picture_that_cannot_be_drawn_leaves_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "encoded", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.main([*SMALL, "--tasks", "3", "--alphas", "0.1,0.01", f"output_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


def table_of(printed: str) -> list[list[str]]:
    """The words of each row of the one-step curve."""
    rows = printed.splitlines()
    (first,) = (i for i, row in enumerate(rows) if row.startswith("alpha "))
    return [row.split() for row in rows[first + 1 : rows.index("", first)]]


def test_the_printed_table_is_the_curve(report):
    curve = report["curve"] | {"alphas": [0.01, 0.05, 0.2, 7.0], "best": 0.05}
    curve |= {"losses": [3.0, 2.5, 4.25, None], "halves": [0.125, 0.5, None, None], "start": 3.5}
    printed = command.text(report | {"curve": curve, "sweep_command": "metalearn"})
    assert table_of(printed) == [
        ["0", "3.5"],
        ["0.01", "3", "-0.5", "+-", "0.125"],
        ["0.05", "2.5", "-1", "+-", "0.5", "best"],
        ["0.2", "4.25", "+0.75", "+-", "not", "finite"],
        ["7", "not", "finite"],
    ]
    line = next(row for row in printed.splitlines() if row.startswith("one step, best"))
    assert "of the 4 alphas below: query loss 2.5 after a step, 3.5 without" in line


def test_a_curve_on_which_no_step_helps_is_no_advice(tmp_path, capsys):
    words = [*SMALL, "--tasks", "3", "--alphas", "100,1e6", "--output", str(tmp_path)]
    assert command.main(words) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "alpha.json").read_text())
    star = written["alpha_star"]["value"]
    assert written["sweep"] == estimate.sweep(star, star) and written["curve"]["best"] is None
    line = next(row for row in printed.splitlines() if row.startswith("one step, best"))
    assert line.split()[3] == "none" and "no step lowers the query loss" in line
    assert "the sweep is around alpha* alone; --alphas goes lower" in printed and "times alpha*" not in printed


@pytest.mark.parametrize(
    ("sweep", "steps", "words"),
    [
        ([0.5, 1.0], (5, 10), None),
        ([0.5, 1.0, 3.0], (5, 10), "1 of the sweep's 3 values are beyond 2 / lambda_max: at 3 a step multiplies the "
         "quadratic model's error in its sharpest direction by 5. The run takes 5 in training and 10 in test: several"),
        ([0.5, 1.5, 2.0], (1, 1), "2 of the sweep's 3 values are beyond 2 / lambda_max: at 2 a step multiplies the "
         "quadratic model's error in its sharpest direction by 3. The run takes single steps"),
    ],
)  # fmt: skip
def test_a_sweep_beyond_the_stability_bound_is_said_in_one_line(report, sweep, steps, words):
    """On a loss lambda (w - a)^2 / 2 with 2 / lambda = 1, w - a becomes (1 - 2 alpha)(w - a)."""
    about = report["about"] | dict(zip(("inner_steps", "test_steps"), steps, strict=True))
    changed = {"about": about, "stability": report["stability"] | {"median": 1.0}, "sweep": sweep}
    printed = command.text(report | changed | {"sweep_command": "metalearn"})
    lines = [row for row in printed.splitlines() if "beyond" in row]
    assert [row[: len(words or "")] for row in lines] == ([] if words is None else [words])


def test_the_report_has_the_steps_of_the_run(report):
    section = cell_of().config["algorithm"]
    assert {k: report["about"][k] for k in ("inner_steps", "test_steps")} == {
        k: section[k] for k in ("inner_steps", "test_steps")
    }


def test_the_printed_sweep_can_be_pasted(tmp_path, capsys):
    """With folders of yaml files of one's own, and what a shell would take for patterns or for several words."""
    own = tmp_path / "my yaml"
    (own / "backbone").mkdir(parents=True)
    (own / "backbone" / "own.yaml").write_text("defaults: [mlp]\nhidden: [3]\n")
    given = ["dataset=sinusoid", "backbone=own", "backbone.hidden=[4]", "hydra/launcher=joblib", f"--config-dir={own}"]
    assert command.main([*given, "--tasks", "3", "--alphas", "0.1,0.01", "--output", str(tmp_path / "out")]) == 0
    row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("metalearn -m "))
    assert "'backbone.hidden=[4]'" in row
    _, _, place, *words = shlex.split(row)
    assert place == f"--config-dir={own}" and "hydra/launcher=joblib" in words
    found = cells.expand(words, [place.removeprefix("--config-dir=")])
    assert {tuple(c.config["backbone"]["hidden"]) for c in found} == {(4,)} and len(found) >= 5


def test_the_picture_names_what_it_marks(report):
    drawn = picture.figure(report)
    (axis,) = drawn.axes
    assert axis.get_ylabel() == "query MSE (target units$^2$) after one step" and axis.get_xscale() == "log"
    words = " ".join(t.get_text() for t in drawn.legends[0].get_texts())
    for part in (f"{report['alpha_star']['value']:.3g}", "same set", "median", "least", "heuristic range", "no step"):
        assert part in words
    low, high = axis.get_xlim()
    assert low < report["alpha_star"]["value"] < high
    assert axis.get_title() == "maml on sinusoid, mlp, before training"
    (axis,) = picture.figure(report | {"about": report["about"] | {"start": "a/run"}}).axes
    assert axis.get_title() == "maml on sinusoid, mlp, at given parameters"


EXPLODES = {"alphas": [0.01, 0.1, 1.0, 10.0, 100.0], "start": 3.0, "best": 0.1, "low": 0.1, "high": 0.1}


@pytest.mark.parametrize(
    ("losses", "halves", "ends"),
    [
        ([2.9, 0.3, 9.0, 2e3, 3e4], [0.1, 0.2, 8.0, 2e3, 4e4], (0.0, 5.7)),
        ([2.9, 2.0, 2.5, 1e300, None], [0.1, 0.2, 0.4, 1e300, None], (1.69, 4.0)),
        ([2.9, 0.3, 2.0, 1e5, 1e9], [9.0, 9.0, 9.0, 1e6, 1e9], (0.0, 8.4)),
        ([2.9, 2.88, 1e5, 1e6, 1e7], [0.01, 0.02, 1e5, 1e6, 1e7], (2.85, 3.15)),
    ],
    ids=["above", "not finite", "few tasks", "little"],
)
def test_the_y_axis_is_of_what_is_shown(report, losses, halves, ends):
    """It holds the start and the best and the bands, no loss below 0, and nothing of the alphas that explode."""
    changed = report | {"curve": EXPLODES | {"losses": losses, "halves": halves}}
    (axis,) = picture.figure(changed).axes
    low, high = axis.get_ylim()
    assert 0 <= low <= losses[1] < 3.0 < high and (low, high) == pytest.approx(ends, rel=0.01, abs=1e-9)
    assert axis.get_yscale() == "linear"
    assert 3.0 - losses[1] >= 0.3 * (high - low)  # no flat line
    picture.encoded(changed, "png")  # draws without warnings


def test_where_no_step_helps_the_picture_has_all_on_a_logarithmic_axis(report):
    losses = [4.0, 50.0, 1e13, 1e307, None]
    curve = EXPLODES | {"losses": losses, "halves": [9.0, 1.0, 1e13, 1e307, None], "best": None}
    (axis,) = picture.figure(changed := report | {"curve": curve}).axes
    low, high = axis.get_ylim()
    assert axis.get_yscale() == "log" and 0 < low < 3.0 and high > 1e99
    picture.encoded(changed, "png")


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


# ---- all samples together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [2**20, 1])
def test_stacked_estimates_are_those_of_all_features_together(monkeypatch, held):
    """H.14, H.15 and H.18 by their formulas of Psi as a whole; chunk by chunk, and with too many features to hold."""
    monkeypatch.setattr(stacked, "HELD", held)
    learner, batch = objects(cell_of("trainer.chunk_mib=1"), 0.3, 6)
    monkeypatch.setattr(learner, "chunks", lambda episodes: [slice(0, 4), slice(4, 6)])
    (phi,) = tangent.features(tangent.tangent(learner, learner.constants(), batch.episodes, batch.key).support)
    psi = phi.flatten(0, 1).detach()
    gram, sigma = psi.mT @ psi, psi.std(correction=0)
    n, d = psi.shape
    expected = {
        "kernel": n * (gram @ gram).trace() / (2 * (gram @ gram @ gram).trace()),
        "deviation": 1 / (2 * n * sigma**2),
        "heuristic": 1 / (2 * min(n, d) * sigma**2),
    }
    found = stacked.stacked(learner, batch).numbers()
    assert found["samples"] == n == 60 and d == 16
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(float(value), rel=SAME)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]


def test_stacked_estimates_are_for_the_mean_squared_error():
    learner = build_float64(MAML, conv_net(), "classification", alpha=0.1)
    assert stacked.stacked(learner, meta_batch(pictures(2))) is None


# ---- at trained parameters ---------------------------------------------------------------------------------------


def test_it_asks_at_the_parameters_of_a_finished_run(tmp_path, capsys):
    """Of the network, whatever algorithm trained it; the estimate is that of a learner which has them."""
    short = ("trainer.precision=64", "trainer.max_steps=2", "trainer.val_every=0", f"output_dir={tmp_path}")
    (cell,) = cells.expand([*runs.TINY, *short])
    assert run(cell) == "done"
    folder = tmp_path / "runs" / cell.cell_id
    (other,) = cells.expand([*runs.TINY, "trainer.precision=64", "algorithm=anil"])
    learner, batch = objects(other, 0.3, 4)
    before = estimate.star(learner, batch).estimate.value
    state = state_of(given_checkpoint(folder))
    learner.load_state_dict({k: p for k, p in state.items() if k.startswith("net.")}, strict=False)
    after = estimate.star(learner, batch).estimate.value
    found = study(other, tasks=4, alphas=[0.01, 0.1], start=folder)
    assert found["alpha_star"]["value"] == pytest.approx(after, rel=SAME) and abs(after / before - 1) > 1e-6
    assert f"training tasks at the parameters of {folder}" in command.text(found | {"sweep_command": "metalearn"})
    rows = {row.split()[0]: row.split()[1] for row in command.text(found | {"sweep_command": ""}).splitlines() if row}
    for name, key in (("H.14", "kernel"), ("H.15", "deviation"), ("H.18", "heuristic")):
        assert rows[name] == f"{found['stacked'][key]['value']:.3g}"
    with pytest.raises(BadInput, match=r"--start=.*: net\.\S+ is .* there and .* here"):
        study(cell_of("backbone.hidden=[7]"), start=folder)
    with pytest.raises(BadInput, match=r"--start=nowhere: no such file or folder"):
        study(other, start=Path("nowhere"))
    (tmp_path / "text").write_text("no checkpoint")
    with pytest.raises(BadInput, match=r"--start=.*text: no checkpoint of a run"):
        study(other, start=tmp_path / "text")
