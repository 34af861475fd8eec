"""The real thing: a job array on SLURM that is preempted, killed and repaired ends as if nothing had happened.

`make test-slurm` starts a throw-away cluster for it (scripts/slurm/slurm-up). With METALEARN_SLURM_LOG=<file> what was
done and seen is written there.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from runs import TINY, assert_twins, checkpoint, command, folder, result

from metalearn.cells import expand
from metalearn.sweep.standing import standings

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not (shutil.which("sbatch") and "SLURM_CONF" in os.environ), reason="needs a SLURM cluster"),
]

LONG = ("trainer.max_steps=4000", "trainer.val_every=1000", "trainer.save_seconds=2", "trainer.compile=never")
QUEUE = ("hydra/launcher=slurm", "hydra.launcher.array_parallelism=3", "hydra.launcher.mem_gb=1")
BEGAN = time.monotonic()


def say(text: str) -> None:
    """One line of the log."""
    line = f"{time.monotonic() - BEGAN:7.1f} s  {text}"
    print(line)
    if place := os.environ.get("METALEARN_SLURM_LOG"):
        with open(place, "a") as file:
            file.write(line + "\n")


def shell(*words: str) -> str:
    say("$ " + " ".join(words))
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and words[0] != "timeout":
        say(f"  exit code {done.returncode}: {' '.join(done.stderr.split())}")
    return done.stdout


def metalearn(output: Path, action: str, *words: str) -> str:
    """An action on the sweep under `output`."""
    verb = [*command(output)[:3], "sweep", action, *TINY, f"output_dir={output}", *LONG, *words]
    say(f"$ metalearn sweep {action} ... " + " ".join(words))
    done = subprocess.run(verb, capture_output=True, text=True, timeout=200)
    for line in (done.stdout + done.stderr).replace(str(output), "<outputs>").splitlines():
        say("  " + line)
    return done.stdout + done.stderr


def until(condition, what: str, seconds: float = 300.0):
    """Wait for something to become true, and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.3)
    say(what)
    return found


def sweep(output: Path, seeds: str):
    return expand([*TINY, f"output_dir={output}", *LONG, f"seed={seeds}"])


def status(output: Path, cell) -> dict:
    path = folder(output, cell) / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def running(output: Path, cell, attempt: int, step: int = 1):
    """Whether an attempt of a cell is in the middle of training (its checkpoint is at least that far)."""
    now = status(output, cell)
    if now.get("state") != "running" or now["attempt"] != attempt or now.get("phase") != "train":
        return None
    log = folder(output, cell) / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    last = [json.loads(x) for x in lines[-1:]]
    return now if last and last[0]["attempt"] == attempt and last[0]["step"] >= step else None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The same cells, one after another on this machine."""
    place = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(command(place, *LONG, "seed=0,1,2,3,4,5", "-m"), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return place


def test_an_array_preempted_twice_and_killed_once_equals_the_local_sweep(tmp_path, undisturbed):
    cells = sweep(tmp_path, "0,1,2,3,4,5")
    assert "submitted: 6 cells in 6 jobs" in metalearn(tmp_path, "run", *QUEUE, "seed=0,1,2,3,4,5")
    jobs = [s.job for s in standings(cells)]
    assert "submitted: 0 cells" in metalearn(tmp_path, "run", *QUEUE, "seed=0,1,2,3,4,5")  # all are in hand

    pid = until(lambda: running(tmp_path, cells[1], 1), "cell 1 is training")["pid"]
    shell("kill", "-9", str(pid))
    # the signal that SLURM sends before it takes a machine away; scancel would go on to signal the job that is queued
    # again, hence the timeout
    for attempt in (1, 2):
        until(lambda n=attempt: running(tmp_path, cells[0], n, 100), f"cell 0, attempt {attempt}, is training")
        shell("timeout", "3", "scancel", "--signal=USR2", jobs[0])
        again = f"cell 0 was started again ({attempt})"
        until(lambda n=attempt: status(tmp_path, cells[0]).get("attempt", 0) > n, again)
    until(lambda: standings([cells[1]])[0].state == "killed", "cell 1 is noticed to be killed", 200)
    assert "submitted: 1 cells" in metalearn(tmp_path, "repair", *QUEUE, "seed=0,1,2,3,4,5")
    until(lambda: all(s.finished for s in standings(cells)), "all cells have a result", 400)
    metalearn(tmp_path, "status", "seed=0,1,2,3,4,5")

    for cell in cells:
        assert_twins(undisturbed, tmp_path, cell)
        assert result(tmp_path, cell)["steps"] == 4000
        assert not (folder(tmp_path, cell) / "old").exists()  # nothing was run twice
    attempts = [status(tmp_path, cell)["attempt"] for cell in cells]
    say(f"attempts of the six cells: {attempts}; parameters, optimizer state, episodes: the bits of the local sweep")
    assert attempts == [3, 2, 1, 1, 1, 1]
    before = {c.cell_id: (folder(tmp_path, c) / "result.json").stat().st_mtime_ns for c in cells}
    assert "submitted: 0 cells" in metalearn(tmp_path, "run", *QUEUE, "seed=0,1,2,3,4,5")
    assert before == {c.cell_id: (folder(tmp_path, c) / "result.json").stat().st_mtime_ns for c in cells}


def test_real_preemption_by_a_partition_of_higher_priority(tmp_path, undisturbed):
    (cell,) = sweep(tmp_path, "0")
    metalearn(tmp_path, "run", *QUEUE, "hydra.launcher.partition=main", "seed=0")
    until(lambda: running(tmp_path, cell, 1, 100), "the cell is training in partition main")
    cpus = shell("sinfo", "-h", "-p", "urgent", "-o", "%c").strip()
    urgent = shell("sbatch", "--parsable", "-p", "urgent", "-n", cpus, "-o", "/dev/null", "--wrap", "sleep 5").strip()
    until(lambda: status(tmp_path, cell)["state"] == "killed", "it was preempted")
    saved = status(tmp_path, cell)["error"]
    say(f"status.json: {saved}")
    assert "saved at meta-step" in saved
    until(lambda: standings([cell])[0].finished, f"job {urgent} is over and the cell is done", 300)
    assert_twins(undisturbed, tmp_path, cell)
    assert checkpoint(tmp_path, cell)["meta_steps"] == 4000


def test_short_cells_share_a_job_and_multirun_waits(tmp_path, undisturbed):
    words = command(tmp_path, *LONG, "seed=0,1,2", *QUEUE, "hydra.launcher.cells_per_job=2", "-m")
    say("$ metalearn -m seed=0,1,2 hydra/launcher=slurm hydra.launcher.cells_per_job=2 ...")
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    say(done.stdout.replace(str(tmp_path), "<outputs>"))
    assert done.returncode == 0, done.stderr
    cells = sweep(tmp_path, "0,1,2")
    jobs = [status(tmp_path, c)["slurm_job_id"] for c in cells]
    assert jobs[0] == jobs[1] != jobs[2]
    for cell in cells:
        assert_twins(undisturbed, tmp_path, cell)


def test_plain_sbatch_saves_and_requeues(tmp_path, undisturbed):
    cells = sweep(tmp_path, "0,1")
    lines = [" ".join([*TINY, *LONG, f"output_dir={tmp_path}", f"seed={seed}"]) for seed in (0, 1)]
    (tmp_path / "cells.txt").write_text("\n".join(lines) + "\n")
    script = Path(__file__).parents[1] / "scripts" / "slurm" / "array.sbatch"
    environment = {**os.environ, "METALEARN": " ".join(command(tmp_path)[:3])}
    words = ["sbatch", "--parsable", "--array=1-2", "--mem=1G", f"--output={tmp_path}/%A_%a.log", str(script)]
    say("$ " + " ".join(words[:3]) + " scripts/slurm/array.sbatch cells.txt")
    submitted = subprocess.run([*words, str(tmp_path / "cells.txt")], env=environment, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    until(lambda: running(tmp_path, cells[0], 1, 100), "the first cell is training")
    shell("timeout", "3", "scancel", "--signal=USR2", f"{job}_1")
    until(lambda: status(tmp_path, cells[0]).get("attempt") == 2, "it was started again")
    until(lambda: all(s.finished for s in standings(cells)), "both have a result")
    for cell in cells:
        assert_twins(undisturbed, tmp_path, cell)


def test_the_ranks_of_one_cell_come_from_slurm(tmp_path):
    """Two tasks of a job are the two ranks; preempted in the middle, both save at the same meta-step."""
    here, twin = tmp_path / "here", tmp_path / "twin"
    two = ("trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=1000", "seed=0")
    (cell,) = expand([*TINY, f"output_dir={here}", *LONG, *two])
    metalearn(here, "run", *QUEUE, *two)
    until(lambda: running(here, cell, 1, 100), "the cell is training")
    shell("timeout", "3", "scancel", "--signal=USR2", standings([cell])[0].job)
    until(lambda: status(here, cell).get("attempt") == 2, "it was started again")
    until(lambda: standings([cell])[0].finished, "it has a result")
    assert subprocess.run(command(twin, *LONG, *two), capture_output=True, timeout=400).returncode == 0
    assert_twins(twin, here, cell)
