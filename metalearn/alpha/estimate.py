"""What a run's training tasks say of its inner learning rate at the initial parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from metalearn.algorithms.maml import MAML
from metalearn.data import Episodes
from metalearn.episode import Episode, MetaBatch
from metalearn.random import Key, TaskKey
from metalearn.statistics import over_tasks
from metalearn.theory import tangent
from metalearn.theory.alpha_star import Estimate, Interval, heuristic_range

T = TypeVar("T")
TASKS = 32
"""Tasks that an estimate is of, if nobody says otherwise."""
EXACT_ROWS, PROBES = 16, 4
"""Support sets with more outputs than these are probed, so many times for each task."""
TOLERANCE, PRODUCTS = 0.1, 40
"""Of power iteration: relative residual, and Hessian-vector products at most."""
RESAMPLES = 2000
BLOCK = 2**26
"""Bytes of tangent features that are held at once."""


class Found(NamedTuple):
    """An estimate of alpha*, its 95 % bootstrap interval over tasks, and how its traces were taken (0: exactly)."""

    estimate: Estimate
    interval: Interval
    tasks: int
    probes: int

    def numbers(self) -> dict[str, float]:
        """All of it by name."""
        return {**self.estimate._asdict(), **self.interval._asdict(), "tasks": self.tasks, "probes": self.probes}


def tasks_of(learner: MAML, data: Episodes, count: int) -> MetaBatch:
    """The training tasks that the estimate is of: a stream of the run's own that no meta-step draws from."""
    batch = data.stream("alpha", 0, count)
    return batch._replace(episodes=learner.regularizer.episodes(batch.episodes, batch.key))


def star(learner: MAML, batch: MetaBatch, *, same: bool = False, probes: int | None = None) -> Found:
    """alpha* = E tr(A B) / E tr(A B A) of tangent features at the learner's present parameters.

    Args:
        learner: its `alpha` plays no part.
        batch: tasks.
        same: B of the support set, as eq. 3.3 has it, not of the query set (Corollary 2), which the outer loss is of.
        probes: random vectors for each task in place of all rows; 0 for none, None for what `EXACT_ROWS` says.

    Raises:
        ValueError: if the features are zero or not finite.
    """
    rows = batch.episodes.support.y.shape[1] * learner.net.stage(learner.net.stages[-1]).shape[0]
    count = (0 if rows <= EXACT_ROWS else PROBES) if probes is None else probes
    theta = learner.constants()

    def traces(episodes: Episode, key: TaskKey) -> Tensor:
        found = tangent.tangent(learner, theta, episodes, key)
        query = None if same else found.query
        if count:
            return tangent.probed(found.support, query, count, key.sub("same" if same else "split"))
        return tangent.grams(found.support, query).traces()

    terms = tangent.curvature_terms(torch.cat(_each(learner, batch, traces)))
    return Found(terms.estimate(), terms.interval(resamples=RESAMPLES), len(terms.values), count)


class Range(NamedTuple):
    """The heuristic range of alpha (H.18), and what it is made of.

    low, high: 2 / width and n / width, for features in [0, 1] as the paper has it. scaled_low, scaled_high: the same
    divided by the square of these features' range, `least` to `largest`. width: d, or N K if that is smaller.
    observations: n = N K.
    """

    low: float
    high: float
    scaled_low: float
    scaled_high: float
    least: float
    largest: float
    width: int
    observations: int


def heuristic(learner: MAML, batch: MetaBatch, tasks: int) -> Range | None:
    """[2, n] / min(N K, d), from bounds on the variance of features: H.18.

    For the mean squared error only, from which it is derived; None otherwise. Features are the d tangent features, K
    is a task's number of support outputs, and n = N K, those of all training, for which the features' variance is
    bounded (the paper does not say what n is; `unravel/fig10` has the same). So the drawn tasks matter for the range
    of the features alone, and the upper end grows with the length of training until it says nothing.

    Args:
        learner: its `alpha` plays no part.
        batch: tasks that show the features' range.
        tasks: N, all tasks of training.
    """
    if learner.kind != "regression":
        return None
    theta = learner.constants()

    def ends(episodes: Episode, key: TaskKey) -> tuple[int, float, float]:
        jacobian = tangent.tangent(learner, theta, episodes, key).support
        blocks = [b.aminmax() for b in tangent.features(jacobian, limit=BLOCK)]
        return jacobian.rows, float(min(b.min for b in blocks)), float(max(b.max for b in blocks))

    found = _each(learner, batch, ends)
    rows, least, largest = found[0][0], min(f[1] for f in found), max(f[2] for f in found)
    width = sum(p.numel() for k, p in learner.net.named_parameters() if learner.moves(k))
    paper = heuristic_range(tasks, rows, width)
    own = heuristic_range(tasks, rows, width, low=least, high=largest)
    return Range(*paper, *own, least, largest, min(tasks * rows, width), tasks * rows)


class Stability(NamedTuple):
    """2 / lambda_max of the support loss, from which on gradient steps on its quadratic model diverge.

    Median and least over tasks (infinite where nothing curves upwards), and the largest relative residual of a power
    iteration.
    """

    median: float
    least: float
    tasks: int
    residual: float


def stability(learner: MAML, batch: MetaBatch) -> Stability:
    """See `Stability`; at the learner's present parameters."""
    theta = learner.constants()

    def largest(episodes: Episode, key: TaskKey) -> Tensor:
        options = {"tolerance": TOLERANCE, "steps": PRODUCTS}
        found = tangent.support_curvature(learner, theta, episodes, key, **options)
        return torch.stack([found.value, found.residual], 1)

    found = torch.cat(_each(learner, batch, largest))
    bound = 2 / found[:, 0].clamp(min=0)
    return Stability(float(bound.median()), float(bound.min()), len(bound), float(found[:, 1].max()))


class Curve(NamedTuple):
    """Query loss after one inner step, over alphas; the same tasks for all.

    Mean loss for each alpha, and the 95 % half-width over tasks of its difference from `start`, the loss without a
    step; None where it is not finite. `best` is the alpha of the least mean loss, and `low` and `high` are its 95 %
    bootstrap interval over tasks, all three out of `alphas`; None if no mean loss is below `start`.
    """

    alphas: list[float]
    losses: list[float | None]
    halves: list[float | None]
    start: float
    best: float | None
    low: float | None
    high: float | None


def curve(learner: MAML, batch: MetaBatch, alphas: Sequence[float]) -> Curve:
    """See `Curve`; through the learner's own `adapt` and `predict`, and with its rate set back in the end."""
    theta, kept = learner.constants(), learner.rate_in_force

    def losses(steps: int) -> Tensor:
        def after(episodes: Episode, key: TaskKey) -> Tensor:
            phi = learner.adapt(theta, episodes.support, steps=steps, key=key)[-1]
            prediction = learner.predict(theta, phi, episodes.query.x, support=episodes.support, bn="batch")
            return learner.loss(prediction, episodes.query.y).double()

        return torch.cat(_each(learner, batch, after))

    try:
        rows = []
        for alpha in alphas:
            learner.use_rate(alpha)
            rows.append(losses(1))
    finally:
        learner.use_rate(kept)
    found, before = torch.stack(rows), losses(0)
    means = [_finite(float(row.mean())) for row in found]
    halves = [_finite(over_tasks((row - before).cpu().numpy()).half) for row in found]
    start, (best, ends) = float(before.mean()), _least(found, alphas)
    lowest = means[list(alphas).index(best)]
    helps = lowest is not None and lowest < start
    return Curve(list(alphas), means, halves, start, *((best, *ends) if helps else (None, None, None)))


def _least(losses: Tensor, alphas: Sequence[float]) -> tuple[float, Interval]:
    """The alpha of the least mean loss `[alphas, tasks]`, and its bootstrap interval over tasks."""
    losses, tasks = torch.where(losses.isfinite(), losses, math.inf), losses.shape[1]
    which = Key(0, "curve").integers(tasks, torch.arange(RESAMPLES), size=tasks).to(losses.device)
    places = losses[:, which].mean(2).argmin(0).sort().values
    ends = [alphas[int(places[int(q * (RESAMPLES - 1))])] for q in (0.025, 0.975)]
    return alphas[int(losses.mean(1).argmin())], Interval(*ends)


def ladder(low: float, high: float, count: int) -> list[float]:
    """`count` values in equal ratios."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def sweep(star: float, best: float | None) -> list[float]:
    """Values to sweep, two digits each: by factors of two around the estimate, and beyond the curve's best.

    At most seven, further apart if the two are far from each other. Without a best, around the estimate alone.
    """
    best = star if best is None else best
    low, high = min(star / 4, best / 2), max(star * 4, best * 2)
    count = min(7, 1 + round(math.log2(high / low)))
    return [float(f"{v:.2g}") for v in ladder(low, high, count)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _each(learner: MAML, batch: MetaBatch, work: Callable[[Episode, TaskKey], T]) -> list[T]:
    """`work` of each chunk of tasks."""
    return learner.in_chunks(lambda c: work(batch.episodes.select(c), batch.key.select(c)), batch.episodes)


def first(batch: MetaBatch, count: int) -> MetaBatch:
    """The first tasks of a batch."""
    part = slice(0, count)
    return batch._replace(
        total=min(count, batch.total), episodes=batch.episodes.select(part), key=batch.key.select(part)
    )
