"""Figure 1: MAML's minimiser over its rate in the plane, uniform optima."""

from __future__ import annotations

from collections.abc import Sequence

from metalearn.results import Result
from metalearn.shown import Shown
from metalearn.unravel import paths


def show(results: Sequence[Result]) -> Shown:
    """See `metalearn.unravel.paths`."""
    return paths.draw("Figure 1: minimisers over alpha", "fig1", results)
