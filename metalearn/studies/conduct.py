"""Running a study's cell: what it measures becomes result.json and episodes.parquet."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd

from metalearn.cells import Cell
from metalearn.identity import config_hash
from metalearn.ledger import CellDir
from metalearn.objects import build
from metalearn.random import Key
from metalearn.record import versions_of
from metalearn.studies.base import Measured, State, Study

Config = dict[str, Any]
SHOWN_SECONDS = 10.0


def conduct(cell: Cell, directory: CellDir, starts: Sequence[State]) -> list[Measured]:
    """Everything that the cell's study measures, told of on the way.

    Raises:
        ValueError: if the study measures the same twice, or has no headline.
    """
    study: Study = build("study", cell.config["study"])
    found: dict[str, Measured] = {}
    began = said = time.monotonic()
    for one in study.measure(Key(cell.config["seed"], f"study/{cell.config['study']['name']}"), starts):
        if one.name in found:
            raise ValueError(f"{type(study).__name__} measures {one.name} twice")
        found[one.name] = one
        directory.beat(phase="study")
        if time.monotonic() - said > SHOWN_SECONDS:
            said = time.monotonic()
            print(f"{len(found)} numbers in {said - began:.0f} s, now {one.name}", file=sys.stderr, flush=True)
    kept = list(found.values())
    if not kept or kept[0].where:
        raise ValueError(f"{type(study).__name__} must measure its headline first, without qualifiers")
    return kept


def rows(found: Sequence[Measured]) -> pd.DataFrame:
    """`episodes.parquet` of a study: one row for each value behind a mean; `group` says which point it belongs to."""
    frames = [
        pd.DataFrame(
            {
                "episode": range(len(one.values)),
                "bn": "none",
                "step": 0,
                "metric": one.metric,
                "value": one.values,
                "loss": None,
                "group": pd.Series([one.point] * len(one.values), dtype="object"),
            }
        )
        for one in found
        if one.values
    ]
    columns = ["episode", "bn", "step", "metric", "value", "loss", "group"]
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    return table.astype({"loss": "float64", "value": "float64"})


def result_of(cell: Cell, found: Sequence[Measured], source: tuple[str | None, bool | None], seconds: float) -> Config:
    """The content of result.json (contract, section 3); a study has no protocol of episodes."""
    return {
        "cell_id": cell.cell_id,
        "train_id": cell.train_id,
        "config": cell.config,
        "config_hash": config_hash(cell.config),
        "git_commit": source[0],
        "git_dirty": source[1],
        "seed": cell.config["seed"],
        "versions": versions_of({}),
        "data_hash": cell.data_hash,
        "protocol": {
            **dict.fromkeys(("label_assignment", "way", "shot", "queries", "inner_loss_reduction", "selection")),
            "bn": "none",
            "test_steps": 0,
            "test_split": None,
            "episodes": max(one.summary["n"] for one in found),
            "episodes_id": cell.cell_id,
            "transductive": False,
        },
        "status": "done",
        "steps": 0,
        "seconds": round(seconds, 3),
        "metrics": {one.name: one.summary for one in found},
    }
