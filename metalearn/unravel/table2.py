"""Table 2: sine curves, error before and after one step on the last layer, over alpha, beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import VERDICTS, Finding, Shown, labels, line, scalar
from metalearn.tables.definition import load

TITLE = "Table 2: last layer of a sine network"

RISES_FROM = 0.3
NEAREST = (
    "the best rate of the grid is the one nearest to alpha* (least difference). Of each network: the error after"
    " adaptation there is less than at every other rate, beyond the paired 95 % interval over tasks; more than at one,"
    " beyond it: does not hold; a tie within it, or an alpha* between two rates that do not agree: undecided. Of all:"
    " holds if it does for every network, does not hold if it does for none and is refuted for some, else undecided"
)
RISING = "of each network: above the least, and more at each rate of the grid; of all: as above"
CLAIMS = (
    ("the best alpha of the grid is the one next to the estimate of eq. 3.3", "alpha_lim", ""),
    ("the same on the points that the step was taken on, which eq. 3.3 supposes", "alpha_lim", "_same"),
    ("the same on fresh points with the estimate of Corollary 2, which supposes them", "alpha_split", ""),
)
"""What is claimed, of which estimate, and which error after adaptation it is of."""
COLUMNS = 3


class Published(NamedTuple):
    """The paper's grid, its error after adaptation in digits, the same over that before, and its estimate."""

    alphas: np.ndarray
    after: np.ndarray
    ratio: np.ndarray
    estimate: float


class Place(NamedTuple):
    """Where an estimate of a network points on the grid, and what the network's errors say of it.

    estimate: with its 95 % interval over tasks. near: the nearest rate, or two if that interval reaches both. best: the
    rate of the least error. excess: for each of `near` the error there less that at the best other rate, with its
    paired interval. least: the least error.
    """

    estimate: tuple[float, float]
    near: tuple[float, ...]
    best: float
    excess: tuple[tuple[float, float], ...]
    least: float

    @property
    def holds(self) -> bool | None:
        """Whether the nearest rate is the best; None if the intervals do not decide it."""
        found = {None if abs(mean) <= half else mean < 0 for mean, half in self.excess}
        return found.pop() if len(found) == 1 else None

    def text(self) -> str:
        """`0.0466 +- 0.0014, nearest 0.05 (+0.011 +- 0.0091), best 0.01`."""
        near = " or ".join(
            f"{a:g} ({mean:+.2g} +- {half:.2g})" for a, (mean, half) in zip(self.near, self.excess, strict=True)
        )
        return f"{_spread(*self.estimate)}, nearest {near}, best {self.best:g}"


def show(results: Sequence[Result]) -> Shown:
    """Errors of each network, each over its own before adaptation: the scale of the published digits is not known."""
    result, paper = results[0], published()
    networks = labels(result, "alpha_lim", "network")
    claims = [_claim(result, networks, *claim) for claim in CLAIMS]
    (first, _), *others = claims
    first = first._replace(measured=first.measured + _theirs(paper))
    later = [finding._replace(criterion="as the first", ours=True) for finding, _ in others]
    findings = [first, _rising(result, networks, paper), *later]
    mean, half = scalar(result, "alpha_lim")
    notes = (
        *(note for _, note in claims),
        "the other rate is the best on the same tasks, a choice that makes the differences a little too large",
        "the paper prints digits after the point, 797 for 0.797 or 0.0797: only ratios and places can be compared",
        f"the estimate depends on the scale of a trained network's features: {_spread(mean, half)} over networks here,"
        f" {paper.estimate:g} for the paper's one network, which is not described further",
    )
    return Shown(TITLE, {"table2": _figure(result, networks, paper)}, findings, notes)


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


def closest(grid: np.ndarray, value: float, *, by_ratio: bool = False) -> float:
    """The rate of a grid with the least difference from a value, or with the least ratio."""
    with np.errstate(divide="ignore"):
        away = np.abs(np.log(grid / value)) if by_ratio else np.abs(grid - value)
    return float(grid[away.argmin()])


def place(result: Result, network: str, estimate: str, error: str = "", *, by_ratio: bool = False) -> Place:
    """Of one network.

    Args:
        result: of the study.
        network: its name.
        estimate: `alpha_lim` or `alpha_split`.
        error: which error after adaptation: on fresh points, or on the step's own (`_same`).
        by_ratio: how near a rate is, see `closest`.
    """
    after, excess = (line(result, f"{m}{error}", "alpha", network=network) for m in ("mse_after", "excess_after"))
    alpha, half = scalar(result, f"{estimate}@network={network}")
    ends = (alpha - half, alpha + half) if half < alpha else (alpha,)
    near = tuple(sorted({closest(after.x, end, by_ratio=by_ratio) for end in ends}))
    found = {a: (float(m), float(h)) for a, m, h in zip(*excess, strict=True)}
    best = int(after.mean.argmin())
    return Place((alpha, half), near, float(after.x[best]), tuple(found[a] for a in near), float(after.mean[best]))


# ---- findings ----------------------------------------------------------------------------------------------------


def _claim(result: Result, networks: Sequence[str], claim: str, estimate: str, error: str) -> tuple[Finding, str]:
    """The finding, and a note that has each network's numbers."""
    places = {n: place(result, n, estimate, error) for n in networks}
    by_ratio = {n: place(result, n, estimate, error, by_ratio=True) for n in networks}
    values = [p.estimate[0] for p in places.values()]
    verdicts = _verdicts(places)
    shares = [mean / p.least for p in places.values() for mean, _ in p.excess]
    measured = (
        f"{_counts(verdicts)}; alpha* {min(values):.3g} to {max(values):.3g}, mean"
        f" {_spread(*scalar(result, estimate))} over {len(places)} networks; error there less that at the best other"
        f" rate: {min(shares):+.1%} to {max(shares):+.1%} of the least; {_otherwise(places, by_ratio)}"
    )
    note = (
        f"{claim}; seed of the network: alpha* +- its interval over tasks, nearest rate (MSE there less that at the"
        f" best other rate, paired), best rate. {'; '.join(f'{n}: {p.text()}' for n, p in places.items())}"
    )
    return Finding(claim, NEAREST, measured, _overall(list(verdicts.values()))), note


def _overall(verdicts: Sequence[bool | None]) -> bool | None:
    """Of a claim that is judged for each network: all, none, or undecided."""
    found = set(verdicts)
    return True if found == {True} else False if False in found and True not in found else None


def _counts(verdicts: Mapping[str, bool | None]) -> str:
    """`holds for 1 network (seed 2), does not hold for 2 (seed 0, 1)`."""
    groups = {word: [n for n, found in verdicts.items() if found is v] for v, word in VERDICTS.items()}
    if all(len(own) in (0, len(verdicts)) for own in groups.values()):
        return next(f"{word} for all {len(own)} networks" for word, own in groups.items() if own)
    return ", ".join(f"{word} for {len(own)} (seed {', '.join(own)})" for word, own in groups.items() if own)


def _verdicts(places: dict[str, Place]) -> dict[str, bool | None]:
    return {n: p.holds for n, p in places.items()}


def _otherwise(places: dict[str, Place], by_ratio: dict[str, Place]) -> str:
    """What is different if the nearest rate is that of the least ratio."""
    other = [f"{n} ({_rates(p.near)}: {VERDICTS[p.holds]})" for n, p in by_ratio.items() if p.near != places[n].near]
    if not other:
        return "the same rates are nearest in ratio"
    counts = _counts(_verdicts(by_ratio))
    return f"nearest in ratio is another rate for seed {', '.join(other)}, by which it {counts}"


def _theirs(paper: Published) -> str:
    near = closest(paper.alphas, paper.estimate)
    best = paper.alphas[paper.after.argmin()]
    return f"; the paper's network: alpha* {paper.estimate:g}, nearest {near:g}, best {best:g}"


def _rising(result: Result, networks: Sequence[str], paper: Published) -> Finding:
    def late(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return y[x >= RISES_FROM] / y.min()

    found = {n: late(*line(result, "mse_after", "alpha", network=n)[:2]) for n in networks}
    verdicts = {n: bool(len(v) and v[0] > 1 and (np.diff(v) > 0).all()) for n, v in found.items()}
    spans = [f"{min(v):.3g} to {max(v):.3g}" for v in zip(*found.values(), strict=True)]
    theirs = ", ".join(f"{v:.3g}" for v in late(paper.alphas, paper.after))
    return Finding(
        f"the error after adaptation rises from alpha = {RISES_FROM:g} on",
        RISING,
        f"{_counts(verdicts)}; {', '.join(spans)} times the least; in the paper {theirs}",
        _overall(list(verdicts.values())),
    )


def _rates(near: Sequence[float]) -> str:
    return " or ".join(f"{a:g}" for a in near)


def _spread(mean: float, half: float) -> str:
    return f"{mean:.3g}" if math.isnan(half) else f"{mean:.3g} +- {half:.2g}"


# ---- picture -----------------------------------------------------------------------------------------------------


def _figure(result: Result, networks: Sequence[str], paper: Published) -> Figure:
    rows = -(-(len(networks) + 1) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 0.9 + 3.1 * rows), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    top = 1.5 * max(line(result, "mse_before", "alpha", network=n).mean.max() for n in networks)
    for axis, network in zip(axes, networks, strict=False):
        _panel(axis, result, network, top)
    _beside(axes[len(networks)], result, networks, paper)
    for axis in axes[len(networks) + 1 :]:
        axis.remove()
    figure.suptitle(
        "Table 2 of Unraveling MAML: sine curves, one step on the last layer of trained networks; bars: 95 % over"
        " tasks\nAbove a panel: MSE on fresh points at the rate nearest to alpha*, less that at the best other rate,"
        " paired",
        fontsize=10.5,
    )
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _panel(axis: Axes, result: Result, network: str, top: float) -> None:
    curves = {m: line(result, m, "alpha", network=network) for m in ("mse_before", "mse_after", "mse_after_same")}
    axis.errorbar(*curves["mse_before"], fmt="s--", color="0.5", markersize=3, label="before the step")
    axis.errorbar(*curves["mse_after"], fmt="o-", color="tab:blue", markersize=4, label="after it, fresh points")
    axis.errorbar(
        *curves["mse_after_same"], fmt="^:", color="tab:orange", markersize=4, label="after it, the step's own points"
    )
    found = place(result, network, "alpha_lim")
    axis.plot(found.best, found.least, "*", color="black", markersize=12, label="best rate on fresh points")
    axis.axvline(found.estimate[0], color="tab:red", linewidth=1.2, label="alpha* (eq. 3.3)")
    axis.axvspan(
        found.estimate[0] - found.estimate[1], found.estimate[0] + found.estimate[1], color="tab:red", alpha=0.2, lw=0,
        label="its 95 % interval over tasks",
    )  # fmt: skip
    differences = ", ".join(
        rf"at {a:g}: {mean:+.2g} $\pm$ {half:.1g}" for a, (mean, half) in zip(found.near, found.excess, strict=True)
    )
    axis.set_title(f"network of seed {network}: {VERDICTS[found.holds]}\n{differences}", fontsize=9)
    axis.set(xscale="log", xlabel="alpha", ylabel="test MSE (target units$^2$)", ylim=(0.6 * found.least, top))


def _beside(axis: Axes, result: Result, networks: Sequence[str], paper: Published) -> None:
    for i, network in enumerate(networks):
        before, after = (line(result, m, "alpha", network=network) for m in ("mse_before", "mse_after"))
        label = "ours, one line a network" if i == 0 else None
        axis.plot(after.x, after.mean / before.mean, "o-", color="tab:blue", markersize=2, linewidth=0.8, label=label)
    axis.plot(paper.alphas, paper.ratio, "D-", color="tab:green", markersize=4, label="the paper's Table 2")
    axis.axvline(paper.estimate, color="tab:green", linestyle="--", linewidth=1.2, label="the paper's alpha*")
    axis.set(xscale="log", yscale="log", xlabel="alpha", ylabel="MSE after the step / before it")
    axis.set_title("all networks and rates, beside the paper's", fontsize=9)
    axis.legend(fontsize=8)
