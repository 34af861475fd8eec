"""Laws of single numbers as keys of studies name them: `[uniform, -5, 5]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from metalearn.theory import designs

LAWS: dict[str, Callable[..., designs.Law]] = {
    "normal": designs.normal,
    "uniform": designs.uniform,
    "exponential": lambda mean: designs.exponential(1 / mean),
    "chi2": lambda degrees: designs.chi2(int(degrees)),
    "zipf": lambda exponent, largest: designs.zipf(exponent, int(largest)),
}
"""By the names that `metalearn.schema.studies.LAWS` allows."""


def law_of(words: Sequence[str]) -> designs.Law:
    """The law of a name and its numbers."""
    name, *numbers = words
    return LAWS[name](*map(float, numbers))
