"""Mirrors of the training log; `metrics.jsonl` is the truth, and no mirror may stop a run."""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from metalearn.ledger import CellDir

Config = dict[str, Any]


def build_logger(config: Config, cell: CellDir, attempt: int) -> Logger | None:
    """The logger that a run asks for; None for none, or if W&B cannot start (a warning says why)."""
    section = config["logger"]
    if section["name"] == "none":
        return None
    if section["name"] == "csv":  # a version for each attempt: Lightning deletes an existing file
        return CSVLogger(cell.path, name="csv", version=f"attempt_{attempt}")
    try:
        return _wandb(config, cell, attempt)
    except Exception as error:
        warnings.warn(f"logging to W&B is off: {error}", stacklevel=2)
        return None


def _wandb(config: Config, cell: CellDir, attempt: int) -> WandbLogger:
    """A W&B run named by cell and attempt, offline unless WANDB_MODE says otherwise."""
    import wandb

    section = config["logger"]
    run = wandb.init(
        project=section["project"],
        dir=str(cell.path),
        id=f"{cell.cell_id}-{attempt}",
        name=f"{config['algorithm']['name']}_{config['dataset']['name']}_{config['seed']}",
        group=section["group"],
        job_type="train",
        tags=[config["algorithm"]["name"], config["dataset"]["name"], *section["tags"]],
        config=config,
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        settings=wandb.Settings(silent=True, console="off"),
    )
    return WandbLogger(experiment=run, save_dir=str(cell.path))


def close(logger: Logger | None, metrics: dict[str, dict[str, Any]]) -> None:
    """Hand the test metrics to W&B, under names of letters, digits and underscores, and end its run."""
    if not isinstance(logger, WandbLogger):
        return
    try:
        summary = {"test_" + re.sub(r"[^A-Za-z0-9]+", "_", name): m["mean"] for name, m in metrics.items()}
        logger.experiment.summary.update(summary)
        logger.experiment.finish()
    except Exception as error:
        warnings.warn(f"W&B did not take the result: {error}", stacklevel=2)
