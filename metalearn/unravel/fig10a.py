"""Figure 10(a): test error of a network on quadratic regression over alpha, and the heuristic range."""

from __future__ import annotations

from collections.abc import Sequence

from metalearn.results import Result
from metalearn.shown import Shown
from metalearn.unravel import heuristic_range


def show(results: Sequence[Result]) -> Shown:
    """See `metalearn.unravel.heuristic_range`."""
    return heuristic_range.draw("Figure 10(a): the heuristic range, quadratic regression", "fig10a", results)
