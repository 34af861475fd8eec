"""What Figures 10(a) and 10(b) have in common: test error of trained networks over alpha, and H.18's range of alpha."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from metalearn.algorithms.maml import MAML
from metalearn.alpha import estimate
from metalearn.results import Config, Result
from metalearn.run import build, build_data, build_learner
from metalearn.shown import Finding, Shown
from metalearn.theory.alpha_star import heuristic_range
from metalearn.unravel import rates
from metalearn.unravel.rates import Scored, best, beyond, near_best, scored

TOP = 100
"""The axis of errors ends at so many times the least one."""


class Range(NamedTuple):
    """A reading of the range: what it is called, its ends, how it is defined, and what it is made of in this case."""

    name: str
    low: float
    high: float
    definition: str
    parts: str


def draw(title: str, name: str, results: Sequence[Result]) -> Shown:
    """The error over alpha with two readings of the range, and whether the best alphas lie inside each.

    Args:
        title: of the experiment.
        name: of its figure, with the panel's letter at its end.
        results: cells that differ in alpha and seed.
    """
    config = min(results, key=lambda r: r.data["seed"]).config
    line, found = scored(results, lambda r: float(r.config["algorithm"]["alpha"])), ranges(config)
    panel, trainer = f"Fig. 10({name[-1]})", config["trainer"]
    top = TOP * best(line).mean
    shot, paper = config["dataset"]["shot"], found[0]
    notes = [
        f"N = {trainer['meta_batch_size']} tasks of each of {trainer['max_steps']} meta-steps, K = {shot}; the paper "
        "does not say which n it takes, and its range holds for features in [0, 1], which tangent features are not",
        f"with n = N K the range spans a factor {paper.high / paper.low:,.0f}, so that it hardly rules out a rate; "
        f"with n = K, the points of a step, it would end at {paper.low * shot / 2:.3g}",
        "each rate is compared with the best one by the ratio of their errors, without a correction for their number",
    ]
    if text := beyond(line, top):
        notes.append(f"beyond the axis: {text}")
    findings = [_point(f"{panel}: the best alpha lies inside {paper.name}", line, paper)]
    findings += [_finding(f"{panel}: all alphas that may be the best lie inside {r.name}", line, r) for r in found]
    return Shown(title, {name: _figure(title, line, found, top)}, findings, tuple(notes))


def ranges(config: Config) -> list[Range]:
    """The range as printed, n = N K, and that which `metalearn alpha` prints for the features of this network.

    Args:
        config: of a cell; its network and training tasks are built as they are before training.
    """
    dataset = build("dataset", config["dataset"])
    learner, data = build_learner(config, dataset), build_data(config, dataset)
    assert isinstance(learner, MAML), "the figure is of MAML"
    batch = estimate.tasks_of(learner, data, estimate.TASKS)
    tasks = config["trainer"]["max_steps"] * config["trainer"]["meta_batch_size"]
    own = estimate.heuristic(learner, batch, tasks)
    assert own is not None, "a regression has a range"
    samples = batch.episodes.support.y.shape[1]
    paper = heuristic_range(tasks, samples, own.width)
    return [
        Range(
            "the heuristic range", *paper, "2 / min(N K, d) to n / min(N K, d), n = N K",
            f"min(N K, d) = {own.width}, n = {tasks * samples}",
        ),
        Range(
            "the heuristic range of its network's features", own.scaled_low, own.scaled_high,
            "2 / (min(N K, d) R^2) to n / (min(N K, d) R^2), R the range of tangent features before training, n as in "
            "`metalearn alpha`",
            f"n = {own.observations}, features from {own.least:.3g} to {own.largest:.3g}, seed {config['seed']}",
        ),
    ]  # fmt: skip


def _point(claim: str, line: Sequence[Scored], r: Range) -> Finding:
    """The paper's: of the one rate with the least error, whatever its neighbours have."""
    rate = best(line).rate
    inside = r.low <= rate <= r.high
    return Finding(
        claim,
        f"the rate of least test error inside {r.definition}; with rates tested below it, and above it or up to one "
        "without a finite error",
        f"{rate:g}, {'inside' if inside else 'outside'} {r.low:.3g} to {r.high:.3g}; {_tested(line, r)}",
        inside if _passed(line, r) else None,
    )


def _tested(line: Sequence[Scored], r: Range) -> str:
    below, above = sum(s.rate < r.low for s in line), sum(s.rate > r.high for s in line)
    return f"of {len(line)} rates {below or 'none'} tested below it, {above or 'none'} above"


def _passed(line: Sequence[Scored], r: Range) -> bool:
    """Whether rates were tested beyond both ends."""
    return line[0].rate < r.low and (line[-1].rate > r.high or line[-1].lost > 0)


def _finding(claim: str, line: Sequence[Scored], r: Range) -> Finding:
    near = near_best(line)
    others = ", ".join(f"{s.rate:g}" for s in near if s is not best(line))
    measured = (
        f"{best(line).text()}; not told from it: {others or 'none'}; range {r.low:.3g} to {r.high:.3g} ({r.parts}); "
        f"{_tested(line, r)}"
    )
    if lost := [s.text() for s in line if s.lost]:
        measured += "; " + ", ".join(lost)
    criterion = (
        "the rate of least test error and all that cannot be told from it (95 %, paired over seeds and test tasks) "
        f"inside {r.definition}; with rates tested below it, and above it or up to one without a finite error"
    )
    return Finding(claim, criterion, measured, _holds(line, near, r), ours=True)


def _holds(line: Sequence[Scored], near: Sequence[Scored], r: Range) -> bool | None:
    """None if rates on both sides of an end are as good as the best, or an end was not passed."""
    inside = {r.low <= s.rate <= r.high for s in near}
    return inside.pop() if _passed(line, r) and len(inside) == 1 else None


def _figure(title: str, line: Sequence[Scored], found: Sequence[Range], top: float) -> Figure:
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axis = figure.subplots()
    rates.draw(axis, line, "C0", top)
    near = [s for s in near_best(line) if s.mean <= top]
    axis.plot(
        [s.rate for s in near], [s.mean for s in near], "o", markersize=10, fillstyle="none", color="C3",
        label="not told from the best",
    )  # fmt: skip
    ends = line[0].rate / 1.5, line[-1].rate * 1.5
    filled: dict[str, Any] = {"facecolor": "C2", "alpha": 0.15, "linewidth": 0}
    hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": "C1", "hatch": "///", "linewidth": 0.5, "alpha": 0.6}
    for r, style in zip(found, (filled, hatched), strict=True):
        if r.high > ends[0] and r.low < ends[1]:
            label = f"{r.name}: {r.low:.2g} to {r.high:.2g}"
            axis.axvspan(max(r.low, ends[0]), min(r.high, ends[1]), label=label, zorder=0, **style)
    axis.set(xscale="log", xlim=ends, xlabel="inner learning rate alpha", ylabel="test MSE (target units$^2$)")
    axis.set_title(title.replace(":", " of Unraveling MAML:", 1), fontsize=10)
    axis.legend(fontsize=8)
    return figure
