"""Figure 8: the distance of alpha*(N) from alpha*_lim over the number of tasks, for three bases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Shown, line, scalar, values

TITLE = "Figure 8: error of alpha*_lim over the number of tasks"

PANELS = {"matrix": "(a) random matrix", "gaussian": "(b) Gaussian basis", "polynomial": "(c) polynomials"}
PRINTED = {"matrix": 0.025, "gaussian": 0.25, "polynomial": 0.7}
"""The largest value on each axis of the paper."""
EXPECTED, NEAR = -0.5, 0.1


def show(results: Sequence[Result]) -> Shown:
    """A panel for each basis, and whether the error falls as one over the root of N: late, and over all N."""
    figure = Figure(figsize=(4.2 * len(results), 4.4), layout="constrained")
    for axis, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        _panel(axis, result)
    study = results[0].config["study"]
    figure.suptitle(
        "Figure 8 of Unraveling MAML: error of alpha*_lim over the number of tasks,"
        f" x ~ U({study['low']:g}, {study['high']:g}), K = {study['samples']}"
    )
    return Shown(TITLE, {"fig8": figure}, [f for r in results for f in (_late(r), _all(r))], _notes(results))


def _late(result: Result) -> Finding:
    return _finding(result, "slope", result.config["study"]["slope_from"])


def _all(result: Result) -> Finding:
    return _finding(result, "slope@tasks=all", min(result.config["study"]["tasks"]))


def _finding(result: Result, name: str, first: int) -> Finding:
    """The slope by its value, unless its interval is wider than what it may differ by."""
    study = result.config["study"]
    slope, half = scalar(result, name)
    measured, wide = f"{slope:.3f} +- {half:.2g}", not half <= NEAR
    if wide:
        measured += f", too wide to tell with study.repetitions={study['repetitions']}"
    return Finding(
        f"|alpha*(N) - alpha*_lim| falls as N^(-1/2) from N = {first} on: {PANELS[study['basis']]}",
        f"log-log slope within {NEAR:g} of {EXPECTED:g}, its 95 % interval at most +- {NEAR:g}",
        measured,
        None if wide else abs(slope - EXPECTED) <= NEAR,
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
    few = [_bias(r) for r in results if min(r.config["study"]["tasks"]) < r.config["study"]["slope_from"]]
    if few:
        notes.append(
            "beside its deviation, of order 1 / sqrt(N), alpha*(N) has a bias, of order 1 / N, so that the error falls"
            f" faster than N^(-1/2) where tasks are few: {'; '.join(few)}"
        )
    return (*notes, "alpha*_lim is exact, so that the slope is not bent by its error")


def _bias(result: Result) -> str:
    """The mean of alpha*(N) - alpha*_lim with few tasks, its deviation with more, and the N at which both are equal."""
    study = result.config["study"]
    found = {n: values(result, "difference", N=n) for n in sorted(study["tasks"])}
    means = [n * d.mean() for n, d in found.items() if n < study["slope_from"]]
    deviation = np.mean([n**0.5 * d.std(ddof=1) for n, d in found.items() if n >= study["slope_from"]])
    return (
        f"{PANELS[study['basis']]} bias {min(means):.2g} / N to {max(means):.2g} / N below N = {study['slope_from']},"
        f" deviation {deviation:.2g} / sqrt(N) above, equal at N = {(np.median(means) / deviation) ** 2:.2g}"
    )


def _panel(axis: Axes, result: Result) -> None:
    study, error = result.config["study"], line(result, "error", "N")
    x, y, first = error.x, error.mean, study["slope_from"]
    axis.fill_between(x, np.maximum(y - error.ci95, y / 10), y + error.ci95, color="tab:blue", alpha=0.2, linewidth=0)
    axis.plot(x, y, "o-", color="tab:blue", markersize=4, label=f"mean of {study['repetitions']}, 95 %")
    late = x >= first
    (slope, half), (overall, wide) = scalar(result, "slope"), scalar(result, "slope@tasks=all")
    for at, points, power, style, label in (
        (x[late], late, slope, "k-", f"slope {slope:.2f} +- {half:.1g} from N = {first} on"),
        (x, x > 0, overall, "k:", f"slope {overall:.2f} +- {wide:.1g} of all N"),
        (x, late, EXPECTED, "C7--", "slope -1/2"),
    ):
        axis.plot(at, _power(at, x[points], y[points], power), style, linewidth=1, label=label)
    printed = PRINTED[study["basis"]]
    axis.plot(x[0], printed, "r_", markersize=14, markeredgewidth=2, label=f"end of the paper's axis, {printed:g}")
    axis.set(xscale="log", yscale="log", xlabel="tasks N", ylabel="|alpha*(N) - alpha*_lim|")
    axis.set_title(f"{PANELS[study['basis']]}, d = {study['width']}")
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=8)


def _power(at: np.ndarray, x: np.ndarray, y: np.ndarray, power: float) -> np.ndarray:
    """x^power through the geometric mean of the points."""
    value: np.ndarray = np.exp(np.log(y).mean()) * (at / np.exp(np.log(x).mean())) ** power
    return value
