"""The formats of a table: terminal, Markdown, LaTeX, HTML, CSV. Pure functions from texts to text."""

from __future__ import annotations

import csv
import html as markup
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from metalearn.tables.compare import Entry, Filled
from metalearn.tables.document import Document, Grid, document, invitation

WIDTH = 120
"""Characters of a line of text in the terminal; grids are as wide as they have to be."""

# ---- terminal ----------------------------------------------------------------------------------------------------


def terminal(doc: Document) -> str:
    """Aligned columns."""
    blocks = [doc.title]
    blocks += ["\n".join([g.heading, *aligned(g)]) for g in (*doc.grids, doc.counts)]
    blocks += ["\n".join(f"[{mark}] {text}" for mark, text in doc.notes)] if doc.notes else []
    blocks += [textwrap.fill(p, WIDTH, break_long_words=False, break_on_hyphens=False) for p in doc.paragraphs]
    blocks += [f"{invitation(doc)}\n  {doc.command}"] if doc.command else []
    return _ascii("\n\n".join(blocks)) + "\n"


def aligned(grid: Grid) -> list[str]:
    """The lines of a grid, columns as wide as they need, two spaces between."""
    lines = [grid.header, *grid.rows]
    widths = [max(len(_ascii(line[i])) for line in lines) for i in range(len(grid.header))]
    return [
        "  ".join(
            _ascii(text).ljust(w) if i in grid.left else _ascii(text).rjust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _ascii(text: str) -> str:
    return text.replace("±", "+-")


# ---- Markdown ----------------------------------------------------------------------------------------------------


def markdown(doc: Document) -> str:
    """Tables of GitHub's Markdown."""
    blocks = [f"### {_plain(doc.title)}"]
    for grid in (*doc.grids, doc.counts):
        blocks += [f"**{_plain(grid.heading)}**", "\n".join(piped(grid))]
    blocks += ["\n".join(f"- [{mark}] {_plain(text)}" for mark, text in doc.notes)] if doc.notes else []
    blocks += map(_plain, doc.paragraphs)
    blocks += [f"{invitation(doc)}\n\n```\n{doc.command}\n```"] if doc.command else []
    return "\n\n".join(blocks) + "\n"


def piped(grid: Grid) -> list[str]:
    """The lines of a grid as a Markdown table."""
    rule = [":--" if i in grid.left else "--:" for i in range(len(grid.header))]
    return ["| " + " | ".join(line) + " |" for line in ([*map(_plain, row)] for row in (grid.header, rule, *grid.rows))]


def _plain(text: str) -> str:
    return re.sub(r"([|*_<>`\\])", r"\\\1", _ascii(text))


# ---- LaTeX -------------------------------------------------------------------------------------------------------

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", '"': r"\textquotedbl{}",
}  # fmt: skip


def latex(doc: Document) -> str:
    """A booktabs `longtable` with the notes under it."""
    width, left = len(doc.grids[0].header), doc.grids[0].left
    lines = [
        r"% \usepackage{booktabs,longtable} and \usepackage[T1]{fontenc}",
        rf"\begin{{longtable}}{{{''.join('l' if i in left else 'r' for i in range(width))}}}",
        rf"\caption{{{tex(doc.title)}}}\label{{tab:{re.sub('[^a-z0-9]+', '-', doc.name.lower())}}}\\",
        r"\toprule",
        _tex_row(doc.grids[0].header),
        r"\endhead",
    ]
    for grid in doc.grids:
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\textit{{{tex(grid.heading)}}}}}\\"]
        lines += [_tex_row(row) for row in grid.rows]
    lines += [r"\bottomrule", r"\end{longtable}"]
    columns = "".join("l" if i in doc.counts.left else "r" for i in range(len(doc.counts.header)))
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _tex_row(doc.counts.header), r"\midrule"]
    lines += [*map(_tex_row, doc.counts.rows), r"\bottomrule", r"\end{tabular}"]
    notes = [rf"\par\noindent\textsuperscript{{{mark}}} {tex(text)}" for mark, text in doc.notes]
    after = [rf"\par\noindent {tex(p)}" for p in doc.paragraphs]
    after += [rf"\par\noindent {tex(invitation(doc))} \texttt{{{tex(doc.command)}}}"] if doc.command else []
    return "\n".join([*lines, *notes, *after]) + "\n"


def _tex_row(texts: Sequence[str]) -> str:
    return " & ".join(map(tex, texts)) + r" \\"


def tex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_TEX.get(c, c) for c in text)


# ---- HTML --------------------------------------------------------------------------------------------------------

_STYLE = """<style>
.metalearn-table table{border-collapse:collapse;margin:.3em 0 1em}
.metalearn-table th,.metalearn-table td{padding:.15em .6em;text-align:right;white-space:nowrap}
.metalearn-table .left{text-align:left}
.metalearn-table thead th{border-top:2px solid;border-bottom:1px solid}
.metalearn-table tbody tr:last-child td{border-bottom:2px solid}
.metalearn-table .reproduced{color:#1a7f37}.metalearn-table .differs{color:#b35900}
.metalearn-table .diverged{color:#b3261e}
.metalearn-table .missing,.metalearn-table .not-available{color:#777}
.metalearn-table ol{font-size:90%}
</style>"""


def html(doc: Document) -> str:
    """A `<section>` that needs nothing else, to stand alone or in a report."""
    name = re.sub("[^a-z0-9]+", "-", doc.name.lower())
    grids = "\n".join(f"<h4>{_text(g.heading)}</h4>\n{_html_grid(g, name)}" for g in (*doc.grids, doc.counts))
    notes = "\n".join(f'<li id="{name}-note-{mark}" value="{mark}">{_text(text)}</li>' for mark, text in doc.notes)
    paragraphs = "\n".join(f"<p>{_text(p)}</p>" for p in doc.paragraphs)
    if doc.command:
        paragraphs += f"\n<p>{_text(invitation(doc))}</p>\n<pre>{_text(doc.command)}</pre>"
    listed = f"<ol>\n{notes}\n</ol>\n" if notes else ""
    return (
        f'<section class="metalearn-table" id="{name}">\n{_STYLE}\n<h3>{_text(doc.title)}</h3>\n{grids}\n'
        f"{listed}{paragraphs}\n</section>\n"
    )


def _html_grid(grid: Grid, name: str) -> str:
    def row(texts: Sequence[str], tag: str) -> str:
        cells = []
        for i, text in enumerate(texts):
            classes = ["left"] * (i in grid.left)
            inner = _text(text)
            if tag == "td" and grid.header[i] == "verdict":
                classes.append(re.split("[:(]", text)[0].strip().replace(" ", "-"))
            if tag == "td" and grid.header[i] == "notes":
                inner = re.sub(r"\d+", rf'<a href="#{name}-note-\g<0>">\g<0></a>', inner)
            cells.append(
                f'<{tag} class="{" ".join(classes)}">{inner}</{tag}>' if classes else f"<{tag}>{inner}</{tag}>"
            )
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(row(r, "td") for r in grid.rows)
    return f"<table>\n<thead>{row(grid.header, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _text(text: str) -> str:
    return markup.escape(text)


# ---- CSV ---------------------------------------------------------------------------------------------------------


def comma_separated(filled: Filled) -> str:
    """One line a cell of the table: each number (in the published unit) has a column, which may be empty."""
    out = io.StringIO()
    records = [record(filled, e) for e in filled.entries]
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _cell(v) for k, v in r.items()} for r in records)
    return out.getvalue()


def record(filled: Filled, e: Entry) -> dict[str, Any]:
    """All that is known of one cell of the table, under names that are the CSV's columns; None where nothing is."""
    ours, judged, published = e.ours, e.judged, e.published
    pair = e.against.difference if e.against else None
    return {
        "table": filled.table.name,
        "method": e.row.method,
        "row": e.row.label,
        "setting": e.column.setting,
        "column": e.column.label,
        "metric": e.column.metric,
        "bn": e.column.bn,
        "group": e.column.group,
        "step": e.column.step,
        "mean": ours and ours.mean,
        "half_width": ours and ours.half,
        "interval": e.interval or None,
        "n_seeds": len(e.seeds),
        "planned_seeds": e.planned,
        "n_tasks": e.tasks or None,
        "seeds": " ".join(map(str, e.seeds)),
        "published": published and published.text,
        "published_half_width": published and published.half,
        "difference": judged and judged.difference,
        "difference_half_width": judged and judged.half,
        "p": judged and judged.p,
        "margin": filled.table.margin,
        "verdict": e.verdict,
        "detail": e.detail,
        "needs_episodes": judged and judged.tasks,
        "needs_seeds": judged and judged.seeds,
        "baseline": filled.baseline,
        "minus_baseline": pair and pair.mean,
        "minus_baseline_half_width_tasks": pair and pair.over_tasks,
        "minus_baseline_half_width_seeds": pair and pair.over_seeds,
        "minus_baseline_p": e.against.p if e.against else None,
        "minus_baseline_seeds": pair and pair.seeds,
        "cell_ids": " ".join(e.cell_ids),
        "notes": "; ".join(e.notes),
        "commands": "; ".join(e.commands),
    }


def _cell(value: Any) -> Any:
    missing = value is None or (isinstance(value, float) and not math.isfinite(value))
    return "" if missing else repr(value) if isinstance(value, float) else value


FORMATS: dict[str, Callable[[Filled], str]] = {
    "terminal": lambda filled: terminal(document(filled)),
    "markdown": lambda filled: markdown(document(filled)),
    "latex": lambda filled: latex(document(filled)),
    "html": lambda filled: html(document(filled)),
    "csv": comma_separated,
}
"""What makes each format of a filled table."""
ENDINGS = {".md": "markdown", ".tex": "latex", ".html": "html", ".csv": "csv"}
