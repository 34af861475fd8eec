"""Interleaved rounds: in each, every implementation computes a few steps in turn, in a random order."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from metalearn.bench.peers import OURS, PEAK, Implementation
from metalearn.bench.process import Setting, Worker, WorkerError
from metalearn.bench.workloads import Workload, make_arrays

Record = dict[str, Any]

EXACT = 1e-8
"""Relative error of loss and gradient that the check in float64 allows."""
SLOT = 0.4
"""Seconds that one implementation works at a time, about, where steps are shorter."""
SLOW = 4.0
"""What takes this many times as long as ours, and a second, is timed in two rounds only."""
HEAVY = 20.0
"""Seconds of a step from which one is enough, under one setting."""
LARGE = 1.5e9
"""Bytes from which an implementation is not kept in memory beside the others, but takes turns with ours alone."""
LIGHT = 1e9
"""Operations of a step below which the first step says nothing about the time of others."""


@dataclass
class Log:
    """`samples.jsonl`: one line for each measurement, written at once, so that an interruption loses nothing."""

    path: Path
    records: list[Record] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> Log:
        """Go on with a file, if there is one."""
        lines = path.read_text().splitlines() if path.exists() else []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # half a line of an interrupted run
                continue
        if path.exists() and lines and not path.read_text().endswith("\n"):
            path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return cls(path, records)

    def add(self, kind: str, **values: Any) -> None:
        """Append one record."""
        record = {"kind": kind, **values}
        self.records.append(record)
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def of(self, kind: str, **where: Any) -> list[Record]:
        """Records of a kind with these values."""
        return [r for r in self.records if r["kind"] == kind and all(r.get(k) == v for k, v in where.items())]

    def drop(self, **where: Any) -> None:
        """Forget the records with these values: a cell that was interrupted is measured again."""
        self.records = [r for r in self.records if not all(r.get(k) == v for k, v in where.items())]
        self.path.write_text("".join(json.dumps(r) + "\n" for r in self.records))


@dataclass
class Bench:
    """One call of the benchmark.

    Attributes:
        log: where measurements go.
        implementations: ours first.
        device: `cpu` or `cuda`.
        rounds: at most, of each workload and setting.
        budget: seconds that the rounds of one workload and setting may take beyond the second round.
        errors: output of the workers.
        say: prints progress.
    """

    log: Log
    implementations: list[Implementation]
    device: str
    rounds: int
    budget: float
    errors: IO[str]
    say: Any = print
    references: dict[str, tuple[float, np.ndarray]] = field(default_factory=dict)

    def measure(self, setting: Setting, workloads: Iterable[Workload]) -> Iterator[Workload]:
        """All workloads under one setting, each yielded when it is done.

        What an earlier, interrupted call has finished is left out.
        """
        with ExitStack() as stack:
            everyone = (*self.implementations, PEAK)
            workers = {i.name: Worker(i.command(), setting, self.errors) for i in everyone}
            for worker in workers.values():
                stack.callback(worker.end)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for workload in workloads:
                cell = {"workload": workload.name, **asdict(setting)}
                if self.log.of("done", **cell):
                    continue
                self.say(f"{workload.name}, {setting}")
                self.log.drop(**cell)
                self._cell(cell, workload, workers, folder)
                if self.log.of("sample", implementation=OURS, **cell):
                    self.log.add("done", **cell)
                yield workload

    def _cell(self, cell: Record, workload: Workload, workers: dict[str, Worker], folder: Path) -> None:
        arrays = folder / f"{workload.name}.npz"
        np.savez(arrays, **make_arrays(workload))  # type: ignore[arg-type]
        ready: dict[str, float] = {}
        for implementation in (i for i in self.implementations if not i.omits(workload)):
            name, worker = implementation.name, workers[implementation.name]
            try:
                if problem := implementation.missing():
                    raise WorkerError(problem)
                self._check(workload, name, worker, folder)
                if any(r["heavy"] for r in self.log.of("first", workload=workload.name, implementation=name)):
                    raise WorkerError("not timed again: one step is enough")
                ready[name] = self._first(cell, workload, name, worker, arrays)
                if name != OURS and OURS in ready and self._apart(workload, name):
                    self._turns(cell, workers, name, ready)
                    del ready[name]
                    worker.close()
            except WorkerError as problem:
                ready.pop(name, None)
                if worker.busy:  # it was ours that failed beside it
                    worker.end()
                self._failed(cell, name, problem)
        if workload.net == "conv4":
            answer = workers[PEAK.name].open(workload.as_dict(), arrays, self.device)
            self.log.add("peak", **cell, flop=answer["flop"])
            ready[PEAK.name] = answer["first_seconds"]
        self._rounds(cell, workers, ready)
        for name in ready:
            try:
                workers[name].close()
            except WorkerError:
                workers[name].end()

    def _first(self, cell: Record, workload: Workload, name: str, worker: Worker, arrays: Path) -> float:
        """First step, memory (once for each workload and call), and about how long a step takes."""
        memory = not self.log.of("first", workload=workload.name, implementation=name)
        answer = worker.open(workload.as_dict(), arrays, self.device, memory=memory)
        seconds: float = answer["first_seconds"]
        if workload.flop() < LIGHT or seconds > HEAVY:  # it says nothing, or it may have been compiling
            seconds = worker.run(1)["seconds"]
        self.log.add("first", **cell, implementation=name, heavy=seconds > HEAVY, **answer)
        return seconds

    def _apart(self, workload: Workload, name: str) -> bool:
        """Whether it takes too much time or memory to be interleaved with all the others."""
        firsts = self.log.of("first", workload=workload.name, implementation=name)
        return any(r["heavy"] or (r["peak_bytes"] or 0) > LARGE for r in firsts)

    def _turns(self, cell: Record, workers: dict[str, Worker], name: str, step: dict[str, float]) -> None:
        """Two turns with ours alone, or one if it is slow."""
        for _ in range(1 if step[name] > HEAVY else 2):
            number = self._next(cell)
            for who in (name, OURS):
                self._sample(cell, workers, who, number, step[who])

    def _sample(self, cell: Record, workers: dict[str, Worker], name: str, number: int, seconds: float) -> None:
        sample = workers[name].run(max(1, round(SLOT / max(seconds, 1e-6))), at_most=2 * SLOT)
        self.log.add("sample", **cell, implementation=name, round=number, **sample)

    def _next(self, cell: Record) -> int:
        """Number of the next round."""
        return 1 + max((r["round"] for r in self.log.of("sample", **cell)), default=-1)

    def _failed(self, cell: Record, name: str, problem: Exception) -> None:
        self.log.add("error", **cell, implementation=name, error=str(problem))
        self.say(f"{name}: {problem}")

    def _check(self, workload: Workload, name: str, worker: Worker, folder: Path) -> None:
        """Whether loss and outer gradient are ours, on the first tasks in float64; once for each workload and call.

        In float32 the question cannot be decided: a rounding error that turns a max-pool or a ReLU elsewhere moves the
        second-order gradient of W1 by a percent.
        """
        if name == OURS and workload.name in self.references:
            return
        if name != OURS and workload.name not in self.references:
            raise WorkerError("there is nothing to compare it with")
        small = checked(workload)
        found = self.log.of("check", workload=workload.name, implementation=name)
        if not found or name == OURS:
            arrays, path = folder / "check.npz", folder / f"{name}.npz"
            np.savez(arrays, **make_arrays(small, np.float64))  # type: ignore[arg-type]
            loss = worker.open(small.as_dict(), arrays, self.device, path)["loss"]
            worker.close()
            gradient = _flat(path)
            if name == OURS:
                self.references[workload.name] = loss, gradient
            expected, reference = self.references[workload.name]
            errors = {
                "loss_error": abs(loss - expected) / abs(expected),
                "gradient_error": distance(gradient, reference),
            }
            self.log.add("check", workload=workload.name, implementation=name, loss=loss, **errors)
            found = self.log.of("check", workload=workload.name, implementation=name)
        loss_error, error = found[-1]["loss_error"], found[-1]["gradient_error"]
        if not max(loss_error, error) <= EXACT:
            raise WorkerError(
                f"computes something else: relative error of the loss {loss_error:.1e}, of the gradient {error:.1e}, "
                f"in float64; {EXACT:.0e} allowed"
            )

    def _rounds(self, cell: Record, workers: dict[str, Worker], step: dict[str, float]) -> None:
        """At least two rounds, then more until `rounds` or the budget is used up."""
        order, began = list(step), time.monotonic()
        shuffle = random.Random(0)
        limit = max(1.0, SLOW * step.get(OURS, float("inf")))
        for done in range(self.rounds):
            if done >= 2 and time.monotonic() - began > self.budget:
                break
            number = self._next(cell)
            shuffle.shuffle(order)
            for name in list(order):
                if done >= 2 and step[name] > limit:
                    continue
                try:
                    self._sample(cell, workers, name, number, step[name])
                except WorkerError as problem:
                    order.remove(name)
                    self._failed(cell, name, problem)


def checked(workload: Workload) -> Workload:
    """A part of a workload that is enough to see whether two implementations compute the same thing."""
    small = replace(workload, tasks=2, steps=min(workload.steps, 2))
    return replace(small, shot=min(small.shot, 2), queries=min(small.queries, 3)) if small.net == "conv4" else small


def distance(gradient: np.ndarray, reference: np.ndarray) -> float:
    """Relative Euclidean distance; infinite where something is missing."""
    if gradient.shape != reference.shape:
        return float("inf")
    return float(np.linalg.norm(gradient - reference) / max(float(np.linalg.norm(reference)), 1e-12))


def _flat(path: Path) -> np.ndarray:
    """All parameters' gradients, by name, in one vector."""
    with np.load(path) as file:
        parts = [file[name].astype(np.float64).ravel() for name in sorted(file)]
    return np.concatenate(parts)
