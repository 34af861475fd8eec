"""Figure 2: quadratic regression in tangent features, test loss over alpha, and where the estimates of alpha* lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.evaluation.metrics import metric_name
from metalearn.results import Result, value
from metalearn.shown import Finding, Line, Shown, labels, line, scalar

TITLE = "Figure 2: quadratic regression with tangent features"

PANELS = {"uniform": "a", "normal": "b"}
COLOURS = {"eq3.3": "tab:red", "H.14": "tab:orange", "H.15": "tab:purple"}
NAMES = {"eq3.3": "eq. 3.3", "H.14": "H.14", "H.15": "H.15"}
CURVES = {
    "same": ("0.45", "--", "loss on the points of the step"),
    "fresh": ("tab:blue", "-", "loss on fresh points"),
}
"""Colour, line and name."""
JUDGED = ("eq3.3", "H.14")
WITHIN, WORSE = 2.0, 1.2
PAPER = (-3e-4, 7e-4, 10_000)
"""Ends of the grid of Figure 2 and its width."""
MARGIN = 1.05
"""Of a picture's x axis beyond the rates that it is of."""


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
    """What an estimate says of a pair, at one cut-off: it and the best alpha, its loss as a multiple of the least."""

    pair: Pair
    estimate: float
    best: float
    loss: float

    @property
    def multiple(self) -> float | None:
        """The estimate as a multiple of the best alpha, if that is positive."""
        return self.estimate / self.best if self.best > 0 else None

    @property
    def near(self) -> bool:
        """Whether both are as near as the criterion says."""
        return self.multiple is not None and 1 / WITHIN <= self.multiple <= WITHIN and self.loss <= WORSE


def show(results: Sequence[Result]) -> Shown:
    """A figure of each initialisation, with a column for each cut-off of the kernel; the claim is judged for each."""
    results = sorted(results, key=lambda r: list(PANELS).index(value(r.config, "study.init")))
    figures, findings, notes = {}, [], []
    for r in results:
        cutoffs, name = labels(r, "rank", "cutoff"), f"fig2{PANELS[value(r.config, 'study.init')]}"
        figures[name] = _figure(r, cutoffs, 1.0)
        if (zoom := r.config["study"]["zoom"]) > 1:
            figures[f"{name}_near"] = _figure(r, cutoffs, zoom)
        findings += [_finding(r, c) for c in cutoffs]
        notes.append(_note(r, cutoffs[-1]))
    return Shown(TITLE, figures, findings, (*notes, _grids(results)))


def _pairs(result: Result) -> list[Pair]:
    study = result.config["study"]
    return [Pair(result, str(n), str(k)) for n, k in zip(study["tasks"], study["samples"], strict=True)]


def _agreement(pair: Pair, by: str, cutoff: str) -> Agreement:
    best = pair.number("best", query="fresh", cutoff=cutoff)
    losses = [pair.number("loss_at", by=b, cutoff=cutoff) for b in (by, "optimum")]
    return Agreement(pair, pair.number("estimate", by=by), best, losses[0] / losses[1])


def _near(pair: Pair, cutoff: str) -> bool:
    """Whether one of the judged estimates is near."""
    return any(_agreement(pair, by, cutoff).near for by in JUDGED)


def _finding(result: Result, cutoff: str) -> Finding:
    pairs, init = _pairs(result), value(result.config, "study.init")
    found = {by: [_agreement(p, by, cutoff) for p in pairs] for by in COLOURS}
    width, study = value(result.config, "study.width"), result.config["study"]
    ends = [study["low"] / width, study["high"] / width]
    inside = all(ends[0] < p.number("best", query="fresh", cutoff=cutoff) < ends[1] for p in pairs)
    far = [f"not {p.name}" for p in pairs if not _near(p, cutoff)]
    parts = [
        f"width {width}: near in {len(pairs) - len(far)} of {len(pairs)} pairs" + f" ({'; '.join(far)})" * bool(far),
        *_negative(found["eq3.3"]),
        *(f"{NAMES[by]} {_spans(a)}" for by, a in found.items()),
    ]
    measured = "; ".join(parts) + " (H.15 is not judged)"
    if not inside:
        measured += "; the best alpha is at an end of the grid, enlarge study.low or study.high"
    return Finding(
        f"alpha* by eq. 3.3 or H.14 is near the best alpha, {init} initialisation; eigenvalues of the kernel below"
        f" {_power(cutoff)} of the largest are cut",
        f"within {WITHIN:g}x of the best alpha and {WORSE:g}x of the least loss on fresh points, in every pair (K, N)",
        measured,
        not far if inside else None,
    )


def _power(cutoff: str) -> str:
    """`1e-6` for `1e-06`."""
    return f"{float(cutoff):.0e}".replace("e-0", "e-")


def _negative(found: Sequence[Agreement]) -> list[str]:
    """A remark on the pairs whose best alpha is not positive, which has no multiples."""
    return [
        f"the best alpha is {a.best:.2g}, not positive, for {a.pair.name}, where eq. 3.3 is {a.estimate:.2g}"
        for a in found
        if a.multiple is None
    ]


def _spans(found: Sequence[Agreement]) -> str:
    multiples = [a.multiple for a in found if a.multiple is not None]
    alpha = f"{_span(multiples)} of the best alpha" if multiples else "no multiple of a best alpha"
    elsewhere = " where that is positive" if 0 < len(multiples) < len(found) else ""
    return f"{alpha}{elsewhere}, loss {_span([a.loss for a in found])}"


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
        f" only. Directions of the kernel above {_power(cutoff)} of the largest: {', '.join(ranks)}; where these are"
        " fewer than samples (few inputs), the start depends on alpha."
    )


def _grids(results: Sequence[Result]) -> str:
    """What rates the curves are of."""
    study = results[0].config["study"]
    low, high = (f"{study[end] / study['width']:.2g}" for end in ("low", "high"))
    theirs = [f"{end * PAPER[2] / study['width']:.2g}" for end in PAPER[:2]]
    finer = [
        f"; {r.config['study']['init']} has as many rates again in 1/{r.config['study']['zoom']:g} of it, around its"
        " optimum, which a figure of its own shows"
        for r in results
        if r.config["study"]["zoom"] > 1
    ]
    return (
        f"alpha from {low} to {high}; the paper's {PAPER[0]:g} to {PAPER[1]:g} is {theirs[0]} to {theirs[1]} in this"
        f" width, since the best alpha falls like 1 / width{''.join(finer)}. The cut-offs of the eigenvalues are ours,"
        " the paper names none: a start that follows the least of them is wild between the samples"
    )


# ---- picture -----------------------------------------------------------------------------------------------------


def _figure(result: Result, cutoffs: Sequence[str], zoom: float) -> Figure:
    """A row for each pair, a column for each cut-off, of rates up to the ends of the grid over `zoom`."""
    pairs, study = _pairs(result), result.config["study"]
    figure = Figure(figsize=(4.9 * len(cutoffs), 1.3 + 2.7 * len(pairs)), layout="constrained")
    axes = figure.subplots(len(pairs), len(cutoffs), squeeze=False, sharex=True, sharey="row")
    ends = MARGIN * study["low"] / study["width"] / zoom, MARGIN * study["high"] / study["width"] / zoom
    for row, pair in zip(axes, pairs, strict=True):
        curves = {c: _curves(pair, c, ends) for c in cutoffs}
        means = [curve.mean for both in curves.values() for curve in both.values()]
        for axis, cutoff in zip(row, cutoffs, strict=True):
            _panel(axis, pair, cutoff, curves[cutoff])
            axis.set(xlim=ends, ylim=(min(map(min, means)) / 2, 2 * max(map(max, means))))
    title = (
        f"Figure 2({PANELS[study['init']]}) of Unraveling MAML: quadratic regression in tangent features,\n"
        f"{study['init']} initialisation, width {study['width']}" + (", near the optimum" if zoom > 1 else "")
    )
    figure.suptitle(title, fontsize=11)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _curves(pair: Pair, cutoff: str, ends: tuple[float, float]) -> dict[str, Line]:
    """Losses after a step over the rates between two."""
    found = {}
    for query in CURVES:
        whole = line(pair.result, "loss", "alpha", query=query, N=pair.tasks, K=pair.samples, cutoff=cutoff)
        inside = (ends[0] <= whole.x) & (whole.x <= ends[1])
        found[query] = Line(*(v[inside] for v in whole))
    return found


def _panel(axis: Axes, pair: Pair, cutoff: str, curves: dict[str, Line]) -> None:
    for query, (colour, style, name) in CURVES.items():
        axis.plot(*curves[query][:2], style, color=colour, linewidth=1.3, label=name)
    x, mean, half = curves["fresh"]
    axis.fill_between(x, mean - half, mean + half, color=CURVES["fresh"][0], alpha=0.25, lw=0, label="95 % over tasks")
    for by, colour in COLOURS.items():
        axis.axvline(pair.number("estimate", by=by), color=colour, linewidth=1.2, label=f"alpha* by {NAMES[by]}")
    best, least = pair.number("best", query="fresh", cutoff=cutoff), pair.number("loss_at", by="optimum", cutoff=cutoff)
    axis.plot(best, least, "*", color="black", markersize=10, label="best alpha on fresh points", zorder=5)
    for i, end in enumerate(e * PAPER[2] / value(pair.result.config, "study.width") for e in PAPER[:2]):
        label = "ends of the paper's grid, times 10,000 / width" if i == 0 else None
        if MARGIN * x[0] <= end <= MARGIN * x[-1]:
            axis.axvline(end, color="0.4", linestyle=":", linewidth=1, label=label)
    verdict = "near" if _near(pair, cutoff) else "NOT near"
    axis.set_title(f"{pair.name}, eigenvalues above {_power(cutoff)}: {verdict}", fontsize=9.5)
    axis.set(yscale="log", xlabel="alpha")
    axis.set_ylabel("MSE after a step (target units$^2$)", fontsize=9)
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axis.tick_params(labelbottom=True)
