"""From the numbers of a figure to a picture: no window, no pyplot, the same bytes for the same numbers."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from metalearn import results
from metalearn.figures import axes, series
from metalearn.figures.series import Mark, Plot, Point
from metalearn.schema.keys import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which people with any form of colour blindness tell apart (without the yellow)."""
MARKERS = "os^Dv<>"
DASHES = ("-", "--", ":", "-.")
FORMATS = ("png", "svg", "pdf")
NO_DATES = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
STAR: dict[str, Any] = {"marker": "*", "markeredgecolor": "black", "markersize": 12, "linestyle": "none"}
CROSS: dict[str, Any] = {"marker": "x", "markersize": 7, "markeredgewidth": 2, "linestyle": "none"}
MOST_TICKS = 16
"""More swept values than these get the axis' own ticks."""
PANEL, LETTER = 3.4, 0.066
"""Inches of a panel's axis, and of a letter on it."""
DECADE = 10.0
COLUMNS = 3
LETTERS_PER_INCH = 17.5
"""Of the caption."""
NAMED, REASONS = 3, 4
"""How many absent cells the caption names for a reason, and for how many reasons."""


class Style(NamedTuple):
    """How a line looks."""

    colour: str
    marker: str
    dash: str


class Scale(NamedTuple):
    """One axis: `linear`, `log`, or `symlog` (with the size below which it is linear)."""

    name: str
    linear_below: float = 0.0

    def apply(self, setter: Any) -> None:
        """Set it by `axis.set_xscale` or `set_yscale`."""
        if self.name == "symlog":
            setter("symlog", linthresh=self.linear_below)
        else:
            setter(self.name)


def scale_of(values: Sequence[float], wanted: bool, *, zero_too: bool = False) -> Scale:
    """Logarithmic if wanted, or if positive values span more than a decade; linear around zero if that is among them.

    Args:
        values: what the axis shows.
        wanted: logarithmic whatever the values span, where it can be.
        zero_too: whether an axis with a zero among its values may be logarithmic.
    """
    positive = [v for v in values if v > 0]
    if not positive or min(values) < 0 or (len(positive) < len(values) and not zero_too):
        return Scale("linear")
    if not wanted and max(positive) / min(positive) <= DECADE:
        return Scale("linear")
    return Scale("log") if len(positive) == len(values) else Scale("symlog", min(positive))


def styles(hues: Sequence[str]) -> dict[str, Style]:
    """A style for each line, by its place in the order."""
    n = len(COLOURS)
    return {h: Style(COLOURS[i % n], MARKERS[i % n], DASHES[i // n % len(DASHES)]) for i, h in enumerate(hues)}


def figure(plot: Plot, *, log: str = "") -> Figure:
    """The picture.

    Args:
        plot: its numbers.
        log: axes that are logarithmic whatever their values span: x, y or both.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with _defaults():
        panels, drawing = plot.panels, _Drawing(plot, log)
        columns = min(COLUMNS, len(panels))
        rows = -(-len(panels) // columns)
        width, height = max(5.4, 4.0 * columns), 3.3 * rows
        words, handles = caption(plot, int((width - 0.2) * LETTERS_PER_INCH)), drawing.handles()
        per_row = _legend_columns(list(handles), width)
        below = [0.19 * -(-len(handles) // per_row) + 0.12, 0.125 * (words.count("\n") + 1) + 0.1]
        total, edge = height + sum(below), sum(below) / (height + sum(below))
        layout = ConstrainedLayoutEngine(rect=(0, edge, 1, 1 - edge))
        out = Figure(figsize=(width, total), layout=layout)
        grid = out.subplots(rows, columns, squeeze=False, sharey=True)
        for i, axis in enumerate(grid.flat):
            if i < len(panels):
                drawing.panel(axis, panels[i], left=i % columns == 0)
            else:
                axis.set_visible(False)
        out.suptitle(plot.title, fontsize=10)
        if handles:
            out.legend(
                handles.values(), handles, ncols=per_row, fontsize=8, frameon=False, loc="upper center",
                bbox_to_anchor=(0.5, edge), borderaxespad=0.0, borderpad=0.2,
            )  # fmt: skip
        out.text(0.1 / width, (below[1] - 0.03) / total, words, fontsize=7, va="top", color="#444444")
        return out


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """How many labels fit beside each other."""
    return max(1, min(len(labels), int((width - 0.2) / (0.55 + 0.072 * max(map(len, labels), default=1)))))


def caption(plot: Plot, width: int) -> str:
    """What stands under the picture, in lines of `width` letters: what the intervals are, and what is not in it."""
    lines = [" ".join(plot.notes)]
    lines += series.absences(plot, NAMED)[:REASONS]
    if len(plot.absent) > REASONS:
        lines.append(f"... and {len(plot.absent) - REASONS} more reasons")
    return "\n".join(piece.replace("$", r"\$") for line in lines for piece in textwrap.wrap(line, width))


class _Drawing:
    """What all panels of a figure share: scales, styles, the places of words on the axis."""

    def __init__(self, plot: Plot, log: str):
        self.plot = plot
        self.styles = styles(plot.hues)
        self.factor = axes.SCALES.get(plot.unit, 1.0)
        values = {p.place.x for p in plot.points if p.place.x is not None}
        self.words = [series.text(x) for x in sorted(values, key=results.by_size)]
        self.by_word = any(isinstance(p.place.x, str) for p in plot.points)
        self.xs = sorted({self.x(p) for p in plot.points if p.place.x is not None})
        self.shown = [*self.xs, *(m.value for m in plot.marks)]
        known = bool(self.shown) and not self.by_word and (plot.x not in series.READERS or "x" in log)
        self.x_scale = scale_of(self.shown, "x" in log, zero_too=True) if known else Scale("linear")
        means = [v * self.factor for p in plot.points for v in (*p.seeds.values(), p.mean) if math.isfinite(v)]
        bounded = plot.unit in axes.SCALES and "y" not in log
        self.y_scale = Scale("linear") if bounded or not means else scale_of(means, "y" in log)
        self.low, self.high = self._limits(means)

    def handles(self) -> dict[str, Any]:
        """The legend: each line, then what marks mean."""
        from matplotlib.lines import Line2D

        found: dict[str, Any] = {}
        for hue, s in self.styles.items():
            own = [p for p in self.plot.points if p.place.hue == hue and p.seeds]
            flat = bool(own) and all(p.place.x is None for p in own)
            how: dict[str, Any] = {"linestyle": "-."} if flat else {"linestyle": s.dash, "marker": s.marker}
            found[self.label(hue)] = Line2D([], [], color=s.colour, markersize=5, **how)
        if any(p.best for p in self.plot.points):
            found["best on validation"] = Line2D([], [], **STAR, color="#bbbbbb")
        if any(p.diverged for p in self.plot.points):
            found["diverged"] = Line2D([], [], **CROSS, color="#666666")
        for i, mark in enumerate(self.plot.marks):
            found[_mark_label(mark)] = Line2D([], [], **self._mark_style(mark, i))
        return found

    def label(self, hue: str) -> str:
        """What the legend calls a line."""
        return hue or axes.METRICS.get(self.plot.metric, self.plot.metric)

    def x(self, point: Point) -> float:
        """Where a point is on the axis."""
        value = point.place.x
        assert value is not None
        return float(self.words.index(series.text(value))) if self.by_word else float(value)

    def _limits(self, means: list[float]) -> tuple[float, float]:
        """Around all means, with their intervals as far as these leave the means readable."""
        if not means:
            return 0.0, 1.0
        ends = [(p.mean + s * p.half) * self.factor for p in self.plot.points for s in (-1, 1) if math.isfinite(p.half)]
        if self.y_scale.name == "log":
            low, high = min(means), max(means)
            ends = [e for e in ends if low / DECADE < e < high * DECADE]
            return min([low, *ends]) / 1.15, max([high, *ends]) * 1.15
        low, high = min(means), max(means)
        room = max(high - low, 0.02 * abs(high), 1e-12)
        low, high = max(low - room, min([low, *ends])), min(high + room, max([high, *ends]))
        return low - 0.06 * room, high + 0.06 * room

    def _across(self) -> tuple[float, float]:
        """Limits of x: all values and marks, with some room."""
        if self.by_word:
            return -0.6, len(self.words) - 0.4
        low, high = min(self.shown, default=0.0), max(self.shown, default=1.0)
        if self.x_scale.name == "log":
            room = (high / low) ** 0.05 if high > low else 2.0
            return low / room, high * room
        if self.x_scale.name == "symlog":
            return low - 0.5 * self.x_scale.linear_below, high * 1.3
        room = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
        return low - room, high + room

    def panel(self, axis: Axes, name: str, *, left: bool) -> None:
        """Draw one panel."""
        own = [p for p in self.plot.points if p.place.panel == name]
        self.x_scale.apply(axis.set_xscale)
        self.y_scale.apply(axis.set_yscale)
        axis.set_xlim(self._across())
        for i, hue in enumerate(self.plot.hues):
            self._line(axis, [p for p in own if p.place.hue == hue], hue, i)
        for i, mark in enumerate(self.plot.marks):
            if mark.panel in (None, name):
                axis.axvline(mark.value, **self._mark_style(mark, i))
        self._crosses(axis, own)
        self._ticks(axis)
        if self.plot.panel and name:
            axis.set_title(f"{', '.join(self.plot.panel)} = {name}", fontsize=9)
        axis.set_xlabel(axes.x_title(self.plot.x))
        if left:
            axis.set_ylabel(axes.y_title(self.plot.metric, self.plot.unit, self.plot.split))
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)

    def _line(self, axis: Axes, points: Sequence[Point], hue: str, number: int) -> None:
        style = self.styles[hue]
        for p in (p for p in points if p.place.x is None and p.seeds):
            self._horizontal(axis, p, style)
        gaps = self.plot.x not in series.READERS  # a value without a mean interrupts the line
        found = [p for p in points if p.place.x is not None and (p.seeds or gaps)]
        if not any(p.seeds for p in found):
            return
        n = len(self.plot.hues)
        shift = min(0.12, 0.8 / n) * (number - (n - 1) / 2) if self.by_word else 0.0
        x, y = [self.x(p) + shift for p in found], [p.mean * self.factor for p in found]
        half = [p.half * self.factor if math.isfinite(p.half) else 0.0 for p in found]
        joined = style.dash if len(found) > 1 and not self.by_word else "none"
        size = 5 if len(found) <= 2 * MOST_TICKS else 0
        axis.plot(x, y, color=style.colour, marker=style.marker, linestyle=joined, markersize=size)
        alone = [i for i, p in enumerate(found) if p.seeds and (joined == "none" or _is_alone(found, i))]
        if alone:  # a band has no width there
            across, up, bars = ([v[i] for i in alone] for v in (x, y, half))
            axis.errorbar(across, up, bars, fmt="none", ecolor=style.colour, capsize=3)
        if joined != "none" and any(half):
            low = [
                max(a - h, self.low if self.y_scale.name == "log" else -math.inf) for a, h in zip(y, half, strict=True)
            ]
            high = [a + h for a, h in zip(y, half, strict=True)]
            axis.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
        many = [
            (a, v * self.factor) for a, p in zip(x, found, strict=True) if len(p.seeds) > 1 for v in p.seeds.values()
        ]
        if many and size:
            seeds_x, seeds_y = zip(*many, strict=True)
            axis.scatter(seeds_x, seeds_y, s=9, color=style.colour, alpha=0.35, linewidths=0, zorder=1.5)
        for a, b, p in zip(x, y, found, strict=True):
            if p.best:
                axis.plot(a, b, color=style.colour, zorder=4, **STAR)

    def _horizontal(self, axis: Axes, point: Point, style: Style) -> None:
        y = point.mean * self.factor
        axis.axhline(y, color=style.colour, linestyle="-.", linewidth=1.2)
        if math.isfinite(point.half):
            h = point.half * self.factor
            axis.axhspan(y - h, y + h, color=style.colour, alpha=0.1, linewidth=0)

    def _mark_style(self, mark: Mark, number: int) -> dict[str, Any]:
        colour = self.styles[mark.hue].colour if mark.hue is not None else "#444444"
        return {"color": colour, "linestyle": (0, (4, 2 + 2 * (number % 4))), "linewidth": 1.1}

    def _crosses(self, axis: Axes, points: Sequence[Point]) -> None:
        """Diverged runs at the top, one row a line, so that none hides another or the means."""
        lost = [p for p in points if p.diverged]
        hues = list(dict.fromkeys(p.place.hue for p in self.plot.points if p.diverged))
        low, high = self.low, self._top(len(hues))
        axis.set_ylim(low, high)
        for p in lost:
            y = self._top(len(hues) - hues.index(p.place.hue) - 0.5)
            colour = self.styles[p.place.hue].colour
            total = p.diverged + len(p.seeds)
            words = f"{p.diverged} of {total}"
            if p.place.x is None:
                axis.annotate(f"x {words}", (0.01, y), xycoords=("axes fraction", "data"), fontsize=7, color=colour)
                continue
            axis.plot(self.x(p), y, color=colour, **CROSS)
            axis.annotate(
                words, (self.x(p), y), xytext=(6, 0), textcoords="offset points", fontsize=7, color=colour, va="center"
            )

    def _top(self, rows: float) -> float:
        """The height of so many rows of crosses above the means."""
        share = 0.08 * rows
        if self.y_scale.name == "log":
            return self.high * (self.high / self.low) ** share
        return self.high + (self.high - self.low) * share

    def _ticks(self, axis: Axes) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

        if self.by_word:
            axis.set_xticks(range(len(self.words)), self.words)
            if max(map(len, self.words)) * LETTER > 0.9 * PANEL / len(self.words):
                axis.tick_params(axis="x", labelrotation=40)
                for word in axis.get_xticklabels():
                    word.set(ha="right", rotation_mode="anchor")
        elif 0 < len(self.xs) <= MOST_TICKS and self.plot.x != axes.META_STEP:
            axis.set_xticks(self.xs, self._labels(axis))
            axis.xaxis.set_minor_formatter(NullFormatter())
        elif self.x_scale.name == "linear" and all(v == int(v) for v in self.xs):
            axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        if not self.xs:
            axis.set_xticks([])
        if self.plot.unit in axes.SCALES:  # nothing is above all of it
            full = 1.0 * self.factor
            axis.set_yticks([t for t in axis.get_yticks() if self.low <= t <= full * (1 + 1e-9)])
        elif self.y_scale.name == "log" and self.high / self.low < DECADE**2:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())

    def _labels(self, axis: Axes) -> list[str]:
        """The values of x where there is room beside the last one."""
        places = axis.transData.transform([(v, self.low) for v in self.xs])[:, 0]
        (left, _), (right, _) = axis.transAxes.transform([(0, 0), (1, 0)])
        inches = (places - left) / (right - left) * PANEL
        out: list[str] = []
        end = -math.inf
        for v, place in zip(self.xs, inches, strict=True):
            label = show(int(v)) if v == int(v) else f"{v:g}"
            half = 0.5 * LETTER * len(label)
            out.append(label if place - half > end + LETTER else "")
            end = place + half if out[-1] else end
        return out


def _is_alone(points: Sequence[Point], i: int) -> bool:
    """Whether no neighbour of a point has a mean."""
    return not any(points[j].seeds for j in (i - 1, i + 1) if 0 <= j < len(points))


def _mark_label(mark: Mark) -> str:
    of = ", ".join(word for word in (mark.panel, mark.hue) if word and word != mark.name)
    name = f"{mark.name} ({of})" if of else mark.name
    return f"{name} = {mark.value:.3g}"


def encoded(picture: Figure, kind: str, dpi: int = 110) -> bytes:
    """The picture as a file of one of `FORMATS`."""
    file = io.BytesIO()
    with _defaults():
        picture.savefig(file, format=kind, dpi=dpi, metadata=NO_DATES[kind])
    return file.getvalue()


@contextmanager
def _defaults() -> Iterator[None]:
    """Matplotlib's own settings, whatever the user's files say, and ids that do not change."""
    from matplotlib import rc_context, style

    with (
        rc_context(),
        style.context("default"),
        rc_context({"svg.hashsalt": "metalearn", "axes.axisbelow": True, "axes.labelsize": 9, "xtick.labelsize": 8}),
    ):
        yield
