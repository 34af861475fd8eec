"""Table 2: sine curves, error before and after one step on the last layer, over alpha, beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Line, Shown, line, scalar
from metalearn.tables.definition import load

TITLE = "Table 2: last layer of a sine network"

RISES_FROM = 0.3


class Published(NamedTuple):
    """The paper's grid, its error after adaptation in digits, the same over that before, and its estimate."""

    alphas: np.ndarray
    after: np.ndarray
    ratio: np.ndarray
    estimate: float


def show(results: Sequence[Result]) -> Shown:
    """The errors of both, each over its own before adaptation: the scale of the published digits is not known."""
    result, paper = results[0], published()
    before, after, same = (line(result, m, "alpha") for m in ("mse_before", "mse_after", "mse_after_same"))
    limit, split = scalar(result, "alpha_lim"), scalar(result, "alpha_split")
    theirs = (
        f"; in the paper {paper.estimate:g}, next to it {closest(paper.alphas, paper.estimate):g}, least at"
        f" {paper.alphas[paper.after.argmin()]:g}"
    )
    findings = [
        _nearest("the best alpha of the grid is the one next to the estimate of eq. 3.3", after, limit, theirs),
        _rising(after, paper),
        _nearest("the same on the points that the step was taken on, which eq. 3.3 supposes", same, limit),
        _nearest("the same on fresh points with the estimate of Corollary 2, which supposes them", after, split),
    ]
    notes = (
        "the paper prints digits after the point, 797 for 0.797 or 0.0797: only ratios and places can be compared",
        f"the estimate depends on the scale of the features, which is that of one trained network: {limit[0]:.4g} here,"
        f" {paper.estimate:g} in the paper, whose network is not described further",
    )
    return Shown(TITLE, {"table2": _figure(before, after, same, limit[0], paper)}, findings, notes)


def published() -> Published:
    """Table 2 and the estimate in the text of appendix H.4.3."""
    numbers = load("unravel/table2").published
    (estimate,) = (p.value for p in load("unravel/alpha_lim").published.values())
    found: dict[float, dict[str, float]] = {}
    for (_, setting, metric), number in numbers.items():
        alpha = float(setting.rpartition("alpha=")[2])
        found.setdefault(alpha, {})[metric.partition("_")[0]] = float(number.value or np.nan)
    alphas = sorted(found)
    before, after = (np.array([found[a][when] for a in alphas]) for when in ("pre", "post"))
    return Published(np.array(alphas), after, after / before, float(estimate or np.nan))


def closest(grid: np.ndarray, value: float) -> float:
    """The rate of a grid with the least difference."""
    return float(grid[np.abs(grid - value).argmin()])


def _nearest(claim: str, after: Line, estimate: tuple[float, float], theirs: str = "") -> Finding:
    best, near = float(after.x[after.mean.argmin()]), closest(after.x, estimate[0])
    at = float(after.mean[after.x == near][0])
    measured = (
        f"alpha* = {estimate[0]:.4g} +- {estimate[1]:.1g}, next to it {near:g}; least at {best:g}, where the error is"
        f" {1 - after.mean.min() / at:.2%} less{theirs}"
    )
    return Finding(claim, "least error after adaptation at the rate nearest to alpha*", measured, best == near)


def _rising(after: Line, paper: Published) -> Finding:
    def rises(x: np.ndarray, y: np.ndarray) -> tuple[bool, str]:
        late = y[x >= RISES_FROM]
        text = ", ".join(f"{v / y.min():.3g}" for v in late)
        return bool(len(late) and late[0] > y.min() and (np.diff(late) > 0).all()), text

    ours, theirs = rises(after.x, after.mean), rises(paper.alphas, paper.after)
    return Finding(
        f"the error after adaptation rises from alpha = {RISES_FROM:g} on",
        "above the least, and more at each rate of the grid",
        f"{ours[1]} times the least; in the paper {theirs[1]}",
        ours[0],
    )


def _figure(before: Line, after: Line, same: Line, limit: float, paper: Published) -> Figure:
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axis, ratio = figure.subplots(1, 2)
    axis.errorbar(*before, fmt="s--", color="0.5", markersize=4, label="before the step, 95 % over tasks")
    axis.errorbar(*after, fmt="o-", color="tab:blue", markersize=4, label="after it")
    axis.errorbar(*same, fmt="^:", color="tab:orange", markersize=4, label="after it, on the step's own points")
    axis.set(ylabel="mean squared error on test tasks", title="ours")
    ratio.plot(after.x, after.mean / before.mean, "o-", color="tab:blue", markersize=4, label="ours")
    ratio.plot(paper.alphas, paper.ratio, "D-", color="tab:green", markersize=4, label="the paper's Table 2")
    ratio.axvline(paper.estimate, color="tab:green", linestyle="--", linewidth=1.2, label="the paper's alpha*")
    ratio.set(ylabel="error after the step / before it", title="beside the paper")
    for a in (axis, ratio):
        a.axvline(limit, color="tab:red", linewidth=1.2, label="alpha* (eq. 3.3), ours")
        a.set(xscale="log", xlabel="alpha")
        if a.get_ylim()[1] > 10 * a.get_ylim()[0] > 0:
            a.set(yscale="log")
        a.legend(fontsize=8)
    return figure
