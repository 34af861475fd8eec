"""Report: the bounds of TSA-MAML's theorems beside what they bound, on logistic regression."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from metalearn.options import whole
from metalearn.reports import Content, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Theorems 1 and 2 and Corollary 1 of TSA-MAML, on logistic regression"
DESCRIPTION = """Excess risk ER(q) and expected gradient EPG(q) after q steps of gradient descent from theta*, beside
their bounds, for alpha = 1 and 4, K samples, and m initialisations that an oracle routes tasks to."""
Records = list[dict[str, Any]]
Q, ALPHA, K = 4, 4.0, 10


def options(parser: argparse.ArgumentParser) -> None:
    """Numbers of tasks and data sets."""
    parser.add_argument("--tasks", type=whole(10), default=60, metavar="N", help="default 60 (a minute or so)")
    text = "data sets of each task; default 20"
    parser.add_argument("--sets", type=whole(2), default=20, metavar="N", help=text)


def run(options: argparse.Namespace) -> Content:
    """The study of `metalearn.theory.logistic` as tables and a picture."""
    from metalearn.theory import logistic

    found = logistic.study(options.seed, tasks=options.tasks, sets=options.sets)
    theorems, corollary, constants = found["theorems"], found["corollary"], found["empirical_constants"]
    shown = [r for r in theorems if r["K"] == K]
    across = [r for r in theorems if (r["alpha"], r["q"]) == (ALPHA, Q)]
    groups = [r for r in corollary if (r["alpha"], r["q"]) == (ALPHA, Q)]
    parts = [
        "# Bounds of TSA-MAML's theorems",
        f"Logistic regression on the unit ball (G = 1, L_s = 1/4; the largest seen: G {constants['lipschitz']:.2f}, "
        f"L_s {constants['smoothness']:.4f}). Means over {options.tasks} tasks and {options.sets} data sets of each. "
        "*gap* is the generalisation gap E[L_T - L_D], which the first term bounds; *2aG2q/K* is what convex stability "
        "gives for it; b' is (b) with L_s / 2 in the place of 1 / (2 alpha).",
        f"Theorems 1 and 2, K = {K}, one theta* (the mean of the theta_T*):",
        _theorems(shown, "q"),
        f"The same for other K, alpha = {ALPHA:g}, q = {Q}:",
        _theorems(across, "K"),
        f"Corollary 1: m initialisations, each task at its nearest one, alpha = {ALPHA:g}, K = {K}:",
        _corollary(corollary, groups),
        _findings(theorems, corollary),
    ]
    return Content("\n\n".join(parts), found, {"bounds": _figure(shown, across, corollary)})


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.1e}"


def _theorems(records: Records, axis: str) -> str:
    names = ["er", "gap", "convex_first", "first", "a", "b", "b_smooth", "epg", "epg_bound"]
    rows = []
    for r in records:
        verdict = "-" if not r["holds"] else "yes" if all(r["holds"].values()) else "no"
        rows.append([f"{r['alpha']:g}", str(r[axis]), *(_number(r[name]) for name in names), verdict])
    columns = ["alpha", axis, "ER", "gap", "2aG2q/K", "first term", "(a)", "(b)", "b'", "EPG", "its bound", "hold"]
    return table(columns, rows)


def _corollary(records: Records, chosen: Records) -> str:
    rows = []
    for r in chosen:
        own = [s for s in records if (s["m"], s["alpha"]) == (r["m"], r["alpha"])]
        rows.append([str(r["m"]), _number(r["dist2_start"]), *(_number(s["er"]) for s in own)])
        rows[-1] += [_number(r["a"]), _number(r["b"]), "yes" if all(r["holds"].values()) else "no"]
    qs = [f"ER, q = {r['q']}" for r in records if (r["m"], r["alpha"]) == (1, ALPHA)]
    return table(["m", "E dist2", *qs, f"(a), q = {Q}", f"(b), q = {Q}", "hold"], rows)


def _findings(theorems: Records, corollary: Records) -> str:
    """Sentences that the numbers decide."""
    moved = [r for r in (*theorems, *(r for r in corollary if r["m"] > 1)) if r["holds"]]
    lines = []
    for name in moved[0]["holds"]:
        true = sum(r["holds"][name] for r in moved)
        lines.append(f"- {name}: in {true} of {len(moved)} cases.")
    moved = [r for r in theorems if r["holds"]]
    start = {(r["alpha"], r["K"]): r["er"] for r in theorems if r["q"] == 0}
    empty = sum(r["a"] > start[r["alpha"], r["K"]] for r in moved)
    lines.append(
        f"- (a) exceeds the excess risk without any step, and so says nothing, in {empty} of {len(moved)} cases."
    )
    ratios = sorted(r["a"] / r["er"] for r in moved)
    lines.append(f"- (a) / ER with one theta*: {_number(ratios[0])} to {_number(ratios[-1])}.")
    for m in sorted({r["m"] for r in corollary}):
        own = [r for r in corollary if r["m"] == m and r["alpha"] == ALPHA]
        best = min(own, key=lambda r: r["er"])
        lowest = min(own, key=lambda r: r["a"])
        lines.append(
            f"- m = {m}, alpha = {ALPHA:g}: ER is least at q = {best['q']}, (a) at q = {lowest['q']} (of the q shown)."
        )
    distances = [r["dist2_start"] for r in corollary if (r["alpha"], r["q"]) == (ALPHA, 0)]
    falls = all(b <= a for a, b in zip(distances, distances[1:], strict=False))
    lines.append(f"- E|theta - theta_T*|^2 {'falls' if falls else 'does not always fall'} with m.")
    return "\n".join(lines)


def _figure(shown: Records, across: Records, corollary: Records) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps = [r for r in shown if r["alpha"] == ALPHA and r["q"]]
    names = {"b": "bound (b)", "a": "bound (a)", "convex_first": "2 alpha G^2 q / K", "gap": "gap", "er": "ER"}
    _lines(left, steps, "q", names)
    left.set(xlabel="inner steps q", ylabel="excess risk", title=f"Theorem 1, alpha = {ALPHA:g}, K = {K}")
    names = {"er": "ER", "first": "first term of (a)", "epg": "EPG", "epg_bound": "bound of EPG"}
    _lines(middle, across, "K", names)
    middle.set(xlabel="samples K", ylabel="risk; squared gradient", title=f"alpha = {ALPHA:g}, q = {Q}")
    for axis, records, x in ((left, steps, "q"), (middle, across, "K")):
        axis.set_yscale("log")
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks([r[x] for r in records], [str(r[x]) for r in records])
    for m, style in zip(sorted({r["m"] for r in corollary}), ("o-", "s-", "^-", "v-", "d-"), strict=False):
        own = [r for r in corollary if r["m"] == m and r["alpha"] == ALPHA]
        right.plot([r["q"] for r in own], [r["er"] for r in own], style, markersize=4, label=f"m = {m}")
    right.set(xlabel="inner steps q", ylabel="excess risk ER", title=f"Corollary 1, alpha = {ALPHA:g}, K = {K}")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    return figure


def _lines(axis: Axes, records: Records, x: str, names: dict[str, str]) -> None:
    for (name, label), style in zip(names.items(), ("o-", "s--", "^--", "v:", "d-"), strict=False):
        axis.plot([r[x] for r in records], [r[name] for r in records], style, markersize=4, label=label)
    axis.legend(fontsize=8)
