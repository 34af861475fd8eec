"""One run from cell to result: exact steps, what is left on disk, resuming, reuse, divergence, logging."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from runs import assert_twins, cell_of, checkpoint, console, folder, result

from metalearn import training
from metalearn.ledger import CellDir
from metalearn.run import run


def lines(output, cell):
    return [json.loads(line) for line in (folder(output, cell) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("steps", "every", "call"), [(7, 3, 1), (10, 4, 3), (6, 6, 4), (5, 0, 2), (3, 10, 10), (0, 5, 1)]
)
def test_max_steps_is_exact(tmp_path, steps, every, call):
    """max_steps counts outer updates, whatever the validation interval and the steps in one Lightning call."""
    cell = cell_of(
        tmp_path, f"trainer.max_steps={steps}", f"trainer.val_every={every}", f"trainer.meta_steps_per_call={call}"
    )
    assert run(cell) == "done"
    state = checkpoint(tmp_path, cell)
    assert state["meta_steps"] == result(tmp_path, cell)["steps"] == steps
    moments = state["optimizer"].get("state", {})
    assert all(float(m["step"]) == steps for m in moments.values()) and bool(moments) == (steps > 0)
    validated = [x["step"] for x in lines(tmp_path, cell) if "val_mse" in x] if steps else []
    expected = sorted({*range(every, steps + 1, every), steps}) if every and steps else []
    assert validated == expected


def test_call_size_changes_no_bit(tmp_path):
    """Several meta-steps in one call of Lightning are the same meta-steps."""
    cells = [
        cell_of(tmp_path / str(n), "trainer.max_steps=9", "trainer.val_every=4", f"trainer.meta_steps_per_call={n}")
        for n in (1, 5)
    ]
    for cell in cells:
        run(cell)
    assert cells[0].cell_id == cells[1].cell_id
    assert_twins(tmp_path / "1", tmp_path / "5", cells[0])


def test_result_holds_what_the_contract_says(tmp_path):
    cell = cell_of(tmp_path, "trainer.max_steps=4", "trainer.val_every=2", "algorithm.test_steps=2")
    run(cell)
    found = result(tmp_path, cell)
    assert {
        *("cell_id", "train_id", "config", "config_hash", "git_commit", "git_dirty", "seed", "versions", "data_hash"),
        *("protocol", "status", "steps", "seconds", "metrics"),
    } == set(found)
    assert {
        *("label_assignment", "way", "shot", "queries", "bn", "test_steps", "inner_loss_reduction", "selection"),
        *("test_split", "episodes", "episodes_id", "transductive"),
    } == set(found["protocol"])
    assert found["protocol"]["bn"] == "none" and found["protocol"]["selection"]["checkpoint"] == "best"
    episodes = pd.read_parquet(folder(tmp_path, cell) / "episodes.parquet")
    assert list(episodes.columns) == ["episode", "bn", "step", "metric", "value", "loss", "group"]
    assert len(episodes) == 9 * 3 and set(episodes["step"]) == {0, 1, 2}
    last = episodes[episodes["step"] == 2]["value"].to_numpy()
    headline = found["metrics"]["mse"]
    assert headline["n"] == 9 and headline["interval"] == "tasks"
    np.testing.assert_allclose(headline["mean"], last.mean(), rtol=1e-12)
    np.testing.assert_allclose(headline["ci95"], 1.96 * last.std(ddof=1) / 3, rtol=1e-12)
    assert set(found["metrics"]) == {"mse", "mse@step=0", "mse@step=1"}
    assert CellDir(tmp_path, cell.cell_id).status["state"] == "done"


def test_the_best_checkpoint_on_validation_classes_is_tested(tmp_path):
    """Selection follows the validation values in the log, and `checkpoint=last` tests the last one."""
    common = ("trainer.max_steps=12", "trainer.val_every=3", "optimizer.lr=0.05")
    cell = cell_of(tmp_path, *common)
    run(cell)
    values = {x["step"]: x["val_mse"] for x in lines(tmp_path, cell) if "val_mse" in x}
    best = min(values, key=values.__getitem__)
    assert result(tmp_path, cell)["protocol"]["selection"]["step"] == best
    last = cell_of(tmp_path, *common, "evaluation.checkpoint=last")
    assert last.train_id == cell.train_id and last.cell_id != cell.cell_id
    run(last)
    assert result(tmp_path, last)["protocol"]["selection"] == {"checkpoint": "last", "step": 12}


class Killed(BaseException):
    """Stands for the process's death between two statements."""


@pytest.mark.parametrize("algorithm", ["maml", "reptile", "anil algorithm.alpha=online"])
@pytest.mark.parametrize("kill_at", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (4, 5, 8)), 11])
def test_an_interrupted_run_continues_bit_identically(tmp_path, monkeypatch, algorithm, kill_at):
    """Dying after any meta-step, with checkpoints every few, leaves the same end as never dying."""
    overrides = ("trainer.max_steps=12", "trainer.val_every=5", "trainer.save_seconds=1e-9")
    overrides += tuple(f"algorithm={algorithm}".split())
    undisturbed = cell_of(tmp_path / "twin", *overrides)
    run(undisturbed)
    original, count = training.Recorder.on_train_batch_end, iter(range(1, 100))

    def dying(self, trainer, module, *rest):
        if next(count) == kill_at:
            raise Killed
        if module.meta_steps % 3:  # so that steps since the last checkpoint are lost, too
            self.save_seconds = 1e9
        original(self, trainer, module, *rest)
        self.save_seconds = 1e-9

    monkeypatch.setattr(training.Recorder, "on_train_batch_end", dying)
    cell = cell_of(tmp_path / "killed", *overrides)
    with pytest.raises(Killed):
        run(cell)
    monkeypatch.setattr(training.Recorder, "on_train_batch_end", original)
    assert run(cell) == "done"
    assert_twins(tmp_path / "twin", tmp_path / "killed", cell)
    assert CellDir(tmp_path / "killed", cell.cell_id).status["attempt"] == 2


def test_a_trained_cell_only_tests(tmp_path):
    """Another number of test episodes reuses the parameters; the shared episodes score the same."""
    first = cell_of(tmp_path, "trainer.max_steps=6", "trainer.val_every=3")
    second = cell_of(tmp_path, "trainer.max_steps=6", "trainer.val_every=3", "trainer.test_episodes=13")
    assert first.train_id == second.train_id and first.cell_id != second.cell_id
    run(first)
    run(second)
    assert not (folder(tmp_path, second) / "checkpoints").exists()
    a, b = (pd.read_parquet(folder(tmp_path, c) / "episodes.parquet") for c in (first, second))
    merged = a.merge(b, on=["episode", "bn", "step", "metric"])
    assert len(merged) == len(a) and (merged["value_x"] == merged["value_y"]).all()
    assert result(tmp_path, first)["protocol"]["episodes_id"] == result(tmp_path, second)["protocol"]["episodes_id"]
    assert result(tmp_path, second)["steps"] == 6


def test_divergence_is_a_result(tmp_path):
    cell = cell_of(tmp_path, "trainer.max_steps=50", "algorithm.alpha=1e30", "trainer.val_every=0")
    assert run(cell) == "diverged"
    text = (folder(tmp_path, cell) / "result.json").read_text()
    found = json.loads(text)
    assert found["status"] == "diverged" and found["metrics"] == {} and "NaN" not in text
    assert all(word in found["error"] for word in ("meta-step", "task", "algorithm.alpha = 1e+30"))


def test_half_a_line_of_a_killed_attempt_is_fenced_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"attempt": 1, "step": 1}\n{"attempt": 1, "st')
    training.MetricsFile(path, 2).write({1: {"loss": 0.5}})
    assert json.loads(path.read_text().splitlines()[-1]) == {"attempt": 2, "step": 1, "loss": 0.5}


def test_seeds_change_training_but_not_the_test_episodes(tmp_path):
    cells = [cell_of(tmp_path, "trainer.max_steps=3", f"seed={s}") for s in (0, 1)]
    for cell in cells:
        run(cell)
    a, b = (result(tmp_path, c) for c in cells)
    assert a["metrics"]["mse"]["mean"] != b["metrics"]["mse"]["mean"]
    assert a["protocol"]["episodes_id"] == b["protocol"]["episodes_id"]


def test_learns_sinusoids_in_a_few_seconds(tmp_path):
    """Adaptation lowers the error on unseen curves, and training lowers it further."""
    common = ("trainer.test_episodes=60", "trainer.meta_batch_size=25", "trainer.val_every=0", "algorithm.test_steps=5")
    trained = cell_of(tmp_path, *common, "trainer.max_steps=800", "trainer.meta_steps_per_call=10")
    untrained = cell_of(tmp_path, *common, "trainer.max_steps=0")
    for cell in (trained, untrained):
        run(cell)
    after, before = (result(tmp_path, c)["metrics"] for c in (trained, untrained))
    assert after["mse"]["mean"] < 0.6 * after["mse@step=0"]["mean"]
    assert after["mse"]["mean"] < 0.5 * before["mse"]["mean"]


@pytest.mark.slow
def test_no_network_is_needed(tmp_path):
    """The default run, W&B included, in a network namespace that has no network at all."""
    import subprocess

    from runs import command

    done = subprocess.run(
        ["unshare", "--net", "--map-root-user", *command(tmp_path, "logger=wandb", "trainer.max_steps=4")],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stderr


@pytest.mark.slow
def test_two_gloo_processes_are_one(tmp_path):
    """The tasks of a meta-step dealt out to two ranks give the update of one process (float64, to rounding)."""
    common = ("trainer.max_steps=11", "trainer.val_every=4", "trainer.precision=64")
    for devices in (1, 2):
        done = console(tmp_path / str(devices), *common, f"trainer.devices={devices}")
        assert done.returncode == 0, done.stderr
    cell = cell_of(tmp_path, *common)
    one, two = (checkpoint(tmp_path / d, cell)["learner"] for d in ("1", "2"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-12, atol=1e-12)
    a, b = (result(tmp_path / d, cell)["metrics"]["mse"] for d in ("1", "2"))
    assert a["n"] == b["n"] == 9 and math.isclose(a["mean"], b["mean"], rel_tol=1e-9)


@pytest.mark.slow
def test_a_sweep_of_two_process_cells(tmp_path):
    """Each cell forms its own process group, after the group of the one before has ended."""
    common = ("trainer.max_steps=6", "trainer.val_every=3", "trainer.devices=2", "seed=0,1")
    done = console(tmp_path, "-m", *common)
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        cell = cell_of(tmp_path, *common[:3], f"seed={seed}")
        assert result(tmp_path, cell)["steps"] == 6
