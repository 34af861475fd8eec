"""Figure 4(b): alpha*_lim of tangent features over the variance of the data, and the power of it that fits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Line, Shown, labels, line, scalar

TITLE = "Figure 4(b): the same with tangent features"

LATE = 3.0
"""Variances from which on the power is fitted: ten times less than the largest of the paper's."""
NEAR = 0.1


def show(results: Sequence[Result]) -> Shown:
    """Two readings of "decreasing like 1 / variance": that it falls, and that the exponent is -1."""
    result = results[0]
    curves = {law: line(result, "alpha_lim", "variance", law=law) for law in labels(result, "alpha_lim", "law")}
    moments = {law: line(result, "second_moment", "variance", law=law) for law in curves}
    zero = scalar(result, "alpha_zero")[0]
    note = (
        f"without spread of the data alpha* is {zero:.3g}, not infinite: biases and the constant feature remain, and"
        " 1 / variance is the law of large variances alone"
    )
    return Shown(TITLE, {"fig4b": _figure(result, curves, moments, zero)}, [_falls(curves), _inverse(curves)], (note,))


def _exponents(curves: dict[str, Line], low: float, high: float) -> dict[str, float]:
    """Slopes of log alpha over log variance by least squares, between two variances; of laws with two points there."""
    found = {}
    for law, c in curves.items():
        where = (c.x >= low) & (c.x <= high)
        if where.sum() > 1:
            found[law] = float(np.polyfit(np.log(c.x[where]), np.log(c.mean[where]), 1)[0])
    return found


def _falls(curves: dict[str, Line]) -> Finding:
    up = np.concatenate([np.diff(c.mean) > 0 for c in curves.values()])
    spans = ", ".join(f"{law} from {c.mean[0]:.3g} to {c.mean[-1]:.3g}" for law, c in curves.items())
    variances = next(iter(curves.values())).x
    return Finding(
        "alpha*_lim decreases with the variance of the data",
        "at each variance of the grid less than at the one before, for every law",
        f"{spans}, over variances {variances[0]:g} to {variances[-1]:g}; it rises in {up.sum()} of {len(up)} steps",
        not up.any(),
    )


def _inverse(curves: dict[str, Line]) -> Finding:
    late, early = _exponents(curves, LATE, math.inf), _exponents(curves, 0, 1)
    texts = [f"{law} {late[law]:.2f}" for law in late]
    measured = f"exponents from variance {LATE:g} on: {', '.join(texts) or 'too few variances'}"
    if early:
        measured += f"; up to variance 1: {', '.join(f'{law} {e:.2f}' for law, e in early.items())}"
    return Finding(
        "alpha*_lim is like 1 / variance",
        f"exponent of the variance within {NEAR:g} of -1 from {LATE:g} on, for every law",
        measured,
        all(abs(e + 1) <= NEAR for e in late.values()) if late else None,
    )


def _figure(result: Result, curves: dict[str, Line], moments: dict[str, Line], zero: float) -> Figure:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    plain, logarithmic, feature = figure.subplots(1, 3)
    for law, c in curves.items():
        for axis in (plain, logarithmic):
            axis.errorbar(*c, fmt="o-", markersize=3, label=law)
        feature.errorbar(moments[law].mean, c.mean, c.ci95, fmt="o-", markersize=3, label=law)
    last = next(iter(curves.values()))
    x = np.geomspace(LATE / 3, last.x[-1], 50)
    for axis in (plain, logarithmic):
        axis.plot(x, last.mean[-1] * last.x[-1] / x, ":", color="black", label="1 / variance, through the last point")
        axis.axhline(zero, color="0.6", linestyle="--", linewidth=1, label="data without spread")
        axis.set(xlabel="variance of the data", ylabel="alpha*_lim (eq. 3.3, 95 % over tasks)")
    s = np.array(sorted(v for m in moments.values() for v in m.mean))
    feature.plot(s, 1 / (2 * s), ":", color="black", label="1 / (2 second moment)")
    feature.set(xscale="log", yscale="log", xlabel="second moment of the features, tr E[G] / K")
    feature.set(ylabel="alpha*_lim (eq. 3.3, 95 % over tasks)")
    logarithmic.set(xscale="log", yscale="log")
    plain.set_ylim(0, 1.1 * max(zero, *(c.mean.max() for c in curves.values())))
    for axis in (plain, logarithmic, feature):
        axis.legend(fontsize=8)
    study = result.config["study"]
    figure.suptitle(
        "Figure 4(b) of Unraveling MAML: alpha*_lim over the variance of the data, tangent features of a two-layer"
        f" network ({study['init']} initialisation, width {study['width']}), K = {study['samples']}",
        fontsize=11,
    )
    return figure
