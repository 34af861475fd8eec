"""Corollary 1: alpha*_lim between its two bounds, design by design."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.evaluation.metrics import metric_name, qualifiers_of
from metalearn.results import Result
from metalearn.shown import Finding, Shown, scalar

TITLE = "Corollary 1: bounds of alpha*_lim"
NAMES = {
    "gaussian": "Gaussian",
    "fixed": "Gaussian, shared",
    "polynomial_s1": "polynomial, s = 1",
    "polynomial_s2": "polynomial, s = 2",
}
ROUNDING = 1e-9
ALIKE = 2
"""Formulas that differ by less are called alike."""


class Design(NamedTuple):
    """One design: its kind, K, d, and what was computed for it, exactly."""

    kind: str
    samples: int
    width: int
    limit: float
    lower: float
    upper: float

    @property
    def label(self) -> str:
        """As in `polynomial, s = 1, K = 10, d = 5`."""
        return f"{NAMES[self.kind]}, K = {self.samples}, d = {self.width}"

    @property
    def below(self) -> bool:
        """Whether alpha*_lim is below the lower bound."""
        return self.limit < self.lower * (1 - ROUNDING)

    @property
    def above(self) -> bool:
        """Whether it is above the upper one."""
        return self.limit > self.upper * (1 + ROUNDING)


def show(results: Sequence[Result]) -> Shown:
    """Bounds and alpha*_lim of every design; the claims are those of (3.5)."""
    designs = _designs(results[0])
    shared, own = ([d for d in designs if (d.kind == "fixed") == fixed] for fixed in (True, False))
    findings = [
        _upper(designs),
        _lower(shared, "the same design in all tasks", ours=True),
        _lower(own, "designs drawn anew for each task"),
        _example(results[0], [d for d in own if d.kind == "gaussian" and d.samples == 1]),
        _simplified(results[0]),
    ]
    return Shown(TITLE, {"corollary1": _figure(designs)}, findings, NOTES)


NOTES = (
    "all numbers are exact, from moments of the features; a shared design is one draw, and exact given it",
    "Gaussian features are N(0, 1); polynomials are 1, x, ..., x^4 with x from N(0, s^2)",
    "a Gaussian feature, d = 1, has alpha*_lim = K / (2 (K + 4)), below the lower bound 1 / 2 for any K: the proof uses"
    " Jensen's inequality the wrong way for the expectation over samples",
)


def _designs(result: Result) -> list[Design]:
    found = []
    for name in result.data["metrics"]:
        if name.startswith("alpha_lim@"):
            q = qualifiers_of(name)
            numbers = [scalar(result, metric_name(m, **q))[0] for m in ("alpha_lim", "lower", "upper")]
            found.append(Design(q["design"], int(q["K"]), int(q["d"]), *numbers))
    return found


def _upper(designs: Sequence[Design]) -> Finding:
    broken = [d for d in designs if d.above]
    shares = [d.limit / d.upper for d in designs]
    return Finding(
        "alpha*_lim <= d / (2 sigma^2)",
        "in every design",
        f"kept in {len(designs) - len(broken)} of {len(designs)} designs; alpha*_lim is {min(shares):.2g} to"
        f" {max(shares):.3g} times the bound",
        not broken,
    )


def _lower(designs: Sequence[Design], where: str, *, ours: bool = False) -> Finding:
    broken = [d for d in designs if d.below]
    measured = f"kept in {len(designs) - len(broken)} of {len(designs)} designs"
    if broken:
        worst = max(broken, key=lambda d: d.lower / d.limit)
        measured += (
            f", broken by most for {worst.label}: the bound is {worst.lower:.3g}, and alpha*_lim {worst.limit:.3g}, a"
            f" factor of {worst.lower / worst.limit:.3g} below it"
        )
    else:
        shares = [d.limit / d.lower for d in designs]
        measured += f"; alpha*_lim is {min(shares):.3g} to {max(shares):.3g} times the bound"
    return Finding(f"1 / (2 d sigma^2) <= alpha*_lim, {where}", "in every design", measured, not broken, ours)


def _example(result: Result, single: Sequence[Design]) -> Finding:
    printed, _ = scalar(result, "example2")
    return Finding(
        "Example 2: alpha*_lim = E[Y^4] / (2 E[Y^6]) for one sample, K = 1, of N(0, 1) features",
        "equal to the exact value, for every d",
        f"{printed:.3g} printed; exactly " + ", ".join(f"{d.limit:.3g} for d = {d.width}" for d in single),
        all(abs(d.limit / printed - 1) <= ROUNDING for d in single) if single else None,
    )


def _simplified(result: Result) -> Finding:
    found = []
    for name in (n for n in result.data["metrics"] if n.startswith("h14@")):
        q = qualifiers_of(name)
        (h14, _), (h15, _) = scalar(result, name), scalar(result, metric_name("h15", **q))
        found.append((f"{h15:.3g} beside {h14:.3g} for N K = {q['NK']}, d = {q['d']}", h15 / h14))
    return Finding(
        "H.15 is H.14 made simple, alpha = 1 / (2 N K sigma^2)",
        f"within {ALIKE:g}x of each other, i.i.d. N(0, 1) features",
        "H.15 " + "; ".join(text for text, _ in found),
        all(1 / ALIKE <= ratio <= ALIKE for _, ratio in found),
    )


def _figure(designs: Sequence[Design]) -> Figure:
    """Bars between the bounds, with ticks at their ends, which is all there is of them for d = 1."""
    rows = sorted(designs, key=lambda d: (d.kind, d.width, d.samples))[::-1]
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(rows)), layout="constrained")
    axis, y = figure.subplots(), range(len(rows))
    lower, upper = [d.lower for d in rows], [d.upper for d in rows]
    axis.hlines(y, lower, upper, color="0.75", linewidth=4)
    axis.plot(lower + upper, [*y, *y], "|", color="0.35", markersize=11, markeredgewidth=1.5, label="the two bounds")
    _marks(axis, [(d, i) for i, d in enumerate(rows) if not d.below], "o", "tab:blue", "alpha*_lim")
    below = [(d, i) for i, d in enumerate(rows) if d.below]
    _marks(axis, below, "X", "tab:red", "alpha*_lim, below the lower bound (bound / alpha*_lim)")
    for design, i in below:
        text = f"{design.lower / design.limit:.4g}x  "
        axis.text(design.limit, i, text, ha="right", va="center", fontsize=8, color="tab:red")
    axis.set_yticks(y, [d.label for d in rows], fontsize=8)
    axis.set(xscale="log", xlabel="adaptation learning rate alpha", title="Corollary 1 of Unraveling MAML")
    axis.set_ylim(-0.8, len(rows) - 0.2)
    axis.margins(x=0.13)
    axis.minorticks_off()
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _marks(axis: Axes, found: Sequence[tuple[Design, int]], marker: str, colour: str, label: str) -> None:
    axis.plot([d.limit for d, _ in found], [y for _, y in found], marker, color=colour, markersize=5, label=label)
