"""Test errors of trained cells over their inner rates: means over seeds, how to compare them, and how to draw them.

Errors over rates span orders of magnitude, so that means over seeds are geometric, intervals those of the logarithm,
and two rates are compared by the ratio of their errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from metalearn.results import Result
from metalearn.statistics import components, half_width, over_seeds


@dataclass(frozen=True, eq=False)
class Scored:
    """A rate and its test errors.

    Attributes:
        rate: the inner rate.
        seeds: the mean error of each seed that has a finite one.
        tasks: of the same seeds, the error of each test task `[tasks]`; empty where it was not kept.
        lost: how many seeds have no finite error (diverged runs are of these).
    """

    rate: float
    seeds: dict[int, float]
    tasks: dict[int, np.ndarray]
    lost: int

    @property
    def mean(self) -> float:
        """Geometric, over the seeds; infinite if some of them have no error."""
        return math.inf if self.lost or not self.seeds else math.exp(np.log(list(self.seeds.values())).mean())

    @property
    def ends(self) -> tuple[float, float]:
        """The 95 % interval of the mean over seeds (Student's t of the logarithms); the mean for one seed."""
        if self.lost or len(self.seeds) < 2:
            return self.mean, self.mean
        found = over_seeds(np.log(list(self.seeds.values())))  # type: ignore[arg-type]
        return _power(found.mean - found.half), _power(found.mean + found.half)

    def text(self) -> str:
        """`0.0976 (0.0961 to 0.0992) at 0.03`."""
        if self.lost:
            return f"no finite error in {self.lost} of {self.lost + len(self.seeds)} seeds at {self.rate:g}"
        between = " ({:.3g} to {:.3g})".format(*self.ends) if len(self.seeds) > 1 else ""
        return f"{self.mean:.3g}{between} at {self.rate:g}"


def _power(x: float) -> float:
    """e^x; infinite where that is no float."""
    return math.exp(x) if x < 700 else math.inf


def scored(results: Sequence[Result], rate: Callable[[Result], float], metric: str = "mse") -> list[Scored]:
    """The results by rate, in ascending order."""
    found: dict[float, list[Result]] = {}
    for result in results:
        found.setdefault(rate(result), []).append(result)
    out = []
    for value, own in sorted(found.items()):
        means = {r.data["seed"]: (r.metric(metric) or {}).get("mean") for r in own}
        seeds = {s: float(m) for s, m in means.items() if m is not None and math.isfinite(m)}
        tasks = {s: r.values() for r in own if (s := r.data["seed"]) in seeds}
        out.append(Scored(value, seeds, tasks, len(own) - len(seeds)))
    return out


def best(line: Sequence[Scored]) -> Scored:
    """The rate with the least mean error."""
    return min(line, key=lambda s: s.mean)


def below(one: Scored, other: Scored) -> bool | None:
    """Whether one error is below another: True or False beyond 95 %, None if that cannot be told.

    A rate at which some seed has no finite error is worse than one at which all have, whatever its other seeds say.
    The rest are told apart by the logarithm of the ratio of their mean errors, paired over common seeds and test tasks,
    with what both of them vary in its interval. None with less than two common seeds, or without the tasks' errors.
    """
    if one.lost or other.lost:
        return None if one.lost and other.lost else bool(other.lost)
    seeds = sorted(one.seeds.keys() & other.seeds.keys())
    sizes = {len(s.tasks[k]) for s in (one, other) for k in seeds}
    if len(seeds) < 2 or len(sizes) != 1 or sizes == {0}:
        return None
    found = components(np.stack([_log_error(one.tasks[k]) - _log_error(other.tasks[k]) for k in seeds]))
    return found.mean < 0 if abs(found.mean) > half_width(found.parts()) else None


def _log_error(tasks: np.ndarray) -> np.ndarray:
    """Per-task values whose mean is the logarithm of the mean error and which vary as it does (delta method)."""
    mean = tasks.mean()
    relative: np.ndarray = np.log(mean) + tasks / mean - 1
    return relative


def near_best(line: Sequence[Scored]) -> list[Scored]:
    """The best rate and those that cannot be told from it, each by itself (see `below`)."""
    least = best(line)
    return [s for s in line if s is least or below(least, s) is None]


def beyond(line: Sequence[Scored], top: float) -> str:
    """`193 at 3, 5.9e+03 at 10`: the errors above the end of an axis; empty if there are none."""
    return ", ".join(f"{s.mean:.2g} at {s.rate:g}" for s in line if top < s.mean < math.inf)


def draw(axis: Axes, line: Sequence[Scored], colour: str, top: float) -> None:
    """Means with their intervals over seeds on a logarithmic axis that ends at `top`, the best of them starred.

    Triangles at the upper edge are rates with an error beyond it, crosses there rates at which some seed has none.
    """
    there = [s for s in line if s.mean <= top]
    if there:
        ends = np.array([s.ends for s in there])
        means = np.array([s.mean for s in there])
        axis.errorbar(
            [s.rate for s in there], means, np.abs(ends.T - means), fmt="o-", color=colour, capsize=3, markersize=4,
            label="geometric mean over seeds, 95 %",
        )  # fmt: skip
        least = best(there)
        axis.plot(least.rate, least.mean, "*", color=colour, markersize=13, label=f"best: {least.rate:g}", zorder=3)
    edge = {
        "^": ("error beyond the axis", [s.rate for s in line if top < s.mean < math.inf]),
        "x": ("no finite error in some seed", [s.rate for s in line if s.mean == math.inf]),
    }
    for marker, (what, rates) in edge.items():
        if rates:
            axis.plot(
                rates, [0.97] * len(rates), marker, color=colour, label=what, transform=axis.get_xaxis_transform()
            )
    axis.set_yscale("log")
    if there:
        axis.set_ylim(top=top)
