"""The sections of an experiment's report, each from the cells that were asked for and what there is of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from metalearn import results, shown, tables
from metalearn.evaluation.metrics import qualifiers_of
from metalearn.experiment_report.page import Html, Piece, details, markup, picture, table, tag
from metalearn.figures import axes, draw, series
from metalearn.figures.command import text as figure_text
from metalearn.figures.series import Request
from metalearn.results import Result
from metalearn.schema import BadInput, is_study
from metalearn.schema.keys import show
from metalearn.selection import Entry, dimensions, experiments_of, settings_of
from metalearn.statistics import over_seeds
from metalearn.sweep.standing import FINISHED, STATES, duration

MOST_LINES = 8
"""More lines than these are divided among panels."""
MOST_COLUMNS = 24
"""More scores than these are listed below each other."""
DPI = 120


def finished(entries: Sequence[Entry]) -> list[Result]:
    """The results there are."""
    return [e.result for e in entries if e.result is not None]


# ---- how far it is -------------------------------------------------------------------------------------------------


def count(entries: Sequence[Entry]) -> list[tuple[str, int]]:
    """States with the numbers of cells in them."""
    counts = Counter(e.state for e in entries)
    return [(s, counts[s]) for s in STATES if counts[s]]


def status(entries: Sequence[Entry], command: str | None) -> list[Piece]:
    """How many cells are in which state, and how to go on."""
    pieces: list[Piece] = [table(["state", "cells"], [*count(entries), ("all", len(entries))])]
    if command and any(e.state not in FINISHED for e in entries):
        pieces.append(tag("p", "What is missing runs with ", tag("code", command), "."))
    return pieces


def failures(entries: Sequence[Entry]) -> list[Piece]:
    """Why cells have no result, or a diverged one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for e in entries:
        if e.state not in ("done", "queued", "running") and (e.error or e.state != "missing"):
            groups.setdefault((e.state, e.error or "no reason is recorded"), []).append(e.name)
    if not groups:
        return [tag("p", "None.")]
    return [
        tag("section", tag("h3", f"{state}: {_cells(len(names))}"), tag("pre", error), tag("p", "; ".join(names)))
        for (state, error), names in groups.items()
    ]


def _cells(n: int) -> str:
    return f"{n} cell{'s' if n != 1 else ''}"


# ---- numbers -------------------------------------------------------------------------------------------------------


def published(
    experiments: Sequence[str], overrides: Sequence[str], place: str | None, folders: Sequence[str]
) -> list[Piece]:
    """The tables of these experiments, with the published numbers."""
    pieces: list[Piece] = []
    others = [o for o in overrides if not o.startswith("experiment=")]
    for name in tables.names(folders):
        try:
            experiment = tables.load(name, folders).experiment
            if experiment in experiments:
                filled = tables.make(name, [f"experiment={experiment}", *others], place=place, config_dirs=folders)
                pieces.append(Html(tables.render(filled, "html")))
        except BadInput as error:
            pieces.append(tag("p", f"Table {name} cannot be made: {error}", class_="warn"))
    return pieces


def measured(entries: Sequence[Entry]) -> list[Piece]:
    """A row for each setting: the mean of every score at the last adaptation step, its interval, and n."""
    keys, found = dimensions(entries), finished(entries)
    names = dict.fromkeys(n for r in found for n in r.data["metrics"] if "step=" not in n)
    units = {n: m["unit"] for r in found for n, m in r.data["metrics"].items()}
    rows = []
    for labels, own in settings_of(entries, keys).items():
        done = [e.result for e in own if e.result is not None and not e.result.diverged]
        lost = Counter(e.state for e in own if e.state != "done")
        note = ", ".join(f"{n} {s}" for s, n in lost.items())
        rows.append([*labels, *(_estimate(done, n) for n in names), str(len(done)), note])
    columns = [*keys, *(f"{n}{_unit(units[n])}" for n in names), "seeds", "not in the mean"]
    rows.sort(key=lambda row: [series.natural(str(c)) for c in row[: len(keys)]])
    if len(columns) > MOST_COLUMNS:
        return [table(*_turned(columns, rows), class_="words")]
    modes = ", ".join(dict.fromkeys(f"bn={r.data['protocol']['bn']}" for r in found))
    text = (
        "Means over seeds with 95 % intervals over seeds (Student's t); marked t: one seed, 95 % interval over its "
        f"test tasks. Names without bn= are of each run's headline mode ({modes or 'none yet'})."
    )
    return [table(columns, rows), tag("p", text)]


def _turned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table with its rows as columns."""
    lines = [list(line) for line in zip(columns, *rows, strict=True)]
    return ["", *["value"] * len(rows)], lines


def _unit(unit: str) -> str:
    sign = axes.UNIT_SIGNS.get(unit, unit).replace("$^2$", "²")
    return f" ({sign})" if sign else ""


def _estimate(done: Sequence[Result], name: str) -> str:
    """Mean and half-width in the unit of display, and of how many seeds, if some have no finite number."""
    found = [m for r in done if (m := r.data["metrics"].get(name)) is not None]
    values = [m for m in found if m["mean"] is not None]
    if not values:
        return "not finite" if found else ""
    some = f" ({len(values)} of {len(found)} seeds; others not finite)" if len(values) < len(found) else ""
    factor = axes.SCALES.get(values[0]["unit"], 1.0)
    estimate = over_seeds([m["mean"] for m in values])
    if len(values) > 1:
        return f"{factor * estimate.mean:.4g} ± {factor * estimate.half:.2g}{some}"
    half = values[0]["ci95"]
    return f"{factor * estimate.mean:.4g}" + (f" ± {factor * half:.2g} t" if half is not None else "") + some


# ---- claims ----------------------------------------------------------------------------------------------------


def claims(entries: Sequence[Entry], experiments: Sequence[str], folders: Sequence[str]) -> list[Piece]:
    """What experiments show by themselves, if their files say so: claims with their verdicts, and figures."""
    pieces: list[Piece] = []
    own = experiments_of(entries) or {name: list(entries) for name in experiments[:1]}
    for name, cells in own.items():
        found = finished(cells)
        module = shown.module_of(name, folders)
        if module is None or not found:
            continue
        content = shown.show(name, module, found)
        rows = [
            [f.claim + shown.OURS * f.ours, f.criterion, f.measured, shown.VERDICTS[f.holds]] for f in content.findings
        ]
        pieces.append(table(["claim", "criterion", "measured", "verdict"], rows, class_="words"))
        pieces += [tag("p", note) for note in content.notes]
        pieces += [picture(draw.encoded(f, "png", DPI), title) for title, f in content.figures.items()]
    return pieces


# ---- pictures ------------------------------------------------------------------------------------------------------


def figures(entries: Sequence[Entry], title: str) -> list[Piece]:
    """The score over each numeric key that was swept; over names, if no numeric key was."""
    if _all_studies(entries):
        return []
    keys = dimensions(entries)
    numeric = [k for k in keys if any(results.is_number(results.value(e.config, k)) for e in entries)]
    pieces = [_figure(entries, x, [k for k in keys if k != x], title) for x in numeric or keys[:1]]
    return pieces or [tag("p", "Nothing varies besides the seed.")]


def curves(entries: Sequence[Entry], x: str, title: str) -> list[Piece]:
    """The score over adaptation steps, or the validation score over meta-steps."""
    return [] if _all_studies(entries) else [_figure(entries, x, dimensions(entries), title)]


def _all_studies(entries: Sequence[Entry]) -> bool:
    """Whether nothing was trained, so that there are no scores of adapted parameters."""
    return all(is_study(e.config) for e in entries)


def _figure(entries: Sequence[Entry], x: str, others: Sequence[str], title: str) -> Piece:
    hue, panel = list(others), []
    if len(hue) > 1 and len(settings_of(entries, hue)) > MOST_LINES:
        panel = [min(hue, key=lambda k: len(settings_of(entries, [k])))]
        hue = [k for k in hue if k not in panel]
    try:
        plot = series.plot(entries, Request(x=x, hue=hue, panel=panel, title=title))
    except BadInput as error:
        return tag("p", str(error).removeprefix("figure: "))
    png = draw.encoded(draw.figure(plot), "png", DPI)
    words = figure_text(plot)
    return tag("div", picture(png, f"{plot.metric} over {x}"), details("the numbers", tag("pre", words)))


# ---- how it was done -----------------------------------------------------------------------------------------------


def protocol(entries: Sequence[Entry]) -> list[Piece]:
    """What all results agree on, and what varies."""
    found = finished(entries)
    says = [{k: v for k, v in results.flat(r.data["protocol"]).items() if k not in CHOSEN} for r in found]
    configs = [{k: v for k, v in results.flat(e.config).items() if not results.idle(k)} for e in entries]
    same, varied = _split(says)
    config_same, config_varied = _split(configs)
    pieces: list[Piece] = []
    if found:
        pieces += [tag("h3", "How results were obtained"), _values(same, varied, "results")]
    pieces += [tag("h3", "Keys that vary"), _values({}, config_varied, "cells")]
    return [*pieces, details(f"{len(config_same)} keys that all cells share", _values(config_same, {}, "cells"))]


CHOSEN = ("selection.step", "selection.value")
"""What the selection found, other than how it was made."""


def environment(entries: Sequence[Entry]) -> list[Piece]:
    """Versions, commits and data of the results; differences are marked."""
    found = finished(entries)
    if not found:
        return [tag("p", "No results yet.")]
    about = [{**r.data.get("versions", {}), **{k: r.data.get(k) for k in SOURCES}} for r in found]
    same, varied = _split(about)
    pieces: list[Piece] = []
    if varied:
        pieces.append(tag("p", f"Results differ in {', '.join(varied)}.", class_="warn"))
    if any(r.data.get("git_dirty") for r in found):
        pieces.append(tag("p", "Some results come from a checkout with uncommitted changes.", class_="warn"))
    return [*pieces, _values(same, varied, "results", mark=True)]


SOURCES = ("git_commit", "git_dirty", "data_hash")


def _split(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, Counter[str]]]:
    """The values that all rows share, and how often each value of the others occurs."""
    counts = {
        k: Counter(show(r[k]) if k in r else "-" for r in rows) for k in dict.fromkeys(k for r in rows for k in r)
    }
    same = {k: next(iter(c)) for k, c in counts.items() if len(c) == 1}
    return same, {k: c for k, c in counts.items() if len(c) > 1}


def _values(same: Mapping[str, str], varied: Mapping[str, Counter[str]], what: str, *, mark: bool = False) -> Html:
    rows: list[tuple[Piece, Piece]] = list(same.items())
    for key, counts in varied.items():
        words = "; ".join(f"{v} ({n} {what})" for v, n in sorted(counts.items(), key=lambda c: series.natural(c[0])))
        rows.append((key, tag("span", words, class_="warn") if mark else words))
    return table(["", "value"], rows, class_="words") if rows else tag("p", "None.")


# ---- every cell ----------------------------------------------------------------------------------------------------


def cells(entries: Sequence[Entry]) -> list[Piece]:
    """Each cell with its state, meta-steps, seconds and headline."""
    seconds = [r.data["seconds"] for r in finished(entries)]
    pieces: list[Piece] = []
    if seconds:
        ends = f"from {min(seconds):.3g} to {max(seconds):.3g} s, median {median(seconds):.3g} s"
        text = f"{_cells(len(seconds))} with a result took {duration(math.fsum(seconds))}: {ends}."
        pieces.append(tag("p", text + " With other work on the same machine these do not measure speed."))
    rows = [_cell(e) for e in entries]
    return [*pieces, table(["cell", "what", "state", "meta-steps", "seconds", "headline"], rows)]


def _cell(entry: Entry) -> list[Piece]:
    data = entry.result.data if entry.result else None
    cell_id = entry.cell_id if entry.state != "impossible" else "-"
    if data is None:
        return [tag("code", cell_id), entry.name, markup(entry.state), "", "", ""]
    bare = next((n for n in data["metrics"] if not qualifiers_of(n)), None)
    headline = f"{bare} {_estimate([entry.result], bare)}" if bare and entry.result else ""
    return [tag("code", cell_id), entry.name, entry.state, data["steps"], f"{data['seconds']:.1f}", headline]
