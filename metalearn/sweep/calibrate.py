"""Measuring how fast cells are, each in a process of its own, and remembering it. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metalearn.cells import Cell
from metalearn.identity import config_hash
from metalearn.ledger import now, read_json, write_json
from metalearn.record import git_state
from metalearn.sweep.speed import STARTED, Group, Speed

START_SECONDS, LEAST_SECONDS, FACTOR = 300.0, 60.0, 5.0
"""A measurement of s seconds is given up if it takes START_SECONDS to begin, or then LEAST_SECONDS + FACTOR s."""
POLL_SECONDS = 0.2
FIRST_USE_SECONDS = 10.0
"""What a process spends once, from which it is taken for the first use of data or kernels, and measured again."""


class Measured(NamedTuple):
    """What is known of a group.

    speed: None if it could not be measured. reason: why not, or what else to say. about: where and when, counts of the
    shortened run, per-episode `values` of its `metric`, how many cores `others` used; empty where there is no speed.
    cached: whether it was there.
    """

    speed: Speed | None
    reason: str | None = None
    about: dict[str, Any] = {}
    cached: bool = False


def machine() -> dict[str, Any]:
    """What of this machine and process sets how fast cells are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = [*_lines("/proc/cpuinfo", "model name"), platform.processor() or platform.machine()]
    gpus = [
        line
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        for line in _lines(path, "Model")
    ]
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
    return {"cpu": names[0], "cores": cores, "gpus": gpus, **{k: os.environ.get(k) for k in variables}}


def _lines(path: str | Path, name: str) -> list[str]:
    try:
        text = Path(path).read_text()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(name)][:1]


class Book:
    """Measurements under `<output_dir>/plan/`, by group, machine, threads and commit.

    Args:
        output_dir: the sweep's.
        config_dirs: further folders of yaml files of the command.
        seconds: of measuring, for each group.
        keep: whether to take what is there.
        measures: whether to measure what is not.
    """

    def __init__(
        self, output_dir: str | Path, config_dirs: Sequence[str] = (), *, seconds: float, keep: bool, measures: bool
    ):
        self.folder, self.config_dirs, self.seconds = Path(output_dir) / "plan", list(config_dirs), seconds
        self.keep, self.measures = keep, measures
        self.machine, (self.commit, self.changed) = machine(), git_state()

    def path(self, group: Group) -> Path:
        """The file of a group's measurement."""
        name = config_hash({"speed": group.signature, "machine": self.machine, "commit": self.commit})[:12]
        return self.folder / f"{name}.json"

    def of(self, group: Group, say: Callable[[str], None]) -> Measured:
        """What is known of a group; measured now if need be (`say` is told so)."""
        path = self.path(group)
        found = read_json(path) if self.keep else None
        if found is not None:
            return Measured(Speed(**found["speed"]), found.get("reason"), found, cached=True)
        if not self.measures:
            return Measured(None, "not measured yet (--no-calibrate)")
        say(group.label)
        measured = measure(group.cells[0], self.config_dirs, self.seconds)
        again = measured.speed is not None and measured.speed.once > FIRST_USE_SECONDS  # caches were filled
        if again and not group.signature["compiled"]:
            measured = measure(group.cells[0], self.config_dirs, self.seconds)
        if measured.speed is not None:
            own = {
                "signature": group.signature,
                "machine": self.machine,
                "commit": self.commit,
                "changed": self.changed,
            }
            write_json(path, own | measured.about | {"reason": measured.reason})
        return measured


def measure(cell: Cell, config_dirs: Sequence[str], seconds: float) -> Measured:
    """Measure one cell for some seconds, in a folder that is gone afterwards."""
    about = {"host": platform.node(), "date": now(), "load": os.getloadavg()[0], "seconds": seconds}
    with tempfile.TemporaryDirectory(prefix="metalearn-plan-") as place:
        spec = Path(place) / "spec.json"
        own = {"overrides": cell.overrides, "config_dirs": config_dirs, "config": cell.config, "seconds": seconds}
        with open(Path(place) / "log.txt", "w+b") as log:
            spec.write_text(json.dumps(own | {"began": time.time()}))
            command = [sys.executable, "-m", "metalearn.sweep.trial", str(spec)]
            code = _run(command, log, Path(place) / STARTED, LEAST_SECONDS + FACTOR * seconds)
            log.seek(0)
            said = log.read().decode(errors="replace")
        found = read_json(Path(place) / "speed.json")
    reason = None if code == 0 else _reason(code, said, LEAST_SECONDS + FACTOR * seconds)
    if found is None:
        return Measured(None, reason or "it said nothing")
    if reason is not None:
        reason = f"roughly, on {2 * found['counts']['half']} meta-steps alone: {reason}"
    return Measured(Speed(**found["speed"]), reason, about | found)


def _run(command: list[str], log: Any, started: Path, seconds: float) -> int | None:
    """The exit code of a command; None if it was ended, with all that it had started.

    Args:
        command: see above.
        log: takes what it prints.
        started: a file that it makes when it begins its work.
        seconds: that it has from then on.
    """
    process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    end, began = time.monotonic() + START_SECONDS, False
    try:
        while time.monotonic() < end:
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if not began and started.exists():
                    end, began = time.monotonic() + seconds, True
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its session is its own
        except ProcessLookupError:
            pass
        process.wait()


def _reason(code: int | None, said: str, seconds: float) -> str:
    """Why a measurement ended early, in a line."""
    if code is None:
        return f"not measured within {seconds:.0f} s; give it more with --seconds"
    if code == -signal.SIGKILL:
        return "killed while it was measured; there may be too little memory"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit code {code}")[:200]
