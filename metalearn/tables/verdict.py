"""Whether a measured mean reproduces a published number, and if that is open, what would decide it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

from metalearn.statistics import Components, Z, half_width, p_value

REPRODUCED, DIFFERS, UNDERPOWERED = "reproduced", "differs", "under-powered"
POWER = 0.8
"""Probability with which the named number of episodes or seeds decides, if the true difference is the measured one."""
AGAIN = NormalDist().inv_cdf((1 + POWER) / 2)
"""Standard errors by which a repeated measurement stays on its side of both bounds with that probability."""
MOST_TASKS, MOST_SEEDS = 10_000_000, 1000


class Judged(NamedTuple):
    """Ours minus published.

    difference, half: with the half-width of its 95 % interval (NaN: unknown).
    p: of the two-sided test of no difference (NaN: no published interval).
    verdict: REPRODUCED, DIFFERS, UNDERPOWERED, or None without a margin.
    tasks, seeds: what would decide, where it is open; reason: why nothing would.
    """

    difference: float
    half: float
    p: float
    verdict: str | None
    tasks: int | None = None
    seeds: int | None = None
    reason: str | None = None


def judge(ours: Components, published: float, half: float | None, margin: float | None) -> Judged:
    """Compare with a published number.

    The interval of the difference is made from that over seeds (Student's t), that of what test tasks bring to all
    seeds, and the published one (1.96 standard errors; none where none is printed): the root of the sum of squares. It
    is never narrower than one of them, and more seeds or tasks never widen it.

    Args:
        ours: in the published unit.
        published: the printed number.
        half: its printed half-width.
        margin: differences up to this count as reproduced.
    """
    theirs = ((half / Z) ** 2 if half is not None else 0.0, math.inf)
    parts = [*ours.parts(), theirs]
    difference, width = ours.mean - published, half_width(parts)
    p = math.nan if half is None else p_value(difference, parts)
    if margin is None:
        return Judged(difference, width, p, None)
    if math.isnan(width):
        return Judged(difference, width, p, UNDERPOWERED, reason="one test task has no interval")
    if abs(difference) + width <= margin:
        return Judged(difference, width, p, REPRODUCED)
    if abs(difference) - width > margin:
        return Judged(difference, width, p, DIFFERS)
    return Judged(difference, width, p, UNDERPOWERED, *_what_decides(ours, theirs, abs(difference), margin))


def _what_decides(
    ours: Components, theirs: tuple[float, float], difference: float, margin: float
) -> tuple[int | None, int | None, str | None]:
    """Test episodes and seeds (None: as many as there are) that close the verdict, or why none do."""
    room, known = abs(margin - difference), Z * math.sqrt(theirs[0])
    if known >= margin and difference <= margin + known:
        return None, None, "cannot be decided: the published interval alone is wider than the margin"
    if known > 0 and known >= room:
        return None, None, "cannot be decided: the published interval alone reaches across the margin"

    def enough(seeds: int, tasks: int) -> bool:
        own = ours.parts(seeds, tasks)
        return half_width([*own, theirs]) + AGAIN * math.sqrt(sum(v for v, _ in own)) <= room

    if not enough(ours.seeds if ours.seeds == 1 else MOST_SEEDS, MOST_TASKS):
        return None, None, _NO_NUMBER
    more_tasks = _first(partial(enough, ours.seeds), _more(ours.tasks, MOST_TASKS))
    if ours.seeds == 1:
        return more_tasks, None, None
    more_seeds = _first(lambda s: enough(s, ours.tasks), _more(ours.seeds, MOST_SEEDS))
    by_seed, by_task = ours.seed / ours.seeds, ours.task / ours.tasks
    if more_tasks and (by_task > by_seed or not more_seeds):
        return more_tasks, None, None
    if more_seeds:
        return None, more_seeds, None
    pairs = ((s, _first(partial(enough, s), _more(ours.tasks, MOST_TASKS, 1.5))) for s in _more(ours.seeds, MOST_SEEDS))
    tasks, seeds = min(((n, s) for s, n in pairs if n), key=math.prod)
    return tasks, seeds, None


_NO_NUMBER = f"cannot be decided with {MOST_TASKS:,} episodes and {MOST_SEEDS:,} seeds: the difference is at the margin"


def _first(suits: Callable[[int], bool], numbers: Iterator[int]) -> int | None:
    return next((n for n in numbers if suits(n)), None)


def _more(now: int, most: int, factor: float = 1.1) -> Iterator[int]:
    """Numbers above `now` in growing steps, of two digits that are not 0."""
    n = now
    while n < most:
        n = max(n + 1, math.ceil(n * factor))
        unit = 10 ** max(0, len(str(n)) - 2)
        n = math.ceil(n / unit) * unit
        yield n
