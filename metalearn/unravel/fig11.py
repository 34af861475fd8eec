"""Figure 11: loss over the adaptation rate in Bernacchia's linear regression, with the ranges of the estimators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Line, Shown, line, scalar, values

TITLE = "Figure 11: linear regression as Bernacchia has it"

NEAR = 0.02
"""How far the best rate may be from the estimate."""
HEURISTIC = "H.18 heuristic"


def show(results: Sequence[Result]) -> Shown:
    """Loss over the rate, the same in training and tests or that of training alone; both papers' claims."""
    result = results[0]
    study = result.config["study"]
    findings = [_positive(result), _near(result), _inside(result), _negative(result, study["fixed_rate"])]
    (free, half), (loss, _) = scalar(result, "best_rate@test=best"), scalar(result, "least_loss@test=best")
    notes = (
        "losses have the factor 1/2, so that rates are twice those of eq. 3.3; they are exact but for the training "
        f"tasks: mean of {study['runs']} draws",
        f"with the best alpha_r for each alpha_t, the best alpha_t is {free:.3f} +- {half:.1g} (loss {loss:.4f}); the "
        "best alpha_r is positive for any start",
        "Bernacchia's case of fewer query samples than parameters is not in the figure and not judged",
    )
    return Shown(TITLE, {"fig11": _figure(result)}, findings, notes)


# ---- claims ------------------------------------------------------------------------------------------------------


def _positive(result: Result) -> Finding:
    (rate, half), (loss, _) = scalar(result, "best_rate@test=same"), scalar(result, "least_loss@test=same")
    return Finding(
        "Unraveling MAML: the best rate is positive if it is the same in training and tests",
        "beyond 95 %",
        f"{rate:.3f} +- {half:.1g}, loss {loss:.4f}",
        rate - half > 0,
    )


def _near(result: Result) -> Finding:
    (rate, _), (alpha, _) = scalar(result, "best_rate@test=same"), scalar(result, "alpha")
    return Finding(
        "that best rate is near the estimate n_t / (n_t + p + 1), twice Corollary 2",
        f"within {NEAR:g}",
        f"{rate:.3f} beside {alpha:.3f}",
        abs(rate - alpha) <= NEAR,
    )


def _inside(result: Result) -> Finding:
    rate = scalar(result, "best_rate@test=same")[0]
    low, high = _ranges(result)[HEURISTIC]
    return Finding(
        "that best rate is inside the heuristic range of H.18",
        "between its ends",
        f"{rate:.3f} beside {low:.3g} to {high:.3g}, from the range of the features",
        low <= rate <= high,
        ours=True,
    )


def _negative(result: Result, fixed: float) -> Finding:
    (rate, half), (loss, _) = scalar(result, "best_rate@test=fixed"), scalar(result, "least_loss@test=fixed")
    excess = scalar(result, "excess@test=fixed")[0]
    return Finding(
        f"Bernacchia: the best rate of training is negative, that of tests being fixed (alpha_r = {fixed:g})",
        "beyond 95 %",
        f"{rate:.3f} +- {half:.1g}, loss {loss:.4f}; but the loss is flat there, {excess / loss:.2%} higher at rate 0",
        rate + half < 0,
    )


def _ranges(result: Result) -> dict[str, tuple[float, float]]:
    low, high = np.quantile(values(result, "estimate"), [0.025, 0.975])
    ends = [scalar(result, f"heuristic@end={end}")[0] for end in ("low", "high")]
    return {"Corollary 2, 95 % of draws": (low, high), HEURISTIC: (ends[0], ends[1])}


# ---- picture -----------------------------------------------------------------------------------------------------


def _figure(result: Result) -> Figure:
    study = result.config["study"]
    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    fixed = f"alpha_r = {study['fixed_rate']:g} in tests"
    for column, (test, title) in enumerate((("same", "the same rate in tests"), ("fixed", fixed))):
        curve = line(result, "loss", "rate", test=test)
        whole, close = axes[0, column], axes[1, column]
        _curve(whole, curve, "C0", "loss, 95 %")
        _marked(whole, result, test)
        _curve(close, curve, "C0", "loss, 95 %")
        shown = [curve]
        if test == "fixed":
            shown.append(line(result, "loss", "rate", test="best"))
            _curve(close, shown[1], "C1", "loss, best alpha_r for each alpha_t")
        _marked(close, result, test)
        _banded(close, result)
        low, high = _ranges(result)[HEURISTIC]
        _limited(close, shown, low - 0.35 * (high - low), high)
        whole.set(title=f"({'ab'[column]}) {title}")
        close.set(title=f"({'cd'[column]}) {title}, and estimates")
        whole.legend(fontsize=8, loc="upper center")
        close.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
        for axis in (whole, close):
            axis.axvline(0, color="k", linewidth=0.8)
            rate = "rate alpha_t = alpha_r" if test == "same" else "rate of training alpha_t"
            axis.set(xlabel=rate, ylabel="loss (1/2 MSE, target units squared)")
    figure.suptitle(
        "Figure 11 of Unraveling MAML: Bernacchia's linear regression, "
        f"n_t = {study['support']}, n_v = {study['query']}, n_r = {study['test_support']}, m = {study['tasks']}, "
        f"p = {study['width']}, sigma = {study['noise']:g}, nu = {study['spread']:g}"
    )
    return figure


def _limited(axis: Axes, curves: Sequence[Line], low: float, high: float) -> None:
    """Only rates from low to high, and the losses there."""
    seen = np.concatenate([of.mean[(of.x >= low) & (of.x <= high)] for of in curves])
    margin = 0.08 * np.ptp(seen)
    axis.set(xlim=(low, high), ylim=(seen.min() - margin, seen.max() + margin))


def _curve(axis: Axes, of: Line, colour: str, label: str) -> None:
    axis.plot(of.x, of.mean, color=colour, label=label)
    axis.fill_between(of.x, of.mean - of.ci95, of.mean + of.ci95, color=colour, alpha=0.25, linewidth=0)


def _marked(axis: Axes, result: Result, test: str) -> None:
    (rate, half), (loss, _) = scalar(result, f"best_rate@test={test}"), scalar(result, f"least_loss@test={test}")
    axis.errorbar(rate, loss, xerr=half, fmt="v", color="k", markersize=6, label=f"least: {rate:.3f} +- {half:.1g}")
    alpha = scalar(result, "alpha")[0]
    axis.axvline(alpha, color="tab:red", linestyle="--", linewidth=1, label=f"estimate, twice Corollary 2: {alpha:.3f}")


def _banded(axis: Axes, result: Result) -> None:
    for (name, (low, high)), colour in zip(_ranges(result).items(), ("tab:red", "tab:green"), strict=True):
        axis.axvspan(low, high, color=colour, alpha=0.12, linewidth=0, label=name)
