"""Report: every figure and table of "Unraveling MAML via the Adaptation Learning Rate", and which claims hold."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from metalearn.options import whole
from metalearn.reports import Content, table

if TYPE_CHECKING:
    from metalearn.cells import Cell
    from metalearn.shown import Shown

TITLE = "figures and claims of Unraveling MAML (adaptation learning rate), run from nothing"
DESCRIPTION = """Runs the experiments unravel/* that are studies, as far as they have no result yet, draws them, and
lists each claim of the paper with what was measured. Experiments that train networks are only drawn from results that
are there; --train runs them, too (hours on a CPU)."""
PAPER = "unravel"
INTRODUCTION = """What Zou, Liu & Li (ICLR 2022) derive and show of alpha*, the best inner rate, and what was measured.
`metalearn -m experiment=unravel/<item>` runs one item and draws it (PNG and SVG), with `size=paper` in the paper's full
size; `metalearn report unravel` runs all that train nothing, and judges what there is of the others. `metalearn alpha`
is the tool for your own runs."""


class Item(NamedTuple):
    """One experiment: its name, what it shows (None without results), and how many of its cells have no result."""

    name: str
    shown: Shown | None
    missing: int


def options(parser: argparse.ArgumentParser) -> None:
    """Which experiments, in which size, and where results lie."""
    parser.add_argument("--only", nargs="+", metavar="ID", help="as fig8 table2; default all")
    parser.add_argument("--size", metavar="NAME", help="paper for the paper's full sizes, where they differ")
    parser.add_argument("--train", action="store_true", help="also run the experiments that train networks")
    parser.add_argument("--results", default="outputs", metavar="FOLDER", help="where results lie; default outputs")
    parser.add_argument("--threads", type=whole(0), default=0, metavar="N", help="of each study; 0 (default): many")


def run(options: argparse.Namespace) -> Content:
    """Run what is missing, then draw and judge everything."""
    items = [_item(name, options) for name in _chosen(options.only)]
    data = {"items": [_record(item) for item in items]}
    figures = {k: f for item in items if item.shown for k, f in item.shown.figures.items()}
    parts = ["# Unraveling MAML via the adaptation learning rate", INTRODUCTION, _table(items), _count(items)]
    parts += [_section(item) for item in items if item.shown] + _missing(items)
    return Content("\n\n".join(parts), data, figures)


def _chosen(only: list[str] | None) -> list[str]:
    """Ids of the paper's experiments that show something, in the order of its figures.

    Raises:
        BadInput: for one that is not there.
    """
    from metalearn import shown
    from metalearn.composing import members
    from metalearn.schema import BadInput, nearest

    there = [m.partition("/")[2] for m in members("experiment") if m.startswith(f"{PAPER}/")]
    for name in only or ():
        if name not in there:
            raise BadInput(f"--only {name}: must be one of {', '.join(there)}{nearest(name, there)}")
    return sorted((n for n in only or there if shown.module_of(f"{PAPER}/{n}")), key=_place)


def _place(name: str) -> tuple[str, int, str]:
    """Where an id comes in order: fig2 before fig10a."""
    kind, number, panel = re.fullmatch(r"([a-z]+)(\d*)(\w*)", name).groups()  # type: ignore[union-attr]
    return kind, int(number or 0), panel


def _item(name: str, options: argparse.Namespace) -> Item:
    from metalearn import cli, composing, shown
    from metalearn.ledger import CellDir
    from metalearn.results import Result
    from metalearn.schema import is_study

    experiment = f"{PAPER}/{name}"
    words = [f"experiment={experiment}", f"output_dir={options.results}", "logger=none"]
    if options.size in (composing.preset(experiment, "sizes") or {}):
        words.append(f"size={options.size}")
    found = cells_of(words)
    studies = is_study(found[0].config)
    if studies:
        found = cells_of([*words, f"seed={options.seed}", f"study.threads={options.threads}"])
    runnable = [c for c in found if c.problem is None]
    if (studies or options.train) and any(_result(c) is None for c in runnable):
        print(f"{experiment}: running", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(sys.stderr):
            cli.work([c.overrides for c in runnable], [])
    directories = [CellDir(c.config["output_dir"], c.cell_id) for c in runnable]
    results = [Result(d.path, data) for d in directories if (data := d.result) is not None]
    module = shown.module_of(experiment)
    content = shown.show(experiment, module, results) if module and results else None
    return Item(name, content, len(found) - len(results))


def cells_of(words: list[str]) -> list[Cell]:
    """The cells of an experiment, those that cannot be run here with their reason."""
    from metalearn import cells

    return cells.expand(words, tolerant=True)


def _result(cell: Cell) -> dict[str, Any] | None:
    from metalearn.ledger import CellDir

    return CellDir(cell.config["output_dir"], cell.cell_id).result


def _table(items: list[Item]) -> str:
    from metalearn.shown import VERDICTS

    rows = [
        [word.replace("|", "\\|") for word in (item.name, f.claim, f.criterion, f.measured, VERDICTS[f.holds])]
        for item in items
        if item.shown
        for f in item.shown.findings
    ]
    columns = ["item", "claim", "criterion", "measured", "verdict"]
    return table(columns, rows, left=range(len(columns))) if rows else "Nothing has a result yet."


def _count(items: list[Item]) -> str:
    verdicts = [f.holds for item in items if item.shown for f in item.shown.findings]
    return (
        f"{verdicts.count(True)} of {len(verdicts)} claims hold as judged, {verdicts.count(False)} do not, "
        f"{verdicts.count(None)} are undecided. Some claims are ours: a second reading of the paper's, or the same "
        "with other constants, beside its own."
    )


def _section(item: Item) -> str:
    """Pictures and remarks of one experiment."""
    assert item.shown is not None
    title, figures = item.shown.title, item.shown.figures
    parts = [f"## {title}", f"`metalearn -m experiment={PAPER}/{item.name}`"]
    parts += [f"![{title}]({name}.png)" for name in figures]
    lines = [f"- {note[0].upper()}{note[1:]}" for note in item.shown.notes]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def _missing(items: list[Item]) -> list[str]:
    lines = [
        f"- {item.name}: {f'{item.missing} cells have no result' if item.shown else 'not run'}: "
        f"metalearn -m experiment={PAPER}/{item.name}"
        for item in items
        if item.missing
    ]
    return ["## Not run", "\n".join(lines)] if lines else []


def _record(item: Item) -> dict[str, Any]:
    from metalearn.shown import finding_record

    findings = [finding_record(f) for f in item.shown.findings] if item.shown else []
    notes = list(item.shown.notes) if item.shown else []
    return {"item": item.name, "findings": findings, "notes": notes, "missing": item.missing}
