"""MAML's minimiser over its rate, drawn in the plane: what Figures 1 and 7 have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Line, Shown, labels, line, scalar, values
from metalearn.unravel.laws import law

NEAR = 0.25
"""The least distance is near alpha*_lim if its rate differs by at most this share."""
INNER, OUTER = "tab:blue", "tab:gray"


def show(number: int, words: str, results: Sequence[Result]) -> Shown:
    """A row of panels for each result: the path, the mean distance, and where it is least for other penalties.

    Args:
        number: of the paper's figure.
        words: what it shows.
        results: one for each pair of laws.
    """
    figure = Figure(figsize=(13, 4.2 * len(results) + 0.4), layout="constrained")
    for axes, result in zip(figure.subplots(len(results), 3, squeeze=False), results, strict=True):
        _plane(axes[0], result)
        _distances(axes[1], result)
        _penalties(axes[2], result)
    findings = [f for r in results for f in (_falls(r), _near(r), _outer(r))]
    figure.suptitle(f"Figure {number} of Unraveling MAML: {words}")
    return Shown(f"Figure {number}: {words}", {f"fig{number}": figure}, findings, _notes(results))


def title(result: Result) -> str:
    """Laws of features and optima."""
    study = result.config["study"]
    return f"x ~ {law(study['inputs'])}, a ~ {law(study['optima'])}"


# ---- panels ------------------------------------------------------------------------------------------------------


def _plane(axis: Axes, result: Result) -> None:
    study = result.config["study"]
    optima = np.array([values(result, "optimum", axis=i) for i in (1, 2)])
    near = np.arange(optima.shape[1]) < study["tasks"]
    axis.scatter(optima[0, near], optima[1, near], s=5, color="0.75", label=f"optima of {study['tasks']} tasks")
    far = f"{study['far_tasks']} far tasks, penalty {study['penalty']:g}"
    axis.scatter(optima[0, ~near], optima[1, ~near], s=7, color="tab:orange", label=far)
    for how, colour, text in (
        ("outer", OUTER, r"$w_m(\alpha)$, penalty outside alone"),
        ("loss", INNER, r"$w_m(\alpha)$, penalty in the loss"),
    ):
        x, y = _path(result, how)
        axis.plot(x.mean, y.mean, color=colour, linewidth=2, label=text)
        for ratio, marker in ((0, "s"), (1, "*"), (study["span"], "o")):
            at = int(np.argmin(abs(x.x - ratio)))
            size = 12 if marker == "*" else 6
            axis.plot(x.mean[at], y.mean[at], marker, color=colour, markeredgecolor="black", markersize=size, zorder=4)
    x, y = _path(result, "loss")
    tangent = np.array([scalar(result, f"tangent@axis={i},penalty=loss")[0] for i in (1, 2)])
    extent = 0.25 * np.ptp(optima, axis=1).max() * tangent / np.linalg.norm(tangent)
    arrow = {"arrowstyle": "-|>", "color": "tab:red", "linewidth": 1.5}
    axis.annotate(
        "", xytext=(x.mean[0], y.mean[0]), xy=(x.mean[0] + extent[0], y.mean[0] + extent[1]), arrowprops=arrow
    )
    axis.plot([], [], color="tab:red", label=r"derivative at $\alpha$ = 0")
    for marker, text in (("s", "0 (ERM)"), ("*", r"$\alpha^*_{lim}$"), ("o", rf"{study['span']:g} $\alpha^*_{{lim}}$")):
        axis.plot([], [], marker, color="white", markeredgecolor="black", label=rf"$\alpha$ = {text}")
    axis.set(xlabel="first coordinate of w, a", ylabel="second coordinate", aspect="equal")
    axis.set_title(f"one draw, {title(result)}", fontsize=10)
    axis.legend(fontsize=7, loc="upper left")


def _distances(axis: Axes, result: Result) -> None:
    for how, colour, text in (("loss", INNER, "penalty in the loss"), ("outer", OUTER, "penalty outside alone")):
        found = line(result, "distance", "ratio", penalty=how)
        axis.plot(found.x, found.mean, color=colour, label=text)
        axis.fill_between(found.x, found.mean - found.ci95, found.mean + found.ci95, color=colour, alpha=0.25, lw=0)
        best = found.mean.argmin()
        axis.plot(found.x[best], found.mean[best], "v", color=colour, markeredgecolor="black")
    limits = [f"{scalar(result, f'alpha_lim@penalty={how}')[0]:.3g}" for how in ("loss", "outer")]
    text = rf"$\alpha^*_{{lim}}$ (in the loss {limits[0]}, outside {limits[1]})"
    axis.axvline(1, color="black", linestyle="--", linewidth=1, label=text)
    axis.plot([], [], "v", color="white", markeredgecolor="black", label="least")
    axis.set(xlabel=r"$\alpha\ /\ \alpha^*_{lim}$", ylabel=r"mean distance $\|w_m(\alpha) - a_i\|$")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    axis.set_title(f"mean over {result.config['study']['draws']} draws, 95 % band", fontsize=10)
    axis.legend(fontsize=7, loc="upper center", framealpha=1)


def _penalties(axis: Axes, result: Result) -> None:
    factors = np.array(sorted(map(float, labels(result, "nearest", "factor"))))
    found = line(result, "nearest", "factor")
    axis.errorbar(factors, found.mean, found.ci95, marker="o", capsize=3, color=INNER)
    axis.axhspan(1 - NEAR, 1 + NEAR, color="tab:green", alpha=0.12, label=f"within {NEAR:.0%}")
    axis.axhline(1, color="black", linestyle="--", linewidth=1)
    axis.axvline(result.config["study"]["penalty"], color="0.6", linestyle=":", label="the penalty of the other panels")
    axis.set(
        xscale="log", xlabel="penalty of the far cluster", ylabel=r"rate of the least distance $/\ \alpha^*_{lim}$"
    )
    axis.set_ylim(0, None)
    axis.set_title("other penalties, in the loss", fontsize=10)
    axis.set_xticks(factors, [f"{f:g}" for f in factors])
    axis.minorticks_off()
    axis.legend(fontsize=7, loc="lower right")


def _path(result: Result, how: str) -> tuple[Line, Line]:
    first, second = (line(result, "w", "ratio", axis=i, penalty=how) for i in (1, 2))
    return first, second


# ---- findings ----------------------------------------------------------------------------------------------------


def _falls(result: Result) -> Finding:
    falls = values(result, "fall", penalty="loss")
    return Finding(
        f"the mean distance to the optima falls from alpha = 0 on ({title(result)})",
        "its derivative at 0 is negative in every draw",
        f"in {_share(falls)} draws; followed up to alpha*_lim, the slope at 0 would take {falls.mean():.0%} of the"
        " distance away, on average",
        bool((falls > 0).all()),
    )


def _near(result: Result) -> Finding:
    at = values(result, "nearest", penalty="loss")
    return Finding(
        f"the mean distance is least near alpha*_lim ({title(result)})",
        f"on average within {NEAR:.0%} of it",
        f"at {at.mean():.2f} alpha*_lim on average ({at.min():.2f} to {at.max():.2f} in {len(at)} draws)",
        bool(abs(at.mean() - 1) <= NEAR),
    )


def _outer(result: Result) -> Finding:
    falls, at = values(result, "fall", penalty="outer"), values(result, "nearest", penalty="outer")
    return Finding(
        f"both claims above hold if the penalty stays outside the inner step, too ({title(result)})",
        f"derivative at 0 negative in every draw, least distance on average within {NEAR:.0%} of alpha*_lim",
        f"negative in {_share(falls)} draws; least at {at.mean():.2f} alpha*_lim on average ({at.min():.2f} to"
        f" {at.max():.2f})",
        bool((falls > 0).all() and abs(at.mean() - 1) <= NEAR),
    )


def _share(falls: np.ndarray) -> str:
    return f"{(falls > 0).sum()} of {len(falls)}"


def _notes(results: Sequence[Result]) -> tuple[str, ...]:
    study = results[0].config["study"]
    return (
        f"not stated in the paper and ours: K = {study['samples']}, the laws of Figure 1, the far cluster"
        f" ({study['far_tasks']} tasks around ({study['far']:g}, {study['far']:g})), its penalty {study['penalty']:g}",
        "a penalty moves the minimiser with alpha only if it multiplies the loss in the inner step, too: outside alone,"
        " the expected S_i(alpha) of all tasks are equal up to that factor, and what moves the minimiser is chance",
        *(f"rate of the least distance over alpha*_lim, by penalty ({title(r)}): {_by_penalty(r)}" for r in results),
    )


def _by_penalty(result: Result) -> str:
    found = line(result, "nearest", "factor")
    return ", ".join(f"{m:.2f} at {f:g}" for f, m in zip(found.x, found.mean, strict=True))
