"""Figure 7: MAML's minimiser over its rate in the plane, normal optima, centred and uncentred features."""

from __future__ import annotations

from collections.abc import Sequence

from metalearn.results import Result
from metalearn.shown import Shown
from metalearn.unravel import paths


def show(results: Sequence[Result]) -> Shown:
    """See `metalearn.unravel.paths`."""
    return paths.draw("Figure 7: minimisers over alpha, centred and uncentred features", "fig7", results)
