"""Composition root: a validated cell -> objects -> fit -> test -> result.json."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from pytorch_lightning.loggers import Logger

from metalearn.analysis import Analysis, adaptation, adaptation_figure
from metalearn.analysis import write as write_analysis
from metalearn.cells import Cell
from metalearn.compiled import Compiler
from metalearn.data import Episodes
from metalearn.datasets.base import Dataset
from metalearn.enlarge import enlarged
from metalearn.learner import Diverged, MetaLearner
from metalearn.ledger import (
    CellDir,
    Checkpoints,
    leads,
    note_trained,
    read_json,
    trained_by,
    write_atomically,
    write_json,
)
from metalearn.loggers import mirrored
from metalearn.memory import keep_freed_memory
from metalearn.objects import NOT_ARGUMENTS, build
from metalearn.ops.conv import multiply_in
from metalearn.outer import outer_rule
from metalearn.phases import forget, products
from metalearn.preemption import SaveOnSignal, handle_signals
from metalearn.prerequisites import State, ready
from metalearn.record import git_state, result_of
from metalearn.schema import BadInput, is_study
from metalearn.schema.algorithms import SIZES
from metalearn.studies.conduct import conduct, rows
from metalearn.studies.conduct import result_of as studied
from metalearn.training import Recorder

Config = dict[str, Any]


def build_learner(config: Config, dataset: Dataset) -> MetaLearner:
    """Network, regularizer and algorithm, with the run's initial parameters."""
    section, trainer = config["algorithm"], config["trainer"]
    module, name = section["_target_"].rsplit(".", 1)
    outputs = getattr(import_module(module), name).head_width(dataset, section)
    shapes: dict[str, Any] = {"input_shape": dataset.input_shape, "outputs": outputs}
    size = section.get("network_size")
    larger = None if size is None else enlarged(config["backbone"], SIZES[size], **shapes)
    net = build("backbone", larger.backbone if larger else config["backbone"], **shapes)
    learner = build(
        "algorithm",
        section,
        net=net,
        kind=dataset.kind,
        regularizer=build("regularizer", config["regularizer"]),
        chunk_bytes=int(trainer["chunk_mib"] * 2**20),
        recompute=trainer["recompute"],
        combine=outer_rule(section["outer"], section["outer_vector"], section["outer_clip"], section["outer_drop"]),
    )
    learner.enlarged = larger
    learner.initialize(config["seed"])
    learner.attach(build("optimizer", config["optimizer"]), trainer["max_steps"])
    learner.to(DTYPES[trainer["precision"]])
    if trainer["compile"] != "never":
        learner.compiler = Compiler(always=trainer["compile"] == "always")
    return learner


DTYPES = {"32": torch.float32, "64": torch.float64, "tf32": torch.float32, "bf16": torch.float32}


def set_precision(precision: str) -> None:
    """What this process multiplies from now on: see `trainer.precision`."""
    if precision == "tf32" and not torch.cuda.is_available():
        raise BadInput(
            "trainer.precision=tf32: only GPUs have TF32, and this machine has no usable one; use 32 or bf16"
        )
    inside = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = inside  # type: ignore[attr-defined]
    multiply_in(torch.bfloat16 if precision == "bf16" else None)


def build_data(config: Config, dataset: Dataset) -> Episodes:
    """Training stream and frozen episodes."""
    t = config["trainer"]
    return Episodes(
        dataset,
        build("sampler", config["sampler"]),
        **{k: t[k] for k in ("meta_batch_size", "max_steps", "val_every", "val_episodes", "test_episodes")},
        seed=config["seed"],
        evaluation_seed=config["evaluation"]["seed"],
        per_call=t["meta_steps_per_call"],
        log_every=t["log_every"],
        dtype=DTYPES[t["precision"]],
    )


def run(cell: Cell, directory: CellDir | None = None) -> str:
    """Train and test one cell; returns how it ended: done, diverged, failed or killed.

    A killed cell continues from its last good checkpoint; a cell whose training another cell has completed only tests.
    Cells that it needs and that nobody has trained are run first.
    """
    config, directory = cell.config, directory or CellDir(cell.config["output_dir"], cell.cell_id)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    keep_freed_memory()
    study = is_study(config)
    set_precision("64" if study else config["trainer"]["precision"])
    if threads := config["study" if study else "trainer"]["threads"]:
        torch.set_num_threads(threads)
    main = leads()
    attempt = directory.start(config, cell.train_id) if main else 0
    if main:
        import yaml

        write_atomically(directory.path / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    before = dict(os.environ)
    handle_signals()
    try:
        state = (_study if study else _train_and_test)(cell, directory, attempt, main)
    except (KeyboardInterrupt, SystemExit):
        if main:
            directory.finish("killed", "interrupted")
        raise
    except Exception as error:
        if main:
            directory.finish("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        _leave_group(before)
    if main:
        directory.finish(state)
    return state


def _leave_group(before: dict[str, str]) -> None:
    """End this run's process group, so that the next cell of a sweep can form its own."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):  # set by Lightning
        if name not in before:
            os.environ.pop(name, None)


def _train_and_test(cell: Cell, directory: CellDir, attempt: int, main: bool) -> str:
    config, t, code = cell.config, cell.config["trainer"], git_state()
    dataset: Dataset = build("dataset", config["dataset"])
    learner, data = build_learner(config, dataset), build_data(config, dataset)
    modes = config["evaluation"]["bn_modes"] if learner.net.has_norm else ["none"]
    learner.watch(modes, config["evaluation"]["steps"])
    source = trained_by(config["output_dir"], cell.train_id)
    checkpoints = Checkpoints((source or directory).path / "checkpoints")
    starts, diverged = _starts(cell, directory) if checkpoints.load("last") is None else ([], None)
    recorder = Recorder(
        directory, attempt, headline=modes[0], log_every=t["log_every"], save_seconds=t["save_seconds"], writes=main
    )
    with mirrored(config, directory, attempt) as logger:
        callbacks = [recorder, SaveOnSignal(recorder, lambda: logger.close("killed") if logger else None)]
        trainer = build_trainer(config, directory, callbacks, logger)
        dataset.to(trainer.strategy.root_device)
        error = None
        try:
            if diverged is not None:
                raise diverged
            if source is None:
                fit(trainer, learner, data, recorder, starts)
                if main:
                    note_trained(config["output_dir"], cell.train_id, cell.cell_id)
            else:
                recorder.resume(learner, checkpoints)
            step = recorder.select(learner, config["evaluation"]["checkpoint"], checkpoints)
            if main:
                directory.beat(force=True, phase="test")
            trainer.test(learner, data, verbose=False)
        except Diverged as met:
            error, step = str(met), learner.meta_steps
        if main:
            rows = episode_rows(recorder, learner, dataset)
            result = result_of(cell, learner, recorder, rows, code, modes[0], step, recorder.elapsed, error)
            if error is None and (found := learner.to(trainer.strategy.root_device).analyse(data)) is not None:
                result["metrics"] |= _analysis(found, rows, learner.metric_name, directory)
            certificate = read_json(directory.path / "certificate.json")
            _write_result(directory, rows, result | ({"certificate": certificate} if certificate else {}))
            if logger is not None:
                logger.close(result["status"], result)
    return "done" if error is None else "diverged"


def _study(cell: Cell, directory: CellDir, attempt: int, main: bool) -> str:
    """Compute what the cell's study measures, in the leading process; a killed study begins anew."""
    if not main:
        return "done"
    code, began = git_state(), time.monotonic()
    starts = ready(cell, directory, run)
    with mirrored(cell.config, directory, attempt) as logger:
        found = conduct(cell, directory, starts)
        result = studied(cell, found, code, time.monotonic() - began)
        _write_result(directory, rows(found), result)
        if logger is not None:
            logger.close("done", result)
    return "done"


def _starts(cell: Cell, directory: CellDir) -> tuple[list[State], Diverged | None]:
    """What training starts from; cells that are run for it end before this one has a mirror and a trainer."""
    try:
        return ready(cell, directory, run), None
    except Diverged as diverged:
        return [], diverged


def build_trainer(
    config: Config, directory: CellDir, callbacks: list[pl.Callback], logger: Logger | None
) -> pl.Trainer:
    """Lightning's trainer, for devices, processes and hooks; the meta-step and its counter are ours.

    Ranks come from SLURM where it has started several processes of this job, else from Lightning. Its own handling of
    SLURM's signals is off: it would not count restarts.
    """
    t = config["trainer"]
    if t["accelerator"] == "cuda" and not torch.cuda.is_available():
        raise BadInput("trainer.accelerator=cuda: this machine has no usable GPU; use auto or cpu")
    environment: list[Any] = []
    if "SLURM_JOB_ID" in os.environ:
        several = int(os.environ.get("SLURM_NTASKS", 1)) > 1
        environment = [SLURMEnvironment(auto_requeue=False) if several else LightningEnvironment()]
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(t["accelerator"], t["accelerator"]),
        devices=t["devices"],
        strategy="ddp" if t["devices"] > 1 else "auto",
        max_epochs=-1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1,
        limit_val_batches=None if t["val_every"] else 0,
        logger=logger or False,
        callbacks=callbacks,
        plugins=environment,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        default_root_dir=str(directory.path),
    )


def fit(
    trainer: pl.Trainer, learner: MetaLearner, data: Episodes, recorder: Recorder, starts: Sequence[State] = ()
) -> None:
    """Train to exactly `max_steps` meta-steps, from the last checkpoint if there is one.

    Before the first meta-step the learner settles what it decides once, inherits what it starts from and goes through
    its phases; what they leave it with is checkpointed as meta-step 0.
    """
    if not recorder.resume(learner):
        prepare(trainer, learner, data, recorder, starts)
    forget(learner.phases(data), recorder.cell)
    data.start = learner.meta_steps
    if recorder.writes:
        recorder.cell.beat(force=True, phase="train")
    if learner.meta_steps < data.max_steps:
        trainer.fit(learner, data)
        trainer.strategy.barrier()  # other ranks read the checkpoints that rank 0 writes


def prepare(
    trainer: pl.Trainer, learner: MetaLearner, data: Episodes, recorder: Recorder, starts: Sequence[State]
) -> None:
    """What comes before the first meta-step; a killed run repeats at most the piece that it was at."""
    learner.to(trainer.strategy.root_device)
    noted = learner.settle(data)
    if starts:
        learner.inherit(starts)
    if phases := learner.phases(data):
        if trainer.world_size > 1:
            raise ValueError(f"{type(learner).__name__} prepares its training in one process; set trainer.devices=1")
        noted |= learner.begin(products(phases, recorder.cell))
    if noted or phases:
        recorder.note(trainer, 0, noted)
    if noted or phases or not data.max_steps:
        recorder.save(learner, "last")


def episode_rows(recorder: Recorder, learner: MetaLearner, dataset: Dataset) -> pd.DataFrame:
    """One row for each test episode, batch-norm mode and step: the contract's `episodes.parquet`."""
    groups = None if recorder.groups is None else [dataset.groups[i] for i in recorder.groups.tolist()]
    frames = []
    for (bn, step), (values, losses) in recorder.test.items():
        frames.append(
            pd.DataFrame(
                {
                    "episode": range(len(values)),
                    "bn": bn,
                    "step": step,
                    "metric": learner.metric_name,
                    "value": values.double().numpy(),
                    "loss": losses.double().numpy(),
                    "group": pd.Series(groups or [None] * len(values), dtype="object"),
                }
            )
        )
    columns = ["episode", "bn", "step", "metric", "value", "loss", "group"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def _analysis(found: Analysis, rows: pd.DataFrame, metric: str, directory: CellDir) -> dict[str, dict[str, Any]]:
    """Write what the algorithm found, and how adaptation goes; returns its numbers for the result."""
    curves = adaptation(rows)
    data = found.data | {"adaptation": curves}
    figures = found.figures | {"adaptation": adaptation_figure(curves, metric)}
    write_analysis(Analysis(found.metrics, data, figures), directory.path)
    return found.metrics


def _write_result(directory: CellDir, rows: pd.DataFrame, result: Config) -> None:
    """Episodes first and result.json last: its presence means finished."""
    part = directory.path / ".episodes.parquet.part"
    rows.to_parquet(part, index=False)
    os.replace(part, directory.path / "episodes.parquet")
    write_json(directory.path / "result.json", result)


__all__ = ["NOT_ARGUMENTS", "build", "build_learner", "build_trainer", "fit", "prepare", "run"]
