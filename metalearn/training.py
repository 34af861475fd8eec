"""What happens around meta-steps: log lines, progress, heartbeat, validation, selection, checkpoints."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from metalearn.data import Episodes
from metalearn.learner import MetaLearner, Scores
from metalearn.ledger import CellDir, Checkpoints

K = TypeVar("K")
T = TypeVar("T", bound=tuple[Tensor, ...])


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, appended and flushed; the latest attempt wins per step."""

    def __init__(self, path: Path, attempt: int):
        self.path, self.attempt = path, attempt
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with open(path, "ab") as file:  # a killed attempt left half a line
                file.write(b"\n")

    def write(self, rows: Mapping[int, dict[str, Any]]) -> None:
        """Append a line for each meta-step."""
        lines = [json.dumps({"attempt": self.attempt, "step": s, **v}, allow_nan=False) for s, v in rows.items()]
        with open(self.path, "a") as file:
            file.write("".join(line + "\n" for line in lines))


def gather(stacks: list[dict[K, T]], ranks: int, total: int) -> dict[K, T]:
    """What is known of all episodes in the order of their index, from stacks dealt out to ranks in turn.

    Args:
        stacks: this rank's, in order; tensors `[B]` by name.
        ranks: how many there are; episode i is with rank i modulo `ranks`.
        total: episodes of all ranks.
    """
    first: dict[K, T] = stacks[0] if stacks else {}
    mine = {k: tuple(torch.cat([s[k][i].cpu() for s in stacks]) for i in range(len(v))) for k, v in first.items()}
    parts: list[Any] = [mine]
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, mine)
    out: dict[K, Any] = {}
    for name, tensors in parts[0].items():
        out[name] = tuple(torch.empty(total, dtype=t.dtype) for t in tensors)
        for rank, part in enumerate(parts):
            for whole, piece in zip(out[name], part[name], strict=True):
                whole[rank::ranks] = piece
    return out


class Recorder(pl.Callback):
    """Keeps the log, the best and the last checkpoint of a run, and says how it goes.

    A checkpoint holds parameters, buffers, the outer optimizer's state, the meta-step and what selection knows, so a
    resumed run continues with the same bits; draws need no state.

    Attributes:
        test: scores of all test episodes; groups: int64, the group of each, None where tasks have none.
    """

    def __init__(
        self, cell: CellDir, attempt: int, *, headline: str, log_every: int, save_seconds: float, writes: bool
    ):
        self.cell, self.headline, self.log_every, self.save_seconds = cell, headline, log_every, save_seconds
        self.writes = writes
        self.checkpoints = Checkpoints(cell.path / "checkpoints")
        self.metrics = MetricsFile(cell.path / "metrics.jsonl", attempt) if writes else None
        self.best: dict[str, Any] | None = None
        self.validated = -1
        self.scores: list[Scores] = []
        self.test: Scores = {}
        self.groups: Tensor | None = None
        self._groups: list[dict[str, tuple[Tensor, ...]]] = []
        self.seconds = 0.0
        self._saved = self._printed = self._started = time.monotonic()
        self._logged = self._first = 0

    @property
    def elapsed(self) -> float:
        """Seconds of this run, those of earlier attempts up to their last checkpoint included."""
        return self.seconds + time.monotonic() - self._started

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, learner: MetaLearner, kind: str) -> None:
        """Write a generation of `best` or `last`."""
        self._saved = time.monotonic()
        if not self.writes:
            return
        fitting = learner._trainer is not None
        state = {
            "learner": learner.state_dict(),
            "optimizer": learner.optimizers(use_pl_optimizer=False).state_dict() if fitting else {},  # type: ignore[union-attr]
            "meta_steps": learner.meta_steps,
            "best": self.best,
            "validated": self.validated,
            "seconds": self.elapsed,
        }
        self.checkpoints.save(kind, learner.meta_steps, lambda file: torch.save(state, file))

    def resume(self, learner: MetaLearner, source: Checkpoints | None = None) -> bool:
        """Load the last good checkpoint into the learner; False, and nothing done, if there is none."""
        found = (source or self.checkpoints).load("last")
        if found is None:
            return False
        state = torch.load(io.BytesIO(found[1]), weights_only=True, map_location="cpu")
        learner.load_state_dict(state["learner"])
        learner.meta_steps, self.best, self.validated = state["meta_steps"], state["best"], state["validated"]
        self.seconds = state["seconds"]
        learner.optimizer_state = state["optimizer"] or None  # none before the first meta-step
        return True

    def select(self, learner: MetaLearner, rule: str, source: Checkpoints | None = None) -> int:
        """Load the parameters to be tested and return their meta-step."""
        step = self.best["step"] if rule == "best" and self.best else None
        found = (source or self.checkpoints).load("last" if step is None else "best", step)
        if found is None:
            raise FileNotFoundError(f"no intact checkpoint in {(source or self.checkpoints).folder}")
        state = torch.load(io.BytesIO(found[1]), weights_only=True, map_location="cpu")
        learner.load_state_dict(state["learner"])
        return int(found[0]["step"])

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = self.elapsed
        self._started = self._saved = time.monotonic()
        self._first = _ours(trainer, pl_module)[0].meta_steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        learner, data = _ours(trainer, pl_module)
        data.step_seconds = max(1e-6, (time.monotonic() - self._began) / len(batch))
        step, last = learner.meta_steps, learner.meta_steps == data.max_steps
        rows = learner.take_traces()
        if step // self.log_every != self._logged // self.log_every or last:
            line = {"loss": float(learner.train_loss), "lr": learner.rate} | learner.reports()
            rows[step] = rows.get(step, {}) | line
        self._note_all(trainer, rows)
        self._logged = step
        validates = bool(data.val_every) and (step % data.val_every == 0 or last)
        if not validates and (last or time.monotonic() - self._saved > self.save_seconds):
            self.save(learner, "last")
        self._progress(trainer, learner, data)
        if self.writes:
            self.cell.beat(step=step)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self.scores.append(outputs)
        if self.writes:
            self.cell.beat()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        learner, data = _ours(trainer, pl_module)
        gathered, self.scores = gather(self.scores, trainer.world_size, data.frozen["val"]), []
        ((values, losses),) = gathered.values()
        value, loss, step = float(values.double().mean()), float(losses.double().mean()), learner.meta_steps
        sign = 1 if learner.kind == "classification" else -1  # accuracy rises, error falls
        better = math.isfinite(value) and (self.best is None or sign * value > sign * self.best["value"])
        self.validated = step
        if better:
            self.best = {"step": step, "value": value}
            self.save(learner, "best")
        self.save(learner, "last")
        self.note(trainer, step, {f"val_{learner.metric_name}": value, "val_loss": loss})
        self._progress(trainer, learner, data, value)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        learner, data = _ours(trainer, pl_module)
        trainer.should_stop = learner.meta_steps >= data.max_steps

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, MetaLearner):
            self._note_all(trainer, pl_module.take_traces())  # of a call that did not come to its end

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self.scores.append(outputs)
        self._groups.append({k: (v,) for k, v in batch.episodes.latent.items() if k == "group"})
        if self.writes:
            self.cell.beat()

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _, data = _ours(trainer, pl_module)
        ranks, total = trainer.world_size, data.frozen["test"]
        self.test, self.scores = gather(self.scores, ranks, total), []
        self.groups = gather(self._groups, ranks, total).get("group", (None,))[0]
        self._groups = []

    # ---- telling -------------------------------------------------------------------------------------------------

    def note(self, trainer: pl.Trainer, step: int, values: dict[str, float]) -> None:
        """Write numbers of a meta-step to the log and its mirrors; None for those that are not finite."""
        self._note_all(trainer, {step: values})

    def _note_all(self, trainer: pl.Trainer, values: Mapping[int, dict[str, float]]) -> None:
        """`note` of several meta-steps, in one go."""
        seconds, rows = round(self.elapsed, 3), {}
        for step, own in values.items():
            rows[step] = {**{k: v if math.isfinite(v) else None for k, v in own.items()}, "seconds": seconds}
        if self.metrics and rows:
            self.metrics.write(rows)
        for logger in trainer.loggers:
            for step, row in rows.items():
                logger.log_metrics({k: v for k, v in row.items() if v is not None}, step=step)

    def _progress(self, trainer: pl.Trainer, learner: MetaLearner, data: Episodes, value: float | None = None) -> None:
        """One line: rewritten in place on a terminal, printed at each validation elsewhere."""
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if not self.writes or (value is None and not (terminal and now - self._printed > 0.5)):
            return
        self._printed = now
        done = learner.meta_steps - self._first
        pace = (now - self._started) / max(1, done)
        best = f", best {self.best['value']:.4f} at {self.best['step']}" if self.best else ""
        shown = "" if value is None else f"  val {learner.metric_name} {value:.4f}{best}"
        line = (
            f"step {learner.meta_steps}/{data.max_steps}  query loss {float(learner.train_loss):.4f}{shown}"
            f"  {1 / max(pace, 1e-9):.1f} steps/s  ETA {_clock(pace * (data.max_steps - learner.meta_steps))}"
        )
        end = "\n" if not terminal or value is not None else ""
        print(("\r\033[K" if terminal else "") + line, end=end, file=sys.stderr, flush=True)


def _ours(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[MetaLearner, Episodes]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(module, MetaLearner) and isinstance(data, Episodes)
    return module, data


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
