"""What a table is: `conf/table/<paper>/<table>.yaml` and the published numbers it names. Imports no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metalearn.composing import all_keys, members
from metalearn.evaluation.metrics import metric_name, qualifiers_of
from metalearn.paths import conf_dir
from metalearn.schema import GROUPS, BadInput, fields_of, nearest
from metalearn.schema.groups import Run
from metalearn.schema.keys import key, show

Where = Mapping[str, Any]


@dataclass
class TableKeys:
    """The keys of a table's yaml file."""

    title: str = key(..., "printed above the table")
    published: str = key(..., "csv file beside the yaml file or in metalearn/published")
    table: str = key(..., "value of the csv's `table` column")
    experiment: str | None = key(None, "the prepared sweep whose cells fill the table; null: none is prepared")
    metric: str = key(..., "name in result.json, of all columns that name no other")
    scale: float = key(1.0, "a result's value times this is in the published unit", gt=0)
    margin: float | None = key(
        None, "reproduced: the whole interval of ours - published lies within +- this; null: no verdict", gt=0
    )
    higher_is_better: bool = key(True, "whether more is better")
    rows: list[dict] = key(..., "methods in print order")
    columns: list[dict] = key(..., "settings in print order")
    protocol: dict = key({}, "what the paper did, as keys; a result's difference becomes a footnote")
    notes: list[str] = key([], "remarks printed under the table")


@dataclass
class RowKeys:
    """The keys of a row."""

    method: str = key(..., "the csv's")
    label: str | None = key(None, "printed instead of method")
    where: dict = key(..., "which results: group members and keys")
    protocol: dict = key({}, "beside the table's")


@dataclass
class ColumnKeys:
    """The keys of a column."""

    setting: str = key(..., "the csv's")
    label: str | None = key(None, "printed instead of setting")
    where: dict = key(..., "which results: group members and keys")
    published_metric: str | None = key(None, "the csv's `metric`, where a setting has several")
    metric: str | None = key(None, "name in result.json instead of the table's, with qualifiers (mse@step=0) if any")
    group: str | None = key(None, "ground-truth group of the test tasks")
    bn: str | None = key(None, "batch-norm mode; null: the headline's")
    protocol: dict = key({}, "beside the table's")


class Row(NamedTuple):
    """One method."""

    method: str
    label: str
    where: Where
    protocol: Where


class Column(NamedTuple):
    """One setting, and which number of a result it shows."""

    setting: str
    label: str
    where: Where
    published_metric: str
    metric: str
    bn: str | None
    group: str | None
    step: int | None
    protocol: Where


class Published(NamedTuple):
    """A printed number with its half-width: as numbers (None where there is none), and as they are printed."""

    value: float | None
    half: float | None
    text: str
    half_text: str

    @property
    def decimals(self) -> int:
        """Digits after the point, of the value or its half-width."""
        return max(len(t.partition(".")[2]) if _number(t) is not None else 0 for t in (self.text, self.half_text))


class Table(NamedTuple):
    """A validated table; `published` is by method, setting and the csv's metric."""

    name: str
    title: str
    experiment: str | None
    scale: float
    margin: float | None
    higher_is_better: bool
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    protocol: Where
    notes: tuple[str, ...]
    published: Mapping[tuple[str, str, str], Published]

    def printed(self, row: Row, column: Column) -> Published | None:
        """The published number of a cell; None where the paper prints none."""
        return self.published.get((row.method, column.setting, column.published_metric))

    def uncovered(self) -> list[tuple[str, str, str]]:
        """The published numbers that no cell of this table shows."""
        shown = {(r.method, c.setting, c.published_metric) for r in self.rows for c in self.columns}
        return [k for k in self.published if k not in shown]


def names(config_dirs: Sequence[str] = ()) -> list[str]:
    """The tables there are, as `<paper>/<table>`."""
    return members("table", config_dirs)


def load(name: str, config_dirs: Sequence[str] = ()) -> Table:
    """Read and check a table.

    Args:
        name: `<paper>/<table>`.
        config_dirs: further folders with a `table/` folder; theirs win.

    Raises:
        BadInput: if there is no such table, or for what is wrong in its file.
    """
    known = names(config_dirs)
    if name not in known:
        raise BadInput(f"table: no table '{name}'{nearest(name, known)}")
    places = [Path(d) / "table" / f"{name}.yaml" for d in (*reversed(config_dirs), conf_dir())]
    return read(next(p for p in places if p.is_file()), name)


def read(path: Path, name: str) -> Table:
    """The table of a file.

    Raises:
        BadInput: as `load`.
    """
    top = f"table/{name}.yaml"
    given = _checked(TableKeys, _yaml(path, top), top)
    published = _published(path.parent, given["published"], given["table"], top)
    rows = tuple(_row(r, f"{top}: rows.{i}", published) for i, r in enumerate(given["rows"]))
    columns = tuple(
        _column(c, f"{top}: columns.{i}", published, given["metric"]) for i, c in enumerate(given["columns"])
    )
    for kind, labels in (("rows", [r.label for r in rows]), ("columns", [c.label for c in columns])):
        if twice := sorted({x for x in labels if labels.count(x) > 1}):
            raise BadInput(f"{top}: {kind}: two are called '{twice[0]}'; give them labels")
    _check_keys(given["protocol"], f"{top}: protocol")
    kept = {k: given[k] for k in ("title", "experiment", "scale", "margin", "higher_is_better", "protocol")}
    return Table(name=name, rows=rows, columns=columns, notes=tuple(given["notes"]), published=published, **kept)


def _yaml(path: Path, top: str) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise BadInput(f"{top}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{top}: must be a mapping")
    return {str(k): v for k, v in found.items()}


def _checked(schema: type, given: Mapping[str, Any], path: str) -> dict[str, Any]:
    fields = fields_of(schema)
    for name in given:
        if name not in fields:
            raise BadInput(f"{path}: {name}: no such key{nearest(str(name), fields)}")
    try:
        return {name: field.check(name, given.get(name, field.default)) for name, field in fields.items()}
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _row(given: Mapping[str, Any], path: str, published: Mapping[tuple[str, str, str], Published]) -> Row:
    found = _checked(RowKeys, given, path)
    methods = dict.fromkeys(k[0] for k in published)
    if found["method"] not in methods:
        raise BadInput(f"{path}: method={found['method']}: not published{nearest(found['method'], methods)}")
    _check_keys(found["where"], f"{path}: where")
    _check_keys(found["protocol"], f"{path}: protocol")
    return Row(found["method"], found["label"] or found["method"], found["where"], found["protocol"])


def _column(
    given: Mapping[str, Any], path: str, published: Mapping[tuple[str, str, str], Published], metric: str
) -> Column:
    found = _checked(ColumnKeys, given, path)
    setting, wanted = found["setting"], found["published_metric"]
    settings = dict.fromkeys(k[1] for k in published)
    if setting not in settings:
        raise BadInput(f"{path}: setting={setting}: not published{nearest(setting, settings)}")
    metrics = list(dict.fromkeys(k[2] for k in published if k[1] == setting))
    if wanted is None and len(metrics) > 1:
        raise BadInput(f"{path}: setting={setting}: name published_metric, one of {', '.join(metrics)}")
    if wanted is not None and wanted not in metrics:
        raise BadInput(
            f"{path}: published_metric={wanted}: must be one of {', '.join(metrics)}{nearest(wanted, metrics)}"
        )
    _check_keys(found["where"], f"{path}: where")
    _check_keys(found["protocol"], f"{path}: protocol")
    name, qualifiers = _metric(found["metric"] or metric, path)
    bn, group = found["bn"] or qualifiers.get("bn"), found["group"] or qualifiers.get("group")
    step = int(qualifiers["step"]) if "step" in qualifiers else None
    label = found["label"] or (f"{setting} {wanted}" if wanted else setting)
    return Column(setting, label, found["where"], wanted or metrics[0], name, bn, group, step, found["protocol"])


def _metric(text: str, path: str) -> tuple[str, dict[str, str]]:
    """A metric's bare name and qualifiers."""
    bare = text.partition("@")[0]
    try:
        qualifiers = qualifiers_of(text)
    except ValueError:
        qualifiers = {"?": text}
    if set(qualifiers) - {"bn", "group", "step"} or not qualifiers.get("step", "0").isdecimal():
        example = metric_name("mse", bn="batch", step=0)
        raise BadInput(f"{path}: metric={text}: must be a name with bn, group, step at most, as {example}")
    return bare, qualifiers


def _check_keys(where: Where, path: str) -> None:
    """Refuse keys that no member has; those of members that are not there yet are let through."""
    known = _known()
    for name, value in where.items():
        group = str(name).partition(".")[0]
        if name in known or any(str(name).startswith(f"{k}.") for k in known if "." in k):
            continue
        if not (group in where and unavailable(group, where[group])):
            raise BadInput(f"{path}: {name}={show(value)}: no such key or group{nearest(str(name), known)}")


@cache
def _known() -> tuple[str, ...]:
    """All keys of all members, and the groups."""
    return (*all_keys(), *GROUPS, *fields_of(Run))


def unavailable(group: str, member: Any) -> bool:
    """Whether a group has no such member, or a mixture names data sets of which one is not there."""
    if group == "dataset.members":
        return not {str(m) for m in member} <= set(members("dataset"))
    return group in GROUPS and str(member) not in members(group)


# ---- published numbers -------------------------------------------------------------------------------------------


def _published(folder: Path, file: str, table: str, top: str) -> dict[tuple[str, str, str], Published]:
    package = Path(__file__).resolve().parent.parent / "published"
    path = next((d / file for d in (folder, package) if (d / file).is_file()), None)
    if path is None:
        known = sorted(f.name for f in package.glob("*.csv"))
        raise BadInput(f"{top}: published={file}: no such file{nearest(file, known)}")
    with open(path, newline="") as lines:
        rows = list(csv.DictReader(lines))
    columns = ("table", "method", "setting", "metric", "value", "ci")
    if lacking := [c for c in columns if rows and c not in rows[0]]:
        raise BadInput(f"{top}: published={file}: has no column {lacking[0]}")
    found: dict[tuple[str, str, str], Published] = {}
    for row in rows:
        if row["table"] == table:
            texts = (row["value"] or "").strip(), (row["ci"] or "").strip()
            name = (row["method"], row["setting"], row["metric"])
            if name in found:
                raise BadInput(f"{top}: published={file}: two values of {' '.join(name)}")
            found[name] = Published(_number(texts[0]), _number(texts[1]), *texts)
    if not found:
        known_tables: Iterable[str] = dict.fromkeys(r["table"] for r in rows)
        raise BadInput(f"{top}: table={table}: no such table in {file}; it has {', '.join(known_tables)}")
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
