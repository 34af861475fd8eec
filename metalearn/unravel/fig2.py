"""Figure 2: quadratic regression in tangent features, test loss over alpha, and where the estimates of alpha* lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.evaluation.metrics import metric_name
from metalearn.results import Result, value
from metalearn.shown import Finding, Shown, labels, line, scalar

TITLE = "Figure 2: quadratic regression with tangent features"

PANELS = {"uniform": "fig2a", "normal": "fig2b"}
COLOURS = {"eq3.3": "tab:red", "H.14": "tab:orange", "H.15": "tab:purple"}
JUDGED = ("eq3.3", "H.14")
WITHIN, WORSE = 2.0, 1.2
PAPER = (-3e-4, 7e-4, 10_000)
"""Ends of the grid of Figure 2 and its width."""


class Pair(NamedTuple):
    """N and K as text, and what a result has of them."""

    result: Result
    tasks: str
    samples: str

    def number(self, metric: str, **where: str) -> float:
        return scalar(self.result, metric_name(metric, N=self.tasks, K=self.samples, **where))[0]

    @property
    def name(self) -> str:
        return f"K = {self.samples}, N = {self.tasks}"


class Agreement(NamedTuple):
    """An estimate as a multiple of the best alpha, and its loss as a multiple of the least."""

    alpha: float
    loss: float

    @property
    def near(self) -> bool:
        return 1 / WITHIN <= self.alpha <= WITHIN and self.loss <= WORSE


def show(results: Sequence[Result]) -> Shown:
    """One figure for each initialisation; the claim is judged on fresh points, for each cutoff of the kernel."""
    results = sorted(results, key=lambda r: list(PANELS).index(value(r.config, "study.init")))
    figures = {PANELS[value(r.config, "study.init")]: _figure(r) for r in results}
    findings = [_finding(r, c, first=i == 0) for r in results for i, c in enumerate(labels(r, "rank", "cutoff"))]
    return Shown(TITLE, figures, findings, tuple(_note(r, labels(r, "rank", "cutoff")[-1]) for r in results))


def _pairs(result: Result) -> list[Pair]:
    study = result.config["study"]
    return [Pair(result, str(n), str(k)) for n, k in zip(study["tasks"], study["samples"], strict=True)]


def _agreement(pair: Pair, by: str, cutoff: str) -> Agreement:
    best = pair.number("best", query="fresh", cutoff=cutoff)
    losses = [pair.number("loss_at", by=b, cutoff=cutoff) for b in (by, "optimum")]
    return Agreement(pair.number("estimate", by=by) / best, losses[0] / losses[1])


def _finding(result: Result, cutoff: str, *, first: bool) -> Finding:
    pairs, init = _pairs(result), value(result.config, "study.init")
    found = {by: [_agreement(p, by, cutoff) for p in pairs] for by in COLOURS}
    width, study = value(result.config, "study.width"), result.config["study"]
    ends = [study["low"] / width, study["high"] / width]
    inside = all(ends[0] < p.number("best", query="fresh", cutoff=cutoff) < ends[1] for p in pairs)
    measured = f"width {width}: " + "; ".join(f"{by} {_spans(a)}" for by, a in found.items()) + " (H.15 is not judged)"
    if not inside:
        measured += "; the best alpha is at an end of the grid, enlarge study.low or study.high"
    holds = all(any(found[by][i].near for by in JUDGED) for i in range(len(pairs))) if inside else None
    which = "" if first else f", eigenvalues of the kernel down to {cutoff} of the largest"
    return Finding(
        f"alpha* by eq. 3.3 or H.14 is near the best alpha, {init} initialisation{which}",
        f"within {WITHIN:g}x of the best alpha and {WORSE:g}x of the least loss on fresh points, in every pair (K, N)",
        measured,
        holds,
    )


def _spans(found: Sequence[Agreement]) -> str:
    alphas, losses = zip(*found, strict=True)
    return f"{_span(alphas)} of the best alpha, loss {_span(losses)}"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low}x" if low == high else f"{low} to {high}x"


def _note(result: Result, cutoff: str) -> str:
    """Why alpha matters in training, too, although there are fewer samples than features (or that it does not)."""
    study = result.config["study"]
    d = (study["inputs"] + 2) * study["width"] + 1
    ranks = [f"{p.number('rank', cutoff=cutoff):.0f} of {int(p.tasks) * int(p.samples)}" for p in _pairs(result)]
    return (
        f"{study['init']}: if the N K < d = {d} samples had independent features, the interpolating start of least norm"
        " would be the same for all alpha that keep the tasks' maps invertible, and alpha would act in the test step"
        f" only. Directions of the kernel above {cutoff} of the largest: {', '.join(ranks)}; where these are fewer than"
        " samples (few inputs), the start depends on alpha."
    )


def _figure(result: Result) -> Figure:
    pairs, init = _pairs(result), value(result.config, "study.init")
    rows = -(-len(pairs) // 2)
    figure = Figure(figsize=(9.5, 0.9 + 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, min(2, len(pairs)), squeeze=False).flat
    for axis, pair in zip(axes, pairs, strict=False):
        _panel(axis, pair, labels(result, "rank", "cutoff")[0])
    for axis in list(axes)[len(pairs) :]:
        axis.set_axis_off()
    width = value(result.config, "study.width")
    figure.suptitle(f"Quadratic regression in tangent features, {init} initialisation, width {width}", fontsize=11)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _panel(axis: Axes, pair: Pair, cutoff: str) -> None:
    where = {"N": pair.tasks, "K": pair.samples}
    for query, style in (("fresh", "-"), ("same", "--")):
        curve = line(pair.result, "loss", "alpha", query=query, **where)
        name = {"fresh": "loss on fresh points, 95 % over tasks", "same": "on the points of the step"}[query]
        axis.errorbar(
            curve.x, curve.mean, curve.ci95, fmt=style, color="tab:blue" if query == "fresh" else "0.6", label=name,
            elinewidth=0.8, linewidth=1.2,
        )  # fmt: skip
    for by, colour in COLOURS.items():
        axis.axvline(pair.number("estimate", by=by), color=colour, linewidth=1.2, label=f"estimate {by}")
    best = pair.number("best", query="fresh", cutoff=cutoff)
    least = pair.number("loss_at", by="optimum", cutoff=cutoff)
    axis.plot(best, least, "*", color="black", markersize=10, label="best alpha", zorder=5)
    low, high = axis.get_xlim()
    for i, end in enumerate(e * PAPER[2] / value(pair.result.config, "study.width") for e in PAPER[:2]):
        if low <= end <= high:
            label = "ends of the paper's grid, times 10,000 / width" if i == 0 else None
            axis.axvline(end, color="0.4", linestyle=":", linewidth=1, label=label)
    axis.set(yscale="log", title=pair.name, xlabel="alpha", ylabel="mean squared error after a step")
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axis.title.set_fontsize(10)
