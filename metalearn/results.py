"""The results store: finished cells are files under a folder, and this reads them. Imports no torch.

Any `result.json` counts, those of `<output_dir>/runs/<cell_id>/` as well as curated ones (`docs/runs/...`); results
that `rerun=true` archived (`old/<n>/`) do not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from metalearn.evaluation.metrics import metric_name, qualifiers_of
from metalearn.identity import identity, short_hash
from metalearn.ledger import read_result
from metalearn.schema import MEMBERS, BadInput, fields_of
from metalearn.schema.groups import Run
from metalearn.schema.keys import show
from metalearn.schema.registry import SINGLE

Config = dict[str, Any]
NOT_RESULTS = ("old", "checkpoints", "wandb", "hydra", "locks", "jobs", "submitted")
"""Folders in which no results lie."""


class Result(NamedTuple):
    """A finished cell: its folder, and what its result.json holds (contract, section 3)."""

    folder: Path
    data: dict[str, Any]

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.data["config"]

    @property
    def diverged(self) -> bool:
        """Whether the run diverged, so that its metrics may be missing."""
        return self.data["status"] == "diverged"

    def metric(self, name: str, *, bn: str | None = None, group: str | None = None) -> dict[str, Any] | None:
        """`mean, std, ci95, n, unit` of a metric at the protocol's test steps; None if the run did not measure it.

        Args:
            name: `accuracy`, `mse`, ...
            bn: the batch-norm mode; None for the headline's.
            group: the ground-truth group of tasks; None for all.
        """
        headline = bn is None or bn == self.data["protocol"]["bn"]
        return self.data["metrics"].get(metric_name(name, bn=None if headline else bn, group=group))

    def episodes(self, *, bn: str | None = None, step: int | None = None, group: str | None = None) -> pd.DataFrame:
        """Rows of episodes.parquet in the order of the episodes; empty if there is no such file.

        Args:
            bn: as in `metric`.
            step: adaptation step; None for the protocol's.
            group: as in `metric`.
        """
        rows, protocol = self.every_episode(), self.data["protocol"]
        rows = rows[rows["bn"] == (bn or protocol["bn"])]
        rows = rows[rows["step"] == (protocol["test_steps"] if step is None else step)]
        rows = rows if group is None else rows[rows["group"] == group]
        return rows.sort_values("episode", ignore_index=True)

    def every_episode(self) -> pd.DataFrame:
        """All rows of episodes.parquet, of every mode and step; a damaged file is a warning and has none."""
        path = self.folder / "episodes.parquet"
        if path.is_file():
            try:
                return pd.read_parquet(path)
            except (OSError, ValueError) as error:  # pyarrow's are of these
                reason = " ".join(str(error).split())
                warnings.warn(f"{path} cannot be read and is left out: {reason[:200]}", stacklevel=2)
        return pd.DataFrame(columns=["episode", "bn", "step", "metric", "value", "loss", "group"])

    def values(self, *, bn: str | None = None, step: int | None = None, group: str | None = None) -> np.ndarray:
        """The metric of each episode, float64 in their order (see `episodes`); empty if the run diverged."""
        return np.empty(0) if self.diverged else self.episodes(bn=bn, step=step, group=group)["value"].to_numpy("f8")

    def log(self) -> pd.DataFrame:
        """`metrics.jsonl`: one row a logged meta-step, the latest attempt's; empty if there is no such file."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return pd.DataFrame(columns=["attempt", "step"])
        return read_log(path)


def read_log(path: Path) -> pd.DataFrame:
    """A training log as columns, by meta-step: of each value the latest attempt's, half-written lines left out."""
    import json

    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # of an attempt that was killed while writing
        if isinstance(row, dict) and "step" in row:
            rows.setdefault(row["step"], {}).update(row)
    return pd.DataFrame([rows[step] for step in sorted(rows)])


def find(place: str | Path) -> list[Result]:
    """All results below a folder, in the order of their paths; what only has a result's name is a warning.

    Raises:
        BadInput: if there is no such folder.
    """
    place = Path(place)
    if not place.is_dir():
        raise BadInput(f"{place}: no such folder of results")
    return sorted(_below(place), key=lambda r: r.folder)


def _below(place: Path) -> Iterator[Result]:
    for folder, names, files in os.walk(place):
        names[:] = [n for n in names if n not in NOT_RESULTS]
        if "result.json" in files:
            path = Path(folder) / "result.json"
            if (data := read_result(path)) is not None:
                yield Result(Path(folder), data)
            else:
                warnings.warn(f"{path} is no result, or damaged, and is left out", stacklevel=2)


class Stored:
    """Results that are kept somewhere (`docs/runs`), found by what they are results of.

    Args:
        results: see above.
    """

    def __init__(self, results: Iterable[Result]):
        self._by_id = {r.data["cell_id"]: r for r in results}
        self._data = {r.data["data_hash"] for r in self._by_id.values()}

    def of(self, config: Config) -> Result | None:
        """The result of a validated configuration, whose data need not be here: a result names its own.

        None also for runs that start from others' results or have source files of the user's: their ids say more.
        """
        names = (short_hash(list(identity(config, data_hash))) for data_hash in self._data)
        return next((self._by_id[name] for name in names if name in self._by_id), None)


def value(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; a group's own name stands for its member. None where there is none.

    `dataset.test_way`, `test_shot` and `test_queries` that are null have the value of training, as their keys say: a
    table's column means the tasks that were tested, however wide those of training were (Reptile, ProtoNet).
    """
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if node is None and key.startswith("dataset.test_"):
        return value(config, key.replace("test_", "", 1))
    return node["name"] if isinstance(node, Mapping) and "name" in node else node


def has(config: Mapping[str, Any], key: str) -> bool:
    """Whether a configuration has a dotted key or group, whatever its value."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def matches(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a configuration has these values (as they are written on the command line; 1 is 1.0)."""
    return all(same(value(config, k), v) for k, v in wanted.items())


def same(one: Any, other: Any) -> bool:
    """Whether two values are written alike on the command line, or are the same number."""
    if show(one) == show(other):
        return True
    try:
        return float(show(one)) == float(show(other))
    except ValueError:
        return False


def is_number(value: Any) -> bool:
    """Whether a key's value is a number; a switch is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def by_size(value: Any) -> tuple[int, float, str]:
    """A key that sorts the values of a key: nothing, numbers by size, then words in alphabetical order."""
    if value is None:
        return (0, 0.0, "")
    return (1, value, "") if is_number(value) else (2, 0.0, show(value))


class Configured(Protocol):
    """Whatever has a configuration."""

    @property
    def config(self) -> Config: ...


def differing(results: Iterable[Configured]) -> list[str]:
    """The dotted keys in which the configurations of results differ, those that change no number left out."""
    configs = [flat(r.config) for r in results]
    names = dict.fromkeys(k for c in configs for k in c)
    return [k for k in names if len({show(c.get(k)) for c in configs}) > 1 and not idle(k)]


@cache
def idle(key: str) -> bool:
    """Whether every member that declares a key says that it touches no number (data count by content, not by path)."""
    group, name = key.partition(".")[0], key.rpartition(".")[2]
    schemas = [SINGLE[group]] if group in SINGLE else MEMBERS[group].values() if group in MEMBERS else [Run]
    declared = [fields_of(schema)[name].key.touches for schema in schemas if name in fields_of(schema)]
    return key.endswith(".root") or (bool(declared) and set(declared) == {"none"})


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by dotted key."""
    out: dict[str, Any] = {}
    for k, v in config.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, Mapping) else {prefix + k: v}
    return out


def frame(results: Iterable[Result]) -> pd.DataFrame:
    """One row a result and metric: ids, seed, members, steps, seconds, and the metric with its qualifiers."""
    rows = []
    for r in results:
        members = {g: value(r.config, g) for g in ("algorithm", "dataset", "backbone", "regularizer", "study")}
        about = {"cell_id": r.data["cell_id"], **members, "seed": r.data["seed"], "status": r.data["status"]}
        about |= {"steps": r.data["steps"], "seconds": r.data["seconds"], "folder": str(r.folder)}
        for name, m in r.data["metrics"].items() or {"": {}}.items():
            q = qualifiers_of(name)
            where = {"bn": q.get("bn", r.data["protocol"]["bn"]), "group": q.get("group")}
            where["step"] = int(q.get("step", r.data["protocol"]["test_steps"]))
            rows.append({**about, "metric": name.partition("@")[0], **where, **m})
    return pd.DataFrame(rows)
