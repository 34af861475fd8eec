"""Figure 4(a): alpha*_lim over the variance of the data, and over the second moment of the features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Line, Shown, labels, line

TITLE = "Figure 4(a): alpha*_lim over the variance of the data, Gaussian basis"

FIT = 0.35
"""c of the paper's example curve c / variance (metalearn/published/unravel_text.csv)."""
PLOTTED = (0.2, 0.375)
"""Between which values the paper's curves lie, for variances up to 50."""
SLOPE = 0.15
"""How much a log-log slope may differ from -1 for an inverse law."""
BASES = {
    "raw": ("raw data", "0.4", ":"),
    "centred": ("centres around 0", "tab:blue", "-"),
    "shifted": ("centres beside 0", "tab:orange", "-"),
    "scaled": ("centres follow the data", "tab:green", "--"),
}
"""What a basis is called, its colour and its line."""
FIXED = ("centred", "shifted")
"""The bases that are judged: raw data follow the inverse law, and `scaled` stays constant, by identities."""
MARKERS = {"N": "o", "U": "s", "Exp": "^"}


def show(results: Sequence[Result]) -> Shown:
    """alpha*_lim over both variables, and whether the inverse law holds in each."""
    result = results[0]
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _over_variance(left, result)
    _over_moment(right, result)
    _legend(figure, left, right)
    study = result.config["study"]
    figure.suptitle(
        "Figure 4(a) of Unraveling MAML: alpha*_lim over the variance of the data, Gaussian basis,"
        f" K = {study['samples']}, d = {study['width']}"
    )
    findings = [*(_falls(result, basis) for basis in FIXED), _fit(result), *(_inverse(result, b) for b in FIXED)]
    return Shown(TITLE, {"fig4a": figure}, findings, _notes(result))


def _curve(result: Result, basis: str, law: str, metric: str = "alpha_lim") -> Line:
    return line(result, metric, "variance", basis=basis, law=law)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


# ---- panels ------------------------------------------------------------------------------------------------------


def _over_variance(axis: Axes, result: Result) -> None:
    for basis, (_, colour, style) in BASES.items():
        for law in labels(result, "alpha_lim", "law"):
            curve = _curve(result, basis, law)
            axis.errorbar(
                curve.x, curve.mean, curve.ci95, color=colour, linestyle=style, marker=MARKERS[law], markersize=4
            )
    variances = _curve(result, "raw", "N").x
    at = np.geomspace(variances[0], variances[-1], 100)
    axis.plot(at, FIT / at, color="tab:red", label=rf"paper's example curve {FIT:g} / $\sigma^2$")
    axis.axhspan(*PLOTTED, color="tab:red", alpha=0.12, lw=0, label="range of the paper's curves")
    _axes(axis, r"variance of the data $\sigma^2$")


def _over_moment(axis: Axes, result: Result) -> None:
    moments = []
    for basis, (_, colour, _) in BASES.items():
        for law in labels(result, "alpha_lim", "law"):
            rate, moment = _curve(result, basis, law).mean, _curve(result, basis, law, "second_moment").mean
            axis.plot(moment, rate, color=colour, marker=MARKERS[law], markersize=4, linewidth=0.8)
            moments += list(moment)
    width = result.config["study"]["width"]
    at = np.array([min(moments), max(moments)])
    axis.plot(at, 1 / (2 * at), color="black", linewidth=1, label="1 / (2 m): the upper bound of Corollary 1")
    text = f"1 / ({2 * width} m): all samples alike"
    axis.plot(at, 1 / (2 * width * at), color="black", linewidth=1, linestyle="--", label=text)
    _axes(axis, r"second moment of the features $m = E\,\phi^2$")


def _axes(axis: Axes, label: str) -> None:
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel=r"$\alpha^*_{lim}$")


def _legend(figure: Figure, left: Axes, right: Axes) -> None:
    for name, colour, style in BASES.values():
        left.plot([], [], color=colour, linestyle=style, label=name)
    for law, marker in MARKERS.items():
        left.plot([], [], marker, color="white", markeredgecolor="black", label=f"{law} data")
    found = [axis.get_legend_handles_labels() for axis in (left, right)]
    handles, names = ([x for part in parts for x in part] for parts in zip(*found, strict=True))
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


# ---- findings ----------------------------------------------------------------------------------------------------


def _falls(result: Result, basis: str) -> Finding:
    ends = {law: _curve(result, basis, law).mean[[0, -1]] for law in labels(result, "alpha_lim", "law")}
    variances = _curve(result, basis, "N").x[[0, -1]]
    return Finding(
        f"alpha*_lim falls as the data spread, Gaussian basis, {BASES[basis][0]}",
        f"lower at variance {variances[1]:g} than at {variances[0]:g}, for every law",
        ", ".join(f"{law} from {first:.3g} to {last:.3g}" for law, (first, last) in ends.items()),
        all(last < first for first, last in ends.values()),
    )


def _fit(result: Result) -> Finding:
    slopes = {b: [_slope(*_curve(result, b, law)[:2]) for law in labels(result, "alpha_lim", "law")] for b in FIXED}
    found = ", ".join(f"{min(s):.2f} to {max(s):.2f} with {BASES[b][0]}" for b, s in slopes.items())
    last = _curve(result, "centred", "N").x[-1]
    return Finding(
        f"alpha*_lim is about {FIT:g} / variance, Gaussian basis",
        f"log-log slope within {SLOPE:g} of -1 for one of the bases, every law",
        f"slopes {found}; and {FIT:g} / {last:g} = {FIT / last:.2g} is far from the {PLOTTED[0]:g} to {PLOTTED[1]:g} of"
        " the paper's own plot",
        any(all(abs(s + 1) <= SLOPE for s in own) for own in slopes.values()),
    )


def _inverse(result: Result, basis: str) -> Finding:
    slopes, products = {}, []
    for law in labels(result, "alpha_lim", "law"):
        moment, rate = _curve(result, basis, law, "second_moment").mean, _curve(result, basis, law).mean
        slopes[law] = _slope(moment, rate)
        products.append((moment * rate).max() / (moment * rate).min())
    return Finding(
        f"alpha*_lim is inverse to the second moment of the features, Gaussian basis, {BASES[basis][0]}",
        f"log-log slope within {SLOPE:g} of -1, for every law",
        f"slopes {', '.join(f'{law} {s:.2f}' for law, s in slopes.items())}; the product of both, which an inverse law"
        f" leaves constant, varies {min(products):.3g}-fold to {max(products):.3g}-fold",
        all(abs(s + 1) <= SLOPE for s in slopes.values()),
    )


def _notes(result: Result) -> tuple[str, ...]:
    study = result.config["study"]

    def places(name: str) -> str:
        low, high, width = study[name]
        return f"{low:g} to {high:g} of width {width:.3g}"

    variance = _curve(result, "raw", "N").x[0]
    first = {b: {law: _curve(result, b, law).mean[0] for law in labels(result, "alpha_lim", "law")} for b in BASES}
    raw = ", ".join(f"{law} {variance * value:.3g}" for law, value in first["raw"].items())
    scaled = ", ".join(f"{law} {value:.3g}" for law, value in first["scaled"].items())
    return (
        f"not stated in the paper and ours: K = {study['samples']}, d = {study['width']}, centres ({places('centred')};"
        f" {places('shifted')}; or within {study['reach']:.3g} deviations of 0, as wide as their distance)",
        "which way alpha*_lim goes with the variance of the data is a matter of the centres: the claim can be had, and"
        " its opposite too",
        "two identities, which are not judged: features s phi have alpha*_lim / s^2, so that raw data have exactly"
        f" c / variance (c: {raw}); where centres and widths follow the data, features are the same at every variance,"
        f" and so is alpha*_lim ({scaled})",
        "the first is all of the inverse law: with fixed centres, the features' correlations change with the variance",
    )
