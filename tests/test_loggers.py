"""Mirrors: what they say, and that none of them can stop a run or spoil the next one."""

import json
import os
import re
import signal
import subprocess
import sys

import pandas as pd
import pytest
import wandb_file
from runs import cell_of, folder, result

from metalearn import loggers, wandb_run
from metalearn.run import run

SHORT = ("trainer.max_steps=4", "trainer.val_every=2", "trainer.log_every=1")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)


def logged(output, cell) -> list[dict]:
    return [json.loads(line) for line in (folder(output, cell) / "metrics.jsonl").read_text().splitlines()]


def mirror(output, cell, attempt: int = 1) -> wandb_file.Mirrored:
    (path,) = folder(output, cell).glob(f"wandb/offline-run-*-{cell.cell_id}-{attempt}/*.wandb")
    return wandb_file.read(path)


def service() -> int:
    """The process id of wandb-core, our child."""
    children = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True).stdout
    return int(children.split()[-1])


class Broken:
    """A sink that fails wherever it is told to."""

    def __init__(self, *places: str):
        self.places, self.calls = places, []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.places:
            raise OSError(f"{name}: no space left")

    def write(self, row, step):
        self._call("write")

    def flush(self):
        self._call("flush")

    def end(self, state, result):
        self._call(f"end {state}" if result is None else "end with a result")
        self._call("end")


@pytest.mark.parametrize("place", ["write", "flush", "end"])
def test_a_mirror_that_fails_anywhere_stops_nothing(tmp_path, monkeypatch, place):
    sink = Broken(place)
    monkeypatch.setitem(loggers.SINKS, "wandb", ("W&B", lambda *_: sink))
    cell = cell_of(tmp_path, *SHORT, "logger=wandb")
    with pytest.warns(UserWarning, match=f"W&B has ended: {place}: no space left") as warned:
        assert run(cell) == "done"
    assert sum("W&B" in str(w.message) for w in warned) == 1  # not one a step
    assert sink.calls.count(place) == 1
    assert sink.calls[-2:] == ["end with a result", "end"]  # also of a mirror that was lost before
    assert {x["step"] for x in logged(tmp_path, cell)} == {1, 2, 3, 4} and result(tmp_path, cell)["status"] == "done"


def test_a_mirror_that_cannot_start_stops_nothing(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(wandb_run, "start", broken)
    cell = cell_of(tmp_path, *SHORT, "logger=wandb")
    with pytest.warns(UserWarning, match="W&B is off: no space left"):
        assert run(cell) == "done"


@pytest.mark.parametrize(("raised", "state"), [(ValueError("x"), "failed"), (KeyboardInterrupt(), "killed")])
def test_the_mirror_of_a_run_that_ends_early_is_ended(tmp_path, monkeypatch, raised, state):
    sink = Broken()
    monkeypatch.setitem(loggers.SINKS, "wandb", ("W&B", lambda *_: sink))

    def fails(*_):
        raise raised

    monkeypatch.setattr("metalearn.run.fit", fails)
    with pytest.raises(type(raised)):
        run(cell_of(tmp_path, *SHORT, "logger=wandb"))
    assert sink.calls == [f"end {state}", "end"]


def test_the_result_is_there_before_the_mirror_ends(tmp_path, monkeypatch):
    """An upload that takes long, or a kill meanwhile, must not cost the result."""
    seen = []

    class Slow(Broken):
        def end(self, state, result):
            seen.extend(p.name for p in folder(tmp_path, cell).iterdir())

    monkeypatch.setitem(loggers.SINKS, "wandb", ("W&B", lambda *_: Slow()))
    cell = cell_of(tmp_path, *SHORT, "logger=wandb")
    run(cell)
    assert {"result.json", "episodes.parquet"} <= set(seen)


def test_csv_log_keeps_every_attempt(tmp_path):
    cell = cell_of(tmp_path, *SHORT, "logger=csv")
    run(cell)
    frame = pd.read_csv(folder(tmp_path, cell) / "csv" / "attempt_1" / "metrics.csv")
    assert frame["loss"].notna().sum() == 4 and frame["val_mse"].notna().sum() == 2


def test_offline_file_says_what_the_cell_says(tmp_path):
    """History by meta-step, names, group, job type, tags, configuration and summary."""
    cell = cell_of(tmp_path, *SHORT, "logger=wandb", "logger.group=sweep", "logger.tags=[extra,maml]")
    run(cell)
    found, wanted = mirror(tmp_path, cell), {}
    for row in logged(tmp_path, cell):
        wanted.setdefault(row.pop("step"), {}).update({k: v for k, v in row.items() if k != "attempt"})
    assert {step: {k: v for k, v in row.items() if k[0] != "_"} for step, row in found.history.items()} == wanted
    about = found.run
    assert (about.run_id, about.run_group, about.job_type) == (f"{cell.cell_id}-1", "sweep", "train")
    assert about.project == "metalearn" and sorted(about.tags) == ["extra", "maml", "sinusoid"]
    assert found.config == cell.config
    test = result(tmp_path, cell)["metrics"]
    for name, plain in {"mse": "test_mse", "mse@step=0": "test_mse_step_0"}.items():
        shown = {k: found.summary[f"{plain}{end}"] for k, end in {"mean": "", "ci95": "_ci95", "n": "_n"}.items()}
        assert shown == {k: test[name][k] for k in shown}
    assert found.summary["status"] == "done" and found.summary["cell_id"] == cell.cell_id and found.exit_code == 0
    names = {name for row in (*found.history.values(), found.summary) for name in row if name[0] != "_"}  # W&B's own
    assert all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in names)


def test_a_failed_run_leaves_the_next_cell_its_own_mirror(tmp_path, monkeypatch):
    """W&B hands out a run that is still open instead of a new one, unless told otherwise."""
    from metalearn import run as module

    failing, good = cell_of(tmp_path, *SHORT, "logger=wandb"), cell_of(tmp_path, *SHORT, "logger=wandb", "seed=1")
    with monkeypatch.context() as patch:
        patch.setattr(module, "episode_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(failing)
    run(good)
    losses = [[x["loss"] for x in logged(tmp_path, c) if "loss" in x] for c in (failing, good)]
    assert losses[0] != losses[1]
    for cell, wanted, code in zip((failing, good), losses, (1, 0), strict=True):
        found = mirror(tmp_path, cell)
        assert [row["loss"] for _, row in sorted(found.history.items())] == wanted and found.exit_code == code


def test_diverged(tmp_path):
    cell = cell_of(tmp_path, "trainer.max_steps=50", "trainer.val_every=0", "algorithm.alpha=1e30", "logger=wandb")
    assert run(cell) == "diverged"
    found = mirror(tmp_path, cell)
    assert found.summary["status"] == "diverged" and found.exit_code == 3
    assert found.summary["error"] == result(tmp_path, cell)["error"]


DEADLY = """
import os, signal, subprocess, sys, warnings
sys.path.insert(0, sys.argv[4])
from runs import cell_of
from metalearn import loggers, schema, sweeper
from metalearn.run import run
from test_loggers import SHORT, service

schema.register(), sweeper.register()
write, output = loggers.WandbSink.write, sys.argv[1]
loggers.PATIENCE_SECONDS = float(sys.argv[3])

def deadly(self, row, step):
    if step == 2:
        os.kill(service(), int(sys.argv[2]))
    write(self, row, step)

loggers.WandbSink.write = deadly
print(run(cell_of(output, *SHORT, "logger=wandb")))
loggers.WandbSink.write = write
print(run(cell_of(output, *SHORT, "logger=wandb", "seed=1")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_wandb_process_that_dies_or_hangs_stops_nothing(tmp_path, signum):
    """The run ends well, the next one has its mirror again, and the process ends."""
    done = subprocess.run(
        [sys.executable, "-c", DEADLY, str(tmp_path), str(int(signum)), "0.5", os.path.dirname(__file__)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == ["done", "done"], done.stderr
    assert done.stderr.count("logging to W&B has ended") == 1 and "Traceback" not in done.stderr
    second = cell_of(tmp_path, *SHORT, "logger=wandb", "seed=1")
    assert mirror(tmp_path, second).summary["test_mse"] == result(tmp_path, second)["metrics"]["mse"]["mean"]


def test_upload_without_a_key_is_off_and_asks_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb_run, "known_key", lambda: False)
    cell = cell_of(tmp_path, *SHORT, "logger=wandb")
    with pytest.warns(UserWarning, match="W&B is off: no API key is known"):
        assert run(cell) == "done"


def test_names_stay_different_and_plain():
    names = ["mse@group=a-b", "mse@group=a_b", "mse@group=線", "mse", "val_mse"]
    plain = wandb_run.plain_names(names)
    assert plain["mse"] == "mse" and plain["val_mse"] == "val_mse" and plain["mse@group=a-b"] == "mse_group_a_b"
    assert len(set(plain.values())) == len(names)
    assert all(p.isascii() and p.replace("_", "").isalnum() for p in plain.values())
