"""Tables of results beside the published numbers. Imports no torch.

filled = make("gradagree/table2", place="docs/runs/omniglot_short", baseline="MAML")
text = render(filled, "html")          # or terminal, markdown, latex, csv
rows = records(filled)                 # one dictionary a cell of the table
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metalearn.cells import search_paths
from metalearn.schema import GROUPS, BadInput
from metalearn.schema.keys import show
from metalearn.selection import select as asked_for
from metalearn.tables.compare import MISSING, Entry, Filled, fill
from metalearn.tables.definition import Table, load, names
from metalearn.tables.render import FORMATS, record
from metalearn.tables.selection import select

__all__ = ["FORMATS", "Filled", "Table", "load", "make", "names", "records", "render"]


def make(
    name: str,
    overrides: Sequence[str] = (),
    *,
    place: str | Path | None = None,
    baseline: str | None = None,
    config_dirs: Sequence[str] = (),
) -> Filled:
    """A table with the results there are.

    Args:
        name: `<paper>/<table>`.
        overrides: groups and keys as after `metalearn experiment=<the table's>`; with `place` they choose results.
        place: folder of results, instead of the results of the experiment's cells.
        baseline: label or method of the row that the others are compared with, on the same test episodes.
        config_dirs: further folders with tables, experiments and groups.

    Raises:
        BadInput: for what cannot be, and if a cell of the table has several results of one seed.
    """
    folders = [*config_dirs, *search_paths(overrides)]
    table = load(name, folders)
    experiment = _experiment(table, overrides)
    if place is not None:
        filled = fill(table, select(table, asked_for(overrides, folders, place)), baseline)
        entries = tuple(_with_command(e, experiment) for e in filled.entries)
        command = experiment and shlex.join(["metalearn", *_options(config_dirs), f"experiment={experiment}"])
        return filled._replace(entries=entries, command=command, elsewhere=True)
    if experiment is None and overrides:
        raise BadInput(f"{name}: no experiment is prepared for this table, so that {overrides[0]} needs --from FOLDER")
    given = [f"experiment={experiment}", *(o for o in overrides if not o.startswith("experiment="))]
    candidates = [] if experiment is None else asked_for(given, folders)
    filled = fill(table, select(table, candidates), baseline)
    entries = tuple(_not_planned(_with_folders(e, config_dirs), experiment) for e in filled.entries)
    command = experiment and shlex.join(["metalearn", *_options(config_dirs), *given])
    return filled._replace(entries=entries, command=command)


def render(filled: Filled, form: str = "terminal") -> str:
    """The text of a filled table in one of FORMATS."""
    return FORMATS[form](filled)


def records(filled: Filled) -> list[dict[str, Any]]:
    """One dictionary a cell of the table, row by row, as in the CSV (None where there is nothing)."""
    return [record(filled, e) for e in filled.entries]


def _experiment(table: Table, overrides: Sequence[str]) -> str | None:
    named = [o.partition("=")[2] for o in overrides if o.startswith("experiment=")]
    return named[-1] if named else table.experiment


def _options(config_dirs: Sequence[str]) -> list[str]:
    return [word for folder in config_dirs for word in ("--config-dir", folder)]


def _with_folders(entry: Entry, config_dirs: Sequence[str]) -> Entry:
    """The entry's commands with the folders that they need."""
    options = "".join(f"{shlex.quote(word)} " for word in _options(config_dirs))
    return entry._replace(commands=tuple(c.replace("metalearn ", f"metalearn {options}", 1) for c in entry.commands))


def _with_command(entry: Entry, experiment: str | None) -> Entry:
    """A missing entry of a folder of results with the command that runs its row."""
    if entry.verdict != MISSING or experiment is None or entry.detail:
        return entry
    chosen = [f"{k}={show(v)}" for k, v in entry.row.where.items() if k in GROUPS]
    return entry._replace(commands=(shlex.join(["metalearn", f"experiment={experiment}", *chosen]),))


def _not_planned(entry: Entry, experiment: str | None) -> Entry:
    """A missing entry that no cell of the experiment would fill, saying so."""
    if entry.verdict != MISSING or entry.planned or entry.detail:
        return entry
    return entry._replace(detail=f"not in experiment={experiment}" if experiment else "no experiment is prepared")
