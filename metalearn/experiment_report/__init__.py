"""`metalearn report key=value ...`: one HTML file about an experiment, readable without a network. Imports no torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from metalearn.cells import chosen
from metalearn.experiment_report import sections
from metalearn.experiment_report.page import Piece, page, tag
from metalearn.figures import axes
from metalearn.figures.command import file_name
from metalearn.figures.series import title as settings
from metalearn.figures.series import unique
from metalearn.ledger import write_atomically
from metalearn.options import Parser, config_dirs
from metalearn.paths import conf_dir
from metalearn.schema import BadInput
from metalearn.selection import Entry, experiments_of, select

DESCRIPTION = """One HTML file about an experiment or a sweep, with nothing outside it: how far cells are, tables beside
published numbers, figures over each swept key, adaptation and validation curves, protocol, environment, failures.

  metalearn report experiment=<paper>/<id>
  metalearn report algorithm=maml,anil algorithm.alpha=0.1,0.4 seed=0,1,2 dataset=glyphs
  metalearn report --from docs/runs/group_regression

(`metalearn report NAME` is something else: a study of what papers prove; `metalearn report` lists these.)
"""
FOLDER = Path("outputs/reports")


def parser() -> Parser:
    """The options of an experiment's report."""
    p = Parser("report", DESCRIPTION)
    p.take_cells()
    p.add_argument("--from", dest="place", metavar="FOLDER", help="take results from there; keys choose among them")
    p.add_argument("--output", metavar="FILE.html", help=f"default in {FOLDER}/; replaced if it is there")
    return p


def main(arguments: Sequence[str]) -> int:
    """Write the report; 0 whatever it says."""
    o = parser().parse_intermixed_args(list(arguments))
    if not o.overrides and o.place is None:
        raise BadInput("report: name an experiment or keys, or a folder of results (--from)")
    folders = config_dirs(o)
    entries = unique(select(o.overrides, folders, o.place))
    names = list(experiments_of(entries)) or [str(v) for v in chosen(o.overrides).get("experiment", [])]
    path = Path(o.output) if o.output else FOLDER / f"{file_name(','.join(names) or o.place or 'sweep')}.html"
    if path.suffix != ".html":
        raise BadInput(f"report: --output {path}: must end in .html")
    text = report(entries, names, overrides=o.overrides, place=o.place, folders=folders, command=arguments)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise BadInput(
            f"report: --output {path}: {error.strerror}; name a file in a folder that can be written"
        ) from None
    print(f"{len(entries)} cells: " + ", ".join(f"{n} {s}" for s, n in sections.count(entries)))
    print(f"file: {path}", file=sys.stderr)
    return 0


def report(
    entries: Sequence[Entry],
    experiments: Sequence[str] = (),
    *,
    overrides: Sequence[str] = (),
    place: str | None = None,
    folders: Sequence[str] = (),
    command: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        entries: cells and what there is of them.
        experiments: their names, for title, comments and tables.
        overrides: what chose the entries.
        place: the folder that results were taken from, if one was named.
        folders: further folders with groups and tables.
        command: the arguments of this report, to be printed.
    """
    found = sections.finished(entries)
    about = settings(found) if found else "no results yet"
    title = ", ".join(experiments) or place or about
    run = None if place is not None else shlex.join(["metalearn", "sweep", "run", *overrides])
    parts = [
        ("Status", sections.status(entries, run)),
        ("Claims", sections.claims(entries, experiments, folders)),
        ("Tables", sections.published(experiments, overrides, place, folders)),
        ("Measured", sections.measured(entries)),
        ("Figures", sections.figures(entries, about)),
        ("Adaptation", sections.curves(entries, axes.STEP, about)),
        ("Validation", sections.curves(entries, axes.META_STEP, about)),
        ("Protocol", sections.protocol(entries)),
        ("Environment", sections.environment(entries)),
        ("Failures", sections.failures(entries)),
        ("Cells", sections.cells(entries)),
    ]
    head = [*_comments(experiments, folders), *_commands(overrides, place, command), tag("p", about)]
    return page(title, head, [(name, pieces) for name, pieces in parts if pieces])


def _commands(overrides: Sequence[str], place: str | None, command: Sequence[str]) -> list[Piece]:
    lines = [] if place is not None else [shlex.join(["metalearn", "-m", *overrides])]
    lines += [shlex.join(["metalearn", "report", *command])] if command else []
    return [tag("pre", "\n".join(lines)), tag("p", f"Made by metalearn {version('metalearn')}.")]


def _comments(experiments: Sequence[str], folders: Sequence[str]) -> list[Piece]:
    """What the experiments' files say of themselves."""
    pieces: list[Piece] = []
    for name in experiments:
        paths = [Path(f) / "experiment" / f"{name}.yaml" for f in (*folders, conf_dir())]
        path = next((p for p in paths if p.is_file()), None)
        if path is not None:
            lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
            comment = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
            pieces.append(tag("pre", "\n".join(line.removeprefix("#").removeprefix(" ") for line in comment)))
    return pieces
