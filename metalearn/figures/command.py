"""`metalearn figure`: a metric against a swept key, as a picture, its numbers as CSV, and what is not in it."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from metalearn import cells, shown
from metalearn.figures import axes, draw, series
from metalearn.figures.series import Mark, Plot, Request
from metalearn.ledger import write_atomically
from metalearn.options import Parser, config_dirs
from metalearn.schema import BadInput
from metalearn.selection import Entry, experiments_of, select

DESCRIPTION = """A metric against a swept key: one line for each value of --hue, means over seeds with a 95 % interval
(over seeds by Student's t; over tasks where there is one seed), single seeds as faint points, diverged runs as crosses
at the top, cells without a value named below. The numbers lie beside the picture as CSV.

An experiment that says what it shows (`shows:` in its file) is drawn and judged as it says, unless an option asks for
something else.

A star is the value that is best on validation. With --x algorithm.alpha a vertical line is alpha*, if results have it.

  metalearn figure experiment=<paper>/<id>
  metalearn figure algorithm=maml,anil algorithm.alpha=0.1,0.4 seed=0,1,2 dataset=glyphs
  metalearn figure --from docs/runs/sinusoid_agreement sampler.corrupted=0.0
"""


def folder_of(overrides: Sequence[str]) -> Path:
    """Where figures go without --output: `figures/` of the output_dir that the command line names, as after a run."""
    return Path(str(cells.chosen(overrides).get("output_dir", ["outputs"])[-1])) / "figures"


def parser() -> Parser:
    """The options of `metalearn figure`."""
    p = Parser("figure", DESCRIPTION)
    p.take_cells()
    p.add_argument(
        "--x", metavar="KEY", help="a key; step (adaptation) or meta_step (log); default: the one that varies"
    )
    p.add_argument("--hue", type=_keys, metavar="KEY[,KEY]", help="one line a value; default algorithm, if several")
    p.add_argument("--panel", type=_keys, default=[], metavar="KEY[,KEY]", help="one panel a value")
    p.add_argument("--metric", help="default: the score that all results have (accuracy, mse)")
    p.add_argument("--bn", metavar="MODE", help="batch-norm mode of prediction; default each result's headline")
    p.add_argument("--mark", action="append", type=_mark, default=[], metavar="NAME=VALUE", help="a vertical line")
    p.add_argument("--from", dest="place", metavar="FOLDER", help="take results from there; keys choose among them")
    p.add_argument(
        "--output", type=_picture, metavar="FILE", help=".png, .svg or .pdf; default in <output_dir>/figures/"
    )
    p.add_argument(
        "--log", action="append", choices=("x", "y"), default=[], help="logarithmic, whatever the values span"
    )
    return p


def _keys(text: str) -> list[str]:
    return [k for k in text.split(",") if k]


def _mark(text: str) -> Mark:
    name, _, value = text.rpartition("=")
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not name or not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text}: must be NAME=VALUE with a finite number")
    return Mark(name, found)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lstrip(".") not in draw.FORMATS:
        raise argparse.ArgumentTypeError(f"{text}: must end in .{', .'.join(draw.FORMATS)}")
    return path


def main(arguments: Sequence[str]) -> int:
    """Write the picture and its numbers; 0 whatever is missing, for the picture says so."""
    o = parser().parse_intermixed_args(arguments)
    entries = select(o.overrides, config_dirs(o), o.place)
    if (own := _own(o, entries)) is not None:
        print(own)
        return 0
    experiments = ", ".join(v.partition("=")[2] for v in o.overrides if v.startswith("experiment="))
    request = Request(o.x, o.hue, o.panel, o.metric, o.bn, o.mark, _title(entries, experiments))
    plot = series.plot(entries, request)
    path = (
        o.output
        or folder_of(o.overrides) / f"{file_name(experiments or o.place or plot.title)}-{file_name(plot.x)}.png"
    )
    write(plot, path, "".join(o.log))
    print(text(plot))
    print(f"files: {path}, {path.with_suffix('.csv')}", file=sys.stderr)
    return 0


def _own(o: argparse.Namespace, entries: Sequence[Entry]) -> str | None:
    """What the experiments that are asked for show by themselves, drawn; None if one does not, or more is asked for."""
    own = experiments_of(entries)
    if not own or o.x or o.hue or o.panel or o.metric or o.bn or o.mark or o.log:
        return None
    modules = {name: shown.module_of(name, config_dirs(o)) for name in own}
    if not all(modules.values()):
        return None
    said = []
    for name, own_entries in own.items():
        results = [e.result for e in own_entries if e.result is not None]
        content = shown.show(name, str(modules[name]), results)
        folder = folder_of(o.overrides) / Path(name).parent if o.output is None else o.output.parent
        if o.output is not None:
            stem = o.output.stem if len(own) == 1 else f"{o.output.stem}-{Path(name).name}"
            named = [stem, *(f"{stem}-{other}" for other in list(content.figures)[1:])]
            content = content._replace(figures=dict(zip(named, content.figures.values(), strict=True)))
        said.append(shown.text(name, content, shown.write(content, folder), len(own_entries) - len(results)))
    return "\n".join(said)


def _title(entries: Sequence[Entry], experiments: str) -> str | None:
    found = [e.result for e in entries if e.result is not None]
    return f"{experiments}: {series.title(found)}" if experiments and found else None


def file_name(words: str) -> str:
    """Words as the name of a file."""
    return re.sub(r"[^\w.-]+", "_", words.strip("/")).strip("_.")


def write(plot: Plot, path: Path, log: str = "") -> None:
    """The picture, and its numbers beside it.

    Raises:
        BadInput: if the folder cannot be written to.
    """
    try:
        write_atomically(path, draw.encoded(draw.figure(plot, log=log), path.suffix.lstrip(".")))
        write_atomically(path.with_suffix(".csv"), series.csv_text(plot).encode())
    except OSError as error:
        raise BadInput(f"--output {path}: {error.strerror}; name a file in a folder that can be written to") from None


def text(plot: Plot) -> str:
    """The means as a table, then the caption and every cell that is not drawn."""
    factor = axes.SCALES.get(plot.unit, 1.0)
    sign = axes.UNIT_SIGNS.get(plot.unit, plot.unit).replace("$^2$", " squared")
    head = [*(["panel"] if plot.panel else []), "line", plot.x, f"{plot.metric}{f' ({sign})' if sign else ''}", "seeds"]
    rows = [head]
    for p in plot.points:
        mean = f"{p.mean * factor:.4g}" if p.seeds else "-"
        half = f" +- {p.half * factor:.2g} over {p.interval}" if p.interval else ""
        lost = f", {p.diverged} diverged" if p.diverged else ""
        lost += f", {p.missing} missing" if p.missing else ""
        cells = [p.place.hue or "-", series.text(p.place.x), f"{mean}{half}{' *' if p.best else ''}"]
        rows.append([*([p.place.panel] if plot.panel else []), *cells, f"{len(p.seeds)}{lost}"])
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([plot.title, "", *lines, "", *plot.notes, *series.absences(plot)])
