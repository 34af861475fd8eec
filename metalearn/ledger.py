"""One cell on disk: its state, and files that are whole or not there (contract, section 3). Imports no torch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

HEARTBEAT_SECONDS = 10.0


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either the old or the new one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The file's content, or None where there is no such (whole) file."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


RESULT_KEYS = ("cell_id", "config", "seed", "protocol", "status", "steps", "seconds", "metrics")
"""What every result.json has."""


def read_result(path: Path) -> dict[str, Any] | None:
    """A result.json, or None where there is none, or something else under that name."""
    found = read_json(path)
    return found if isinstance(found, dict) and all(k in found for k in RESULT_KEYS) else None


def read_status(path: Path) -> dict[str, Any]:
    """A status.json; empty where there is none, or something else under that name."""
    found = read_json(path)
    return found if isinstance(found, dict) and "state" in found else {}


class Busy(RuntimeError):
    """Another process is working on the cell."""


class CellDir:
    """`<output_dir>/runs/<cell_id>/`, its state and its lock.

    Only the holder of the lock (one process, released by the kernel when it dies) writes; anyone may read.

    Args:
        output_dir: see above.
        cell_id: see above.
        wanted_by: the cell, held by this process, for which it is run; its heartbeat follows.
    """

    def __init__(self, output_dir: str | Path, cell_id: str, wanted_by: CellDir | None = None):
        self.output, self.wanted_by = Path(output_dir), wanted_by
        self.path = self.output / "runs" / cell_id
        self.cell_id = cell_id
        self._status: dict[str, Any] = {}
        self._beat = 0.0
        self._writing, self._ended = threading.Lock(), threading.Event()
        self._lock = FileLock(self.output / "locks" / f"{cell_id}.lock")

    @property
    def result(self) -> dict[str, Any] | None:
        """The finished result, if there is one that can be read."""
        return read_result(self.path / "result.json")

    @property
    def status(self) -> dict[str, Any]:
        """What status.json says; empty for a cell that was never started, or if it is damaged."""
        return read_status(self.path / "status.json")

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            Busy: if another process holds it.
        """
        Path(self._lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            status = self.status
            who = (
                f"process {status['pid']} on {status['host']} (attempt {status['attempt']})"
                if {"pid", "host", "attempt"} <= status.keys()
                else "another process, which has just begun"
            )
            raise Busy(f"cell {self.cell_id} is being run by {who}") from None

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def start(self, config: dict[str, Any], train_id: str) -> int:
        """Begin an attempt and return its number, from 1."""
        before = self.status
        attempt = before.get("attempt", 0) + 1
        self._status = {
            "state": "running",
            "cell_id": self.cell_id,
            "train_id": train_id,
            "attempt": attempt,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "slurm_job_id": slurm_job(),
            "started": now(),
            "error": None,
            "failures": before.get("failures", 0),
        }
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in (
            part for folder in (".", "checkpoints", "phases") for part in self.path.glob(f"{folder}/.*.part")
        ):
            stale.unlink()  # of a writer that was killed; we hold the lock
        self.beat(force=True)
        self._ended = threading.Event()
        threading.Thread(target=self._pulse, args=(self._ended,), daemon=True, name="heartbeat").start()
        return attempt

    def _pulse(self, ended: threading.Event) -> None:
        """Beat through work that says nothing of itself, such as a long test or a compilation."""
        while not ended.wait(HEARTBEAT_SECONDS):
            self.beat()

    def beat(self, *, force: bool = False, **progress: Any) -> None:
        """Say that the attempt lives (at most every ten seconds unless forced)."""
        with self._writing:
            self._status |= progress
            if force or time.monotonic() - self._beat > HEARTBEAT_SECONDS:
                self._beat = time.monotonic()
                self._status["heartbeat"] = now()
                write_json(self.path / "status.json", self._status)
        if self.wanted_by is not None:
            self.wanted_by.beat(phase=f"training of {self.cell_id}")

    def finish(self, state: str, error: str | None = None) -> None:
        """Record how the attempt ended: done, diverged, failed or killed. The first record stands."""
        if self._status.get("state") != "running":
            return
        self._ended.set()
        self._status |= {"state": state, "error": error}
        self._status["failures"] += state == "failed"
        self.beat(force=True)

    def archive(self) -> Path:
        """Move everything of a finished run beside the new one, into `old/<n>/`; returns that folder."""
        number = 1 + max((int(p.name) for p in self.path.glob("old/*") if p.name.isdigit()), default=0)
        target = self.path / "old" / str(number)
        target.mkdir(parents=True)
        names = sorted(p.name for p in self.path.iterdir() if p.name != "old")
        for name in sorted(names, key=lambda n: n != "result.json"):  # the done marker goes first
            os.replace(self.path / name, target / name)
        return target

    def restore(self, archived: Path) -> None:
        """Undo `archive`, as long as nothing new has begun."""
        names = sorted(p.name for p in archived.iterdir())
        for name in sorted(names, key=lambda n: n == "result.json"):  # the done marker goes last
            os.replace(archived / name, self.path / name)
        archived.rmdir()


class Checkpoints:
    """Two generations of each kind of checkpoint, listed with their hashes in `<kind>.json`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, kind: str, step: int, write: Callable[[Any], None]) -> None:
        """Write a generation, then the list, then drop what the list no longer names."""
        buffer = io.BytesIO()
        write(buffer)
        data = buffer.getvalue()
        name = f"{kind}-{step:08d}.ckpt"
        entry = {"file": name, "step": step, "sha256": hashlib.sha256(data).hexdigest()}
        write_atomically(self.folder / name, data)
        old = [e for e in self.generations(kind) if e["file"] != name]
        write_json(self.folder / f"{kind}.json", [entry, *old[:1]])
        for stale in old[1:]:
            (self.folder / stale["file"]).unlink(missing_ok=True)

    def generations(self, kind: str) -> list[dict[str, Any]]:
        """Newest first."""
        return read_json(self.folder / f"{kind}.json") or []

    def load(self, kind: str, step: int | None = None) -> tuple[dict[str, Any], bytes] | None:
        """The newest generation (of that step, if given) whose hash is right, and its bytes."""
        for entry in self.generations(kind):
            path = self.folder / entry["file"]
            if (step is None or entry["step"] == step) and path.is_file():
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() == entry["sha256"]:
                    return entry, data
        return None


class Found(NamedTuple):
    """The bytes of a checkpoint, and their hash (64 hex digits)."""

    data: bytes
    sha256: str


def trained_parameters(cell: Path) -> Found:
    """The checkpoint that a training ended with: the best on validation classes, the last if there was no validation.

    Args:
        cell: its folder.

    Raises:
        ValueError: if it is not there as it was written.
    """
    checkpoints = Checkpoints(cell / "checkpoints")
    kind = "best" if checkpoints.generations("best") else "last"
    newest = checkpoints.generations(kind)[:1]
    found = checkpoints.load(kind, newest[0]["step"]) if newest else None
    if found is None:
        raise ValueError(f"no intact checkpoint in {checkpoints.folder}")
    return Found(found[1], found[0]["sha256"])


def given_checkpoint(path: str | Path) -> Found:
    """A checkpoint file, or that of a cell's folder whose run is done (see `trained_parameters`).

    Raises:
        ValueError: saying why it cannot be used.
    """
    path = Path(path)
    if path.is_file():
        data = path.read_bytes()
        return Found(data, hashlib.sha256(data).hexdigest())
    if not path.is_dir():
        raise ValueError("no such file or folder")
    if (result := read_json(path / "result.json")) is None:
        raise ValueError("not the folder of a finished run")
    if result["status"] != "done":
        raise ValueError(f"the run there is {result['status']}")
    return trained_parameters(path)


def slurm_job() -> str | None:
    """The SLURM job that this process belongs to, as squeue prints it (`A_a` for a task of an array)."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def leads() -> bool:
    """Whether this process is the one of its run that writes files (rank 0)."""
    return int(next((os.environ[k] for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if k in os.environ), 0)) == 0


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def trained_by(output_dir: str | Path, train_id: str) -> CellDir | None:
    """The cell that completed training under this name, if its checkpoints are still there."""
    note = read_json(Path(output_dir) / "trained" / f"{train_id}.json")
    if note is None:
        return None
    cell = CellDir(output_dir, note["cell_id"])
    return cell if Checkpoints(cell.path / "checkpoints").load("last") else None


def note_trained(output_dir: str | Path, train_id: str, cell_id: str) -> None:
    """Remember which cell holds the parameters of a training."""
    write_json(Path(output_dir) / "trained" / f"{train_id}.json", {"cell_id": cell_id})
