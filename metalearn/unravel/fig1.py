"""Figure 1: MAML's minimiser over its rate in the plane, uniform optima."""

from functools import partial

from metalearn.unravel import paths

show = partial(paths.show, 1, "minimisers over alpha")
