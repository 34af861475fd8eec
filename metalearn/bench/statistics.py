"""Medians and spreads of interleaved rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Median and quartiles of n values."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Quartiles by linear interpolation between the sorted values."""
    if not values:
        raise ValueError("no values")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def paired_ratio(peer: dict[int, float], ours: dict[int, float]) -> Spread | None:
    """Peer's time over ours in the rounds that have both, so that what slows the machine for a while cancels."""
    common = sorted(peer.keys() & ours.keys())
    return spread([peer[r] / ours[r] for r in common]) if common else None
