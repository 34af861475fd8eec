"""Mirrors of the training log; `metrics.jsonl` is the truth, and no mirror may stop a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from pytorch_lightning.loggers import CSVLogger, Logger

from metalearn import wandb_run
from metalearn.ledger import CellDir

Config = dict[str, Any]
PATIENCE_SECONDS = 30.0
"""How long the end of a run waits for W&B to upload or to answer at all; schedulers give little time after a signal."""


class Sink(Protocol):
    """Where a mirror writes; any method may raise."""

    def write(self, row: dict[str, Any], step: int) -> None:
        """Take the numbers of a meta-step."""

    def flush(self) -> None:
        """Bring what was written to the disk."""

    def end(self, state: str, result: Config | None) -> None:
        """Take the result, if there is one, and end; see `Mirror.close`."""


class Mirror(Logger):
    """Lightning's logger over a sink whose failures stop nothing: the first is a warning, and later rows are left out.

    Args:
        kind: its name in warnings.
        sink: see above.
        cell: whose training is mirrored.
        attempt: its number.
    """

    def __init__(self, kind: str, sink: Sink, cell: CellDir, attempt: int):
        super().__init__()
        self.kind, self.sink, self.cell, self.attempt = kind, sink, cell, attempt
        self._lost = self._closed = False

    @property
    def name(self) -> str:
        return self.kind

    @property
    def version(self) -> int:
        return self.attempt

    @property
    def save_dir(self) -> str:
        return str(self.cell.path)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if metrics and step is not None:
            self._attempt(self.sink.write, metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is there from the start."""

    def save(self) -> None:
        self._attempt(self.sink.flush)

    def close(self, state: str, result: Config | None = None) -> None:
        """End the mirror; the first call counts.

        Args:
            state: done, diverged, failed or killed.
            result: what result.json says, if the run has come so far.
        """
        if not self._closed:
            self._closed, lost = True, self._lost
            self._lost = False  # what is lost must be ended too, or it stands in the way of the process's next run
            self._attempt(self.sink.end, state, result, quiet=lost)

    def _attempt(self, act: Callable[..., None], *arguments: Any, quiet: bool = False) -> None:
        if self._lost:
            return
        try:
            act(*arguments)
        except Exception as error:
            self._lost = True
            if not quiet:
                what = f"logging to {self.kind} has ended: {wandb_run.words(error)}"
                warnings.warn(f"{what}; metrics.jsonl and result.json have everything", stacklevel=2)


class CsvSink:
    """`csv/attempt_<n>/metrics.csv`, a folder for each attempt: Lightning deletes an existing file."""

    def __init__(self, config: Config, cell: CellDir, attempt: int):
        self.csv = CSVLogger(cell.path, name="csv", version=f"attempt_{attempt}")

    def write(self, row: dict[str, Any], step: int) -> None:
        self.csv.log_metrics(row, step)

    def flush(self) -> None:
        self.csv.save()

    def end(self, state: str, result: Config | None) -> None:
        self.csv.save()


class WandbSink:
    """A W&B run named by cell and attempt, offline unless WANDB_MODE says otherwise; W&B's step is the meta-step."""

    def __init__(self, config: Config, cell: CellDir, attempt: int):
        self.run = wandb_run.start(
            config,
            f"{cell.cell_id}-{attempt}",
            cell.path,
            os.environ.get("WANDB_MODE", "offline"),
            init_timeout=PATIENCE_SECONDS,
            finish_timeout=PATIENCE_SECONDS,
            finish_timeout_raises=True,
        )

    def write(self, row: dict[str, Any], step: int) -> None:
        self.run.log(wandb_run.history_row(row), step=step)

    def flush(self) -> None:
        """Nothing: W&B's process writes by itself."""

    def end(self, state: str, result: Config | None) -> None:
        shown = {} if result is None else wandb_run.summary(result)
        wandb_run.finish(self.run, shown, wandb_run.EXIT_CODES[state], 2 * PATIENCE_SECONDS)


SINKS: dict[str, tuple[str, Callable[[Config, CellDir, int], Sink]]] = {
    "csv": ("CSV", CsvSink),
    "wandb": ("W&B", WandbSink),
}


def build_logger(config: Config, cell: CellDir, attempt: int) -> Mirror | None:
    """The mirror that a run asks for; None for none, or if it cannot start (a warning says why)."""
    section = config["logger"]
    if section["name"] not in SINKS:
        return None
    kind, make = SINKS[section["name"]]
    try:
        return Mirror(kind, make(config, cell, attempt), cell, attempt)
    except Exception as error:
        warnings.warn(f"logging to {kind} is off: {wandb_run.words(error)}", stacklevel=2)
        return None


@contextmanager
def mirrored(config: Config, cell: CellDir, attempt: int) -> Iterator[Mirror | None]:
    """The mirror of a block, which is ended whatever ends the block; attempt 0 (another rank) has none."""
    mirror = build_logger(config, cell, attempt) if attempt else None
    state = "killed"
    try:
        yield mirror
    except Exception:
        state = "failed"
        raise
    finally:
        if mirror is not None:
            mirror.close(state)
