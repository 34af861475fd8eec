"""Studies compute numbers of a paper's theory; theirs are the files that a training run leaves, too."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from metalearn.evaluation.metrics import TaskMean, metric_name
from metalearn.random import Key
from metalearn.statistics import over_seeds

State = dict[str, Any]
Label = float | int | str


class Measured(NamedTuple):
    """One number that a study found, with its uncertainty.

    Attributes:
        metric: what it is, in snake_case.
        where: the point it belongs to: names and values that qualify the metric, such as `alpha` or `law`.
        summary: `mean, std, ci95, n, interval, unit` as in result.json.
        values: what the mean is of, one for each task or repetition; empty if it is no mean.
    """

    metric: str
    where: dict[str, Label]
    summary: dict[str, Any]
    values: tuple[float, ...]

    @property
    def name(self) -> str:
        """`metric@key=value,...`, keys in alphabetical order, numbers in their shortest form."""
        return metric_name(self.metric, **{k: label(v) for k, v in self.where.items()})

    @property
    def point(self) -> str | None:
        """The qualifiers alone."""
        return self.name.partition("@")[2] or None


def label(value: Label) -> str:
    """A qualifier's value as text; numbers to 12 digits, so that grids print as they were meant."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def over(metric: str, values: Iterable[float], unit: str = "", *, of: str = "tasks", **where: Label) -> Measured:
    """The mean of one value for each task (or whatever `of` says), with its 95 % interval."""
    kept = tuple(float(v) for v in values)
    return Measured(metric, where, TaskMean(kept).compute(unit) | {"interval": of}, kept)


def repeated(
    metric: str, values: Iterable[float], unit: str = "", *, of: str = "repetitions", **where: Label
) -> Measured:
    """The mean over a few repetitions (or whatever `of` says), with Student's 95 % interval."""
    found = over(metric, values, unit, of=of, **where)
    half = over_seeds(found.values).half
    return found._replace(summary=found.summary | {"ci95": half if math.isfinite(half) else None})


def estimate(
    metric: str, value: float, se: float, n: int, unit: str = "", *, of: str = "tasks", **where: Label
) -> Measured:
    """A value with a standard error that is not that of a mean, such as a jackknife's over `n` tasks."""
    ci = 1.96 * se
    numbers = {"mean": value, "std": None, "ci95": ci}
    finite = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
    return Measured(metric, where, {**finite, "n": n, "interval": of, "unit": unit}, ())


def exact(metric: str, value: float, unit: str = "", **where: Label) -> Measured:
    """A value without sampling error."""
    return estimate(metric, value, math.nan, 1, unit, of="exact", **where)


class Study(ABC):
    """Something to compute; a subclass takes the keys of its schema (`metalearn.schema.studies`) as keyword arguments.

    A subclass's `measure` is a generator, so that a run shows how far it is.
    """

    title: str
    """One line for tables."""

    @abstractmethod
    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Compute.

        Args:
            key: the stream of all random draws, by the run's seed.
            starts: states of the learners that the study's schema needs, in that order; empty if it needs none.

        Yields:
            What was found, the headline first: it has no qualifiers.
        """
