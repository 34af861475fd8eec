"""Where each cell of a sweep stands, told from files and the queue alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

from metalearn.cells import Cell
from metalearn.ledger import HEARTBEAT_SECONDS, CellDir
from metalearn.results import value
from metalearn.sweep.jobs import Queue, Submission, submission, tail

STALE_SECONDS = 6 * HEARTBEAT_SECONDS
"""A running cell that was silent for so long is taken for dead."""
STATES = ("done", "diverged", "running", "queued", "killed", "failed", "missing", "impossible")
FINISHED = ("done", "diverged")
UNDER_WAY = ("running", "queued")


class Standing(NamedTuple):
    """Where a cell stands.

    state: `done` and `diverged` have a result; `running` has a fresh heartbeat; `queued` is in a job that has not begun
    it; `killed` ended without a result and goes on from its last checkpoint; `failed` raised an exception; `missing`
    was never begun; `impossible` cannot be run here. why: for a reader, may be empty. failures: attempts that failed.
    step, steps: meta-steps made and to be made. seconds: of the result, or since the attempt began.
    """

    cell: Cell
    state: str
    why: str = ""
    attempt: int = 0
    step: int = 0
    steps: int = 0
    seconds: float | None = None
    job: str | None = None
    failures: int = 0

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return self.state in FINISHED

    @property
    def under_way(self) -> bool:
        """Whether somebody runs it or will."""
        return self.state in UNDER_WAY


def standings(found: Sequence[Cell], queue: Queue | None = None) -> list[Standing]:
    """Where cells stand, in their order."""
    queue = queue or Queue()
    return [_standing(cell, queue) for cell in found]


def _standing(cell: Cell, queue: Queue) -> Standing:
    steps = value(cell.config, "trainer.max_steps") or 0  # a study has none
    if cell.problem is not None:
        return Standing(cell, "impossible", cell.problem, steps=steps)
    output = cell.config["output_dir"]
    directory = CellDir(output, cell.cell_id)
    result, status = directory.result, directory.status
    job = submission(output, cell.cell_id)
    common = {
        "attempt": status.get("attempt", 0),
        "failures": status.get("failures", status.get("attempt", 0)),
        "step": status.get("step", 0),
        "steps": steps,
        "job": job.job if job else status.get("slurm_job_id"),
    }
    if result is not None:
        why = result.get("error") or ""
        common |= {"step": result["steps"], "seconds": result["seconds"]}
        return Standing(cell, result["status"], why, **common)
    state, why = _unfinished(status, job, queue)
    if (directory.path / "result.json").exists():
        why = f"its result.json is damaged, which is made again from its checkpoint{f'; {why}' if why else ''}"
    seconds = age(status["started"]) if state == "running" and "started" in status else None
    return Standing(cell, state, why, seconds=seconds, **common)


def _unfinished(status: dict[str, Any], job: Submission | None, queue: Queue) -> tuple[str, str]:
    """State and reason of a cell without a result."""
    begun_since = job is None or status.get("slurm_job_id") == job.job or status.get("started", "") >= job.submitted
    silent = age(status["heartbeat"]) if "heartbeat" in status else None
    if status.get("state") == "running" and silent is not None and silent < STALE_SECONDS:
        return "running", status.get("phase", "")
    if status.get("state") == "failed" and begun_since:
        return "failed", status.get("error") or ""
    if job is not None and queue.alive(job):
        return "queued", f"job {job.job}, {queue.state(job).lower()}"
    if not status or not begun_since:
        if job is None:
            return "missing", ""
        return "killed", f"job {job.job} ended ({queue.state(job).lower()}) before it began the cell: {tail(job.log)}"
    if status["state"] == "killed":
        return "killed", status.get("error") or ""
    if status["state"] in FINISHED:
        return "killed", "its result is gone"
    ended = f"; job {job.job}: {queue.state(job).lower()}" if job else ""
    return "killed", f"no heartbeat for {duration(silent or 0)} (host {status.get('host', '?')}){ended}"


def age(time: str) -> float:
    """Seconds since a time that `ledger.now` wrote."""
    return (datetime.now(timezone.utc) - datetime.fromisoformat(time)).total_seconds()


def duration(seconds: float) -> str:
    """Seconds in the largest units that matter."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
