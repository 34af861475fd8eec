"""Figure 7: MAML's minimiser over its rate in the plane, normal optima, centred and uncentred features."""

from functools import partial

from metalearn.unravel import paths

show = partial(paths.show, 7, "minimisers over alpha, centred and uncentred features")
