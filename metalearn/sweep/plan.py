"""`metalearn sweep plan`: what a sweep costs and what it can show, before it is started. Imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from metalearn.cells import Cell
from metalearn.options import Parser, config_dirs, read_cells, refuse_place, whole
from metalearn.schema import BadInput, is_study
from metalearn.sweep.calibrate import Book
from metalearn.sweep.forecast import forecast
from metalearn.sweep.layout import aligned, count, roughly, size

TITLE = "what a sweep would cost (time, memory, disk) and the smallest differences that it could show"
DESCRIPTION = """Plan a sweep before it is started: cells, time, memory, disk, and what its episodes and seeds can show.

  metalearn sweep plan experiment=<paper>/<id> [key=value] ...     or groups and keys as after metalearn -m

Cells that differ in nothing but seeds, learning rates and the like are equally fast. One of each kind is run shortened,
in a process and a folder of its own, and what was measured is kept in <output_dir>/plan/ for the next time (by machine,
threads and commit). Nothing else is written; run it where the sweep will run."""


def parser() -> Parser:
    """The action's options."""
    p = Parser("sweep plan", DESCRIPTION)
    p.take_cells()
    p.add_argument("--width", type=whole(1), default=1, metavar="N", help="cells that run at once; default 1")
    p.add_argument(
        "--seconds", type=whole(1), default=20, metavar="S", help="of measuring for each kind of cell; default 20"
    )
    p.add_argument(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="measure again what has been measured, or nothing at all; default: what has not been measured",
    )
    p.add_argument("--format", choices=("terminal", "json"), default="terminal", help="default terminal")
    return p


def main(arguments: Sequence[str]) -> int:
    """Run the action and return the exit code."""
    options = parser().parse_intermixed_args(list(arguments))
    cells = _trained(read_cells(options))
    keep, measures = options.calibrate is not True, options.calibrate is not False
    if measures:
        refuse_place(cells[0].config["output_dir"])
    book = Book(
        cells[0].config["output_dir"], config_dirs(options), seconds=options.seconds, keep=keep, measures=measures
    )
    found = forecast(cells, book, width=options.width)
    print(json.dumps(found, indent=1, allow_nan=False) if options.format == "json" else text(found))
    return 0


def _trained(cells: list[Cell]) -> list[Cell]:
    """The cells that train; a study's cost cannot be read from a short part of it."""
    kept = [c for c in cells if not is_study(c.config)]
    if not kept:
        raise BadInput(
            f"sweep plan: study={cells[0].config['study']['name']} trains nothing that a short part could time"
        )
    if len(kept) < len(cells):
        print(f"metalearn: left out: {len(cells) - len(kept)} studies, which train nothing", file=sys.stderr)
    return kept


def text(found: dict[str, Any]) -> str:
    """The plan for the terminal."""
    head = f"{found['cells']} cells: {found['finished']} finished, {found['to_run']} to run"
    if found["trained_first"]:
        head += f" ({count(found['trained_first'], 'training')} first, which they start from)"
    cannot = sum(r["cells"] for r in found["cannot_run"])
    lines = [head + (f", {cannot} that cannot be run here" if cannot else "")]
    for r in found["cannot_run"]:
        lines += [f"  {count(r['cells'], 'cell')}: {r['reason']}", f"    first: {r['first']}"]
    if found["groups"]:
        lines += ["", *_group_lines(found["groups"])]
    if found["total"]["counted"]:
        lines += ["", *_total_lines(found["total"], found["trained_first"])]
    if found["differences"]:
        lines += ["", *_difference_lines(found["differences"])]
    if found["notes"]:
        lines += ["", "notes", *(f"- {note}" for note in found["notes"])]
    return "\n".join(lines)


def _group_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = ("cells that are equally fast", "cells", "to run", "start", "meta-step", "val ep.", "test ep.", "a cell")
    table: list[tuple[str, ...]] = [(*head, "finished took", "memory", "disk")]
    for row in rows:
        label = row["label"] + (f" (first, {row['trained_first']})" if row["trained_first"] else "")
        counts = (label, str(row["cells"]), str(row["to_run"]))
        took = roughly(row["finished_took"])
        if (m := row["measured"]) is None:
            table.append((*counts, *["-"] * 5, took, "-", "-"))
            continue
        low, high = (roughly(s) for s in row["seconds"])
        parts = [roughly(m["start"] + m["once"] + m["setup"]), *(roughly(m[k]) for k in ("step", "validation", "test"))]
        memory = size(m["memory"]) + (f", GPU {size(m['gpu'])}" if m["gpu"] is not None else "")
        cell = low if low == high else f"{low} - {high}"
        table.append((*counts, *parts, cell, took, memory, size(row["disk"])))
    failed = [f"  {row['label']}: {row['reason']}" for row in rows if row["reason"]]
    return [*aligned(table), *failed]


def _total_lines(total: dict[str, Any], first: int) -> list[str]:
    width = total["width"]
    cells = count(total["counted"], "cell") + (f" and {count(first, 'training')} before" if first else "")
    lines = [f"in total, {cells}" + (f", without {total['unknown']} of unknown cost" if total["unknown"] else "")]
    wall = f"{roughly(total['wall'])} at width {width}"
    if width > 1:
        wall += f", {roughly(total['wall_one_at_a_time'])} one at a time"
    rows = [("  wall time", wall), ("  CPU time", roughly(total["cpu"]))]
    memory = f"{size(total['memory'])} the largest cell"
    if width > 1:
        memory += f", {size(total['memory_at_width'])} the {width} largest together"
    rows.append(("  memory", memory))
    if total["gpu"] is not None:
        rows.append(("  GPU memory", f"{size(total['gpu'])} the largest cell"))
    short = "  MORE THAN IS FREE" if total["disk"] > total["free"] else ""
    rows.append(("  disk", f"{size(total['disk'])}; {size(total['free'])} free in {total['place']}{short}"))
    return [*lines, *aligned(rows)]


def _difference_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "smallest true difference that is found with a probability of 80 % (two-sided tests at 5 %)",
        "  over tasks: for fixed models, on other test episodes; over seeds: for other trainings, on these episodes",
    ]
    rows: list[tuple[str, ...]] = [
        ("  test episodes", "metric", "what varies", "two methods, paired", "against a published value", "spread from")
    ]
    for s in found:
        tasks = f"{s['episodes']} tasks"
        single = f"{_spread(s['published'])} if exact"
        if s["printed"] is not None:
            single = f"{_spread(s['printed'])} (printed +- {s['half']:.4g}), {single}"
        pair = _spread(s["paired"]) if s["paired"] else "not known of one method"
        rows.append((f"  {s['setting']}", s["metric"], tasks, pair, single, s["source"]))
        if s["seeds"] < 2:
            unknown = "one seed tells nothing of others"
        else:
            unknown = "not known: needs finished results of two seeds"
        values = [_spread(s[k]) if s[k] else unknown for k in ("over_seeds", "published_over_seeds")]
        rows.append(("", "", count(s["seeds"], "seed"), *values, s["source"] if s["over_seeds"] else ""))
    return [*lines, *aligned(rows, left=range(6))]


def _spread(r: dict[str, float]) -> str:
    """A median with its ends, if they differ in what is shown."""
    low, middle, high = (f"{r[k]:.3g}" for k in ("low", "median", "high"))
    return middle if low == high else f"{middle} ({low} - {high})"
