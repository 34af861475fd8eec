"""Jobs that cells were submitted in: what is noted of them on disk, and what the queue says. Imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from metalearn.ledger import now, read_json, write_json

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "RESV_DEL_HOLD")
ALIVE = (*WAITING, "RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED")
"""SLURM's states of a job that will go on or end by itself."""


class Submission(NamedTuple):
    """The latest submission of a cell.

    job: as the queue names it (`A_a` for a task of an array; a process id for the local queue). executor: `slurm` or
    `local`. log: the file that its output goes to.
    """

    job: str
    executor: str
    submitted: str
    log: str


def _path(output_dir: str | Path, cell_id: str) -> Path:
    return Path(output_dir) / "submitted" / f"{cell_id}.json"


def note(output_dir: str | Path, cell_ids: Iterable[str], job: str, executor: str, log: str) -> None:
    """Remember which job runs these cells."""
    for cell_id in cell_ids:
        write_json(_path(output_dir, cell_id), Submission(job, executor, now(), log)._asdict())


def submission(output_dir: str | Path, cell_id: str) -> Submission | None:
    """The latest submission of a cell, if there was one."""
    found: dict[str, Any] | None = read_json(_path(output_dir, cell_id))
    return None if found is None else Submission(**found)


class Queue:
    """What the queues of this machine say of jobs; asked once, when the first job is looked up.

    A job of SLURM is looked for in squeue, and in sacct (where there is accounting) for how it ended.
    """

    def __init__(self) -> None:
        self._squeue: dict[str, str] | None = None
        self._sacct: dict[str, str] = {}

    def state(self, found: Submission) -> str:
        """SLURM's word for the job's state; `UNKNOWN` if nobody here knows."""
        if found.executor == "local":
            return "RUNNING" if _is_job(int(found.job)) else "COMPLETED"
        if self._squeue is None:
            self._squeue = _squeue()
        if self._squeue is not None and found.job in self._squeue:
            return self._squeue[found.job]
        if found.job not in self._sacct:
            self._sacct[found.job] = _sacct(found.job)
        return self._sacct[found.job]

    def alive(self, found: Submission) -> bool:
        """Whether the job waits or runs."""
        return self.state(found) in ALIVE


def _is_job(pid: int) -> bool:
    """Whether the process is there and runs cells (on systems without /proc: is there)."""
    if not Path("/proc/self").exists():
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return True
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"submitit" in command or b"metalearn.sweep.work" in command


def _squeue() -> dict[str, str]:
    """States of this user's jobs by name."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--array", "--me", "--states=all", "--format=%i|%T"]
    text = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    return dict(line.split("|", 1) for line in text.splitlines() if "|" in line)


def _sacct(job: str) -> str:
    """How a job that left the queue ended."""
    if shutil.which("sacct") is None:
        return "UNKNOWN"
    command = ["sacct", "-X", "--noheader", "--parsable2", "--format=State", "-j", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    states = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    return states[-1] if done.returncode == 0 and states else "UNKNOWN"


def has_accounting() -> bool:
    """Whether sacct answers, so that a job that died without a word is noticed."""
    if shutil.which("sacct") is None:
        return False
    done = subprocess.run(["sacct", "-X", "-n", "-S", "now"], capture_output=True, check=False, timeout=60)
    return done.returncode == 0


def tail(path: str, lines: int = 3) -> str:
    """The last lines of a job's output, for what the files of its cell do not say."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])
