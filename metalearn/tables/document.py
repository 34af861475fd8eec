"""A filled table as text for readers: one grid for each setting, counts of verdicts, footnotes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from metalearn.tables.compare import MISSING, Comparison, Entry, Filled
from metalearn.tables.definition import Published

LONG = 40
"""Characters from which on what explains a verdict becomes a footnote."""


MOST_DIGITS = 6
"""Decimals beyond which an interval gets no more."""


class Grid(NamedTuple):
    """Rows of texts under a heading; the columns whose numbers are in `left` are flush left. Signs are +- as one."""

    heading: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: frozenset[int]


class Document(NamedTuple):
    """What every format prints: title, grids, numbered notes (mark and text), and further paragraphs.

    command: what runs the missing cells (so many: `runs`) and nothing that is finished, unless the results are from
    elsewhere.
    """

    name: str
    title: str
    grids: list[Grid]
    counts: Grid
    notes: list[tuple[str, str]]
    paragraphs: list[str]
    command: str | None = None
    runs: int = 0
    elsewhere: bool = False


def invitation(doc: Document) -> str:
    """The words before the command that runs what is missing."""
    if doc.elsewhere:
        return (
            f"missing cells: {doc.runs}; this runs them, with all others that are not finished in its own output_dir:"
        )
    return f"missing cells that can be run: {doc.runs}; this runs them, and nothing that is finished:"


def document(filled: Filled) -> Document:
    """The texts of a filled table."""
    numbers, everywhere = _numbered(filled.entries)
    table = filled.table
    notes = [(str(n), ("all: " if text in everywhere else "") + text) for text, n in numbers.items()]
    marks = {text: n for text, n in numbers.items() if text not in everywhere}
    grids = [
        _grid(filled, column.label, [e for e in filled.entries if e.column is column], marks)
        for column in table.columns
    ]
    paragraphs = [_legend(filled), *filled.remarks, *table.notes]
    runs = sum(e.verdict == MISSING and bool(e.commands) for e in filled.entries)
    command = filled.command if runs else None
    return Document(table.name, table.title, grids, _counts(filled), notes, paragraphs, command, runs, filled.elsewhere)


def _notes(e: Entry) -> tuple[str, ...]:
    """The footnotes of an entry, a long verdict among them."""
    return (*e.notes, f"{e.verdict}: {e.detail}") if len(e.detail) > LONG else e.notes


def _numbered(entries: Sequence[Entry]) -> tuple[dict[str, int], set[str]]:
    """Each distinct footnote with its number, and those that all measured entries (of several) have."""
    texts = dict.fromkeys(note for e in entries for note in _notes(e))
    noted = [set(_notes(e)) for e in entries if e.ours is not None]
    everywhere = set.intersection(*noted) if len(noted) > 1 else set()
    return {text: i for i, text in enumerate(texts, 1)}, everywhere


def _grid(filled: Filled, heading: str, entries: Sequence[Entry], marks: dict[str, int]) -> Grid:
    digits = _digits(entries)
    header = ("method", "ours", "over", "published", "ours - published", "p", "verdict")
    beside = (f"ours - {filled.baseline}", "p") if filled.baseline else ()
    rows = []
    for e in entries:
        numbers = ranges([marks[n] for n in _notes(e) if n in marks])
        versus = _versus(e.against, digits) if filled.baseline else ()
        rows.append((e.row.label, *_ours(e, digits), *_published(e, digits), _verdict(e), *versus, numbers))
    return Grid(heading, (*header, *beside, "notes"), rows, frozenset({0, 6, 7 + len(beside)}))


def _digits(entries: Sequence[Entry]) -> int:
    """Decimals: as many as are published, and enough for two digits of the narrowest interval."""
    printed = max((e.published.decimals for e in entries if e.published and e.published.value is not None), default=3)
    halves = [e.ours.half for e in entries if e.ours is not None and math.isfinite(e.ours.half) and e.ours.half > 0]
    return max(printed, min(MOST_DIGITS, 1 - math.floor(math.log10(min(halves))))) if halves else printed


def _ours(e: Entry, digits: int) -> tuple[str, str]:
    if e.ours is None:
        return "-", "-"
    over = f"{len(e.seeds)} seeds" if e.interval == "seeds" else f"{e.ours.n} {e.interval}"
    return interval(e.ours.mean, e.ours.half, digits), over


def _published(e: Entry, digits: int) -> tuple[str, str, str]:
    text = printed(e.published)
    if e.judged is None:
        return text, "-", "-"
    return text, interval(e.judged.difference, e.judged.half, digits, sign=True), probability(e.judged.p)


def _verdict(e: Entry) -> str:
    if not e.detail or len(e.detail) > LONG:
        return e.verdict
    return (
        f"{e.verdict} ({e.detail})"
        if len(e.detail.split()) == 1 and "=" not in e.detail
        else f"{e.verdict}: {e.detail}"
    )


def _versus(against: Comparison | None, digits: int) -> tuple[str, str]:
    if against is None or against.difference is None:
        return "-", "-"
    d = against.difference
    text = interval(d.mean, d.over_tasks, digits, sign=True) + " tasks"
    if not math.isnan(d.over_seeds):
        text += f", ±{d.over_seeds:.{digits}f} seeds"
    return text, probability(against.p)


def interval(mean: float, half: float, digits: int, *, sign: bool = False) -> str:
    """`mean ± half`, the mean alone where there is no half-width."""
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def printed(published: Published | None) -> str:
    """A published number with its interval as it is printed; `-` where there is none."""
    if published is None or not published.text:
        return "-"
    return f"{published.text} ± {published.half_text}" if published.half_text else published.text


def probability(p: float) -> str:
    """Three decimals, or that it is less."""
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in order with runs joined: `1-3,5`."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    joined = [[r[0]] if len(r) == 1 else [r[0], r[-1]] for r in runs]
    return ",".join("-".join(map(str, r)) for r in joined)


def _counts(filled: Filled) -> Grid:
    """How many cells of each row, of each column and of all have each verdict."""
    kinds = list(filled.counts())
    lines = [(r.label, [e for e in filled.entries if e.row is r]) for r in filled.table.rows]
    lines += [(c.label, [e for e in filled.entries if e.column is c]) for c in filled.table.columns]
    rows = []
    for label, entries in [*lines, ("all", list(filled.entries))]:
        found = filled.counts(entries)
        rows.append((label, *(str(found.get(k, 0)) for k in kinds)))
    return Grid("how many cells", ("", *kinds), rows, frozenset({0}))


def _legend(filled: Filled) -> str:
    texts = [
        "ours: mean over seeds; its 95 % interval is over what the next column names: seeds (Student's t), or the test "
        "tasks of the only seed, or what else its mean is of",
        "ours - published: its interval counts what varies among seeds, among test tasks, and the published interval; "
        "p: two-sided test of no difference",
    ]
    if filled.table.margin is not None:
        texts.append(
            f"reproduced: the whole interval lies within ± {filled.table.margin:g}; differs: it lies outside; "
            "under-powered: neither; the number that is needed decides with probability 0.8 if the true difference is "
            "the measured one"
        )
    if filled.baseline:
        about = "seed by seed on the same test episodes, with intervals over tasks and over seeds"
        texts.append(f"ours - {filled.baseline}: {about}")
    return ". ".join(texts) + "."
