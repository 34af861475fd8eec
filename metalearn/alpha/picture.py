"""The one-step curve of `metalearn alpha` with alpha*, the heuristic range and the stability bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metalearn.figures import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE, STAR, RANGE, BOUND = draw.COLOURS[0], draw.COLOURS[1], draw.COLOURS[2], draw.COLOURS[3]
UNITS = {"mse": "query MSE (target units$^2$)", "cross-entropy": "query cross-entropy (nats)"}


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
    axis.set_title(f"{about['algorithm']} on {about['dataset']}, {about['backbone']}, before training", fontsize=10)
    axis.grid(alpha=0.3)
    out.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return out


def _include(axis: Axes, values: list[float | None]) -> None:
    """Widen the x axis to these values."""
    low, high = axis.get_xlim()
    known = [v for v in values if v is not None]
    axis.set_xlim(min([low, *(v / 1.3 for v in known)]), max([high, *(v * 1.3 for v in known)]))


def _loss(axis: Axes, curve: dict[str, Any], tasks: int) -> None:
    """The curve with its interval; what is far above the loss without a step is cut off, and so are such alphas."""
    known = [
        (a, m, h)
        for a, m, h in zip(curve["alphas"], curve["losses"], curve["halves"], strict=True)
        if m is not None and h is not None
    ]
    alphas, means, halves = zip(*known, strict=True)
    lower, upper = ([m + s * h for m, h in zip(means, halves, strict=True)] for s in (-1, 1))
    label = f"one step, {tasks} tasks; band: 95 % of the change"
    axis.plot(alphas, means, color=CURVE, marker="o", markersize=4, label=label)
    axis.fill_between(alphas, lower, upper, color=CURVE, alpha=0.15, linewidth=0)
    axis.axhline(curve["start"], color="#666666", linewidth=0.9, linestyle="-.", label="no step")
    best = min(means)
    axis.plot(curve["best"], best, color=CURVE, **{**draw.STAR, "label": f"best = {curve['best']:.3g}"})
    fall = max(curve["start"] - best, 0.05 * abs(best))
    shown = [u for u, m in zip(upper, means, strict=True) if m <= curve["start"] + fall]
    top = max([curve["start"] + fall, *shown])
    axis.set_ylim(min(lower) - 0.1 * (top - min(lower)), top)
    above = [a for a, m in zip(alphas, means, strict=True) if a > curve["best"] and m > top]
    axis.set_xlim(alphas[0] / 1.3, (above or alphas[-1:])[0] * 1.3)
