"""`metalearn sweep status`: where each cell of a sweep stands, and why some are not done. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from metalearn.options import Parser, read_cells
from metalearn.schema import BadInput
from metalearn.schema.keys import nearest
from metalearn.sweep.launch import counts
from metalearn.sweep.standing import STATES, Standing, duration, standings

TITLE = "which cells are done, running, queued, killed, failed, diverged or missing, and why"
DESCRIPTION = f"""{TITLE}.

  metalearn sweep status experiment=<paper>/<id> [key=value ...]

Told from the cells' files (heartbeat, result) and the queue, so any process on any node may have run them. Exit code 0
if all cells have a result, 1 if not."""


def main(arguments: Sequence[str]) -> int:
    """Print the standings."""
    p = Parser("sweep status", DESCRIPTION)
    p.take_cells()
    p.add_argument("--format", choices=("terminal", "json"), default="terminal", help="default terminal")
    p.add_argument("--state", metavar="STATE,...", help="show only cells in these states")
    options = p.parse_intermixed_args(list(arguments))
    wanted = STATES if options.state is None else options.state.split(",")
    for state in wanted:
        if state not in STATES:
            raise BadInput(f"sweep status: --state {state}: must be one of {', '.join(STATES)}{nearest(state, STATES)}")
    found = standings(read_cells(options))
    shown = [s for s in found if s.state in wanted]
    print(json.dumps([as_json(s) for s in shown], indent=1) if options.format == "json" else table(shown, found))
    return 0 if all(s.finished for s in found) else 1


def as_json(s: Standing) -> dict[str, Any]:
    """A standing as plain data."""
    about = {"cell_id": s.cell.cell_id if s.cell.problem is None else None, "overrides": list(s.cell.overrides)}
    rest = {k: v for k, v in s._asdict().items() if k != "cell"}
    return about | rest


def table(shown: Sequence[Standing], found: Sequence[Standing]) -> str:
    """One line a cell, named by what varies in the sweep, and the counts."""
    common = set.intersection(*(set(s.cell.overrides) for s in found)) if len(found) > 1 else set()
    rows = [("cell", "state", "step", "attempt", "time", "")]
    for s in shown:
        time = "" if s.seconds is None else duration(s.seconds)
        differs = " ".join(o for o in s.cell.overrides if o not in common)
        cell_id = s.cell.cell_id if s.state != "impossible" else "-"
        if s.why and s.under_way:
            differs += f"  ({s.why})"
        rows.append((cell_id, s.state, f"{s.step}/{s.steps}", str(s.attempt or "-"), time, differs))
        if s.why and not s.under_way:
            rows.append(("", "", "", "", "", "  " + " ".join(s.why.split())[:300]))
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(r[:5], widths, strict=True)), r[5]]).rstrip() for r in rows]
    if common:
        lines.insert(0, "all: " + " ".join(o for o in found[0].cell.overrides if o in common))
    return "\n".join([*lines, counts(found)])
