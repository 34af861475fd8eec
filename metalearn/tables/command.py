"""`metalearn table`: a table of a paper with our results beside the published numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from metalearn.cells import search_paths
from metalearn.ledger import write_atomically
from metalearn.options import Parser, config_dirs
from metalearn.results import find
from metalearn.schema import BadInput, nearest
from metalearn.tables import FORMATS, load, make, names, render
from metalearn.tables.document import Grid
from metalearn.tables.render import ENDINGS, aligned
from metalearn.tables.selection import filled_cells

DESCRIPTION = """A table of a paper with our results beside the published numbers; without NAME, the list of tables.

The results are those of the cells that the table's experiment means (finished or not; further key=value as for
`metalearn experiment=<id>`), or with --from those below a folder that have the values of key=value. For each cell: mean
over seeds and its 95 % interval, the published number, the difference with its interval and a test, a verdict
(reproduced, differs, under-powered with the number of episodes or seeds that decides), and footnotes for each
difference in protocol. What is missing is shown as missing, with the command that runs it.

  metalearn table gradagree/table2 dataset.root=<data>
  metalearn table gradagree/table2 --from docs/runs/omniglot_short --baseline MAML
  metalearn table gradagree/table2 --from outputs trainer.max_steps=500 --output table2.html"""


def parser() -> Parser:
    """The verb's options."""
    p = Parser("table", DESCRIPTION)
    p.take_cells()
    p.add_argument("--from", dest="place", metavar="FOLDER", help="any folder of results, as outputs or docs/runs/x")
    p.add_argument("--baseline", metavar="METHOD", help="row that the others are compared with, episode by episode")
    p.add_argument(
        "--format", metavar="FORMAT", help=f"{', '.join(FORMATS)}; default: by --output's ending, or terminal"
    )
    p.add_argument("--output", metavar="FILE", help="write there instead of printing (whole or not at all)")
    return p


def main(arguments: Sequence[str]) -> int:
    """Print the table that the arguments name, or list all; 0 whatever it shows."""
    options = parser().parse_intermixed_args(list(arguments))
    form = format_of(options.format, options.output)
    folders = config_dirs(options)
    named = [o for o in options.overrides if "=" not in o]
    overrides = [o for o in options.overrides if "=" in o]
    if len(named) > 1:
        raise BadInput(f"table: {named[1]}: one table at a time, and key=value")
    if named:
        filled = make(named[0], overrides, place=options.place, baseline=options.baseline, config_dirs=folders)
        text = render(filled, form)
    elif overrides or options.baseline or form != "terminal":
        raise BadInput(f"table: name one of {', '.join(names([*folders, *search_paths(overrides)]))}")
    else:
        text = overview(options.place, folders)
    write(text, options.output)
    return 0


def format_of(form: str | None, output: str | None) -> str:
    """The name of the format that options ask for.

    Raises:
        BadInput: if there is none.
    """
    if form is None:
        return ENDINGS.get(Path(output).suffix, "terminal") if output else "terminal"
    if form not in FORMATS:
        raise BadInput(f"--format {form}: must be one of {', '.join(FORMATS)}{nearest(form, FORMATS)}")
    return form


def write(text: str, output: str | None) -> None:
    """Print, or write a file that is whole or not there.

    Raises:
        BadInput: if it cannot be written.
    """
    if output is None:
        print(text, end="")
        return
    try:
        write_atomically(Path(output), text.encode())
    except OSError as error:
        raise BadInput(f"--output {output}: cannot be written: {error.strerror}") from None
    print(f"written to {output}", file=sys.stderr)


def overview(place: str | None, folders: Sequence[str] = ()) -> str:
    """All tables, with how many of their cells have at least one result below a folder."""
    folder = "outputs" if place is None else place
    there = place is not None or Path(folder).is_dir()
    results = find(folder) if there else []
    rows: list[tuple[str, ...]] = []
    for name in names(folders):
        table = load(name, folders)
        cells = len(table.rows) * len(table.columns)
        rows.append((name, f"{filled_cells(table, results)} of {cells}", table.experiment or "-", table.title))
    grid = Grid("", ("table", "cells with results", "experiment", "title"), rows, frozenset({0, 2, 3}))
    return "\n".join([*aligned(grid), "", f"results: those below {folder}; metalearn table --help"]) + "\n"
