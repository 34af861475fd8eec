"""The estimates of alpha* that are of all tasks' samples together, beside eq. 3.3: H.14, H.15 and H.18."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.algorithms.maml import MAML
from metalearn.alpha.estimate import RESAMPLES
from metalearn.episode import MetaBatch
from metalearn.theory import tangent
from metalearn.theory.alpha_star import Terms, deviation, heuristic, stacked_kernel

HELD = 2**29
"""Bytes of features that are kept."""


class Stacked(NamedTuple):
    """Estimates from the tangent features Psi `[N K, d]` of N tasks' support sets, each with its error and interval.

    kernel: H.14, N K tr G^2 / (2 tr G^3) with G = Psi^T Psi. deviation: H.15, 1 / (2 N K sigma^2), which is printed as
    its simplification and is none. heuristic: H.18, 1 / (2 min(N K, d) sigma^2). samples: N K.
    """

    kernel: Terms
    deviation: Terms
    heuristic: Terms
    samples: int

    def numbers(self) -> dict[str, dict[str, float] | int]:
        """All of it by name."""
        found: dict[str, dict[str, float] | int] = {"samples": self.samples}
        for name in ("kernel", "deviation", "heuristic"):
            terms: Terms = getattr(self, name)
            found[name] = {**terms.estimate()._asdict(), **terms.interval(resamples=RESAMPLES)._asdict()}
        return found


def stacked(learner: MAML, batch: MetaBatch) -> Stacked | None:
    """See `Stacked`; for the mean squared error only, from which all three are derived, None otherwise.

    Exact: as many products as samples with J^T, a chunk of tasks at a time; features that are too many to hold are made
    again for each pair of chunks.

    Args:
        learner: its `alpha` plays no part.
        batch: tasks.

    Raises:
        ValueError: if the features are zero or not finite.
    """
    if learner.kind != "regression":
        return None
    theta = learner.constants()

    chunks = learner.chunks(batch.episodes)

    def features(i: int) -> Tensor:
        """Of the tasks of a chunk, `[t, K, d]`."""
        own = batch.episodes.select(chunks[i]), batch.key.select(chunks[i])
        with torch.no_grad():
            support = tangent.tangent(learner, theta, *own).support
        return torch.cat(list(tangent.features(support)), 1)

    rows = batch.episodes.support.y.shape[1]
    if batch.episodes.tasks * features(0)[0].numel() * 8 <= HELD:
        features = functools.cache(features)

    def samples(i: int) -> Tensor:
        return features(i).flatten(0, 1)

    kernel = tangent.kernel([functools.partial(samples, i) for i in range(len(chunks))], held=HELD)

    def each() -> Iterator[Tensor]:
        return (phi for i in range(len(chunks)) for phi in features(i))

    return Stacked(
        stacked_kernel.terms(kernel, [rows] * batch.episodes.tasks),
        deviation.terms(each()),
        heuristic.terms(each()),
        len(kernel),
    )
