"""How exactly the numbers are printed that a sweep is to be compared with. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from metalearn.cells import Cell
from metalearn.results import matches
from metalearn.tables.definition import Table, load, names


def tables_of(cells: Sequence[Cell], config_dirs: Sequence[str] = ()) -> list[Table]:
    """The tables that are made from the experiments which cells belong to."""
    asked = {o.partition("=")[2] for c in cells for o in c.overrides if o.startswith("experiment=")}
    return (
        [t for t in (load(name, config_dirs) for name in names(config_dirs)) if t.experiment in asked] if asked else []
    )


def typical_half(tables: Sequence[Table], cells: Sequence[Cell]) -> float | None:
    """The median half-width printed for the settings that cells belong to, in the unit of results; None for none."""
    halves = []
    for table in tables:
        own = {
            (c.setting, c.published_metric)
            for c in table.columns
            if any(matches(cell.config, c.where) for cell in cells)
        }
        halves += [p.half / table.scale for k, p in table.published.items() if k[1:] in own and p.half is not None]
    return statistics.median(halves) if halves else None
