"""A signal in the middle of a run: saved at that very step, the signal goes on, and the rest has the same bits."""

import json
import os
import signal

import pytest
from runs import assert_twins, cell_of, folder, result

from metalearn import preemption
from metalearn.cells import Cell
from metalearn.ledger import CellDir
from metalearn.run import run
from metalearn.training import Recorder

RUN = ("trainer.max_steps=30", "trainer.val_every=10", "trainer.save_seconds=1000")


class Requeued(SystemExit):
    """What a scheduler's handler raises in these tests."""


@pytest.fixture
def scheduler():
    """A handler of USR2 that was there first, as submitit's is."""
    seen = []

    def handler(signum, frame):
        seen.append(signum)
        raise Requeued

    before = {s: signal.getsignal(s) for s in preemption.SIGNALS}
    signal.signal(signal.SIGUSR2, handler)
    yield seen
    assert signal.getsignal(signal.SIGUSR2) is handler  # handed back
    for signum, old in before.items():
        signal.signal(signum, old)


def at(monkeypatch, hook: str, *steps: int, signum=signal.SIGUSR2) -> None:
    """Send this process a signal when a hook of the recorder meets one of these meta-steps, once each."""
    original, left = getattr(Recorder, hook), list(steps)

    def wrapped(self, trainer, module, *arguments, **more):
        if module.meta_steps in left:
            left.remove(module.meta_steps)
            os.kill(os.getpid(), signum)
        return original(self, trainer, module, *arguments, **more)

    monkeypatch.setattr(Recorder, hook, wrapped)


def attempts(output, cell: Cell, most: int = 9) -> list[str]:
    """Start a cell until it ends; what status.json said after each start."""
    said = []
    for _ in range(most):
        directory = CellDir(output, cell.cell_id)
        directory.acquire()
        try:
            run(cell, directory)
        except Requeued:
            pass
        finally:
            directory.release()
        status = directory.status
        said.append(f"{status['state']} {status['error']}")
        if status["state"] == "done":
            return said
    raise AssertionError(said)


def test_a_run_signalled_several_times_equals_its_undisturbed_twin(tmp_path, monkeypatch, scheduler):
    twin, cell = cell_of(tmp_path / "twin", *RUN), cell_of(tmp_path / "signalled", *RUN)
    run(twin)
    at(monkeypatch, "on_train_batch_start", 3, 4, 17)
    said = attempts(tmp_path / "signalled", cell)
    assert said == [f"killed SIGUSR2: saved at meta-step {n}" for n in (4, 5, 18)] + ["done None"]
    assert scheduler == [signal.SIGUSR2] * 3
    assert_twins(tmp_path / "twin", tmp_path / "signalled", cell)
    assert result(tmp_path / "signalled", cell)["steps"] == 30
    lines = [json.loads(x) for x in (folder(tmp_path / "signalled", cell) / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "val_mse" in x] == [10, 20, 30]  # nothing repeated, nothing left out


@pytest.mark.parametrize("step", [10, 30])
def test_a_signal_during_validation_waits_for_its_end(tmp_path, monkeypatch, scheduler, step):
    twin, cell = cell_of(tmp_path / "twin", *RUN), cell_of(tmp_path / "signalled", *RUN)
    run(twin)
    at(monkeypatch, "on_validation_batch_end", step)
    assert attempts(tmp_path / "signalled", cell) == [f"killed SIGUSR2: saved at meta-step {step}", "done None"]
    assert_twins(tmp_path / "twin", tmp_path / "signalled", cell)


def test_a_signal_during_the_test_acts_at_once_and_the_test_is_made_again(tmp_path, monkeypatch, scheduler):
    twin, cell = cell_of(tmp_path / "twin", *RUN), cell_of(tmp_path / "signalled", *RUN)
    run(twin)
    at(monkeypatch, "on_test_batch_end", 30)
    assert [s.split()[0] for s in attempts(tmp_path / "signalled", cell)] == ["killed", "done"]
    assert_twins(tmp_path / "twin", tmp_path / "signalled", cell)


def test_what_nobody_handles_ends_the_process_with_its_number(monkeypatch):
    called = []
    monkeypatch.setattr(preemption.subprocess, "run", lambda command, check: called.append(command))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SystemExit) as ended:
        preemption.leave(signal.SIGTERM)
    assert ended.value.code == 143 and called == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for signum, requeues in ((signal.SIGTERM, 0), (signal.SIGUSR1, 1), (signal.SIGUSR2, 2)):
        with pytest.raises(SystemExit):
            preemption.leave(signum)
        assert called == [["scontrol", "requeue", "7"]] * requeues
    monkeypatch.setenv(preemption.REQUEUES, "2")
    with pytest.raises(SystemExit):
        preemption.leave(signal.SIGUSR2)
    assert len(called) == 2  # restarts are counted
