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
    from metalearn.results import Result, Stored
    from metalearn.shown import Shown

TITLE = "figures and claims of Unraveling MAML (adaptation learning rate), run from nothing"
DESCRIPTION = """Runs the experiments unravel/*, as far as they have no result yet, draws them, and lists each claim of
the paper with what was measured: minutes for those that train nothing, some twenty more for Figures 10 and 12 (or
--from docs/runs). Figure 3 needs the files of Omniglot (metalearn -m experiment=unravel/fig3 dataset.root=...) and is
drawn from results that are there."""
PAPER = "unravel"
INTRODUCTION = """What Zou, Liu & Li (ICLR 2022) derive and show of alpha*, the best inner rate, and what was measured.
`metalearn report unravel` runs and judges all of it, `metalearn -m experiment=unravel/<item>` one item (PNG and SVG),
with `size=paper` in the paper's full size. `metalearn alpha` is the tool for your own runs.

N tasks of K samples each have features Phi `[K, d]`, G = Phi^T Phi, and noise-free labels of optima a; w_m(alpha) is
MAML's minimiser with one inner step of rate alpha, and w_r = w_m(0) joint training's. The best rate of many tasks is

- alpha*_lim = K tr E[G^2] / (2 tr E[G^3]) (Theorem 1, eq. 3.3); with other samples to test on, Phi_t beside Phi_u,
  K tr E[G_u G_t] / (2 tr E[G_u G_t G_u]) (Corollary 2)
- H.14: the same of all N K samples' features Psi as one task; H.15: 1 / (2 N K sigma^2), sigma their deviation; H.18:
  1 / (2 min(N K, d) sigma^2), and the range of that for features in [0, 1]

F_t is the mean squared distance to new tasks' optima after t steps of gradient descent (Definition 1)."""


class Item(NamedTuple):
    """One experiment: its name, what it shows (None without results), and how many of its cells have no result."""

    name: str
    shown: Shown | None
    missing: int


def options(parser: argparse.ArgumentParser) -> None:
    """Which experiments, in which size, and where results lie."""
    parser.add_argument("--only", nargs="+", metavar="ID", help="as fig8 table2; default all")
    parser.add_argument("--size", metavar="NAME", help="paper for the paper's full sizes")
    parser.add_argument("--results", default="outputs", metavar="FOLDER", help="where results lie; default outputs")
    parser.add_argument(
        "--from", dest="stored", nargs="+", default=[], metavar="FOLDER", help="finished results, not run again"
    )
    parser.add_argument("--threads", type=whole(0), default=0, metavar="N", help="of each study; 0 (default): many")


def run(options: argparse.Namespace) -> Content:
    """Run what is missing, then draw and judge everything."""
    from metalearn.results import Stored, find

    stored = Stored(r for folder in options.stored for r in find(folder))
    items = [_item(name, options, stored) for name in _chosen(options.only, options.size)]
    data = {"items": [_record(item) for item in items]}
    figures = {k: f for item in items if item.shown for k, f in item.shown.figures.items()}
    parts = ["# Unraveling MAML via the adaptation learning rate", INTRODUCTION, _table(items), _count(items)]
    parts += [_section(item) for item in items if item.shown] + _missing(items)
    return Content("\n\n".join(parts), data, figures)


def _chosen(only: list[str] | None, size: str | None) -> list[str]:
    """Ids of the paper's experiments that show something, in the order of its figures.

    Raises:
        BadInput: for one that is not there, or a size that one of them does not have.
    """
    from metalearn import shown
    from metalearn.composing import members, preset
    from metalearn.schema import BadInput, nearest

    there = [m.partition("/")[2] for m in members("experiment") if m.startswith(f"{PAPER}/")]
    chosen = []
    for name in only or there:
        panels = [name] if name in there else [n for n in there if n[:-1] == name and n[-1].isalpha()]
        if not panels:
            raise BadInput(f"--only {name}: must be one of {', '.join(there)}{nearest(name, there)}")
        chosen += panels
    found = sorted((n for n in dict.fromkeys(chosen) if shown.module_of(f"{PAPER}/{n}")), key=_place)
    for name in found:
        if size is not None and size not in (sizes := preset(f"{PAPER}/{name}", "sizes") or {}):
            raise BadInput(f"--size {size}: {name} has {', '.join(sizes) or 'one size'}{nearest(size, list(sizes))}")
    return found


def _place(name: str) -> tuple[str, int, str]:
    """Where an id comes in order: fig2 before fig10a."""
    kind, number, panel = re.fullmatch(r"([a-z]+)(\d*)(\w*)", name).groups()  # type: ignore[union-attr]
    return kind, int(number or 0), panel


def _item(name: str, options: argparse.Namespace, stored: Stored) -> Item:
    from metalearn import cli, shown
    from metalearn.schema import BadInput, is_study

    experiment = f"{PAPER}/{name}"
    words = [f"experiment={experiment}", f"output_dir={options.results}", "logger=none"]
    words += [f"size={options.size}"] if options.size else []
    found = cells_of(words)
    if is_study(found[0].config):
        found = cells_of([*words, f"seed={options.seed}", f"study.threads={options.threads}"])
    wanting = [c for c in found if c.problem is None and _result(c, stored) is None]
    if wanting:
        print(f"{experiment}: running {len(wanting)} cells", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(sys.stderr):
            cli.work([c.overrides for c in wanting], [])
    results = [r for c in found if (r := _result(c, stored)) is not None]
    module = shown.module_of(experiment)
    try:
        content = shown.show(experiment, module, results) if module and results else None
    except KeyError as error:  # a result without a number that is looked for
        raise BadInput(f"{experiment}: {error.args[0]}; run it again with rerun=true") from None
    return Item(name, content, len(found) - len(results))


def cells_of(words: list[str]) -> list[Cell]:
    """The cells of an experiment, those that cannot be run here with their reason."""
    from metalearn import cells

    return cells.expand(words, tolerant=True)


def _result(cell: Cell, stored: Stored) -> Result | None:
    """The result of a cell under `--results`, or a stored one."""
    from metalearn.ledger import CellDir
    from metalearn.results import Result

    directory = CellDir(cell.config["output_dir"], cell.cell_id)
    if cell.problem is None and (data := directory.result) is not None:
        return Result(directory.path, data)
    return stored.of(cell.config)


def _table(items: list[Item]) -> str:
    from metalearn.shown import OURS, VERDICTS

    rows = [
        [
            word.replace("|", "\\|")
            for word in (item.name, f.claim + OURS * f.ours, f.criterion, f.measured, VERDICTS[f.holds])
        ]
        for item in items
        if item.shown
        for f in item.shown.findings
    ]
    columns = ["item", "claim", "criterion", "measured", "verdict"]
    return table(columns, rows, left=range(len(columns)), padded=False) if rows else "Nothing has a result yet."


def _count(items: list[Item]) -> str:
    found = [f for item in items if item.shown for f in item.shown.findings]
    counts = []
    for whose, own in (("The paper's", False), ("Our further", True)):
        verdicts = [f.holds for f in found if f.ours == own]
        counts.append(
            f"{whose} claims: {verdicts.count(True)} of {len(verdicts)} hold as judged, {verdicts.count(False)} do not,"
            f" {verdicts.count(None)} undecided."
        )
    return " ".join([*counts, "Ours are second readings of the paper's, or the same with other constants."])


def _section(item: Item) -> str:
    """Pictures and remarks of one experiment."""
    assert item.shown is not None
    title, figures = item.shown.title, item.shown.figures
    parts = [f"## {title}", f"`metalearn -m experiment={PAPER}/{item.name}`"]
    parts += [f"![{title}]({name}.png)" for name in figures]
    lines = [f"- {note}" for note in item.shown.notes]
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
