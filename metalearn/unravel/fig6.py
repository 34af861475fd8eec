"""Figure 6: the coefficients of polynomial moments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Line, Shown, line, scalar

TITLE = "Figure 6: coefficients of polynomial moments"

ROUNDING = 1e-9
MEANING = {1: "pairs i + j = n", 2: "triples i + j + h = n", 3: "triples i + 2j + h = n"}


def show(results: Sequence[Result]) -> Shown:
    """The three coefficients over n; their formula, sums, and the traces that they are made for."""
    result = results[0]
    study = result.config["study"]
    found = {g: line(result, "coefficient", "order", g=g) for g in MEANING}
    findings = [_formula(found[1], study["width"]), _sums(result, study["width"]), _traces(result, study["samples"])]
    notes = (
        "only the formula of g1 is taken from the paper; g2 and g3 are what the expansion of tr E[G^3] needs",
        "in terms E x^n E x^(i + h), which g3 counts, two of three samples are the same",
    )
    return Shown(TITLE, {"fig6": _figure(found, study["width"])}, findings, notes)


def _formula(g1: Line, d: int) -> Finding:
    formula = g1.x + 1 - 2 * np.maximum(0, g1.x - d + 1)
    return Finding(
        "g1(d, n) = (n + 1) - 2 max(0, n - d + 1)",
        "equal to the number of pairs for all n",
        f"largest difference {np.abs(g1.mean - formula).max():g} over n = 0..{g1.x[-1]:g}, d = {d}",
        bool(np.array_equal(g1.mean, formula)),
    )


def _sums(result: Result, d: int) -> Finding:
    sums = [scalar(result, f"sum@g={g}")[0] for g in MEANING]
    return Finding(
        "all pairs and triples are counted: the sums are d^2, d^3 and d^3",
        "exactly",
        f"{sums[0]:.0f}, {sums[1]:.0f} and {sums[2]:.0f} for d = {d}",
        sums == [d**2, d**3, d**3],
    )


def _traces(result: Result, samples: int) -> Finding:
    values = [[scalar(result, f"trace@how={how},power={p}")[0] for how in ("coefficients", "tuples")] for p in (2, 3)]
    differences = [abs(a / b - 1) for a, b in values]
    return Finding(
        "tr E[G^2] and, of one sample, tr E[G^3] are sums of moments with these coefficients",
        "equal to sums over all tuples of indices, to rounding",
        f"relative differences {differences[0]:.1g} (K = {samples}) and {differences[1]:.1g} (K = 1)",
        max(differences) < ROUNDING,
    )


def _figure(found: dict[int, Line], d: int) -> Figure:
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axis, (g, of) in zip(figure.subplots(1, 3), found.items(), strict=True):
        axis.plot(of.x, of.mean, ".-", color=f"C{g - 1}", label=f"g{g}: {MEANING[g]}, counted")
        if g == 1:
            formula = of.x + 1 - 2 * np.maximum(0, of.x - d + 1)
            axis.plot(of.x, formula, color="k", linewidth=0.8, label="the paper's formula")
        power = 2 if g == 1 else 3
        axis.set(
            xlabel="n, the order of the moment", ylabel=f"g{g}(d, n)", title=f"sum {of.mean.sum():.0f} = d^{power}"
        )
        axis.set_ylim(0, 1.3 * of.mean.max())
        axis.legend(fontsize=8, loc="upper center")
    figure.suptitle(f"Figure 6 of Unraveling MAML: coefficients of polynomial moments, d = {d}")
    return figure
