"""Figure 3: ANIL with the running estimate of its head's rate beside fixed rates, accuracy over meta-steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.schema.keys import show as written
from metalearn.shown import Finding, Shown
from metalearn.statistics import over_seeds

TITLE = "Figure 3: alpha estimated online, ANIL on Omniglot"

FIXED = 0.1
"""The rate of the paper's configuration, which the estimate is compared with."""


class Curve(NamedTuple):
    """Validation accuracy of a rate, `[validations, seeds]`, and the logged rate where it is estimated."""

    rate: str
    steps: np.ndarray
    accuracy: np.ndarray
    alpha: tuple[np.ndarray, np.ndarray] | None

    @property
    def mean(self) -> np.ndarray:
        """Over seeds."""
        mean: np.ndarray = self.accuracy.mean(1)
        return mean

    def reaches(self, level: float) -> float:
        """The first validation at which the mean is at least this; infinite if none is."""
        there = self.steps[self.mean >= level]
        return float(there[0]) if len(there) else float("inf")

    def last(self) -> str:
        """The mean of the last validation, in percent."""
        end = over_seeds([100 * v for v in self.accuracy[-1]])
        return f"{end.mean:.1f} +- {end.half:.1f} %" if self.accuracy.shape[1] > 1 else f"{end.mean:.1f} %"


def show(results: Sequence[Result]) -> Shown:
    """The curves, and whether the estimate is at the fixed rate's last accuracy no later than that rate itself."""
    curves = [c for c in (_curve(rate, own) for rate, own in _by_rate(results).items()) if c]
    config = results[0].config
    setting = f"{config['dataset']['way']}-way {config['dataset']['shot']}-shot, width {config['backbone']['width']}"
    notes = (
        f"{config['dataset']['name']}, {setting}, {config['trainer']['max_steps']} meta-steps, for minutes on a CPU; "
        "the paper has 20-way 1-shot Omniglot and 40,000 meta-steps (size=paper)",
        f"accuracies are of validation classes, bn={_mode(results)}; means over seeds are compared without an interval",
    )
    figures = {"fig3": _figure(curves, setting)} if curves else {}
    return Shown(TITLE, figures, [_faster(curves), _fastest(curves)], notes)


def _mode(results: Sequence[Result]) -> str:
    return str(results[0].data["protocol"]["bn"])


def _by_rate(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        if not result.diverged:
            found.setdefault(written(result.config["algorithm"]["alpha"]), []).append(result)
    return found


def _curve(rate: str, results: Sequence[Result]) -> Curve | None:
    """None if the logs are not there, as in curated results."""
    logs = [log for log in (r.log() for r in results) if "val_accuracy" in log]
    if not logs:
        return None
    own = [log[["step", "val_accuracy"]].dropna() for log in logs]
    length = min(map(len, own))
    steps = own[0]["step"].to_numpy("f8")[:length]
    alpha = None
    if "alpha" in logs[0]:
        rows = logs[0][["step", "alpha"]].dropna()
        alpha = rows["step"].to_numpy("f8"), rows["alpha"].to_numpy("f8")
    return Curve(rate, steps, np.stack([o["val_accuracy"].to_numpy("f8")[:length] for o in own], 1), alpha)


def _faster(curves: Sequence[Curve]) -> Finding:
    claim = f"Fig. 3: ANIL with the estimated rate gets to the accuracy of the fixed rate {FIXED:g} no later"
    criterion = "meta-steps until the mean over seeds is at the fixed rate's last accuracy: not more"
    found = {c.rate: c for c in curves}
    online, fixed = found.get("online"), found.get(written(FIXED))
    if online is None or fixed is None:
        return Finding(claim, criterion, "not both of them have a log with val_accuracy", None)
    level = float(fixed.mean[-1])
    ours, theirs = online.reaches(level), fixed.reaches(level)
    measured = (
        f"{100 * level:.1f} % after {ours:g} and {theirs:g} meta-steps; at the end {online.last()} and {fixed.last()}"
    )
    return Finding(claim, criterion, measured, ours <= theirs)


def _fastest(curves: Sequence[Curve]) -> Finding:
    """The paper compares the estimate with its one fixed rate."""
    claim = "no fixed rate gets to the estimated rate's accuracy sooner"
    criterion = "meta-steps until the mean over seeds is at the estimated rate's last accuracy: not fewer for any"
    online, others = [c for c in curves if c.rate == "online"], [c for c in curves if c.rate != "online"]
    if not online or not others:
        return Finding(claim, criterion, "no log of the estimate, or of a fixed rate", None, ours=True)
    level = float(online[0].mean[-1])
    after = online[0].reaches(level)
    found = "; ".join(f"{c.rate} {_steps(c.reaches(level))}, {c.last()} at the end" for c in others)
    measured = f"{100 * level:.1f} % {_steps(after)}; of the fixed rates {found}"
    return Finding(claim, criterion, measured, all(after <= c.reaches(level) for c in others), ours=True)


def _steps(count: float) -> str:
    return f"after {count:g} meta-steps" if np.isfinite(count) else "never"


def _figure(curves: Sequence[Curve], setting: str) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, c in enumerate(curves):
        style = {"color": f"C{i}", "linewidth": 2.2 if c.rate == "online" else 1.2}
        left.plot(c.steps, 100 * c.mean, label=f"alpha = {c.rate}", **style)
        left.fill_between(
            c.steps, 100 * c.accuracy.min(1), 100 * c.accuracy.max(1), color=f"C{i}", alpha=0.12, linewidth=0
        )
        if c.alpha is not None:
            right.plot(*c.alpha, label="estimate, one seed", **style)
        elif c.rate != "online":
            right.axhline(float(c.rate), color=f"C{i}", linewidth=1, linestyle="--", label=f"fixed: {c.rate}")
    left.set(xlabel="meta-steps (outer updates)", ylabel="validation accuracy (%)", title="mean and range of the seeds")
    right.set(xlabel="meta-steps (outer updates)", ylabel="rate of the head", yscale="log", title="the rate")
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.suptitle(f"Figure 3 of Unraveling MAML: ANIL, {setting}")
    return figure
