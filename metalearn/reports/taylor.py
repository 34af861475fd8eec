"""Report: which combination of AvgGrad and AvgGradInner MAML, FOMAML and Reptile follow (overview, eq. 33-41)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from metalearn.options import whole
from metalearn.reports import Content, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Taylor coefficients of MAML, FOMAML and Reptile (overview, eq. 33-41)"
DESCRIPTION = """E[g] = a AvgGrad - b alpha AvgGradInner + O(alpha^2) for k minibatches: a and b by regression over
random quadratic tasks, the order of what the expansions leave out, and their exactness for linear losses."""
NAMES = {"maml": "MAML", "fomaml": "FOMAML", "reptile": "Reptile"}
Rows = list[dict[str, Any]]


def options(parser: argparse.ArgumentParser) -> None:
    """Number of tasks."""
    text = "random tasks of the regression; default 100000 (ten seconds or so)"
    parser.add_argument("--tasks", type=whole(100), default=100_000, metavar="N", help=text)


def run(options: argparse.Namespace) -> Content:
    """The study of `metalearn.theory.taylor` as a table and a picture."""
    from metalearn.theory import taylor

    found = taylor.study(options.seed, tasks=options.tasks)
    rows = found["coefficients"]
    outside = [r for r in rows if not r["holds"]]
    parts = [
        "# Taylor coefficients of the outer gradients",
        f"E[g] = a AvgGrad - b alpha AvgGradInner + O(alpha^2) for k minibatches. Measured by regression over "
        f"{options.tasks} random quadratic tasks, +- 3 standard errors over tasks; the two columns before the last "
        "are what the other vector contributes at the same order, in theory 0.",
        _coefficients(rows),
        f"{len(rows) - len(outside)} of {len(rows)} coefficients lie within 3 standard errors of the theory."
        + "".join(f"\nOutside: {NAMES[r['algorithm']]}, k = {r['k']}, {r['term']}." for r in outside),
        "Residuals of the expansions: the factor by which halving alpha (1e-4 to 5e-5) divides them on log-cosh losses "
        "(4 for O(alpha^2)); their size on linear losses (0: no curvature, no residual); and the error of b when "
        "AvgGrad and AvgGradInner come from the same 200 tasks and all k! orders are averaged (no Monte-Carlo error is "
        "left, only O(alpha): at alpha 1e-3, and at half of that; for k = 2 nothing is left of FOMAML and Reptile, "
        "whose expansions are exact for quadratics).",
        _orders(found),
    ]
    return Content("\n\n".join(parts), found, {"residuals": _figure(found["orders"])})


def _coefficients(rows: Rows) -> str:
    lines = []
    for name, k in dict.fromkeys((r["algorithm"], r["k"]) for r in rows):
        own = [r for r in rows if (r["algorithm"], r["k"]) == (name, k)]
        cells = [f"{r['measured']:.3f} +- {r['three_se']:.3f}" for r in own]
        holds = "yes" if all(r["holds"] for r in own) else "no"
        a, b = (f"{r['theory']:g}" for r in own[:2])
        lines.append([NAMES[name], str(k), a, cells[0], b, cells[1], cells[2], cells[3], holds])
    columns = [
        "algorithm",
        "k",
        "a",
        "measured",
        "b",
        "measured",
        "AvgGrad at O(alpha)",
        "AvgGradInner at O(1)",
        "holds",
    ]
    return table(columns, lines)


def _orders(found: dict[str, Rows]) -> str:
    lines = []
    for order, linear, sample in zip(found["orders"], found["linear"], found["in_sample"], strict=True):
        lines.append(
            [NAMES[order["algorithm"]], str(order["k"]), f"{order['ratio']:.4f}", f"{linear['residual']:.0e}"]
            + [f"{sample['error']:.1e}", f"{sample['error_at_half']:.1e}"]
            + ["yes" if order["holds"] and linear["holds"] else "no"]
        )
    return table(["algorithm", "k", "ratio", "linear", "error of b", "at alpha / 2", "holds"], lines)


def _figure(orders: Rows) -> Figure:
    from matplotlib.figure import Figure

    ks = list(dict.fromkeys(r["k"] for r in orders))
    figure = Figure(figsize=(3 * len(ks), 3.2), layout="constrained")
    axes = figure.subplots(1, len(ks), sharex=True, sharey=True, squeeze=False)[0]
    for axis, k in zip(axes, ks, strict=True):
        own = [r for r in orders if r["k"] == k]
        for row, style in zip(own, ("o-", "s--", "^:"), strict=True):
            axis.loglog(*zip(*row["residuals"], strict=True), style, markersize=3, label=NAMES[row["algorithm"]])
        alphas = [alpha for alpha, _ in own[0]["residuals"]]
        scale = min(r["residuals"][0][1] for r in own) / alphas[0] ** 2 / 4
        axis.loglog(alphas, [scale * alpha**2 for alpha in alphas], color="grey", linewidth=0.8, label="slope 2")
        axis.set_title(f"k = {k}")
        axis.set_xlabel("inner rate alpha")
    axes[0].set_ylabel("|g - expansion| / |g|")
    axes[0].legend(fontsize=8)
    return figure
