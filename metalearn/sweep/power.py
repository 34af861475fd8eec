"""The smallest true difference that a sweep's planned episodes and seeds can show. Imports no torch.

All tests are two-sided at 5 %, and the difference is found with probability 80 %. Over tasks, models are fixed and test
episodes vary; over seeds, trainings vary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metalearn.cells import Cell
from metalearn.identity import config_hash
from metalearn.record import episodes_id
from metalearn.results import Result
from metalearn.statistics import Z, detectable

Config = dict[str, Any]
LEAST = 8
"""Episodes from which their spread is worth a number."""
Scores = Mapping[int, np.ndarray]
"""Per-episode values `[episodes]` of a method's models, by seed."""


class Range(NamedTuple):
    """The median and the ends of what pairs of methods, or methods, give."""

    median: float
    low: float
    high: float


class Shown(NamedTuple):
    """The smallest differences that one setting of a sweep can show, in the metric's own unit.

    setting: the test episodes in words. metric: what they are scored by. episodes, seeds: planned. methods: how many
    methods the spread is known of. paired: between two methods on the same episodes; None for a single method.
    published: one method against a number that is known exactly; printed: against one with the table's typical interval
    (`half`), None where there is none. over_seeds, published_over_seeds: the same over seeds, None where the spread of
    seeds is not known. source: where the spread is from.
    """

    setting: str
    metric: str
    episodes: int
    seeds: int
    methods: int
    paired: Range | None
    published: Range
    printed: Range | None
    half: float | None
    over_seeds: Range | None
    published_over_seeds: Range | None
    source: str


def method(config: Config) -> str:
    """Names what is compared: the run without its seed."""
    rest = {k: v for k, v in config.items() if k not in ("seed", "output_dir", "rerun", "logger")}
    return config_hash(rest)


def setting(cell: Cell) -> str:
    """The test episodes in words."""
    data = cell.config["dataset"]
    way, shot = (data.get(f"test_{k}") or data.get(k) for k in ("way", "shot"))
    words = [str(data["name"]), *([str(data["variant"])] if data.get("variant") else [])]
    words += [f"{way}-way"] if way else []
    return " ".join([*words, *([f"{shot}-shot"] if shot else [])])


def by_setting(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by the id of their frozen test episodes: those within one can be paired."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(episodes_id(cell), []).append(cell)
    return found


def scores(results: Sequence[Result]) -> dict[str, dict[int, np.ndarray]]:
    """Headline scores of finished runs, by method and seed; those that diverged or left no episodes do not count."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for result in results:
        values = result.values()
        if len(values) >= LEAST and np.isfinite(values).all():
            found.setdefault(method(result.config), {})[result.data["seed"]] = values
    return found


def spread_over_tasks(methods: Sequence[Scores]) -> list[float]:
    """Standard deviation over episodes of the difference of each two methods, averaged over the seeds both have.

    Episodes are shared from the first on; methods of which fewer are known limit their pairs.
    """
    found = []
    for i, one in enumerate(methods):
        for other in methods[:i]:
            if seeds := one.keys() & other.keys():
                n = min(len(x[s]) for x in (one, other) for s in seeds)
                differences = np.mean([one[s][:n] - other[s][:n] for s in seeds], axis=0)
                found.append(float(differences.std(ddof=1)))
    return found


def spread_over_seeds(methods: Sequence[Scores]) -> tuple[list[float], list[float]]:
    """Standard deviations over seeds: of the difference of each two methods, and of each method's mean.

    Only of two seeds and more; empty lists otherwise.
    """
    pairs, alone = [], []
    for i, one in enumerate(methods):
        if len(one) > 1:
            alone.append(float(np.std([v.mean() for v in one.values()], ddof=1)))
        for other in methods[:i]:
            if len(seeds := one.keys() & other.keys()) > 1:
                pairs.append(float(np.std([one[s].mean() - other[s].mean() for s in seeds], ddof=1)))
    return pairs, alone


def pooled(deviations: Sequence[float]) -> float:
    """One standard deviation from several of equal standing: each of a few seeds alone is known badly."""
    return math.sqrt(sum(d * d for d in deviations) / len(deviations))


def detectable_over_seeds(std: float, seeds: int, *, power: float = 0.8) -> float:
    """The smallest true mean that a two-sided 5 % t-test of `seeds` values with this deviation finds.

    The deviation is taken as if it were exact; the test's own estimate has `seeds - 1` degrees of freedom. Infinite for
    one seed.
    """
    if seeds < 2:
        return math.inf
    from scipy.optimize import brentq
    from scipy.stats import chi2, norm, t

    bound, probable = t.ppf(0.975, seeds - 1), (np.arange(4000) + 0.5) / 4000
    # scipy's noncentral t is NaN for large shifts: the mean over the estimated deviation is taken here
    limits = bound * np.sqrt(chi2.ppf(probable, seeds - 1) / (seeds - 1))

    def lacking(shift: float) -> float:
        return power - float(np.mean(norm.sf(limits - shift) + norm.cdf(-limits - shift)))

    return float(std * brentq(lacking, 0.0, 10 * bound) / math.sqrt(seeds))


def detectable_from(std: float, n: int, half: float = 0.0) -> float:
    """The smallest difference of a mean of n values from a printed number with a 95 % half-width."""
    return detectable(math.hypot(std / math.sqrt(n), half / Z), 1)


def shown(
    label: str, metric: str, methods: Sequence[Scores], *, episodes: int, seeds: int, half: float | None, source: str
) -> Shown:
    """The smallest differences from the scores of some methods on a setting's episodes.

    Args:
        label: of the setting.
        metric: of the scores.
        methods: at least one.
        episodes: planned for each model.
        seeds: planned for each method.
        half: typical half-width of the published numbers, in the metric's unit; None if none is printed.
        source: where the scores are from.
    """
    pairs = spread_over_tasks(methods)
    own = [float(np.mean(list(m.values()), axis=0).std(ddof=1)) for m in methods]
    between, alone = spread_over_seeds(methods)
    return Shown(
        setting=label,
        metric=metric,
        episodes=episodes,
        seeds=seeds,
        methods=len(methods),
        paired=_range([detectable(s, episodes) for s in pairs]),
        published=_range([detectable_from(s, episodes) for s in own]) or Range(math.nan, math.nan, math.nan),
        printed=None if half is None else _range([detectable_from(s, episodes, half) for s in own]),
        half=half,
        over_seeds=_over_seeds(between, seeds),
        published_over_seeds=_over_seeds(alone, seeds),
        source=source,
    )


def _over_seeds(deviations: Sequence[float], seeds: int) -> Range | None:
    if not deviations or seeds < 2:
        return None
    low, high = (detectable_over_seeds(s, seeds) for s in (min(deviations), max(deviations)))
    return Range(detectable_over_seeds(pooled(deviations), seeds), low, high)


def _range(values: Sequence[float]) -> Range | None:
    return Range(float(np.median(values)), min(values), max(values)) if values else None
