"""Corollary 1: alpha*_lim between its two bounds, design by design."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from metalearn.evaluation.metrics import metric_name, qualifiers_of
from metalearn.results import Result
from metalearn.shown import Finding, Shown, scalar

TITLE = "Corollary 1: bounds of alpha*_lim"


def show(results: Sequence[Result]) -> Shown:
    """Bounds and alpha*_lim of every design; the claims are those of (3.5)."""
    result = results[0]
    designs = [qualifiers_of(n) for n in result.data["metrics"] if n.startswith("alpha_lim@")]
    rows = [(q, *(scalar(result, metric_name(m, **q)) for m in ("alpha_lim", "lower", "upper"))) for q in designs]
    return Shown(
        TITLE, {"corollary1": _figure(rows)}, [_upper(rows), _lower(rows, fixed=True), _lower(rows, fixed=False)]
    )


ROUNDING = 1e-9


def _below(row: tuple) -> bool:  # type: ignore[type-arg]
    """Whether alpha*_lim, with its interval, is below the lower bound."""
    _, value, lower, _ = row
    return bool(value[0] + value[1] < lower[0] * (1 - ROUNDING))


def _upper(rows: Sequence[tuple]) -> Finding:  # type: ignore[type-arg]
    highest = max(value[0] / upper[0] for _, value, _, upper in rows)
    return Finding(
        "alpha*_lim <= d / (2 sigma^2)",
        "in every design",
        f"alpha*_lim is at most {highest:.3g} of the bound in {len(rows)} designs",
        highest <= 1 + ROUNDING,
    )


def _lower(rows: Sequence[tuple], *, fixed: bool) -> Finding:  # type: ignore[type-arg]
    own = [r for r in rows if (r[0]["design"] == "fixed") == fixed]
    broken = [r for r in own if _below(r)]
    measured = f"broken in {len(broken)} of {len(own)} designs"
    if broken:
        q, value, lower, _ = max(broken, key=lambda r: r[2][0] / r[1][0])
        measured += f", most for {_label(q)}: {value[0]:.3g} +- {value[1]:.1g} where the bound is {lower[0]:.3g}"
    where = "the same design in all tasks" if fixed else "random designs"
    return Finding(f"1 / (2 d sigma^2) <= alpha*_lim, {where}", "in every design, beyond 95 %", measured, not broken)


def _label(q: dict[str, str]) -> str:
    return f"{q['design'].replace('_s', ', s = ')}, K = {q['K']}, d = {q['d']}"


def _figure(rows: Sequence[tuple]) -> Figure:  # type: ignore[type-arg]
    rows = sorted(rows, key=lambda r: (r[0]["design"], int(r[0]["d"]), int(r[0]["K"])))[::-1]
    figure = Figure(figsize=(7.5, 1.2 + 0.24 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(rows):
        (_, value, lower, upper), broken = row, _below(row)
        axis.plot([lower[0], upper[0]], [i, i], color="0.7", linewidth=5, solid_capstyle="butt")
        axis.plot(value[0], i, "X" if broken else "o", color="tab:red" if broken else "tab:blue", markersize=6)
    axis.plot([], [], color="0.7", linewidth=5, label="between the bounds")
    axis.plot([], [], "o", color="tab:blue", label="alpha*_lim, inside")
    axis.plot([], [], "X", color="tab:red", label="alpha*_lim, below the lower bound")
    axis.set_yticks(range(len(rows)), [_label(r[0]) for r in rows], fontsize=8)
    axis.set(xscale="log", xlabel="adaptation learning rate", title="Corollary 1 of Unraveling MAML")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.6 / len(rows)), ncols=3, frameon=False)
    return figure
