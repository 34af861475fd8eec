"""`metalearn report`: studies that take seconds to minutes, each as a table, its numbers as JSON, and a picture.

Every other module of this package is one report and needs no registration. It imports no torch at its top and defines

    TITLE: str                                   one line for the list
    DESCRIPTION: str                             what the report shows, for its --help
    def options(parser) -> None                  adds its own options, and says which numbers they take
    def run(options) -> Content                  the work
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
import time
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from metalearn.options import Parser, whole
from metalearn.schema import BadInput
from metalearn.schema.keys import nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Content(NamedTuple):
    """What a report found.

    text: Markdown, also printed. data: the numbers behind it, for JSON. figures: by file name without its ending; those
    that the text does not place stand at its end.
    """

    text: str
    data: dict[str, Any]
    figures: dict[str, Figure]


def names() -> list[str]:
    """The reports there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a report.

    Raises:
        BadInput: if there is none.
    """
    if name not in names():
        raise BadInput(f"report: {name}: must be one of {', '.join(names())}{nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def usage() -> str:
    """The list of reports."""
    lines = ["usage: metalearn report NAME [--output FOLDER] [options]; metalearn report NAME --help", ""]
    lines += [f"  {name:<10} {load(name).TITLE}" for name in names()]
    lines += ["", "Writes report.md, report.json and pictures to outputs/theory/NAME, or to FOLDER.", ""]
    lines += ["usage: metalearn report experiment=<paper>/<id> [key=value] ... [--from FOLDER] [--output FILE.html]"]
    lines += ["       metalearn report --from FOLDER [key=value] ...; metalearn report --from --help", ""]
    return "\n".join([*lines, "Writes one HTML file about an experiment: tables, figures, protocol, failures."])


def parser(name: str) -> Parser:
    """The options of one report."""
    module = load(name)
    p = Parser(f"report {name}", f"{module.TITLE}.\n\n{module.DESCRIPTION}")
    folder = f"outputs/theory/{name}"
    p.add_argument("--output", metavar="FOLDER", default=folder, help=f"default {folder}; files there are replaced")
    p.add_argument("--page", metavar="FILE.md", help="write the Markdown there instead of FOLDER/report.md")
    p.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of every draw; default 0")
    module.options(p)
    return p


def main(arguments: Sequence[str]) -> int:
    """Run the report that the arguments name (an experiment's if they are keys), or list all.

    0 whatever it finds, for what fails is a finding, too.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if "=" in arguments[0] or arguments[0].startswith("-"):
        from metalearn import experiment_report

        return experiment_report.main(arguments)
    options = parser(arguments[0]).parse_args(arguments[1:])
    folder = Path(options.output)
    page = Path(options.page) if options.page else folder / "report.md"
    _check(arguments[0], "--output", folder, folder)
    if options.page:
        if page.suffix != ".md" or page.is_dir():
            raise BadInput(f"report {arguments[0]}: --page {page}: must be a file whose name ends in .md")
        _check(arguments[0], "--page", page, page.parent)
    began = time.monotonic()
    content: Content = load(arguments[0]).run(options)
    _write(folder, page, arguments, content, time.monotonic() - began)
    print(content.text)
    print(f"files: {folder}{f', {page}' if options.page else ''}", file=sys.stderr)
    return 0


def _check(name: str, option: str, given: Path, folder: Path) -> None:
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise BadInput(f"report {name}: {option} {given}: {existing} is a file; name a folder")


def _write(folder: Path, page: Path, arguments: Sequence[str], content: Content, seconds: float) -> None:
    from metalearn.record import git_state

    commit, dirty = git_state()
    header: dict[str, Any] = {"command": " ".join(["metalearn report", *arguments]), "commit": commit, "changed": dirty}
    header |= {"torch": version("torch"), "seconds": round(seconds, 1)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in content.figures.items():
        figure.savefig(folder / f"{name}.png", dpi=90, bbox_inches="tight")
    shown = [name for name in content.figures if f"({name}.png)" not in content.text]
    pictures = "".join(f"\n![{name}]({name}.png)\n" for name in shown)
    source = "" if commit is None else f", commit {commit[:12]}{' (changed)' if dirty else ''}"
    text = f"{content.text}\n{pictures}\n`{header['command']}`{source}\n"
    beside = os.path.relpath(folder.absolute(), page.parent.absolute())
    if beside != ".":
        for name in content.figures:
            text = text.replace(f"({name}.png)", f"({Path(beside).as_posix()}/{name}.png)")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    text = json.dumps({"header": header, **content.data}, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,), *, padded: bool = True
) -> str:
    """A Markdown table whose columns are also aligned in a terminal, those of text (`left`) to the left.

    Not `padded`, its cells are as wide as their text: for sentences, which no terminal shows side by side.
    """
    widths = [max(3, *(len(row[i]) for row in (columns, *rows))) if padded else 3 for i in range(len(columns))]
    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(cells) for cells in (columns, rule, *rows))
