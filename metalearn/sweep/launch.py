"""Handing cells to a queue: packed into jobs, noted, and not waited for. Imports no torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from metalearn.cells import Cell
from metalearn.launchers import executor, is_launcher
from metalearn.ledger import CellDir, now, write_json
from metalearn.results import value
from metalearn.schema import BadInput
from metalearn.sweep import jobs
from metalearn.sweep.standing import STATES, Standing, standings

NOT_PASSED_ON = ("_target_", "submitit_folder", "cells_per_job", "max_num_timeout")
COMMON = (
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
)
"""Settings that all of submitit's executors have; the others carry the executor's name."""


class Work:
    """What a job does: its cells, one after another; those that are finished by then are passed over.

    submitit pickles it, calls it, and asks it for a successor when the job is preempted or runs out of time.

    Args:
        cells: the overrides of each.
        flags: options of the command line that chose them (folders of further groups).
    """

    def __init__(self, cells: Sequence[Sequence[str]], flags: Sequence[str]):
        self.cells, self.flags = [list(c) for c in cells], list(flags)

    def __call__(self) -> None:
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # before torch is imported
            os.environ.setdefault("OMP_NUM_THREADS", cpus)
        from metalearn import cli

        cli.work(self.cells, self.flags)

    def checkpoint(self) -> Any:
        """The same work again: what is done lies in files."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class Job(NamedTuple):
    """A submitted job and the cells that it runs."""

    job: str
    cells: list[Cell]
    log: str


def packs(cells: Sequence[Cell], size: int) -> list[list[Cell]]:
    """The cells of each job, in order."""
    return [list(cells[i : i + size]) for i in range(0, len(cells), size)]


def submit(cells: Sequence[Cell], flags: Sequence[str], launcher: dict[str, Any]) -> list[Job]:
    """Submit cells as one job array (the local queue: one process a job) and return at once.

    A result that is to be made again is archived first, so that a restarted job does not make it twice; if the queue
    refuses, it is as it was.

    Raises:
        BadInput: if the queue refuses, or cannot run such cells.
    """
    name, output = executor(launcher), Path(cells[0].config["output_dir"]).absolute()
    assert name is not None
    devices = {value(c.config, "trainer.devices") or 1 for c in cells}  # a study has one process
    _check_devices(devices, launcher, name)
    kept = [f for f in flags if not is_launcher(f)]
    groups = packs(cells, launcher.get("cells_per_job", 1))
    work = [Work([_once(c) for c in g], kept) for g in groups]
    archived = _archive(cells)
    began = now()
    try:
        submitted = _submitit(work, launcher, name, output / "jobs", max(devices))
    except BaseException:
        for directory, place in archived:
            directory.restore(place)
        raise
    found = []
    for job, group in zip(submitted, groups, strict=True):
        log = str(job.paths.stdout)
        jobs.note(cells[0].config["output_dir"], [c.cell_id for c in group], job.job_id, name, log, began)
        found.append(Job(job.job_id, group, log))
    return found


def _once(cell: Cell) -> list[str]:
    """The overrides of a cell for a job that may be restarted: what is run again is so by being archived."""
    return [o for o in cell.overrides if not o.startswith("rerun=")]


def _archive(cells: Sequence[Cell]) -> list[tuple[CellDir, Path]]:
    """Archive the results that are to be made again; returns their cells' folders, and where they are now."""
    found = [CellDir(c.config["output_dir"], c.cell_id) for c in cells if c.config["rerun"]]
    return [(directory, directory.archive()) for directory in found if directory.result is not None]


def _check_devices(devices: set[int], launcher: dict[str, Any], name: str) -> None:
    if len(devices) > 1:
        raise BadInput(f"trainer.devices={','.join(map(str, sorted(devices)))}: the jobs of an array have equally many")
    (count,) = devices
    if name == "local" and count > 1:
        raise BadInput(f"trainer.devices={count}: hydra/launcher=submitit_local runs cells of one process")
    if launcher["tasks_per_node"] not in (1, count):
        raise BadInput(f"hydra.launcher.tasks_per_node={launcher['tasks_per_node']}: must be trainer.devices={count}")


def _submitit(work: list[Work], launcher: dict[str, Any], name: str, folder: Path, devices: int) -> list[Any]:
    import submitit

    own: dict[str, Any] = {}
    if name == "slurm":
        own = {"slurm_max_num_timeout": launcher["max_num_timeout"], "slurm_python": _python()}
    queue = submitit.AutoExecutor(folder=folder / "%j", cluster=name, **own)
    given = {k: v for k, v in launcher.items() if k not in NOT_PASSED_ON and v is not None and v != {}}
    given["name"] = "metalearn" if "${" in str(given["name"]) else given["name"]
    given["tasks_per_node"] = devices
    queue.update_parameters(**{k if k in COMMON else f"{name}_{k}": v for k, v in given.items()})
    try:
        with queue.batch():
            return [queue.submit(w) for w in work]
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        said = " ".join(str(error).split())[-300:]
        packs = "; hydra.launcher.cells_per_job makes fewer jobs" if "array" in said.lower() and len(work) > 1 else ""
        raise BadInput(f"hydra/launcher: the queue refused {len(work)} jobs: {said}{packs}") from None


def _python() -> str:
    """The command that starts Python in a job: deaf to USR2 until handlers are there, if env can do that.

    A signal in the seconds of importing would kill the job instead of having it queued again.
    """
    deaf = ["env", "--ignore-signal=USR2"]
    try:
        able = subprocess.run([*deaf, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        able = False
    return shlex.join([*(deaf if able else []), sys.executable])


def in_background(cells: Sequence[Cell], flags: Sequence[str], output_dir: str) -> tuple[int, Path]:
    """Run cells in a process of this machine that outlives this one; its id and the file that it writes to."""
    folder = Path(output_dir).absolute() / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    write_json(folder / "work.json", {"cells": [_once(c) for c in cells], "flags": list(flags)})
    _archive(cells)
    began = now()
    with open(folder / "log", "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "metalearn.sweep.work", str(folder / "work.json")],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    jobs.note(output_dir, [c.cell_id for c in cells], str(process.pid), "local", str(folder / "log"), began)
    return process.pid, folder / "log"


def submitting(output_dir: str) -> FileLock:
    """Held while somebody looks what is missing and submits it, so that two do not submit the same."""
    path = Path(output_dir) / "locks" / "submit.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def wait(cells: Sequence[Cell], say: Callable[[str], None], seconds: float = 5.0) -> list[Standing]:
    """Look at the files until no cell is under way, and say what changes."""
    for found, text in _looks(cells, seconds):
        if text:
            say(text)
        if not any(s.under_way for s in found):
            return found
    raise AssertionError


def _looks(cells: Sequence[Cell], seconds: float) -> Iterator[tuple[list[Standing], str]]:
    before = ""
    while True:
        found = standings(cells)
        text = counts(found)
        yield found, text if text != before else ""
        before = text
        time.sleep(seconds)


def counts(found: Sequence[Standing]) -> str:
    """`12 cells: 3 done, 9 queued`."""
    by_state = {state: sum(s.state == state for s in found) for state in STATES}
    return f"{len(found)} cells: " + ", ".join(f"{n} {state}" for state, n in by_state.items() if n)
