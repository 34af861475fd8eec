"""Signals that end a job: training is saved when the running meta-step is complete, then the signal takes its course.

Schedulers send a signal before they take a machine away (`--signal` of sbatch; submitit's is USR2), and users press
kill. In training the handler only sets a flag; elsewhere what was there before acts at once, which loses at most the
piece of work that a restart makes again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from metalearn.learner import MetaLearner
from metalearn.ledger import leads
from metalearn.training import Recorder

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
REQUEUES = "METALEARN_MAX_REQUEUES"
"""Environment variable: how often a plain SLURM job asks to be started again; default 100."""


def leave(signum: int, frame: FrameType | None = None) -> None:
    """The handler of a process that nobody else handles signals for: ask SLURM for a restart, then exit.

    Only the signals that sbatch was told to send (USR1, USR2) mean that the job shall go on later, and only as often as
    `METALEARN_MAX_REQUEUES` says.
    """
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if job and signum != signal.SIGTERM and leads():
        if restarts < int(os.environ.get(REQUEUES, 100)):
            subprocess.run(["scontrol", "requeue", job], check=False)
        else:
            print(f"metalearn: not started again after {restarts} restarts ({REQUEUES})", file=sys.stderr, flush=True)
    sys.exit(128 + signum)


def handle_signals() -> None:
    """Install `leave` where nobody has installed anything (jobs start deaf to USR2: see scripts/slurm/array.sbatch)."""
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            deaf = signal.getsignal(signum) is signal.SIG_IGN and signum != signal.SIGTERM
            if deaf or signal.getsignal(signum) is signal.SIG_DFL:
                signal.signal(signum, leave)


class SaveOnSignal(pl.Callback):
    """Saves a training when a signal asks for its end, closes the mirror, and hands the signal on.

    With several ranks, all learn of a signal that any has got at the same meta-step.

    Args:
        recorder: what saves; it comes before this callback in the trainer's list.
        close: called after saving, before the process may end.
    """

    def __init__(self, recorder: Recorder, close: Callable[[], None]):
        self.recorder, self.close = recorder, close
        self.asked: int | None = None
        self.before: dict[int, Any] = {}
        self.wrapped: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # before Lightning wraps them: its handler of TERM talks to ranks that may have ended
            self.before = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self.wrapped = {signum: signal.signal(signum, self._note) for signum in SIGNALS}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.asked = signum

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._obey(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._obey(trainer, pl_module)  # not within a validation: a checkpoint is never one whose validation is missing

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore(self.wrapped)
        if self.asked is not None:  # during the last validation
            self._pass_on(self.asked)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore(self.wrapped)

    def _obey(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        signum = self._agreed(trainer)
        if signum is None:
            return
        assert isinstance(module, MetaLearner)
        self.recorder.save(module, "last")
        self._restore(self.before)
        if self.recorder.writes:
            reason = f"{signal.Signals(signum).name}: saved at meta-step {module.meta_steps}"
            self.recorder.cell.finish("killed", reason)
            print(f"metalearn: {reason}", file=sys.stderr, flush=True)
        self.close()
        trainer.strategy.barrier()  # no rank ends before rank 0 has saved
        self._pass_on(signum)

    def _agreed(self, trainer: pl.Trainer) -> int | None:
        if trainer.world_size == 1:
            return self.asked
        told = torch.tensor([self.asked or 0], device=trainer.strategy.root_device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return int(told) or None

    def _pass_on(self, signum: int) -> None:
        """Whatever handled the signal before decides; a process that it leaves running ends here."""
        self.asked = None
        handler = self.before.get(signum)
        if callable(handler):
            handler(signum, None)
        sys.exit(128 + signum)

    def _restore(self, handlers: dict[int, Any]) -> None:
        for signum, handler in handlers.items():
            if signal.getsignal(signum) == self._note:
                signal.signal(signum, handler)
