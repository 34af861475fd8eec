"""`metalearn sweep plan`: which cells are equally fast, sums, waves, memory of measurements, and what can be shown."""

import dataclasses
import hashlib
import itertools
import json
import math
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import runs

from metalearn.cells import Cell, expand
from metalearn.ledger import CellDir, note_trained, write_json
from metalearn.schema import BadInput
from metalearn.schema.groups import LONG_RUN
from metalearn.statistics import detectable
from metalearn.sweep import calibrate, main, power, trial
from metalearn.sweep.calibrate import Book, Measured
from metalearn.sweep.layout import aligned, between, roughly, size
from metalearn.sweep.schedule import Job, course
from metalearn.sweep.speed import Speed, groups, signature, validations

SINE = ("dataset=sinusoid", "dataset.variant=finn", "logger=none")
SPEED = Speed(
    start=4.0, once=1.0, setup=1.0,
    prepared=0.5, step=0.01, validation=0.002, test=0.003, cores=1.5, memory=2**30, gpu=None,
    checkpoint=1000.0, line=100.0, row=10.0, kept=7.0, other=5000.0,
)  # fmt: skip
ABOUT = {"host": "here", "device": "CPU", "date": "2026-01-01", "load": 0.5, "others": 0.1, "metric": "mse"}


def about(values=(1.0, 2.0) * 20, half: int = 5) -> dict:
    counts = {"half": half, "validation": 2, "test": len(values), "tasks": 0}
    return ABOUT | {"counts": counts, "values": list(values), "speed": dataclasses.asdict(SPEED)}


@pytest.fixture
def measured(monkeypatch):
    """Replaces measuring: the list of cells that were measured; `answer` makes what is found on a cell."""
    asked: list[Cell] = []

    def measure(cell, config_dirs, seconds):
        asked.append(cell)
        return measure.answer(cell)

    measure.answer = lambda cell: Measured(SPEED, None, about())
    measure.asked = asked
    monkeypatch.setattr(calibrate, "measure", measure)
    return measure


def book(place, **options) -> Book:
    return Book(place, seconds=1, **{"keep": True, "measures": True, **options})


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", "--format", "json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


# ---- which cells are equally fast --------------------------------------------------------------------------------


def labels(*arguments: str) -> list[str]:
    return [g.label for g in groups(expand([*SINE, *arguments]))]


def test_scalars_seeds_and_counts_do_not_set_the_speed():
    cells = expand(
        [
            *SINE,
            "algorithm=maml",
            "seed=0,1",
            "algorithm.alpha=0.01,0.1",
            "optimizer.lr=0.1,0.2",
            "trainer.max_steps=10,20",
        ]
    ) + expand([*SINE, "algorithm=maml", "dataset.seed=7", "trainer.max_steps=9", "trainer.val_every=0"])
    (group,) = groups(cells)
    assert len(group.cells) == 2**4 + 1


@pytest.mark.parametrize(
    "axis",
    ["algorithm.inner_steps=1,2", "algorithm=maml,fomaml", "algorithm=maml,reptile", "trainer.meta_batch_size=4,8"]
    + ["backbone.hidden=[40],[40,40]", "algorithm.inner_clip=null,1.0", "algorithm.alpha=0.0,0.1"]
    + ["dataset.shot=5,10"],
)
def test_whole_numbers_members_and_switches_do(axis):
    found = labels("algorithm=maml", axis)
    assert len(found) == len(set(found)) == 2
    name = axis.partition("=")[0]
    assert all(f"{name}=" in label for label in found)


def test_switches_that_change_no_result_do():
    configs = [expand([*SINE, *own])[0].config for own in ([], ["trainer.chunk_mib=2"], ["trainer.threads=2"])]
    keys = {k for c in configs[1:] for k in signature(c) if signature(c)[k] != signature(configs[0])[k]}
    assert keys == {"trainer.chunk_mib", "trainer.threads"}


def test_labels_are_as_short_as_they_can_be():
    assert labels("algorithm=maml,reptile", "seed=0,1") == [
        "algorithm=maml dataset=sinusoid",
        "algorithm=reptile dataset=sinusoid",
    ]


def test_runs_that_are_compiled_are_a_group_of_their_own():
    assert len(labels(f"trainer.max_steps={LONG_RUN - 1},{LONG_RUN}")) == 2
    assert len(labels(f"trainer.max_steps={LONG_RUN - 1},{LONG_RUN}", "trainer.compile=never")) == 1


def test_members_inside_a_mixture_count():
    command = ["logger=none", "dataset=mixture", "dataset.members=[glyphs,group_glyphs]"]
    argument = "dataset.arguments.glyphs.drawings="
    one, other = (signature(expand([*command, argument + n])[0].config) for n in ("20", "21"))
    assert {k for k in one if one[k] != other[k]} == {"dataset.arguments.glyphs.drawings"}


# ---- what one costs ----------------------------------------------------------------------------------------------


def config(**trainer) -> dict:
    (cell,) = expand([*SINE, "algorithm=maml", *(f"trainer.{k}={v}" for k, v in trainer.items())])
    return cell.config


@pytest.mark.parametrize(("steps", "every", "count"), [(10, 5, 2), (11, 5, 3), (4, 5, 1), (10, 0, 0), (0, 5, 0)])
def test_validations_follow_every_so_many_meta_steps_and_the_last(steps, every, count):
    assert validations(config(max_steps=steps, val_every=every)) == count


def test_seconds_are_those_of_the_parts():
    own = config(max_steps=1000, val_every=300, val_episodes=50, test_episodes=200)
    assert SPEED.training(own) == pytest.approx(1000 * 0.01 + 4 * 50 * 0.002)
    assert SPEED.training(own, done=600) == pytest.approx(400 * 0.01 + 2 * 50 * 0.002)
    assert SPEED.testing(own) == pytest.approx(0.6)
    assert SPEED.training(config(max_steps=1000, val_every=0)) == pytest.approx(10.0)


def test_tasks_before_training_count_in_time_and_on_disk():
    (cell,) = expand(["dataset=group_regression", "algorithm=tsa_maml", "algorithm.tasks=40", "trainer.max_steps=0"])
    assert SPEED.training(cell.config) == pytest.approx(20.0)
    assert SPEED.training(cell.config, done=1) == 0.0
    bare = dataclasses.replace(SPEED, kept=0.0)
    assert SPEED.disk(cell.config) - bare.disk(cell.config) == 40 * 7.0


def test_disk_counts_two_checkpoints_of_each_kind():
    own = config(max_steps=100, val_every=50, log_every=10, test_episodes=200)
    assert SPEED.disk(own) == 4 * 1000 + (10 + 2) * 100 + 200 * 10 + 5000
    assert SPEED.disk(config(max_steps=100, val_every=0, log_every=10, test_episodes=200)) == SPEED.disk(own) - 3200
    online = own | {"algorithm": own["algorithm"] | {"alpha": "online"}}  # logged at every meta-step
    assert SPEED.disk(online) == SPEED.disk(own) + 90 * 100


# ---- waves -------------------------------------------------------------------------------------------------------


def test_equal_cells_run_in_waves():
    jobs = [Job(str(i), 1.0, 7.0, 2.0) for i in range(10)]
    for width, waves in ((1, 10), (4, 3), (5, 2), (20, 1)):
        assert course(jobs, {}, width) == (waves * 10.0, 100.0)


def test_a_place_takes_the_next_cell_when_it_is_free():
    jobs = [Job(str(i), 0.0, t, 0.0) for i, t in enumerate((5.0, 1.0, 1.0, 1.0, 4.0))]
    assert course(jobs, {}, 2).wall == 7.0  # 5 beside 1 + 1 + 1 + 4


def test_a_shared_training_is_done_once_and_waited_for():
    need = Job("first", 3.0, 100.0, 10.0)
    jobs = [Job(str(i), 1.0, 5.0, 2.0, needs=("first",)) for i in range(3)]
    assert course(jobs, {"first": need}, 1) == (110 + 3 * 8.0, 110 + 3 * 8.0)
    # its test is in the first cell's place; the others go on once it is trained
    assert course(jobs, {"first": need}, 3) == (1 + 110 + 7.0, 110 + 3 * 8.0)
    assert course(jobs, {}, 1, ["first"]).work == 3 * 8.0


def test_needs_of_needs():
    chain = {"b": Job("b", 9.0, 10.0, 1.0, needs=("a",)), "a": Job("a", 9.0, 100.0, 1.0)}
    assert course([Job("c", 1.0, 1.0, 1.0, needs=("b",))], chain, 1).wall == 1 + 101 + 11 + 2.0


def test_cells_of_one_training_only_test_once_it_is_there():
    jobs = [Job("same", 1.0, 50.0, 2.0)] * 3
    assert course(jobs, {}, 1).wall == 53 + 3 + 3.0
    assert course(jobs, {}, 3) == (53.0, 159.0)  # at once nobody knows of the others
    assert course(jobs, {}, 1, ["same"]).wall == 9.0


def test_places_are_never_better_than_their_number_and_never_idle_for_nothing():
    rng = np.random.default_rng(0)
    for width in (1, 2, 5):
        jobs = [Job(str(i), 0.0, float(t), 0.0) for i, t in enumerate(rng.uniform(0, 10, 30))]
        found = course(jobs, {}, width)
        assert found.work / width <= found.wall + 1e-9 <= found.work / width + 10


# ---- the verb ----------------------------------------------------------------------------------------------------


def test_pretraining_of_several_cells_counts_once(tmp_path, capsys, measured):
    command = [
        "dataset=group_regression",
        "algorithm=tsa_maml",
        f"output_dir={tmp_path}",
        "algorithm.m=2,3",
        "logger=none",
    ]
    command += ["trainer.max_steps=100", "trainer.val_every=0", "trainer.test_episodes=100", "algorithm.tasks=10"]
    found = planned(capsys, *command, "algorithm.pretrain_steps=1000")
    assert (found["cells"], found["to_run"], found["trained_first"]) == (2, 2, 1)
    first = 1000 * 0.01 + 1.0 + 0.3  # in the process of a cell
    own = 5.0 + 1.0 + 10 * 0.5 + 1.0 + 0.3
    assert found["total"]["wall"] == pytest.approx(first + 2 * own)
    assert found["total"]["cpu"] == pytest.approx(1.5 * (first + 2 * own))


def test_trainings_that_are_there_cost_nothing(tmp_path, capsys, measured):
    command = ["dataset=group_regression", "algorithm=tsa_maml", f"output_dir={tmp_path}", "logger=none"]
    (cell,) = expand(command)
    (need,) = cell.needs
    checkpoints = CellDir(tmp_path, need.cell_id).path / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last-1.ckpt").write_bytes(b"x")
    write_json(
        checkpoints / "last.json", [{"file": "last-1.ckpt", "step": 1, "sha256": hashlib.sha256(b"x").hexdigest()}]
    )
    note_trained(tmp_path, need.train_id, need.cell_id)
    assert planned(capsys, *command)["trained_first"] == 0


def test_one_of_each_kind_is_measured_and_remembered(tmp_path, capsys, measured):
    command = [*SINE, "algorithm=maml,reptile", "seed=0,1,2", f"output_dir={tmp_path}"]
    first = planned(capsys, *command)
    assert [c.config["algorithm"]["name"] for c in measured.asked] == ["maml", "reptile"]
    assert [g["measured"]["cached"] for g in first["groups"]] == [False, False]
    again = planned(capsys, *command)
    assert len(measured.asked) == 2 and [g["measured"]["cached"] for g in again["groups"]] == [True, True]
    for found in (first, again):
        del found["total"]["free"]
    assert again["total"] == first["total"] and again["differences"] == first["differences"]
    planned(capsys, *command, "--calibrate")
    assert len(measured.asked) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"plan"}


def test_first_use_of_data_is_measured_again(tmp_path, capsys, measured):
    speeds = [dataclasses.replace(SPEED, once=60.0), SPEED]
    measured.answer = lambda cell: Measured(s := speeds.pop(0), None, about() | {"speed": dataclasses.asdict(s)})
    found = planned(capsys, *SINE, "trainer.max_steps=100", f"output_dir={tmp_path}")
    assert found["groups"][0]["measured"]["once"] == 1.0 and not speeds


def test_what_was_measured_holds_for_its_machine_threads_and_commit(tmp_path, monkeypatch):
    (group,) = groups(expand([*SINE, "algorithm=maml"]))
    paths = {book(tmp_path).path(group)}
    for change in ({"cpu": "another"}, {"OMP_NUM_THREADS": "7"}):
        other = book(tmp_path)
        other.machine |= change
        paths.add(other.path(group))
    other = book(tmp_path)
    other.commit = "another"
    paths.add(other.path(group))
    assert len(paths) == 4
    assert book(tmp_path).path(group) in paths


def test_nothing_is_measured_if_so_asked(tmp_path, capsys, measured):
    found = planned(capsys, *SINE, f"output_dir={tmp_path}", "--no-calibrate")
    assert not measured.asked and not list(tmp_path.iterdir())
    assert found["total"]["unknown"] == 1 and "--no-calibrate" in found["groups"][0]["reason"]
    assert main(["plan", *SINE, f"output_dir={tmp_path}", "--no-calibrate"]) == 0
    assert "not measured yet" in capsys.readouterr().out


def test_what_cannot_be_run_or_measured_is_shown_and_the_rest_planned(tmp_path, capsys, measured):
    def answer(cell):
        failed = cell.config["algorithm"]["name"] == "reptile"
        return Measured(None, "too little memory") if failed else Measured(SPEED, None, about())

    measured.answer = answer
    command = [
        "dataset=sinusoid,omniglot",
        "algorithm=maml,reptile",
        "logger=none",
        f"dataset.root={tmp_path / 'none'}",
    ]
    found = planned(capsys, *command, f"output_dir={tmp_path}")
    assert (found["cells"], found["to_run"], found["total"]["counted"], found["total"]["unknown"]) == (4, 2, 1, 1)
    (absent,) = found["cannot_run"]
    assert absent["cells"] == 2 and "omniglot" in absent["first"]
    assert {g["reason"] for g in found["groups"]} == {None, "too little memory"}
    main(["plan", *command, f"output_dir={tmp_path}"])
    text = capsys.readouterr().out
    assert "2 cells that cannot" not in text and "2 that cannot be run here" in text and absent["reason"] in text
    assert "algorithm=reptile dataset=sinusoid: too little memory" in text and "without 1 of unknown cost" in text


def finish(cell: Cell, values: np.ndarray, seconds: float = 33.0) -> None:
    """Put a finished result where the cell's would be."""
    folder = CellDir(cell.config["output_dir"], cell.cell_id).path
    folder.mkdir(parents=True)
    columns = {"episode": range(len(values)), "bn": "none", "step": 1, "metric": "mse", "value": values, "loss": values}
    pd.DataFrame(columns | {"group": None}).to_parquet(folder / "episodes.parquet")
    about = {
        "protocol": {"bn": "none", "test_steps": 1},
        "status": "done",
        "seed": cell.config["seed"],
        "seconds": seconds,
        "steps": 5,
        "cell_id": cell.cell_id,
    }
    write_json(folder / "result.json", about | {"config": cell.config, "metrics": {"mse": {"mean": values.mean()}}})


def test_finished_results_tell_of_spread_and_are_not_run_again(tmp_path, capsys, measured):
    command = [
        *SINE,
        "algorithm=maml,reptile,fomaml",
        "seed=0,1,2",
        "trainer.test_episodes=400",
        f"output_dir={tmp_path}",
    ]
    rng = np.random.default_rng(1)
    hard, values = rng.normal(size=400), {}
    for cell in expand(command):
        name, seed = cell.config["algorithm"]["name"], cell.config["seed"]
        if seed < 2 and name != "fomaml":
            values[name, seed] = hard + 0.1 * rng.normal(size=400) + 0.05 * rng.normal()
            finish(cell, values[name, seed])
    found = planned(capsys, *command)
    assert (found["finished"], found["to_run"]) == (4, 5)
    assert {g["label"]: g["finished_took"] for g in found["groups"]}["algorithm=maml dataset=sinusoid"] == 33.0
    (shown,) = found["differences"]
    assert "finished results (4 runs)" in shown["source"] and (shown["episodes"], shown["seeds"]) == (400, 3)
    difference = np.mean([values["maml", s] - values["reptile", s] for s in (0, 1)], axis=0)
    assert shown["paired"]["median"] == pytest.approx(detectable(difference.std(ddof=1), 400))
    means = [(values["maml", s] - values["reptile", s]).mean() for s in (0, 1)]
    expected = power.detectable_over_seeds(float(np.std(means, ddof=1)), 3)
    assert shown["over_seeds"]["median"] == pytest.approx(expected)
    assert shown["published"]["median"] > 5 * shown["paired"]["median"]  # what episodes share does not cancel there


def test_without_results_the_calibration_tells_of_spread(tmp_path, capsys, measured):
    rng = np.random.default_rng(2)
    models = {name: rng.normal(size=64) for name in ("maml", "reptile")}
    measured.answer = lambda cell: Measured(SPEED, None, about(models[cell.config["algorithm"]["name"]]))
    found = planned(capsys, *SINE, "algorithm=maml,reptile", "trainer.test_episodes=500", f"output_dir={tmp_path}")
    (shown,) = found["differences"]
    assert "calibration" in shown["source"] and shown["over_seeds"] is None
    spread = (models["maml"] - models["reptile"]).std(ddof=1)
    assert shown["paired"]["median"] == pytest.approx((1.959964 + 0.841621) * spread / math.sqrt(500), rel=1e-5)
    main(["plan", *SINE, "algorithm=maml,reptile", "trainer.test_episodes=500", f"output_dir={tmp_path}"])
    text = capsys.readouterr().out
    assert "10 meta-steps, 64 episodes" in text and "one seed tells nothing of others" in text


def test_settings_with_other_episodes_are_not_paired(tmp_path, capsys, measured):
    found = planned(capsys, *SINE, "algorithm=maml,reptile", "dataset.shot=5,10", f"output_dir={tmp_path}")
    assert [s["setting"] for s in found["differences"]] == ["sinusoid finn 5-shot", "sinusoid finn 10-shot"]
    assert [s["methods"] for s in found["differences"]] == [2, 2]


def test_the_table_says_what_the_numbers_are(tmp_path, capsys, measured):
    assert main(["plan", *SINE, "algorithm=maml,reptile", "seed=0,1", f"output_dir={tmp_path}", "--width", "2"]) == 0
    text = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    row = lines["algorithm=maml dataset=sinusoid"].split()
    assert row[2:4] == ["2", "2"] and "10 ms" in lines["algorithm=maml dataset=sinusoid"]
    assert "2.0 GiB the 2 largest together" in text and "at width 2" in text
    assert "load average" in text and "80 %" in text and "no more than the CPU time" not in text
    measured.answer = lambda cell: Measured(SPEED, None, about() | {"others": 1.0})
    main(["plan", *SINE, f"output_dir={tmp_path}", "--calibrate"])
    assert "no more than the CPU time" in capsys.readouterr().out
    assert max(map(len, text.splitlines())) < 250


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--width", "0"], "--width"),
        (["plan", "--seconds", "no"], "--seconds"),
        (["plan", "--format", "html"], "--format"),
        (["plan", "algorithm=mmal"], "maml"),
        (["plan", "algorithm.alfa=1"], "alpha"),
        (["plan", "experiment=none/such"], "no such experiment"),
        (["plann"], "did you mean 'plan'"),
    ],
)
def test_bad_input_is_refused_in_a_line(arguments, message):
    with pytest.raises(BadInput, match=message) as refused:
        main(arguments)
    assert len(str(refused.value).splitlines()) <= 3


# ---- what it can show --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_smallest_difference_over_seeds_is_found_four_times_in_five(seeds):
    from scipy.stats import ttest_1samp

    least = power.detectable_over_seeds(0.3, seeds)
    x = np.random.default_rng(seeds).normal(least, 0.3, size=(20_000, seeds))
    assert (ttest_1samp(x, 0.0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.012)


def test_smallest_difference_from_a_printed_interval_is_found_four_times_in_five():
    least = power.detectable_from(2.0, 100, half=0.5)
    rng = np.random.default_rng(0)
    ours, printed = rng.normal(least, 2.0 / 10, 40_000), rng.normal(0, 0.5 / 1.959964, 40_000)
    error = math.hypot(0.2, 0.5 / 1.959964)
    assert (abs(ours - printed) > 1.959964 * error).mean() == pytest.approx(0.8, abs=0.01)
    assert power.detectable_from(2.0, 100) == pytest.approx(detectable(2.0, 100))


def test_one_seed_shows_nothing_over_seeds():
    assert power.detectable_over_seeds(0.1, 1) == math.inf


def test_spreads_are_those_of_differences():
    rng = np.random.default_rng(0)
    methods = [{s: rng.normal(size=50) for s in (0, 1)} for _ in range(3)]
    expected = [
        np.std((methods[i][0] - methods[j][0] + methods[i][1] - methods[j][1]) / 2, ddof=1)
        for i, j in ((1, 0), (2, 0), (2, 1))
    ]
    assert power.spread_over_tasks(methods) == pytest.approx(expected)
    assert power.spread_over_tasks([{0: np.ones(9)}, {1: np.ones(9)}]) == []  # no common seed
    assert power.spread_over_tasks([{0: np.arange(9.0)}, {0: np.zeros(5)}]) == pytest.approx([np.arange(5).std(ddof=1)])
    pairs, alone = power.spread_over_seeds(methods)
    assert len(pairs) == len(alone) == 3
    assert alone[0] == pytest.approx(abs(methods[0][0].mean() - methods[0][1].mean()) / math.sqrt(2))
    assert power.spread_over_seeds([{0: np.ones(9)}]) == ([], [])


# ---- measuring ---------------------------------------------------------------------------------------------------


def test_a_longer_run_fits_into_the_time_and_never_exceeds_the_cell():
    (cell,) = expand([*SINE, "algorithm=maml", "trainer.max_steps=1000", "trainer.log_every=10"])
    few = trial.least(cell.config)
    assert few == (1, 2, 2, 0)
    slow = trial.more(few, trial.Seconds(0.1, 0.2, 0.2, 0.0), cell.config, 10.0)
    assert slow == (40, 20, 20, 0)  # 40 % of the time for meta-steps, 20 % each for episodes
    assert trial.more(few, trial.Seconds(1e-4, 1e-4, 1e-4, 0), cell.config, 10.0) == trial.most(cell.config)
    assert trial.most(cell.config) == (500, 100, 600, 0)
    assert trial.more(few, trial.Seconds(9.0, 9.0, 9.0, 0), cell.config, 10.0) is None
    assert trial.more(trial.most(cell.config), trial.Seconds(1e-4, 1e-4, 1e-4, 0), cell.config, 10.0) is None
    assert trial.more(few, trial.Seconds(0.1, 0.2, 0.2, 0.0), cell.config, -1.0) is None


def test_a_shortened_run_logs_at_its_middle(tmp_path):
    for steps, half in itertools.product((1, 7, 500), (1, 12, 13, 250)):
        (cell,) = expand([*SINE, f"trainer.max_steps={steps}", "trainer.log_every=10"])
        trainer = trial.shortened(cell.config, trial.Counts(half, 2, 2, 0), tmp_path)["trainer"]
        assert half % trainer["log_every"] == 0 and trainer["val_every"] == half
        assert trainer["log_every"] <= 10 and trainer["max_steps"] == 2 * half


def test_parts_are_read_from_the_log(tmp_path):
    lines = [(0, 3.0), (10, 5.0), (20, 7.0), (20, 7.5), (30, 8.5), (40, 9.5), (40, 10.25)]
    text = "".join(json.dumps({"step": s, "seconds": t}) + "\n" for s, t in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    parts, rest = trial._parts(tmp_path, trial.Counts(20, 5, 5, 8), 12.0)
    assert parts == (2.0, 0.75, 1.75, 3.0)  # the second half, its validation, the test, the tasks before
    assert rest == 2.0  # of the first half: what training does once


def spawn(tmp_path, code: str, seconds: float) -> tuple[int | None, str]:
    with open(tmp_path / "log", "w+b") as log:
        return calibrate._run([sys.executable, "-c", code], log, tmp_path / "started", seconds), (
            tmp_path / "log"
        ).read_text()


def test_a_measurement_that_does_not_end_is_ended_with_what_it_started(tmp_path, monkeypatch):
    child = "import time, pathlib, sys\ntime.sleep(3)\npathlib.Path(sys.argv[1]).touch()"
    code = f"import subprocess, sys, time, pathlib\npathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
    code += f"subprocess.Popen([sys.executable, '-c', {child!r}, {str(tmp_path / 'survived')!r}])\ntime.sleep(60)"
    monkeypatch.setattr(calibrate, "POLL_SECONDS", 0.02)
    began = time.monotonic()
    assert spawn(tmp_path, code, 0.1)[0] is None
    assert time.monotonic() - began < 20
    assert spawn(tmp_path, "raise SystemExit(5)", 1.0)[0] == 5


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (None, "", "not measured within 7 s"),
        (-9, "", "too little memory"),
        (1, "a\nValueError: b\n\n", "ValueError: b"),
    ],
)
def test_why_a_measurement_failed(code, said, reason):
    assert reason in calibrate._reason(code, said, 7.0)


def test_measuring_one_run(tmp_path):
    """In this process: every part takes time, the bytes are those on disk, and the episodes are the cell's first."""
    (cell,) = expand([*runs.TINY, "trainer.max_steps=50", "trainer.val_every=25", f"output_dir={tmp_path / 'own'}"])
    counts = trial.Counts(3, 4, 8, 0)
    found, parts = trial.measure(trial.cell_of(trial.shortened(cell.config, counts, tmp_path / "try")), counts)
    speed = Speed(start=1.0, once=0.0, **found["speed"])
    assert min(speed.step, speed.validation, speed.test, speed.setup, speed.cores) > 0
    assert speed.step == pytest.approx(parts.half / 3) and speed.memory > 2**26
    assert len(found["about"]["values"]) == 8 and found["about"]["metric"] == "mse"
    assert not (tmp_path / "own").exists()


def test_layout():
    assert aligned([("a", "1"), ("bbb", "22")]) == ["a     1", "bbb  22"]
    assert [roughly(s) for s in (None, 0.0123, 1.26, 59, 600, 5400, 2e5)] == [
        "-", "12 ms", "1.3 s", "59 s", "10 min", "1.5 h", "2.3 d"
    ]  # fmt: skip
    assert [size(n) for n in (None, 512, 3 * 2**20, 2**30, 5 * 2**40)] == [
        "-",
        "0.5 KiB",
        "3.0 MiB",
        "1.0 GiB",
        "5.0 TiB",
    ]
    assert between([1.0, 1.04]) == "1.0" and between([1, 3], "d") == "1 to 3"


def test_the_printed_half_width_of_the_settings_counts(tmp_path):
    from metalearn.sweep.printed import tables_of, typical_half

    (tmp_path / "table" / "p").mkdir(parents=True)
    (tmp_path / "experiment" / "p").mkdir(parents=True)
    (tmp_path / "experiment" / "p" / "t.yaml").write_text("# @package _global_\ngrid: [{dataset.shot: [1, 5]}]\n")
    (tmp_path / "table" / "p" / "p.csv").write_text(
        "paper,table,method,setting,metric,value,ci\np,t,A,one,acc,50.0,1.0\np,t,B,one,acc,51.0,3.0\np,t,A,five,acc,60,9\n"
    )
    (tmp_path / "table" / "p" / "t.yaml").write_text(
        "title: T\npublished: p.csv\ntable: t\nexperiment: p/t\nmetric: accuracy\nscale: 100\n"
        "rows: [{method: A, where: {algorithm: maml}}, {method: B, where: {algorithm: anil}}]\n"
        "columns:\n- {setting: one, published_metric: acc, where: {dataset.shot: 1}}\n"
        "- {setting: five, published_metric: acc, where: {dataset.shot: 5}}\n"
    )
    one, five = expand(["experiment=p/t"], [str(tmp_path)])
    tables = tables_of([one, five], [str(tmp_path)])
    assert [t.name for t in tables] == ["p/t"]
    assert typical_half(tables, [one]) == pytest.approx(0.02) and typical_half(tables, [five]) == pytest.approx(0.09)
    assert tables_of(expand([*SINE]), [str(tmp_path)]) == [] and typical_half([], [one]) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_measuring_a_run_that_starts_from_another_trains_that_one_but_shortly(tmp_path):
    (cell,) = expand(
        ["dataset=group_regression", "algorithm=tsa_maml", "logger=none", "trainer.threads=1", f"output_dir={tmp_path}"]
        + ["algorithm.pretrain_steps=1000000", "trainer.max_steps=100000", "algorithm.tasks=5000"]
    )
    kept: dict[int, str] = {}
    for counts in (trial.least(cell.config), trial.Counts(6, 4, 8, 40)):
        own = trial.cell_of(trial.shortened(cell.config, counts, tmp_path))
        trial.provide(own, kept)
        found, parts = trial.measure(own, counts)
        assert found["speed"]["prepared"] == pytest.approx(parts.tasks / counts.tasks) and parts.tasks > 0
        assert found["speed"]["step"] > 0 and found["speed"]["kept"] > 0
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 3  # two of the cell, one of what it starts from


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "overrides",
    [
        ["dataset=sinusoid", "algorithm=maml", "trainer.max_steps=3000", "trainer.val_every=500"],
        ["dataset=sinusoid", "algorithm=reptile", "trainer.max_steps=3000", "trainer.val_every=500"],
        ["dataset=glyphs", "algorithm=anil", "trainer.max_steps=40", "trainer.val_every=20", "trainer.val_episodes=32"],
    ],
)
def test_predicted_seconds_are_those_of_the_run(tmp_path, capfd, overrides):
    """Within a factor of 1.5 of the command's wall time: needs a machine that is equally busy all the time."""
    command = [*overrides, "logger=none", "trainer.threads=1", "trainer.test_episodes=100"]
    found = planned(capfd, *command, f"output_dir={tmp_path / 'plan'}", "--seconds", "10")
    (predicted,) = (r["seconds"] for r in found["runs"])
    began = time.monotonic()
    arguments = [sys.executable, "-m", "metalearn", *command, f"output_dir={tmp_path / 'run'}"]
    subprocess.run(arguments, check=True, capture_output=True)
    took = time.monotonic() - began
    assert took / 1.5 < predicted < took * 1.5
    (result,) = (tmp_path / "run" / "runs").glob("*/result.json")
    size_there = sum(p.stat().st_size for p in result.parent.rglob("*") if p.is_file())
    assert size_there / 1.5 < found["groups"][0]["disk"] < size_there * 1.5
