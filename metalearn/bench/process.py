"""The parent's side of a worker: one process for each implementation and setting, of which one works at a time."""

from __future__ import annotations

import json
import os
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from metalearn.bench.peers import CACHE, ROOT, SCRIPTS

MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""Freed memory is reused instead of returned to the system, by all implementations (see `metalearn.memory`)."""


class WorkerError(RuntimeError):
    """A worker could not do what it was told; it may have ended."""


@dataclass(frozen=True)
class Setting:
    """Threads of a worker, and how idle OpenMP threads wait: `default` (they spin, GNU OpenMP's way) or `passive`."""

    threads: int
    wait: str = "default"

    def __str__(self) -> str:
        plural = "" if self.threads == 1 else "s"
        return f"{self.threads} thread{plural}" + (", passive waiting" if self.wait == "passive" else "")

    def environment(self) -> dict[str, str]:
        """The process environment of every worker under this setting; the same for us and for peers."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "XLA_"))}
        n = str(self.threads)
        env |= MALLOC | {"OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n, "NPROC": n}
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if self.wait == "passive":
            env["OMP_WAIT_POLICY"] = "passive"
        if self.threads == 1:
            env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        env["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "jax-cache")
        env["PYTHONPATH"] = f"{SCRIPTS}{os.pathsep}{ROOT}"  # this checkout, whatever is installed
        return env


class Worker:
    """A process that answers one line of JSON for each it gets (`scripts/bench/worker.py`)."""

    def __init__(self, command: list[str], setting: Setting, log: IO[str], patience: float = 240.0):
        self.command, self.setting, self.log, self.patience = command, setting, log, patience
        self.process: subprocess.Popen[str] | None = None
        self.busy = False

    def open(
        self, workload: dict[str, Any], arrays: Path, device: str, gradient: Path | None = None, *, memory: bool = False
    ) -> dict[str, Any]:
        """Begin a workload: build it, take its first steps. Returns loss, seconds and (`memory`) peak memory."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                bufsize=1,
                env=self.setting.environment(),
            )
        self.busy = True
        where = None if gradient is None else str(gradient)
        request = {"workload": workload, "arrays": str(arrays), "device": device, "gradient": where, "memory": memory}
        return self.ask(request)

    def run(self, steps: int, at_most: float = 60.0) -> dict[str, float]:
        """Time some steps: `seconds` and `cpu_seconds` of one, and how many cores `others` used meanwhile.

        It may be fewer steps: none is begun after `at_most` seconds.
        """
        before = busy_seconds()
        answer = self.ask({"steps": steps, "at_most": at_most})
        others = (busy_seconds() - before - answer["cpu_seconds"]) / answer["seconds"]
        return {k: answer[k] / answer["steps"] for k in ("seconds", "cpu_seconds")} | {"others": max(0.0, others)}

    def close(self) -> None:
        """End the workload; its memory is free again."""
        if self.busy:
            self.ask({"close": True})
            self.busy = False

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            WorkerError: if the answer is an error, or there is none in time; the workload is closed then.
        """
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            self.end()
            raise WorkerError("the worker has ended") from error
        if not select.select([self.process.stdout], [], [], self.patience)[0]:
            self.end()
            raise WorkerError(f"no answer within {self.patience:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self.end()
            raise WorkerError("the worker has ended; see workers.log")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.busy = False
            raise WorkerError(answer["error"])
        return answer

    def end(self) -> None:
        """End the process and its workload."""
        self.busy = False
        if self.process is None:
            return
        process, self.process = self.process, None
        children = _children(process.pid)
        for pid in children:
            _kill(pid)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass


def busy_seconds() -> float:
    """CPU time that the whole machine has spent at work, or lost to others on its host; 0 where it does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        pass
