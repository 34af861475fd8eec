"""Figure 8: the distance of alpha*(N) from alpha*_lim over the number of tasks, for three bases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Shown, line, scalar

TITLE = "Figure 8: error of alpha*_lim over the number of tasks"

PANELS = {"matrix": "(a) random matrix", "gaussian": "(b) Gaussian basis", "polynomial": "(c) polynomials"}
PRINTED = {"matrix": 0.025, "gaussian": 0.25, "polynomial": 0.7}
"""The largest value on each axis of the paper."""
EXPECTED, NEAR = -0.5, 0.1


def show(results: Sequence[Result]) -> Shown:
    """A panel for each basis, and whether the error falls as one over the root of N."""
    figure = Figure(figsize=(4.2 * len(results), 4.2), layout="constrained")
    for axis, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        _panel(axis, result)
    study = results[0].config["study"]
    figure.suptitle(f"Figure 8 of Unraveling MAML: x ~ U({study['low']:g}, {study['high']:g}), K = {study['samples']}")
    return Shown(TITLE, {"fig8": figure}, [_finding(r) for r in results], _notes(results))


def _finding(result: Result) -> Finding:
    study = result.config["study"]
    (slope, half), (overall, wide) = scalar(result, "slope"), scalar(result, "slope@tasks=all")
    return Finding(
        f"|alpha*(N) - alpha*_lim| falls as N^(-1/2): {PANELS[study['basis']]}",
        f"log-log slope from N = {study['slope_from']} on within {NEAR:g} of {EXPECTED:g}, to its 95 % interval",
        f"{slope:.3f} +- {half:.2g} ({overall:.3f} +- {wide:.2g} from N = {min(study['tasks'])} on)",
        bool(abs(slope - EXPECTED) - half <= NEAR),
    )


def _notes(results: Sequence[Result]) -> tuple[str, ...]:
    sizes = []
    for result in results:
        basis, error = result.config["study"]["basis"], line(result, "error", "N")
        limit = scalar(result, "alpha_lim")[0]
        first = f"{error.mean[0]:.2g} at N = {error.x[0]:g} (alpha*_lim {limit:.3g})"
        sizes.append(f"{PANELS[basis]} {PRINTED[basis]:g} beside {first}")
    study = {r.config["study"]["basis"]: r.config["study"] for r in results}
    notes = ["the paper's axes end at, beside our errors: " + "; ".join(sizes)]
    if "gaussian" in study:
        notes.append(
            "not stated in the paper: Gaussian features share the x of a sample, their centres are spaced evenly over "
            f"its range, their width is {study['gaussian']['bandwidth']:g}"
        )
    if "polynomial" in study:
        notes.append(
            f"polynomials are x^n / n! with d = {study['polynomial']['width']}: more, or without weights, are too "
            "ill-conditioned for float64; the paper's scale of 0.7 is that of other features"
        )
    few = "with few tasks the error falls faster, as it has a bias of the order of 1 / N besides"
    return (*notes, few, "alpha*_lim is exact, so that the slope is not bent by its error")


def _panel(axis: Axes, result: Result) -> None:
    study, error = result.config["study"], line(result, "error", "N")
    low = np.maximum(error.mean - error.ci95, error.mean / 10)
    axis.fill_between(error.x, low, error.mean + error.ci95, color="tab:blue", alpha=0.2, linewidth=0)
    axis.plot(error.x, error.mean, "o-", color="tab:blue", markersize=4, label=f"mean of {study['repetitions']}, 95 %")
    slope, half = scalar(result, "slope")
    fitted = error.x >= study["slope_from"]
    middle = np.exp(np.log(error.x[fitted]).mean()), np.exp(np.log(error.mean[fitted]).mean())
    axis.plot(
        error.x[fitted],
        middle[1] * (error.x[fitted] / middle[0]) ** slope,
        "k-",
        linewidth=1,
        label=f"slope {slope:.2f} +- {half:.2g}",
    )
    axis.plot(
        error.x, middle[1] * (error.x / middle[0]) ** EXPECTED, "--", color="0.5", linewidth=1, label="slope -1/2"
    )
    printed = PRINTED[study["basis"]]
    axis.plot(
        error.x[0], printed, "r_", markersize=14, markeredgewidth=2, label=f"end of the paper's axis, {printed:g}"
    )
    axis.set(xscale="log", yscale="log", xlabel="tasks N", ylabel="|alpha*(N) - alpha*_lim|")
    axis.set_title(f"{PANELS[study['basis']]}, d = {study['width']}")
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=8)
