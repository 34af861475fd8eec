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
NO_ANSWER = "NO ANSWER FROM THE QUEUE"
"""The state of a job of a queue that is there but does not answer: it may wait or run."""
ALIVE = (*WAITING, "RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", NO_ANSWER)
"""SLURM's states of a job that will go on or end by itself, and what is taken for that."""
TIMEOUT_SECONDS = 60
"""How long a command of SLURM may take."""


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


def note(
    output_dir: str | Path, cell_ids: Iterable[str], job: str, executor: str, log: str, submitted: str | None = None
) -> None:
    """Remember which job runs these cells.

    Args:
        output_dir: see above.
        cell_ids: see above.
        job: see `Submission`.
        executor: see `Submission`.
        log: see `Submission`.
        submitted: a time before the job can have begun; None means the present one.
    """
    for cell_id in cell_ids:
        write_json(_path(output_dir, cell_id), Submission(job, executor, submitted or now(), log)._asdict())


def submission(output_dir: str | Path, cell_id: str) -> Submission | None:
    """The latest submission of a cell, if there was one."""
    found: Any = read_json(_path(output_dir, cell_id))
    whole = isinstance(found, dict) and found.keys() == set(Submission._fields)
    return Submission(**found) if whole else None


class Queue:
    """What the queues of this machine say of jobs; asked once, when the first job is looked up.

    A job of SLURM is looked for in squeue, and in sacct (where there is accounting) for how it ended.
    """

    def __init__(self) -> None:
        self._squeue: dict[str, str] | None = None
        self._asked = False
        self._sacct: dict[str, str] = {}

    def state(self, found: Submission) -> str:
        """SLURM's word for the job's state; `UNKNOWN` if nobody here knows, `NO_ANSWER` if squeue fails."""
        if found.executor == "local":
            return "RUNNING" if _is_job(int(found.job)) else "COMPLETED"
        if not self._asked:
            self._squeue, self._asked = _squeue(), True
        if self._squeue is not None and found.job in self._squeue:
            return self._squeue[found.job]
        if found.job not in self._sacct:
            self._sacct[found.job] = _sacct(found.job)
        state = self._sacct[found.job]
        return NO_ANSWER if state == "UNKNOWN" and self._squeue is None else state

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


def _said(*command: str) -> str | None:
    """What a command of SLURM prints; None if it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except (subprocess.TimeoutExpired, OSError):
        return None
    return done.stdout if done.returncode == 0 else None


def _squeue() -> dict[str, str] | None:
    """States of this user's jobs by name; none on a machine without squeue, None if it fails."""
    if shutil.which("squeue") is None:
        return {}
    text = _said("squeue", "--noheader", "--array", "--me", "--states=all", "--format=%i|%T")
    return None if text is None else dict(line.split("|", 1) for line in text.splitlines() if "|" in line)


def _sacct(job: str) -> str:
    """How a job that left the queue ended."""
    if shutil.which("sacct") is None:
        return "UNKNOWN"
    text = _said("sacct", "-X", "--noheader", "--parsable2", "--format=State", "-j", job)
    states = [line.split()[0] for line in (text or "").splitlines() if line.strip()]
    return states[-1] if states else "UNKNOWN"


def has_accounting() -> bool:
    """Whether sacct answers, so that a job that died without a word is noticed."""
    return shutil.which("sacct") is not None and _said("sacct", "-X", "-n", "-S", "now") is not None


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
