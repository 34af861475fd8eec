"""A table filled with results: means, intervals, differences from published numbers and from a baseline."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metalearn.evaluation.metrics import TaskMean, metric_name
from metalearn.results import Result
from metalearn.schema import BadInput, nearest
from metalearn.statistics import (
    Components,
    Estimate,
    Paired,
    components,
    half_width,
    over_seeds,
    p_value,
    paired,
    summarized_components,
)
from metalearn.tables import footnotes
from metalearn.tables.definition import Column, Published, Row, Table
from metalearn.tables.selection import Chosen
from metalearn.tables.verdict import DIFFERS, REPRODUCED, UNDERPOWERED, Judged, judge

DIVERGED, MISSING, NOT_AVAILABLE, MEASURED = "diverged", "missing", "not available", "measured"
VERDICTS = (REPRODUCED, DIFFERS, UNDERPOWERED, DIVERGED, MISSING, NOT_AVAILABLE, MEASURED)
"""What a cell can be; MEASURED where there is no published number or no margin to compare with."""


class Comparison(NamedTuple):
    """Ours minus the baseline row's on the same episodes, in the published unit, or why it is not there."""

    difference: Paired | None
    p: float
    why_not: str | None = None


class Entry(NamedTuple):
    """One cell of a table; all numbers in the published unit.

    ours: mean over seeds with its interval (`interval`): over seeds where there are two, else over tasks, or over what
        else the result is a mean of, as trained networks.
    tasks: test tasks of a seed, or what else. seeds: finished without diverging; planned: how many there are to be.
    notes: footnotes. commands: what runs the missing ones. cell_ids: of `seeds`.
    """

    row: Row
    column: Column
    published: Published | None
    verdict: str
    detail: str
    ours: Estimate | None = None
    interval: str = ""
    tasks: int = 0
    seeds: tuple[int, ...] = ()
    planned: int = 0
    judged: Judged | None = None
    against: Comparison | None = None
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    cell_ids: tuple[str, ...] = ()


class Filled(NamedTuple):
    """A table with its entries, row by row.

    baseline: the label of a row. remarks: hold for all of it. command: runs what is missing and nothing else, unless
    the results are from elsewhere than where it looks for them.
    """

    table: Table
    entries: tuple[Entry, ...]
    baseline: str | None
    remarks: tuple[str, ...]
    command: str | None = None
    elsewhere: bool = False

    def counts(self, entries: Sequence[Entry] | None = None) -> dict[str, int]:
        """How many entries have each verdict, those without any left out."""
        found = Counter(e.verdict for e in (self.entries if entries is None else entries))
        return {v: found[v] for v in VERDICTS if found[v]}


def fill(table: Table, chosen: Mapping[tuple[int, int], Chosen], baseline: str | None = None) -> Filled:
    """Compare what was chosen for each cell with the published numbers, and with a baseline row.

    Args:
        table: the definition.
        chosen: `selection.select`.
        baseline: label or method of a row.

    Raises:
        BadInput: if there is no such row.
    """
    base = None if baseline is None else _row(table, baseline)
    entries = []
    for (i, j), cell in chosen.items():
        row, column = table.rows[i], table.columns[j]
        entry = _entry(table, row, column, cell)
        if base is not None and i != base and entry.ours is not None:
            entry = _beside(entry, table, column, cell, chosen[base, j], table.rows[base].label)
        entries.append(entry)
    used = [r for cell in chosen.values() for r in cell.results.values()]
    label = None if base is None else table.rows[base].label
    return Filled(table, tuple(entries), label, tuple(footnotes.provenance(used)))


def _row(table: Table, name: str) -> int:
    labels = [r.label for r in table.rows]
    if name in labels:
        return labels.index(name)
    fitting = [i for i, r in enumerate(table.rows) if name.lower() in (r.method.lower(), r.label.lower())]
    fitting = fitting or [i for i, r in enumerate(table.rows) if list(r.where.values()) == [name]]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise BadInput(f"--baseline {name}: must be one of {', '.join(labels[i] for i in fitting)}")
    raise BadInput(f"--baseline {name}: no such row, must be one of {', '.join(labels)}{nearest(name, labels)}")


# ---- one cell ----------------------------------------------------------------------------------------------------


def _entry(table: Table, row: Row, column: Column, cell: Chosen) -> Entry:
    published = table.printed(row, column)
    commands = tuple(shlex.join(["metalearn", *c.overrides]) for c in cell.missing)
    blank = Entry(row, column, published, MISSING, "", planned=cell.planned, commands=commands)
    if cell.reason is not None:
        return blank._replace(verdict=NOT_AVAILABLE, detail=cell.reason)
    if not cell.results:
        about = dict.fromkeys(": ".join(filter(None, (c.state, c.error))) for c in cell.missing if c.state != MISSING)
        return blank._replace(detail=", ".join(about))
    everything = list(cell.results.values())
    blank = blank._replace(notes=tuple(footnotes.of_cell(table, row, column, everything)))
    lost = [r for r in everything if r.diverged or (m := _metric(r, column)) is not None and m["mean"] is None]
    measured = [r for r in everything if r not in lost and _metric(r, column) is not None]
    unmeasured = len(everything) - len(lost) - len(measured)
    if not measured and not lost:
        return blank._replace(detail=f"no result has {_name(everything[0], column)}")
    entry = blank if not measured else _measured(blank, table, column, measured)
    entry = entry._replace(notes=(*entry.notes, *_incomplete(cell, len(lost), unmeasured)))
    if lost:
        return entry._replace(verdict=DIVERGED, detail=f"{len(lost)} of {len(everything)} seeds")
    return entry


def _measured(blank: Entry, table: Table, column: Column, results: list[Result]) -> Entry:
    """The entry with its mean, interval, and verdict."""
    spread = _components(results, column).scaled(table.scale)
    means = [table.scale * _metric(r, column)["mean"] for r in results]  # type: ignore[index]
    ours, kind = over_seeds(means), "seeds"
    if len(means) == 1:
        ours = Estimate(means[0], half_width(spread.parts()), spread.tasks)
        kind = (_metric(results[0], column) or {}).get("interval", "tasks")
    entry = blank._replace(
        ours=ours,
        interval=kind,
        tasks=spread.tasks,
        seeds=tuple(r.data["seed"] for r in results),
        cell_ids=tuple(r.data["cell_id"] for r in results),
        verdict=MEASURED,
        detail=_why_not_judged(blank.published, table),
    )
    if blank.published is None or blank.published.value is None:
        return entry
    judged = judge(spread, blank.published.value, blank.published.half, table.margin)
    notes = entry.notes
    if kind == "tasks":
        notes = (*notes, "one seed: how much seeds differ is not in the interval")
    if blank.published.half is None:
        notes = (*notes, "published without an interval and taken as exact: no test")
    entry = entry._replace(judged=judged, notes=notes)
    if judged.verdict is None:
        return entry
    return entry._replace(verdict=judged.verdict, detail=_detail(judged, table.higher_is_better))


def _why_not_judged(published: Published | None, table: Table) -> str:
    if published is None or not published.text:
        return "no published number"
    return "not a number" if published.value is None else "no margin" if table.margin is None else ""


def _detail(judged: Judged, higher_is_better: bool) -> str:
    if judged.verdict == DIFFERS:
        return "better" if (judged.difference > 0) == higher_is_better else "worse"
    needs = [f"{n:,} {what}" for n, what in ((judged.tasks, "episodes"), (judged.seeds, "seeds")) if n]
    return "needs " + " and ".join(needs) if needs else judged.reason or ""


def _incomplete(cell: Chosen, lost: int, unmeasured: int) -> list[str]:
    notes = []
    if cell.missing:
        states = Counter(c.state for c in cell.missing)
        about = ", ".join(f"{n} {state}" for state, n in states.items())
        notes.append(f"{len(cell.results)} of {cell.planned} planned seeds are finished ({about})")
    if lost:
        notes.append(f"{lost} of {len(cell.results)} seeds diverged and are not in the mean")
    if unmeasured:
        notes.append(f"{unmeasured} of {len(cell.results)} seeds did not measure this and are not in the mean")
    return notes


# ---- numbers of results ------------------------------------------------------------------------------------------


def _name(result: Result, column: Column) -> str:
    """The metric's name in result.json."""
    protocol, mode = result.data["protocol"], footnotes.mode_of(result, column)
    bn = None if mode == protocol["bn"] else mode
    step = None if column.step == protocol["test_steps"] else column.step
    return metric_name(column.metric, bn=bn, step=step, group=column.group)


def _metric(result: Result, column: Column) -> dict[str, Any] | None:
    """`mean, std, n` of what a column shows, from the episodes if result.json does not name it; None without either.

    The group of a study's column is the point that a metric belongs to, as its name has it (`mse_after@alpha=0.1`).
    """
    metrics = result.data["metrics"]
    named = metrics.get(_name(result, column), metrics.get(f"{column.metric}@{column.group}"))
    if named is None and not result.diverged and len(found := values(result, column)):
        return TaskMean(found).compute("")
    return named


def values(result: Result, column: Column) -> np.ndarray:
    """The per-episode values of what a column shows, in the order of the episodes; empty if they are not there."""
    rows = result.episodes(bn=footnotes.mode_of(result, column), step=column.step, group=column.group)
    return rows.loc[rows["metric"] == column.metric, "value"].to_numpy("f8")


def _components(results: list[Result], column: Column) -> Components:
    """Variances over seeds and tasks, from the episodes where all seeds have the same ones, else from the summaries."""
    each = [values(r, column) for r in results]
    shared = len(footnotes.episode_ids(results)) == 1
    summaries = [m for r in results if (m := _metric(r, column)) is not None]
    if shared and len({len(v) for v in each}) == 1 and len(each[0]) > 1 and np.isfinite(each).all():
        return components(np.stack(each))
    deviations = [math.nan if m["std"] is None else m["std"] for m in summaries]
    tasks = min(m["n"] for m in summaries)
    return summarized_components([m["mean"] for m in summaries], deviations, tasks, shared=shared)


# ---- beside a baseline -------------------------------------------------------------------------------------------


def _beside(entry: Entry, table: Table, column: Column, cell: Chosen, base: Chosen, label: str) -> Entry:
    """The entry with its paired difference from the baseline's cell."""
    against = _against(table, column, cell, base, label)
    ours = {footnotes.mode_of(r, column) for r in cell.results.values()}
    theirs = {footnotes.mode_of(r, column) for r in base.results.values()}
    notes = (f"beside {label}: not paired, {against.why_not}",) if against.why_not else ()
    if against.difference and ours != theirs:
        notes = (f"beside {label}: bn={'/'.join(sorted(ours))} against bn={'/'.join(sorted(theirs))}",)
    return entry._replace(against=against, notes=(*entry.notes, *notes))


def _against(table: Table, column: Column, cell: Chosen, base: Chosen, label: str) -> Comparison:
    ours, theirs = ([r for r in c.results.values() if not r.diverged] for c in (cell, base))
    if not theirs:
        return Comparison(None, math.nan, f"{label} has no result")
    if len(footnotes.episode_ids([*ours, *theirs])) > 1:
        return Comparison(None, math.nan, "other test episodes")
    mine, other = ({r.data["seed"]: table.scale * values(r, column) for r in rs} for rs in (ours, theirs))
    if any(len(v) == 0 for v in (*mine.values(), *other.values())):
        return Comparison(None, math.nan, "no values of single episodes")
    n = min(len(v) for v in (*mine.values(), *other.values()))  # equal ids mean equal episodes, index by index
    mine, other = ({s: v[:n] for s, v in each.items()} for each in (mine, other))
    difference = paired(mine, other)
    if difference is None:
        return Comparison(None, math.nan, "no common seed")
    spread = components(np.stack([mine[s] - other[s] for s in sorted(mine.keys() & other.keys())]))
    return Comparison(difference, p_value(spread.mean, spread.parts()))
