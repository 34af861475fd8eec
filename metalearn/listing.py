"""`metalearn results`: the finished results below a folder, filtered and listed. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from metalearn import selection
from metalearn.options import Parser
from metalearn.record import number
from metalearn.results import Result, by_size, find, flat, value
from metalearn.schema import BadInput, nearest
from metalearn.schema.keys import few, show
from metalearn.tables.document import Grid
from metalearn.tables.render import aligned, piped

DESCRIPTION = """Finished results below a folder, one line each, chosen by what their configurations hold.

  metalearn results algorithm=maml,anil dataset.test_shot=1
  metalearn results --from docs/runs/omniglot_short --metric accuracy@bn=support_plus_one --sort mean
  metalearn results --columns algorithm.alpha,trainer.max_steps --format csv

What runs leave are plain files, for pandas and DuckDB, too:

  pandas.read_parquet("outputs/runs/<cell_id>/episodes.parquet")            one row a test episode, mode and step
  metalearn.results.frame(metalearn.results.find("outputs"))                one row a result and metric
  duckdb: SELECT filename, bn, step, avg(value) FROM read_parquet('outputs/runs/*/episodes.parquet') GROUP BY ALL
          SELECT seed, config.algorithm.name, metrics.accuracy.mean FROM read_json('outputs/runs/*/result.json')"""
MEMBERS = ("algorithm", "dataset", "backbone", "regularizer", "study")
HEADLINE = ("metric", "mean", "ci95", "n")


class Listed(NamedTuple):
    """Columns of a list of results, and its rows by column."""

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]


def parser() -> Parser:
    """The verb's options."""
    p = Parser("results", DESCRIPTION)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="only results with this value, or one of a,b,c")
    p.add_argument("--from", dest="place", metavar="FOLDER", default="outputs", help="default outputs")
    p.add_argument("--metric", metavar="NAME", help="name in result.json; default the headline")
    p.add_argument("--columns", metavar="KEYS", help="further keys to show, as algorithm.alpha,dataset.shot")
    p.add_argument("--sort", metavar="COLUMN", help="of the list, the smallest first")
    p.add_argument("--reverse", action="store_true", help="with --sort: the largest first")
    p.add_argument("--format", metavar="FORMAT", default="terminal", help=f"{', '.join(FORMATS)}; default terminal")
    return p


def main(arguments: Sequence[str]) -> int:
    """Print the list that the arguments ask for; 0 if there are results or none."""
    options = parser().parse_intermixed_args(list(arguments))
    if options.format not in FORMATS:
        near = nearest(options.format, FORMATS)
        raise BadInput(f"--format {options.format}: must be one of {', '.join(FORMATS)}{near}")
    found = selection.select(options.overrides, place=options.place) if options.overrides else []
    results = [e.result for e in found if e.result is not None] if options.overrides else find(options.place)
    keys = [k for k in (options.columns or "").split(",") if k]
    listed = table(results, options.metric, keys)
    print(FORMATS[options.format](ordered(listed, options.sort, options.reverse) if options.sort else listed))
    return 0


def table(results: Sequence[Result], metric: str | None = None, keys: Sequence[str] = ()) -> Listed:
    """One row a result.

    Args:
        results: see `metalearn.results.find`.
        metric: name in result.json; None for each result's headline.
        keys: further dotted keys or groups to show.

    Raises:
        BadInput: for a metric or a key that no result has.
    """
    if metric is not None and results and not any(metric in r.data["metrics"] for r in results):
        known = dict.fromkeys(m for r in results for m in r.data["metrics"])
        raise BadInput(f"--metric {metric}: no result has it{nearest(metric, known)}; there are {few(known)}")
    for key in keys if results else ():
        if all(value(r.config, key) is None for r in results):
            known = dict.fromkeys(k for r in results for k in (*flat(r.config), *r.config))
            raise BadInput(f"--columns {key}: no result has this key{nearest(key, known)}")
    columns = ("cell_id", *MEMBERS, "seed", *keys, "status", "steps", *HEADLINE, "folder")
    return Listed(columns, [_row(r, metric, keys) for r in results])


def _row(r: Result, metric: str | None, keys: Sequence[str]) -> dict[str, Any]:
    metrics = r.data["metrics"]
    name = metric if metric is not None else next((m for m in metrics if "@" not in m), None)
    found = metrics.get(name) or {}
    return {
        "cell_id": r.data["cell_id"],
        **{group: value(r.config, group) for group in MEMBERS},
        "seed": r.data["seed"],
        **{key: value(r.config, key) for key in keys},
        "status": r.data["status"],
        "steps": r.data["steps"],
        "metric": name if found else None,
        **{k: found.get(k) for k in ("mean", "ci95", "n")},
        "folder": str(r.folder),
    }


def ordered(listed: Listed, column: str, reverse: bool = False) -> Listed:
    """The list by the values of a column, the smallest (reverse: the largest) first; rows without a value come last.

    Numbers come before words (`algorithm.alpha` may be one).

    Raises:
        BadInput: if there is no such column.
    """
    if column not in listed.columns:
        near = nearest(column, listed.columns)
        raise BadInput(f"--sort {column}: must be one of {', '.join(listed.columns)}{near}")
    there = [r for r in listed.rows if r[column] is not None]
    there.sort(key=lambda r: by_size(r[column]), reverse=reverse)
    return Listed(listed.columns, [*there, *(r for r in listed.rows if r[column] is None)])


# ---- formats -----------------------------------------------------------------------------------------------------


def _grid(listed: Listed) -> Grid:
    """For readers: the metric with its interval in one column, and members that are all the same left out."""
    dull = {g for g in MEMBERS[1:] if len({show(r[g]) for r in listed.rows}) == 1 and len(listed.rows) > 1}
    dull |= {g for g in MEMBERS if all(r[g] is None for r in listed.rows)}
    shown = [c for c in listed.columns if c not in (*HEADLINE, *dull)]
    at = shown.index("steps") + 1
    header = (*shown[:at], "metric", "mean, 95 % interval over tasks", "n", *shown[at:])
    rows = []
    for r in listed.rows:
        mean = "-" if r["mean"] is None else f"{number(r['mean'])} ± {number(r['ci95'])}"
        texts = {c: "-" if r[c] is None else show(r[c]) for c in (*shown, "metric", "n")}
        rows.append(
            (*(texts[c] for c in shown[:at]), texts["metric"], mean, texts["n"], *(texts[c] for c in shown[at:]))
        )
    numeric = {"seed", "steps", "n", "mean, 95 % interval over tasks"}
    return Grid("", header, rows, frozenset(i for i, h in enumerate(header) if h not in numeric))


def _terminal(listed: Listed) -> str:
    return "\n".join([*aligned(_grid(listed)), "", f"{len(listed.rows)} results"]) if listed.rows else "0 results"


def _csv(listed: Listed) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, listed.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed.rows)
    return out.getvalue().rstrip("\n")


FORMATS: dict[str, Callable[[Listed], str]] = {
    "terminal": _terminal,
    "csv": _csv,
    "json": lambda listed: json.dumps(listed.rows, indent=1, allow_nan=False),
    "markdown": lambda listed: "\n".join(piped(_grid(listed))),
}
