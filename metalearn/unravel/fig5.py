"""Figure 5: MAML's minimiser beside joint training's while new tasks adapt, in loss (a) and in distance (b)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Line, Shown, line, scalar
from metalearn.unravel.laws import law

TITLE = "Figure 5: MAML beside joint training under fast adaptation"


class Law(NamedTuple):
    """What was measured with features of one law; eta is the rate of adaptation."""

    name: str
    centred: bool
    own: Line
    new: Line
    distance: Line
    left: Line
    least: float
    largest: float
    eta: float

    @property
    def ratio(self) -> np.ndarray:
        """Each F_t gap over that at t = 0."""
        ratio: np.ndarray = self.distance.mean / self.distance.mean[0]
        return ratio

    def geometric(self, eigenvalue: float) -> np.ndarray:
        """(1 - 2 eta eigenvalue)^(2 t), which the gap's ratio follows if all eigenvalues are this one."""
        shrunk: np.ndarray = (1 - 2 * self.eta * eigenvalue) ** (2 * self.distance.x)
        return shrunk

    def taken(self, steps: int) -> tuple[float, float]:
        """The share of the gap that so many steps take away, as fast as between the first and the last two t."""
        change = steps * np.diff(np.log(self.ratio)) / np.diff(self.distance.x)
        return float(-np.expm1(change[0])), float(-np.expm1(change[-1]))


def show(results: Sequence[Result]) -> Shown:
    """Both panels for every law, and how the distances decay; laws whose mean is not 0 are judged apart."""
    laws = [_law(result) for result in results]
    study = results[0].config["study"]
    turn = study["alpha"] / (2 * study["eta"])
    groups = [[one for one in laws if one.centred == centred] for centred in (True, False)]
    findings = [f for group in groups if group for f in _judged(group, turn)]
    notes = (
        f"not stated in the paper: optima from N(0, {study['variance']:g} I), steps t to {max(study['steps'])}",
        f"means over {study['repetitions']} draws of {study['tasks']} training tasks and {study['new_tasks']} new ones",
        "on new tasks the expectation over optima is exact; the paper's one draw of them is noise as large as the "
        "difference itself",
        "on the tasks of training, t steps are about one of rate t eta: w_m, the best start for a step of alpha, "
        f"overtakes w_r, the best for none, at t eta = alpha / 2: t = {turn:g}",
        "the difference of distances is a sum of geometric sequences, one for each eigenvalue l of H, of which the slow"
        " ones remain; the mean of (1 - 2 eta l)^(2 t) over all of them, which is what is left if w_m and w_r differ"
        " alike in all directions, is off by at most "
        + ", ".join(f"{np.abs(one.left.mean / one.ratio - 1).max():.1g} of it for {one.name}" for one in laws),
    )
    return Shown(TITLE, {"fig5": _figure(laws, turn)}, findings, notes)


def _law(result: Result) -> Law:
    study = result.config["study"]
    own, new = (line(result, "loss_gap", "t", tasks=tasks) for tasks in ("own", "new"))
    least, largest = (scalar(result, f"eigenvalue@which={w}")[0] for w in ("least", "largest"))
    centred = scalar(result, "mean_feature")[0] == 0
    distance, left = line(result, "distance_gap", "t"), line(result, "left", "t")
    return Law(law(study["inputs"]), centred, own, new, distance, left, least, largest, study["eta"])


# ---- claims ------------------------------------------------------------------------------------------------------


def _judged(laws: Sequence[Law], turn: float) -> list[Finding]:
    names = ", ".join(one.name for one in laws)
    losses = [_loss(laws, names, turn, tasks) for tasks in ("own", "new")]
    return [*losses, _closer(laws, names), _bounded(laws, names), _geometric(laws, names)]


def _loss(laws: Sequence[Law], names: str, turn: float, tasks: str) -> Finding:
    lines = {one.name: one.own if tasks == "own" else one.new for one in laws}
    where = {"own": "the tasks of training", "new": "new tasks"}[tasks]
    holds = all(_positive(of, of.x == 0) and _negative(of, of.x >= 2 * turn) for of in lines.values())
    measured = "; ".join(
        f"{name} {_number(of, 0)} at t = 0, {_number(of, _after(of, 2 * turn))} at t = {of.x[_after(of, 2 * turn)]:g}"
        for name, of in lines.items()
    )
    return Finding(
        f"Fig. 5(a): MAML's loss is a little higher at t = 0 and lower after a few steps; {where}, {names}",
        f"sum of l_t(w_m) - l_t(w_r) positive at t = 0 and negative from t = {2 * turn:g} on, beyond 95 %",
        measured,
        holds,
        ours=tasks == "own",
    )


def _closer(laws: Sequence[Law], names: str) -> Finding:
    return Finding(
        f"Fig. 5(b), Theorem 2: MAML's start is nearer to new optima after any number of steps; {names}",
        "F_t(w_m) - F_t(w_r) negative at all t, beyond 95 %",
        "; ".join(
            f"{one.name} {_number(one.distance, 0)} at t = 0, {_number(one.distance, -1)} at t = {one.distance.x[-1]:g}"
            for one in laws
        ),
        all(_negative(one.distance, one.distance.x >= 0) for one in laws),
    )


def _bounded(laws: Sequence[Law], names: str) -> Finding:
    return Finding(
        f"Theorem 2: the difference of distances stays between two geometric sequences; {names}",
        "at all t between (1 - 2 eta l)^(2 t) of its size at t = 0 for the largest and for the least eigenvalue l of H",
        "; ".join(
            f"{one.name} {one.ratio[-1]:.3g} of it left at t = {one.distance.x[-1]:g}, where the sequences are at"
            f" {one.geometric(one.largest)[-1]:.2g} and {one.geometric(one.least)[-1]:.2g}"
            for one in laws
        ),
        all(_between(one) for one in laws),
    )


def _geometric(laws: Sequence[Law], names: str) -> Finding:
    taken = [one.taken(STEPS) for one in laws]
    return Finding(
        f"the difference of distances decays as one geometric sequence; {names}",
        f"{STEPS:,} steps take the same share of it between the last two t as between the first two, within {SAME:.0%}",
        "; ".join(
            f"{one.name} {first:.2g} at first and {last:.2g} at last"
            for one, (first, last) in zip(laws, taken, strict=True)
        ),
        all(abs(last / first - 1) <= SAME for first, last in taken),
        ours=True,
    )


STEPS = 1000
ROUNDING = 1e-9
SAME = 0.1


def _between(one: Law) -> bool:
    low, high = one.geometric(one.largest), one.geometric(one.least)
    return bool(np.all((low * (1 - ROUNDING) <= one.ratio) & (one.ratio <= high * (1 + ROUNDING))))


def _positive(of: Line, where: np.ndarray) -> bool:
    return bool(np.all(of.mean[where] - np.nan_to_num(of.ci95[where]) > 0))


def _negative(of: Line, where: np.ndarray) -> bool:
    return bool(np.all(of.mean[where] + np.nan_to_num(of.ci95[where]) < 0))


def _after(of: Line, t: float) -> int:
    """The first point from t on."""
    return int(np.searchsorted(of.x, t).clip(max=len(of.x) - 1))


def _number(of: Line, i: int) -> str:
    return f"{of.mean[i]:.3g} +- {of.ci95[i]:.1g}"


# ---- picture -----------------------------------------------------------------------------------------------------


def _figure(laws: Sequence[Law], turn: float) -> Figure:
    figure = Figure(figsize=(11, 8), layout="constrained")
    (own, new), (distance, decay) = figure.subplots(2, 2)
    for i, one in enumerate(laws):
        early = one.own.x <= 4 * turn
        size = f"{one.name}, {one.own.mean[0]:.2g} +- {one.own.ci95[0]:.1g}"
        own.plot(
            one.own.x[early],
            one.own.mean[early] / one.own.mean[0],
            "o-",
            color=f"C{i}",
            markersize=7 - 2 * i,
            label=size,
        )
        _over_steps(new, one.new, f"C{i}", one.name)
        _over_steps(distance, one.distance, f"C{i}", one.name)
        decay.plot(one.distance.x, one.ratio, "o-", color=f"C{i}", markersize=3, label=one.name)
        for eigenvalue in (one.least, one.largest):
            decay.plot(one.distance.x, one.geometric(eigenvalue), ":", color=f"C{i}", linewidth=1)
        decay.plot(one.left.x, one.left.mean, "--", color="k", linewidth=0.8)
    own.axvline(turn, color="0.6", linewidth=1, linestyle="--", label=f"t eta = alpha / 2: t = {turn:g}")
    for axis in (own, new, distance):
        axis.axhline(0, color="k", linewidth=0.8)
    for axis in (new, distance):
        axis.set_xscale("symlog", linthresh=1)
        axis.margins(x=0.02)
    new.margins(y=0.12)
    new.annotate(
        "claimed: above 0 at t = 0", (0, 0.02), (1.2, 0.03), fontsize=8, va="bottom", arrowprops={"arrowstyle": "->"}
    )
    distance.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    decay.plot([], [], ":", color="0.4", label="geometric, least and largest eigenvalue")
    decay.plot([], [], "--", color="k", linewidth=0.8, label="mean over all eigenvalues")
    decay.set(yscale="log", ylim=(min(one.ratio[-1] for one in laws) / 3, 2), title="(b) new tasks, as a share")
    decay.set(xlabel="steps t", ylabel="share of F_0(w_m) - F_0(w_r) left")
    loss = "sum over tasks of l_t(w_m) - l_t(w_r)"
    own.set(xlabel="steps t", ylabel=f"{loss},\nas a share of its value at t = 0", title="(a) tasks of training")
    new.set(xlabel="steps t", ylabel=f"{loss}\n(target units squared)", title="(a) new tasks")
    distance.set(xlabel="steps t", ylabel="F_t(w_m) - F_t(w_r)\n(mean squared distance)", title="(b) new tasks")
    own.set_ylim(top=2.6)  # room for the legend
    own.legend(fontsize=8, title="features, value at t = 0 (target units squared)", title_fontsize=8, loc="upper right")
    for axis in (new, distance):
        axis.legend(fontsize=8)
    decay.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    figure.suptitle("Figure 5 of Unraveling MAML: MAML (w_m) minus joint training (w_r); below 0 MAML is better")
    return figure


def _over_steps(axis: Axes, of: Line, colour: str, label: str) -> None:
    axis.plot(of.x, of.mean, ".-", color=colour, label=label)
    axis.fill_between(of.x, of.mean - of.ci95, of.mean + of.ci95, color=colour, alpha=0.2, linewidth=0)
