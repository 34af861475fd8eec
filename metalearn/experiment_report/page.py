"""HTML from plain values: whatever is not markup already is escaped, and a page needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

VOID = ("img", "meta", "br")
STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fff; --rule: #ccc; --soft: #f3f3f3; --warn: #a33b00; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --page: #181818; --rule: #555; --soft: #262626; --warn: #ffab7a; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 76rem;
  margin: 0 auto; padding: 1rem 1.5rem; }
h2 { border-bottom: 1px solid var(--rule); padding-bottom: .2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 90%; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child, .words td, .words th { text-align: left; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .6rem 0; }
pre { background: var(--soft); padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figure img { max-width: 100%; background: #fff; }
.warn { color: var(--warn); font-weight: 600; }
nav a { margin-right: 1rem; color: inherit; }
@media print { nav { display: none; } body { max-width: none; } figure, tr { break-inside: avoid; } }
""".strip()


class Html(str):
    """Text that is markup."""


Piece = str | int | float


def markup(piece: Piece) -> Html:
    """A piece as markup: escaped unless it is that."""
    return piece if isinstance(piece, Html) else Html(escape(str(piece)))


def join(pieces: Iterable[Piece], between: str = "\n") -> Html:
    """Pieces after each other."""
    return Html(between.join(markup(p) for p in pieces))


def tag(name: str, /, *children: Piece, **attributes: str) -> Html:
    """An element; an underscore at the end of an attribute's name is left out (`class_`)."""
    words = "".join(f' {k.rstrip("_")}="{escape(v)}"' for k, v in attributes.items())
    return Html(f"<{name}{words}>" + ("" if name in VOID else f"{join(children, '')}</{name}>"))


def table(columns: Sequence[Piece], rows: Iterable[Sequence[Piece]], class_: str = "") -> Html:
    """A table that scrolls where it is too wide, its first column to the left and numbers to the right."""
    head = tag("thead", tag("tr", *(tag("th", c) for c in columns)))
    body = tag("tbody", join(tag("tr", *(tag("td", c) for c in row)) for row in rows))
    return tag(
        "div", tag("table", head, "\n", body, class_=class_) if class_ else tag("table", head, body), class_="wide"
    )


def details(summary: str, *children: Piece) -> Html:
    """What is folded until asked for."""
    return tag("details", tag("summary", summary), *children)


def picture(png: bytes, alternative: str) -> Html:
    """A picture inside the page."""
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return tag("figure", tag("img", src=source, alt=alternative))


def page(title: str, head: Sequence[Piece], sections: Sequence[tuple[str, Sequence[Piece]]]) -> str:
    """The whole file: what stands at its top, then sections with their headings, which are listed first."""
    links = tag("nav", *(tag("a", name, href=f"#{_anchor(name)}") for name, _ in sections))
    blocks = [join([tag("h2", name, id=_anchor(name)), *pieces]) for name, pieces in sections]
    top = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    ]
    body = tag("body", join(["", tag("h1", title), *head, links, *blocks, ""]))
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{join(top)}\n</head>\n{body}\n</html>\n'


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())
