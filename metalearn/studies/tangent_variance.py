"""alpha*_lim of a two-layer network's tangent features over the variance of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, estimate, exact
from metalearn.theory import alpha_star, designs
from metalearn.theory.two_layer import TwoLayer

LAWS = ("normal", "uniform", "exponential")
"""In the order of `designs.of_deviation`."""


class TangentVariance(Study):
    """Inputs from N(0, s^2), U(-sqrt(3) s, sqrt(3) s) and Exp(1 / s), all of variance s^2; eq. 3.3 on K x K kernels.

    The draws at all variances are the same but for their scale, and so is the network.

    Args:
        variances: of the inputs, above 0.
        tasks: N.
        samples: K.
        init: initialisation of the net.
        width: hidden units.
        inputs: p.
    """

    title = "alpha*_lim over the variance of the data, tangent features"

    def __init__(self, *, variances: list[float], tasks: int, samples: int, init: str, width: int, inputs: int):
        self.variances, self.tasks, self.samples = variances, tasks, samples
        self.init, self.width, self.inputs = init, width, inputs

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields `alpha_zero`, that of data without spread; then `alpha_lim` and tr E[G] / K by law and variance."""
        net = TwoLayer.drawn(key.sub("net"), self.inputs, self.width, self.init)
        origin = torch.zeros(1, self.inputs, dtype=torch.float64)
        yield exact("alpha_zero", 1 / (2 * float(net.kernel(origin, origin))))
        for variance in self.variances:
            for name, law in zip(LAWS, designs.of_deviation(variance**0.5), strict=True):
                generator = torch.Generator().manual_seed(key.sub(f"x of {name}").integer())
                x = law.draw(self.tasks, self.samples, self.inputs, generator=generator)
                kernels = torch.cat([net.kernel(chunk, chunk) for chunk in x.split(50)])
                found = alpha_star.of_curvature(kernels * (2 / self.samples))
                yield estimate("alpha_lim", *found, self.tasks, law=name, variance=variance)
                second = float(kernels.diagonal(dim1=1, dim2=2).mean())
                yield exact("second_moment", second, law=name, variance=variance)
