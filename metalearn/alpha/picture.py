"""The one-step curve of `metalearn alpha` with alpha*, the heuristic range and the stability bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from metalearn.figures import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE, STAR, RANGE, BOUND = draw.COLOURS[0], draw.COLOURS[1], draw.COLOURS[2], draw.COLOURS[3]
UNITS = {"mse": "query MSE (target units$^2$)", "cross-entropy": "query cross-entropy (nats)"}
MOST = 1e100
"""What is drawn of larger numbers, which an axis has no room for."""


def encoded(report: dict[str, Any], kind: str) -> bytes:
    """The picture as a file of one of `figures.draw.FORMATS`."""
    return draw.encoded(figure(report), kind)


def figure(report: dict[str, Any]) -> Figure:
    """Query loss after one step over alpha, with everything else that the report says on that axis."""
    from matplotlib.figure import Figure

    about, curve, star = report["about"], report["curve"], report["alpha_star"]
    out = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = out.subplots()
    axis.axvspan(star["low"], star["high"], color=STAR, alpha=0.2, linewidth=0)
    axis.axvline(star["value"], color=STAR, label=f"$\\alpha^*$ = {star['value']:.3g} (95 % over tasks)")
    same = report["alpha_star_same_set"]["value"]
    axis.axvline(same, color=STAR, linestyle=":", label=f"$\\alpha^*$, same set = {same:.3g}")
    bounds = report["stability"]
    for name, dash in (("median", "--"), ("least", ":")):
        if bounds[name] is not None:
            label = f"$2/\\lambda_{{max}}$, {name} = {bounds[name]:.3g}"
            axis.axvline(bounds[name], color=BOUND, linestyle=dash, label=label)
    if report["heuristic"] is not None:
        low, high = (report["heuristic"][k] for k in ("low", "high"))
        label = f"heuristic range {low:.2g} to {high:.2g}"
        axis.axvspan(low, high, ymax=0.04, color=RANGE, alpha=0.5, linewidth=0, label=label)
    axis.set_xscale("log")
    _loss(axis, curve, star["tasks"])
    _include(axis, [star["value"], bounds["median"]])
    axis.set_xlabel("inner learning rate $\\alpha$")
    axis.set_ylabel(UNITS[about["loss"]] + " after one step")
    when = "before training" if about["start"] is None else "at given parameters"
    axis.set_title(f"{about['algorithm']} on {about['dataset']}, {about['backbone']}, {when}", fontsize=10)
    axis.grid(alpha=0.3)
    out.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return out


def _include(axis: Axes, values: list[float | None]) -> None:
    """Widen the x axis to these values."""
    low, high = axis.get_xlim()
    known = [v for v in values if v is not None]
    axis.set_xlim(min([low, *(v / 1.3 for v in known)]), max([high, *(v * 1.3 for v in known)]))


class Point(NamedTuple):
    """Of the curve: mean loss, and the ends of its band, which is no lower than any loss can be."""

    alpha: float
    mean: float
    low: float
    high: float


def _points(curve: dict[str, Any]) -> list[Point]:
    """Where the curve is finite."""
    found = []
    for alpha, mean, half in zip(curve["alphas"], curve["losses"], curve["halves"], strict=True):
        if mean is not None:
            width = 0.0 if half is None else half
            found.append(Point(alpha, mean, max(0.0, mean - width), mean + width))
    return found


def _loss(axis: Axes, curve: dict[str, Any], tasks: int) -> None:
    """The curve with its interval. Where no step helps all of it is shown, on a logarithmic axis."""
    points, start = _points(curve), curve["start"]
    if curve["best"] is None:
        axis.set_yscale("log")
        means = [start, *(p.mean for p in points)]
        shown, low, high = points, min(m for m in means if m > 0) / 2, min(2 * max(means), MOST)
    else:
        shown, low, high = _window(points, start, curve["best"])
        label = f"best of these = {curve['best']:.3g}"
        axis.plot(curve["best"], min(p.mean for p in shown), color=CURVE, **{**draw.STAR, "label": label})
    axis.set_ylim(low, high)
    alphas, far = [p.alpha for p in shown], min(100 * high, MOST)
    label = f"one step, {tasks} tasks; band: 95 % of the change"
    axis.plot(alphas, [min(p.mean, far) for p in shown], color=CURVE, marker="o", markersize=4, label=label)
    ends = [p.low for p in shown], [min(p.high, far) for p in shown]
    axis.fill_between(alphas, *ends, color=CURVE, alpha=0.15, linewidth=0)
    axis.axhline(start, color="#666666", linewidth=0.9, linestyle="-.", label="no step")
    axis.set_xlim(alphas[0] / 1.3, alphas[-1] * 1.3)


def _window(points: list[Point], start: float, best: float) -> tuple[list[Point], float, float]:
    """What is shown of a curve: the points, and the ends of the y axis.

    Inside are means no further above the loss without a step than the best is below; the first point beyond on each
    side shows where the curve goes. Bands are inside up to twice that far.
    """
    at = next(i for i, p in enumerate(points) if p.alpha == best)
    rise = max(start - points[at].mean, 0.05 * start)
    top = start + rise
    first, last = (_beyond(points, at, top, step) for step in (-1, 1))
    shown = points[first : last + 1]
    inside = [p for p in shown if p.mean <= top]
    low, high = min(p.low for p in inside), min(max(top, *(p.high for p in inside)), top + rise)
    return shown, max(0.0, low - 0.05 * (high - low)), high


def _beyond(points: list[Point], at: int, top: float, step: int) -> int:
    """The first point from the best on, to the left or the right, that is above the top; else the last one there."""
    while 0 <= at + step < len(points) and points[at].mean <= top:
        at += step
    return at
