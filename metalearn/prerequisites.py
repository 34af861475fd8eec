"""What a cell's training starts from: parameters that another cell, or a checkpoint, holds."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metalearn.cells import Cell, Given
from metalearn.learner import Diverged
from metalearn.ledger import Busy, CellDir, Found, given_checkpoint, read_json, trained_by, trained_parameters
from metalearn.schema import BadInput

POLL_SECONDS = 5.0  # between looks at a cell that another process trains

State = dict[str, Any]
"""A learner's state as its checkpoint holds it."""
Run = Callable[[Cell, CellDir], str]
"""Trains and tests a cell for another one, and says how it ended."""


class NoStart(Diverged):
    """A cell that this one starts from diverged: that is this one's result, too."""


def ready(cell: Cell, directory: CellDir, run: Run) -> list[State]:
    """The states that a cell's training starts from, in the order of its needs.

    Args:
        cell: the cell.
        directory: its folder, whose lock this process holds.
        run: called for a needed cell that nobody has trained yet; it leaves a cell of its own, found again by all who
            need it.

    Raises:
        NoStart: if a needed cell diverged.
        RuntimeError: if a needed cell failed.
        BadInput: for a given checkpoint that is none, or has changed since the cell was named.
    """
    return [_given(need, cell) if isinstance(need, Given) else _trained(need, directory, run) for need in cell.needs]


SIZES = ("name", "root", "way", "shot", "queries", "test_way", "test_shot", "test_queries", "label_assignment")
"""Keys of a data set that do not say which examples are for training."""


def _same_data(need: Given, cell: Cell, refusal: str) -> None:
    """Refuse parameters of a run on other data: its training classes may be this run's test classes."""
    result = read_json(Path(need.path) / "result.json")
    if result is None:  # a bare file says nothing of its data
        return
    here, there = cell.config["dataset"], result["config"]["dataset"]
    if result["data_hash"] != cell.data_hash:
        raise BadInput(f"{refusal}it was trained on other data ({there['name']}) than this run ({here['name']})")
    for key in sorted((here.keys() | there.keys()) - set(SIZES)):
        if here.get(key) != there.get(key):
            raise BadInput(
                f"{refusal}it was trained with dataset.{key}={there.get(key)}, and this run has {here.get(key)}"
            )


def _given(need: Given, cell: Cell) -> State:
    refusal = f"{need.key}={need.path}: "
    try:
        found = given_checkpoint(need.path)
    except ValueError as error:
        raise BadInput(refusal + str(error)) from None
    _same_data(need, cell, refusal)
    if found.sha256 != need.sha256:
        raise BadInput(refusal + "its contents have changed since this run was named; run the command again")
    try:
        return state_of(found)
    except ValueError as error:
        raise BadInput(refusal + str(error)) from None


def _trained(need: Cell, wanted_by: CellDir, run: Run) -> State:
    """Waits for the process that trains a needed cell, or trains it."""
    output, who = need.config["output_dir"], f"cell {need.cell_id} ({need.config['algorithm']['name']})"
    said = ""
    while (source := trained_by(output, need.train_id)) is None:
        directory = CellDir(output, need.cell_id, wanted_by)
        try:
            directory.acquire()
        except Busy as busy:
            if str(busy) != said:
                print(f"metalearn: cell {wanted_by.cell_id} waits: {busy}", file=sys.stderr, flush=True)
            said = str(busy)
            wanted_by.beat(phase=f"waiting for {need.cell_id}")
            time.sleep(POLL_SECONDS)
            continue
        try:
            if trained_by(output, need.train_id) is not None:
                continue  # by the process that had the lock a moment ago
            result = directory.result
            if result is not None and result["status"] == "done":
                directory.archive()  # its checkpoints are gone
            if result is None or result["status"] == "done":
                print(
                    f"metalearn: cell {wanted_by.cell_id} starts from {who}: training it", file=sys.stderr, flush=True
                )
                wanted_by.beat(force=True, phase=f"training of {need.cell_id}")
                run(need, directory)
                result = directory.result
                if trained_by(output, need.train_id) is None and result is not None and result["status"] == "done":
                    raise RuntimeError("it left no checkpoint")
            if result is not None and result["status"] == "diverged":
                raise NoStart(f"{who}, whose parameters this cell starts from, diverged: {result['error']}")
        except (NoStart, BadInput):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"{who}, whose parameters this cell starts from, failed: {reason}") from error
        finally:
            directory.release()
    return state_of(trained_parameters(source.path))


def state_of(found: Found) -> State:
    """The learner's state in a checkpoint.

    Raises:
        ValueError: if it is none of a run.
    """
    try:
        state = torch.load(io.BytesIO(found.data), weights_only=True, map_location="cpu")["learner"]
    except Exception as error:
        raise ValueError(f"no checkpoint of a run ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"no checkpoint of a run (its learner is a {type(state).__name__})")
    return state


def take(own: Mapping[str, nn.Parameter], state: State, refusal: str) -> None:
    """Copy parameters from a learner's state, where they have the same names.

    Args:
        own: by name, overwritten.
        state: see above.
        refusal: what a message begins with.

    Raises:
        BadInput: if one is absent, or has another shape; nothing is copied then.
    """
    for name, parameter in own.items():
        there = list(state[name].shape) if name in state else "absent"
        if there != list(parameter.shape):
            raise BadInput(f"{refusal}{name} is {there} there and {list(parameter.shape)} here")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
