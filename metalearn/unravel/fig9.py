"""Figure 9: the meta-loss over alpha, and what it is at alpha*_lim, for pairs of laws of data and optima."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Shown, labels, scalar, values
from metalearn.unravel.laws import law

TITLE = "Figure 9: loss over alpha for pairs of laws"

ALLOWED = 1.02
"""The loss at alpha*_lim over the least of the grid."""
COLUMNS = 3


def show(results: Sequence[Result]) -> Shown:
    """A panel and a finding for each pair of laws."""
    rows = -(-len(results) // COLUMNS)
    figure = Figure(figsize=(4.3 * min(len(results), COLUMNS), 3.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, min(len(results), COLUMNS), squeeze=False).ravel()
    for axis, letter, result in zip(axes, string.ascii_lowercase, results, strict=False):
        _panel(axis, result)
        axis.set_title(f"({letter}) {_title(result)}\n{_numbers(result)}", fontsize=9)
    for axis in axes[len(results) :]:
        axis.remove()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    study = results[0].config["study"]
    sizes = f"d = {study['width']}, K = {study['samples']}, N = {study['tasks']}"
    figure.suptitle(f"Figure 9 of Unraveling MAML: meta-loss over alpha, Gaussian basis, {sizes}")
    return Shown(TITLE, {"fig9": figure}, [_finding(r) for r in results], _notes(results))


def _title(result: Result) -> str:
    study = result.config["study"]
    return f"x ~ {law(study['inputs'])}, a ~ {law(study['optima'])}"


def _panel(axis: Axes, result: Result) -> None:
    rates, draws = _draws(result)
    axis.plot(rates, draws[:, 0], color="tab:blue", linewidth=0.7, label="meta-loss, each draw")
    axis.plot(rates, draws[:, 1:], color="tab:blue", linewidth=0.7)
    limit, half = scalar(result, "alpha_lim")
    axis.axvline(limit, color="tab:red", linestyle="--", label=r"$\alpha^*_{lim}$ (with 95 % band)")
    axis.axvspan(limit - half, limit + half, color="tab:red", alpha=0.2, lw=0)
    best = values(result, "best_alpha")
    axis.plot(best, [1] * len(best), "v", color="black", alpha=0.5, markersize=5, label="least of each draw")
    axis.axhline(ALLOWED, color="0.5", linestyle=":", label=f"{ALLOWED:g} x the least")
    axis.set(xlabel=r"adaptation rate $\alpha$", ylabel="meta-loss / its least over the grid")
    axis.set(xlim=(0, rates[-1]), ylim=(0.9, 1.3 * np.median(draws[0])))


def _numbers(result: Result) -> str:
    limit, start, there = (scalar(result, name)[0] for name in ("alpha_lim", "loss@at=0", "loss@at=lim"))
    return rf"mean loss {start:.3g} at 0, {there:.3g} at $\alpha^*_{{lim}}$ = {limit:.3g}"


def _draws(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Rates `[rates]` and the relative losses `[rates, draws]`."""
    rows = result.every_episode()
    table = rows[rows["metric"] == "relative_loss"].pivot_table(index="group", columns="episode", values="value")
    rates = labels(result, "relative_loss", "alpha")
    return np.array(rates, float), table.loc[[f"alpha={rate}" for rate in rates]].to_numpy()


def _finding(result: Result) -> Finding:
    excess = 100 * (values(result, "excess") - 1)
    limit, best = scalar(result, "alpha_lim")[0], values(result, "best_alpha")
    return Finding(
        f"alpha*_lim is the best rate ({_title(result)})",
        f"the loss there is at most {ALLOWED:g} x the least of the grid, in every draw",
        f"{excess.max():.2g} % above the least at most, {excess.mean():.2g} % on average ({len(excess)} draws);"
        f" alpha*_lim is {limit:.3g}, the best rates {best.min():.3g} to {best.max():.3g}",
        bool((excess <= 100 * (ALLOWED - 1)).all()),
    )


def _notes(results: Sequence[Result]) -> tuple[str, ...]:
    study = results[0].config["study"]
    heavy = "Theorem 1 asks for optima of finite variance and many tasks: where a few optima are huge, the meta-loss is"
    return (
        f"not stated in the paper and ours: {study['width']} centres evenly within {study['reach']:.3g} deviations of"
        " the mean of the data, each as wide as the distance to the next; one number for each feature of a sample"
        " (study.scalar=true: one for all); the mean of the non-central normal law; Zipf's exponent and largest value",
        "moving or scaling all optima multiplies the meta-loss by a number that does not depend on alpha: panels with"
        " the same law of x and normal optima are one curve, and confirm the claim once",
        "alpha*_lim is no point of the grid, so that the loss there can be just below the grid's least",
        f"{heavy} that of their tasks alone, and its best rate theirs",
    )
