"""Scores of trained cells over their inner rates: means over seeds, and how to draw and compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from metalearn.results import Result
from metalearn.statistics import over_seeds


class Scored(NamedTuple):
    """A rate and the test error of each seed, which diverged runs and scores that are not finite have none of."""

    rate: float
    seeds: dict[int, float]
    lost: int

    @property
    def mean(self) -> float:
        """Over the seeds; infinite if some of them have no score."""
        return float("inf") if self.lost or not self.seeds else over_seeds(list(self.seeds.values())).mean

    @property
    def half(self) -> float:
        """Half-width of the 95 % interval over seeds (Student's t); 0 for one seed."""
        return 0.0 if len(self.seeds) < 2 else over_seeds(list(self.seeds.values())).half

    def text(self) -> str:
        """`0.0976 +- 0.013 at 0.03`."""
        return f"{self.mean:.3g} +- {self.half:.2g} at {self.rate:g}"


def scored(results: Sequence[Result], rate: Callable[[Result], float], metric: str = "mse") -> list[Scored]:
    """The results by rate, in ascending order."""
    found: dict[float, list[Result]] = {}
    for result in results:
        found.setdefault(rate(result), []).append(result)
    out = []
    for value, own in sorted(found.items()):
        means = {r.data["seed"]: (r.metric(metric) or {}).get("mean") for r in own}
        seeds = {s: float(m) for s, m in means.items() if m is not None}
        out.append(Scored(value, seeds, len(own) - len(seeds)))
    return out


def best(line: Sequence[Scored]) -> Scored:
    """The rate with the least mean error."""
    return min(line, key=lambda s: s.mean)


def below(one: Scored, other: Scored) -> bool | None:
    """Whether one error is below another beyond 95 % over the seeds that both have; None with less than two."""
    if other.lost:
        return True
    shared = sorted(one.seeds.keys() & other.seeds.keys())
    if len(shared) < 2:
        return None
    difference = over_seeds([one.seeds[s] - other.seeds[s] for s in shared])
    return bool(difference.mean + difference.half < 0)


def draw(axis: Axes, line: Sequence[Scored], label: str, colour: str) -> None:
    """Means with their intervals over seeds, the best of them starred, rates without a mean crossed at the top."""
    there = [s for s in line if s.mean < float("inf")]
    axis.errorbar(
        [s.rate for s in there], [s.mean for s in there], [s.half for s in there], fmt="o-", color=colour, capsize=3,
        markersize=4, label=label,
    )  # fmt: skip
    if there:
        least = best(there)
        axis.plot(least.rate, least.mean, "*", color=colour, markersize=13, label=f"best: {least.rate:g}")
    for s in line:
        if s not in there:
            axis.plot(s.rate, 0.97, "x", color=colour, transform=axis.get_xaxis_transform())
