"""What a sweep would cost and show, as plain data: from its cells and what was measured on them. Imports no torch."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metalearn.bench.report import BUSY
from metalearn.cells import Cell
from metalearn.ledger import CellDir, Checkpoints, trained_by
from metalearn.results import Result
from metalearn.sweep import power
from metalearn.sweep.calibrate import Book, Measured
from metalearn.sweep.layout import between, count
from metalearn.sweep.printed import tables_of, typical_half
from metalearn.sweep.schedule import Job, course
from metalearn.sweep.speed import Group, groups
from metalearn.sweeper import unfinished


class Work(NamedTuple):
    """The cells of a sweep by what is left to do: cannot be run here, finished, to run, and trained before these."""

    cannot: list[Cell]
    finished: list[Cell]
    pending: list[Cell]
    needed: list[Cell]


def work_of(cells: Sequence[Cell]) -> Work:
    """Sort cells; of needed trainings each counts once, and those that are there not at all."""
    cannot = [c for c in cells if c.problem]
    good = [c for c in cells if not c.problem]
    pending = unfinished(good)
    needed: dict[str, Cell] = {}
    queue = list(pending)
    while queue:
        for need in queue.pop().needs:
            if isinstance(need, Cell) and need.train_id not in needed and not _trained(need):
                needed[need.train_id] = need
                queue.append(need)
    return Work(cannot, [c for c in good if c not in pending], pending, list(needed.values()))


def _trained(cell: Cell) -> bool:
    return trained_by(cell.config["output_dir"], cell.train_id) is not None


def forecast(cells: Sequence[Cell], book: Book, *, width: int) -> dict[str, Any]:
    """Everything that is printed, as JSON.

    Args:
        cells: of the sweep, those that cannot be run here included.
        book: of measurements.
        width: cells that run at once.
    """
    work = work_of(cells)
    kinds = groups([*work.pending, *work.finished, *work.needed])
    active = {id(c) for c in (*work.pending, *work.needed)}
    known: dict[str, Measured] = {}
    to_measure = [g for g in kinds if any(id(c) in active for c in g.cells)]
    for i, group in enumerate(to_measure):
        known[group.key] = book.of(group, lambda label, i=i: _say(f"measuring {i + 1}/{len(to_measure)}: {label}"))  # type: ignore[misc]
    of_cell = {id(c): known[g.key] for g in to_measure for c in g.cells}
    rows = [_group(g, known.get(g.key), work) for g in kinds]
    return {
        "cells": len(cells),
        "finished": len(work.finished),
        "to_run": len(work.pending),
        "trained_first": len(work.needed),
        "cannot_run": _reasons(work.cannot),
        "groups": rows,
        "total": _total(work, of_cell, width, book.folder.parent),
        "differences": [_as_json(s) for s in _differences(cells, work, known, to_measure, book)],
        "notes": _notes(work, [known[g.key] for g in to_measure], book, width),
        "runs": [_run(c, of_cell[id(c)]) for c in work.pending],
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _reasons(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Why cells cannot be run here, with how many."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        found.setdefault(str(cell.problem), []).append(" ".join(cell.overrides))
    return [{"reason": reason, "cells": len(which), "first": which[0]} for reason, which in found.items()]


# ---- costs -------------------------------------------------------------------------------------------------------


def job_of(cell: Cell, measured: Measured) -> Job:
    """Seconds of a cell, less what an earlier attempt has done."""
    speed = measured.speed
    assert speed is not None
    begun = Checkpoints(CellDir(cell.config["output_dir"], cell.cell_id).path / "checkpoints").generations("last")
    training = speed.training(cell.config, begun[0]["step"] if begun and not cell.config["rerun"] else 0)
    needs = tuple(n.train_id for n in cell.needs if isinstance(n, Cell))
    return Job(cell.train_id, speed.start + speed.once, training, speed.setup + speed.testing(cell.config), needs)


def _run(cell: Cell, measured: Measured) -> dict[str, Any]:
    about = {"cell_id": cell.cell_id, "overrides": " ".join(cell.overrides)}
    if measured.speed is None:
        return about | {"seconds": None, "disk": None}
    job = job_of(cell, measured)
    seconds = job.start + job.testing + (0.0 if _trained(cell) else job.training)
    return about | {"seconds": round(seconds, 3), "disk": round(measured.speed.disk(cell.config))}


def _group(group: Group, measured: Measured | None, work: Work) -> dict[str, Any]:
    """What is printed of a group."""
    own = {id(c) for c in group.cells}
    pending, needed = ([c for c in part if id(c) in own] for part in (work.pending, work.needed))
    took = [r["seconds"] for c in work.finished if id(c) in own and (r := _result(c)) is not None]
    row: dict[str, Any] = {
        "label": group.label,
        "cells": len(group.cells) - len(needed),
        "to_run": len(pending),
        "trained_first": len(needed),
        "finished_took": statistics.median(took) if took else None,
    }
    if measured is None or measured.speed is None:
        return row | {"measured": None, "reason": measured.reason if measured else None}
    runs = [_run(c, measured) for c in (*pending, *needed)]
    seconds = [r["seconds"] for r in runs]
    about = {k: v for k, v in measured.about.items() if k in ("host", "device", "date", "load", "others", "counts")}
    return row | {
        "measured": measured.speed.__dict__ | about | {"cached": measured.cached},
        "reason": measured.reason,
        "seconds": [min(seconds), max(seconds)],
        "disk": max(r["disk"] for r in runs),
    }


def _result(cell: Cell) -> dict[str, Any] | None:
    return CellDir(cell.config["output_dir"], cell.cell_id).result


def _total(work: Work, of_cell: dict[int, Measured], width: int, place: Path) -> dict[str, Any]:
    """Sums over the cells whose cost is known; a cell that starts from one whose cost is not is left out, too."""
    speeds = {id(c): m.speed for c in (*work.pending, *work.needed) if (m := of_cell[id(c)]).speed is not None}
    needed = {c.train_id: job_of(c, of_cell[id(c)]) for c in work.needed if id(c) in speeds}
    there = {n.train_id for c in (*work.pending, *work.needed) for n in c.needs if isinstance(n, Cell) and _trained(n)}

    def whole_cost(cell: Cell) -> bool:
        needs = [n.train_id for n in cell.needs if isinstance(n, Cell)]
        return id(cell) in speeds and all(n in needed or n in there for n in needs)

    counted = [c for c in work.pending if whole_cost(c)]
    jobs = [job_of(c, of_cell[id(c)]) for c in counted]
    trained = [*there, *(c.train_id for c in counted if _trained(c))]
    found = course(jobs, needed, width, trained)
    alone = course(jobs, needed, 1, trained)
    costs = [(s, c.config) for c in (*counted, *work.needed) if (s := speeds.get(id(c))) is not None]
    weights = [s.start + s.once + s.training(c) + s.setup + s.testing(c) for s, c in costs]
    cores = sum(w * s.cores for w, (s, _) in zip(weights, costs, strict=True)) / (sum(weights) or 1.0)
    memory = sorted((s.memory for s, _ in costs), reverse=True)
    gpu = [s.gpu for s, _ in costs if s.gpu is not None]
    return {
        "width": width,
        "counted": len(counted),
        "unknown": len(work.pending) - len(counted),
        "wall": found.wall,
        "wall_one_at_a_time": alone.wall,
        "cpu": found.work * cores,
        "memory": memory[0] if memory else None,
        "memory_at_width": sum(memory[:width]) if memory else None,
        "gpu": max(gpu) if gpu else None,
        "disk": sum(s.disk(c) for s, c in costs),
        "free": shutil.disk_usage(next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())).free,
        "place": str(place),
    }


# ---- what it can show --------------------------------------------------------------------------------------------


def _differences(
    cells: Sequence[Cell], work: Work, known: dict[str, Measured], kinds: Sequence[Group], book: Book
) -> list[power.Shown]:
    """For each set of test episodes, from finished results if they tell of two methods, else from the calibration."""
    found, tables = [], tables_of(cells, book.config_dirs)
    for own in power.by_setting([c for c in cells if not c.problem]).values():
        ids = {id(c) for c in own}
        finished = [c for c in work.finished if id(c) in ids]
        results = [Result(CellDir(c.config["output_dir"], c.cell_id).path, r) for c in finished if (r := _result(c))]
        done = list(power.scores(results).values())
        tried = [known[g.key] for g in kinds if id(g.cells[0]) in ids and known[g.key].speed is not None]
        tried = [m for m in tried if len(m.about["values"]) >= power.LEAST]
        models: list[power.Scores] = [{0: np.asarray(m.about["values"])} for m in tried]
        finished_ones = f"finished results ({count(len(results), 'run')})"
        methods, source = (models, _calibrated(tried))
        if min(2, len(done)) >= min(2, len(models)):
            methods, source = list(done), finished_ones
        if methods:
            found.append(_shown(own, methods, source, results, tried, typical_half(tables, own)))
    return found


def _shown(
    own: Sequence[Cell],
    methods: list[Any],
    source: str,
    results: Sequence[Result],
    tried: Sequence[Measured],
    half: float | None,
) -> power.Shown:
    metrics = [next(n for n in r.data["metrics"] if "@" not in n) for r in results if r.data["metrics"]]
    seeds: dict[str, set[int]] = {}
    for cell in own:
        seeds.setdefault(power.method(cell.config), set()).add(cell.config["seed"])
    return power.shown(
        power.setting(own[0]),
        (metrics or [m.about["metric"] for m in tried])[0],
        methods,
        episodes=min(c.config["trainer"]["test_episodes"] for c in own),
        seeds=min(map(len, seeds.values())),
        half=half,
        source=source,
    )


def _calibrated(tried: Sequence[Measured]) -> str:
    if not tried:
        return ""
    steps = [2 * m.about["counts"]["half"] for m in tried]
    episodes = min(m.about["counts"]["test"] for m in tried)
    return f"calibration ({between(steps, 'd')} meta-steps, {episodes} episodes)"


def _as_json(shown: power.Shown) -> dict[str, Any]:
    return {k: v._asdict() if isinstance(v, power.Range) else v for k, v in shown._asdict().items()}


# ---- assumptions ------------------------------------------------------------------------------------------------


def _notes(work: Work, measured: Sequence[Measured], book: Book, width: int) -> list[str]:
    """What the numbers assume."""
    known = [m for m in measured if m.speed is not None]
    if not known:
        return []
    devices = ", ".join(dict.fromkeys(f"{m.about['device']} of {m.about['host']}" for m in known))
    dates = sorted(m.about["date"] for m in known)
    loads, others = ([m.about[k] for m in known] for k in ("load", "others"))
    notes = [
        f"measured on {devices}, {dates[0]}" + (f" to {dates[-1]}" if dates[-1] != dates[0] else ""),
        f"meanwhile the load average was {between(loads)} and other work took {between(others)} of "
        f"{book.machine['cores']} cores",
        "not in these times: first use of data (unpacking, caches) and the first compilation of kernels",
    ]
    if max(others) > BUSY:
        notes.append(
            "times are those of a machine that is as busy; with cores to themselves, cells one at a time would need no "
            "more than the CPU time"
        )
    if any(c.config["logger"]["name"] != "none" for c in work.pending):
        notes.append("measured without a logger: the time and the files of W&B or csv come on top")
    if width > 1:
        notes.append(f"wall time at width {width} is that of places with cores of their own, as they were here")
    if book.changed:
        notes.append("the checkout has changes that are not committed; --calibrate measures again")
    return notes
