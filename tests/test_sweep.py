"""Sweeps told from files and queues alone: states, what is submitted and what is not, packing, refusals."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
import types
from datetime import datetime, timedelta, timezone

import pytest
from runs import TINY, assert_twins, cell_of, command, folder, result

from metalearn import launchers
from metalearn.cells import expand
from metalearn.ledger import CellDir, write_json
from metalearn.schema import BadInput
from metalearn.sweep import jobs, launch, main
from metalearn.sweep.standing import STALE_SECONDS, duration, standings


def ago(seconds: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def put(cell, state: str, *, heartbeat: float = 0.0, started: float = 50.0, error=None, **more) -> None:
    """A status.json as an attempt leaves it."""
    status = {"state": state, "attempt": 1, "host": "h", "started": ago(started), "heartbeat": ago(heartbeat)}
    write_json(CellDir(cell.config["output_dir"], cell.cell_id).path / "status.json", status | {"error": error, **more})


def finish(cell, status: str = "done", **more) -> None:
    about = {"cell_id": cell.cell_id, "seed": cell.config["seed"], "config": cell.config, "protocol": {}, "metrics": {}}
    result = about | {"status": status, "steps": 5, "seconds": 61.0, **more}
    write_json(CellDir(cell.config["output_dir"], cell.cell_id).path / "result.json", result)


@pytest.fixture
def six(tmp_path):
    return expand([*TINY, f"output_dir={tmp_path}", "seed=0,1,2,3,4,5"])


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Stand-ins of squeue and sacct that know what `says` holds."""
    says = {"squeue": "", "sacct": ""}
    place = tmp_path / "bin"
    place.mkdir()

    def tell(**texts: str) -> None:
        says.update(texts)
        for name, text in says.items():
            script = place / name
            script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
            script.chmod(script.stat().st_mode | stat.S_IEXEC)

    tell()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return tell


def states(cells) -> list[str]:
    return [s.state for s in standings(cells)]


def test_every_state_is_told_from_the_files(six, queue):
    done, diverged, running, silent, failed, missing = six
    finish(done)
    finish(diverged, "diverged", error="loss is not finite at meta-step 3")
    put(running, "running", heartbeat=5, step=17, phase="train")
    put(silent, "running", heartbeat=STALE_SECONDS + 70)
    put(failed, "failed", error="ValueError: no")
    found = standings(six)
    assert [s.state for s in found] == ["done", "diverged", "running", "killed", "failed", "missing"]
    assert found[0].seconds == 61.0 and found[2].step == 17
    assert "no heartbeat for 2 min" in found[3].why and found[4].why == "ValueError: no"
    put(silent, "killed", error="SIGUSR2: saved at meta-step 40")
    assert standings([silent])[0].why == "SIGUSR2: saved at meta-step 40"


def test_a_result_counts_whatever_the_status_says(six):
    put(six[0], "running", heartbeat=1000)
    finish(six[0])
    assert states(six[:1]) == ["done"]


@pytest.mark.parametrize("text", ["", "[]", '{"status": "done"}', '"done"', "{"])
def test_damaged_files_are_told_and_never_raise(six, queue, text):
    one, two, three, *_ = six
    finish(one)
    (CellDir(one.config["output_dir"], one.cell_id).path / "result.json").write_text(text)
    put(two, "done")
    put(three, "running")
    (CellDir(three.config["output_dir"], three.cell_id).path / "status.json").write_text(text)
    found = standings(six[:3])
    assert [s.state for s in found] == ["missing", "killed", "missing"]
    assert "result.json is damaged" in found[0].why and found[1].why == "its result is gone"


def test_the_queue_tells_what_has_not_begun(tmp_path, six, queue):
    jobs.note(tmp_path, [six[0].cell_id], "7_0", "slurm", "log")
    jobs.note(tmp_path, [six[1].cell_id, six[2].cell_id], "7_1", "slurm", "log")
    queue(squeue="7_0|PENDING\n7_1|RUNNING")
    put(six[1], "running", heartbeat=1)  # the first of its job; the third waits for it
    assert states(six[:3]) == ["queued", "running", "queued"]
    queue(squeue="7_0|PENDING", sacct="OUT_OF_MEMORY\n")
    put(six[1], "running", heartbeat=STALE_SECONDS + 1)
    found = standings(six[:3])
    assert [s.state for s in found] == ["queued", "killed", "killed"]
    assert "out_of_memory" in found[1].why and "before it began" in found[2].why


def test_a_cell_that_was_killed_before_its_submission_is_queued(tmp_path, six, queue):
    put(six[0], "killed", started=500, error="SIGTERM: saved at meta-step 4")
    jobs.note(tmp_path, [six[0].cell_id], "9", "slurm", "log")
    queue(squeue="9|PENDING")
    assert states(six[:1]) == ["queued"]
    put(six[0], "failed", started=-1, error="ValueError: no")  # begun since; its job goes on with others
    queue(squeue="9|RUNNING")
    assert states(six[:1]) == ["failed"]


def test_a_job_whose_queue_does_not_answer_is_not_given_up(tmp_path, six, queue, monkeypatch):
    jobs.note(tmp_path, [six[0].cell_id], "9", "slurm", "log")
    queue()
    assert states(six[:1]) == ["killed"]  # squeue does not know it
    for text in ("exit 1", "sleep 5"):
        monkeypatch.setattr(jobs, "TIMEOUT_SECONDS", 0.5)
        (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\n{text}\n")
        (found,) = standings(six[:1])
        assert found.state == "queued" and "no answer from the queue" in found.why
    queue(sacct="FAILED\n")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert states(six[:1]) == ["killed"]  # accounting knows how it ended


def test_a_cell_of_the_noted_job_has_begun_whatever_the_clocks_say(tmp_path, six, queue):
    jobs.note(tmp_path, [c.cell_id for c in six[:2]], "9_0", "slurm", "log")
    put(six[0], "failed", started=3, error="ValueError: no", slurm_job_id="9_0")  # its node's clock is behind
    put(six[1], "failed", started=3, error="ValueError: no", slurm_job_id="8_0")  # of the job before
    assert states(six[:2]) == ["failed", "killed"]
    jobs.note(tmp_path, [six[2].cell_id], "9_0", "slurm", "log", ago(60))
    put(six[2], "failed", started=50, error="ValueError: no")
    assert states(six[2:3]) == ["failed"]


def test_nobody_who_knows_the_job_means_killed(tmp_path, six, monkeypatch):
    monkeypatch.setenv("PATH", "")
    jobs.note(tmp_path, [six[0].cell_id], "9", "slurm", "log")
    assert "unknown" in standings(six[:1])[0].why


def test_cells_that_cannot_run_here_are_said_to_be_impossible(tmp_path):
    cells = expand([f"output_dir={tmp_path}", "dataset=omniglot"], tolerant=True)
    (s,) = standings(cells)
    assert s.state == "impossible" and "dataset.root" in s.why


@pytest.fixture
def submitted(monkeypatch):
    """What would be submitted; no queue gets it."""
    found = []

    def submit(cells, flags, launcher):
        found.extend(c.cell_id for c in cells)
        return [launch.Job("1_0", list(cells), "log")]

    monkeypatch.setattr(launch, "submit", submit)
    monkeypatch.setattr(launchers.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(jobs, "has_accounting", lambda: True)
    return found


def sweep(action: str, tmp_path, *more: str) -> int:
    return main([action, *TINY, f"output_dir={tmp_path}", "seed=0,1,2,3,4,5", "hydra/launcher=slurm", *more])


def test_run_submits_what_nobody_has_and_nothing_else(tmp_path, six, queue, submitted, capsys):
    finish(six[0])
    finish(six[1], "diverged")
    put(six[2], "running")
    put(six[3], "killed")
    put(six[4], "failed", error="ValueError: no")
    assert sweep("run", tmp_path, "--dry-run") == 0
    said = capsys.readouterr().out
    assert submitted == [] and "would submit: 2 cells" in said
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("  ")] == ["seed=3", "seed=5"]
    assert sweep("run", tmp_path) == 0
    assert submitted == [six[3].cell_id, six[5].cell_id]
    assert "left alone: 1 failed; metalearn sweep repair runs them again" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path, submitted):
    assert sweep("run", tmp_path / "new", "--dry-run") == 0
    assert submitted == [] and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("place", "said"), [("file", "file is a file"), ("/proc/nothing", "cannot be made")])
@pytest.mark.parametrize("action", ["run", "repair", "plan"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, submitted, monkeypatch, action, place, said):
    (tmp_path / "file").write_text("")
    place = str(tmp_path / place)  # an absolute one stands alone
    with pytest.raises(BadInput, match=f"output_dir={place}: .*{said}"):
        main([action, *TINY, f"output_dir={place}"])
    assert submitted == []


def test_what_is_run_again_is_so_once(tmp_path, six, monkeypatch, capsys):
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, **__: types.SimpleNamespace(pid=1))
    monkeypatch.setattr(jobs, "_is_job", lambda pid: True)
    finish(six[0])
    command = ["run", *TINY, f"output_dir={tmp_path}", "seed=0", "rerun=true"]
    assert main(command) == main(command) == 0
    said = capsys.readouterr().out
    assert said.count("submitted: 1 cells") == said.count("submitted: 0 cells") == 1
    (work,) = tmp_path.glob("jobs/*/work.json")
    assert "seed=0" in work.read_text() and "rerun" not in work.read_text()  # the process may be started again
    assert [p.name for p in folder(tmp_path, six[0]).iterdir()] == ["old"]


def test_what_the_queue_refuses_to_run_again_is_still_finished(tmp_path, six, monkeypatch):
    def refuse(*_):
        raise BadInput("no such partition")

    monkeypatch.setattr(launch, "_submitit", refuse)
    (cell,) = expand([*TINY, f"output_dir={tmp_path}", "seed=0", "rerun=true"])
    finish(cell)
    write_json(folder(tmp_path, cell) / "checkpoints" / "last.json", [])
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(BadInput, match="no such partition"):
        launch.submit([cell], [], launchers.settings(["hydra/launcher=submitit_local"]))
    assert states([cell]) == ["done"]
    (folder(tmp_path, cell) / "old").rmdir()
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_an_array_that_is_too_large_is_refused_with_the_way_out(tmp_path, six, monkeypatch):
    import submitit

    class Refuses:
        def __init__(self, *_, **__): ...
        def update_parameters(self, **_): ...
        def submit(self, work): ...
        @contextlib.contextmanager
        def batch(self):
            yield
            raise submitit.core.utils.FailedJobError("sbatch: error: Invalid job array specification")

    monkeypatch.setattr(submitit, "AutoExecutor", Refuses)
    launcher = launchers.settings(["hydra/launcher=submitit_local"])
    with pytest.raises(
        BadInput, match="refused 6 jobs: .*Invalid job array.*; hydra.launcher.cells_per_job makes fewer"
    ):
        launch.submit(six, [], launcher)


def test_a_state_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(BadInput, match="--state killd: must be one of .*did you mean 'killed'"):
        main(["status", "--state", "done,killd", *TINY, f"output_dir={tmp_path}"])


def test_repair_counts_failures_not_preemptions_and_says_what_it_leaves(tmp_path, six, queue, submitted, capsys):
    put(six[0], "failed", error="OSError: disk full", attempt=7, failures=1)  # preempted six times
    put(six[1], "failed", error="ValueError: no", attempt=7, failures=3)
    assert sweep("repair", tmp_path) == 0
    said = capsys.readouterr().out
    assert submitted == [six[0].cell_id]
    assert "left alone: 1 failed; failed 3 times or more; --max-attempts allows more" in said
    assert "left alone: 4 missing; metalearn sweep run submits them" in said


def test_repair_says_why_and_counts_attempts(tmp_path, six, queue, submitted, capsys):
    for cell in six[:3]:
        finish(cell)
    put(six[3], "killed", error="SIGUSR2: saved at meta-step 4")
    put(six[4], "failed", error="OSError: disk full", attempt=1)
    put(six[5], "failed", error="ValueError: no", attempt=3)
    assert sweep("repair", tmp_path) == 0
    said = capsys.readouterr().out
    assert submitted == [six[3].cell_id, six[4].cell_id]
    assert all(why in said for why in ("saved at meta-step 4", "disk full", "ValueError: no"))
    assert sweep("repair", tmp_path, "--max-attempts", "4") == 0
    assert submitted[2:] == [c.cell_id for c in six[3:]]


def test_status_shows_the_grid_and_says_whether_it_is_complete(tmp_path, six, queue, capsys):
    for cell in six[:5]:
        finish(cell)
    put(six[5], "failed", error="ValueError: no")
    assert main(["status", *TINY, f"output_dir={tmp_path}", "seed=0,1,2,3,4,5"]) == 1
    said = capsys.readouterr().out
    assert "6 cells: 5 done, 1 failed" in said and "ValueError: no" in said
    assert said.count("seed=") == 6 and said.count("algorithm=maml") == 1  # what all share is said once
    assert main(["status", "--format", "json", *TINY, f"output_dir={tmp_path}", "seed=0,1,2,3,4,5"]) == 1
    plain = json.loads(capsys.readouterr().out)
    assert [p["state"] for p in plain] == ["done"] * 5 + ["failed"] and plain[0]["cell_id"] == six[0].cell_id
    finish(six[5])
    assert main(["status", *TINY, f"output_dir={tmp_path}", "seed=0,1,2,3,4,5"]) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["hydra/launcher=slrm"], "did you mean 'slurm'"),
        (["hydra/launcher=slurm", "hydra.launcher.partitoin=x"], "hydra.launcher.partitoin"),
        (["hydra/launcher=slurm", "hydra.launcher.timeout_min=2"], "signal_delay_s=120: must be < 120"),
        (["hydra/launcher=slurm", "hydra.launcher.cells_per_job=0"], "cells_per_job=0: must be >= 1"),
        (["hydra/launcher=slurm", "hydra.launcher.nodes=2"], "nodes=2: must be 1"),
        (["hydra/launcher=slurm", "hydra.launcher.timeout_min=x"], "timeout_min=x: .*'x' .* converted to Integer"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said, monkeypatch):
    monkeypatch.setattr(launchers.shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(BadInput, match=said):
        launchers.settings(settings)


def test_slurm_needs_sbatch(monkeypatch):
    monkeypatch.setattr(launchers.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="no sbatch here"):
        launchers.settings(["hydra/launcher=slurm"])
    assert launchers.executor(launchers.settings(["hydra/launcher=joblib"])) is None
    assert launchers.executor(launchers.settings([])) is None


def test_packs_keep_order_and_lose_nothing(six):
    assert [len(p) for p in launch.packs(six, 4)] == [4, 2]
    assert [c for p in launch.packs(six, 4) for c in p] == six


def test_jobs_of_several_processes_are_refused_where_there_is_no_scheduler(tmp_path):
    cell = cell_of(tmp_path, "trainer.devices=2")
    with pytest.raises(BadInput, match=r"trainer.devices=2.*one process"):
        launch.submit([cell], [], launchers.settings(["hydra/launcher=submitit_local"]))


@pytest.mark.parametrize(("seconds", "text"), [(9, "9 s"), (61, "1 min 01 s"), (7380, "2 h 03 min"), (1e5, "1 d 3 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


LONG = ("trainer.max_steps=1500", "trainer.val_every=500", "trainer.compile=never")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit drops its processes
def test_the_local_executor_preempts_requeues_and_packs_as_slurm_does(tmp_path):
    """submitit's local executor has the code path of SLURM: the same pickles, signal handlers and successors."""
    import submitit

    twin, here = tmp_path / "twin", tmp_path / "here"
    assert subprocess.run(command(twin, *LONG, "seed=0,1,2", "-m"), capture_output=True).returncode == 0
    cells = expand([*TINY, f"output_dir={here}", *LONG, "seed=0,1,2"])
    launcher = launchers.settings(["hydra/launcher=submitit_local", "hydra.launcher.cells_per_job=2"])
    found = launch.submit(cells, [], launcher)
    assert [len(j.cells) for j in found] == [2, 1]
    end = time.monotonic() + 300
    log = folder(here, cells[0]) / "metrics.jsonl"
    while not log.exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    job = submitit.LocalJob(here / "jobs" / "%j", found[0].job, tasks=[0])
    os.kill(CellDir(here, cells[0].cell_id).status["pid"], signal.SIGUSR2)
    said = launch.wait(cells, lambda text: None, 0.5)
    assert [s.state for s in said] == ["done"] * 3, said
    assert job.job_id == found[0].job
    assert [s.attempt for s in said] == [2, 1, 1]
    for cell in cells:
        assert_twins(twin, here, cell)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_run_returns_at_once_and_a_second_call_submits_nothing(tmp_path):
    def call(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "metalearn", "sweep", *words, *TINY, f"output_dir={tmp_path}", *LONG, "seed=0,1"],
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        return done.stdout + done.stderr

    assert "submitted: 2 cells" in call("run")
    assert "submitted: 0 cells" in call("run")
    cells = expand([*TINY, f"output_dir={tmp_path}", *LONG, "seed=0,1"])
    assert [s.state for s in launch.wait(cells, lambda text: None, 0.5)] == ["done", "done"]
    assert result(tmp_path, cells[0])["steps"] == 1500
    assert "2 cells: 2 done" in call("status")
