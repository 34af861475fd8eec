"""Figure 6 of "Unraveling MAML": how often each moment of the data enters alpha*_lim of polynomial features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, exact
from metalearn.studies.laws import law_of
from metalearn.theory import designs

COEFFICIENTS = {1: designs.g1, 2: designs.g2, 3: designs.g3}


class PolynomialMoments(Study):
    """The coefficients g1, g2, g3 of moments in tr E[G^2] and tr E[G^3] of features (1, x, ..., x^(d-1)).

    Args:
        width: d.
        samples: K of the traces that are computed from them.
        inputs: law of x in these.
    """

    title = "coefficients of polynomial moments"

    def __init__(self, *, width: int, samples: int, inputs: list[str]):
        self.width, self.samples, self.law = width, samples, law_of(inputs)

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields `coefficient` by g and order n, `sum` by g, traces from coefficients and from all tuples of indices.

        tr E[G^3] is of one sample: with more, its terms are no sums over n alone.
        """
        found = {g: of(self.width).tolist() for g, of in COEFFICIENTS.items()}
        yield exact("sum", sum(found[1]))
        for g, counts in found.items():
            yield exact("sum", sum(counts), g=g)
            for n, count in enumerate(counts):
                yield exact("coefficient", count, g=g, order=n)
        moments = self.law.moments(6 * (self.width - 1))
        pairs = self.samples * (self.samples - 1)
        second = sum(c * (self.samples * moments[2 * n] + pairs * moments[n] ** 2) for n, c in enumerate(found[1]))
        third = sum(c * moments[2 * n] for n, c in enumerate(found[2]))
        yield exact("trace", second, power=2, how="coefficients")
        yield exact("trace", designs.polynomial_traces(self.samples, self.width, moments)[1], power=2, how="tuples")
        yield exact("trace", third, power=3, how="coefficients")
        yield exact("trace", designs.polynomial_traces(1, self.width, moments)[2], power=3, how="tuples")
