"""Figure 5 of "Unraveling MAML": MAML's minimiser beside that of joint training while new tasks adapt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, exact, repeated
from metalearn.studies.laws import law_of
from metalearn.theory import designs, linear_meta


class Found(NamedTuple):
    """One repetition after each number of steps, `[steps]` all: differences (MAML minus joint training), and a share.

    distance: to new optima; new, own: losses on new tasks and on those of training; left: of the squared distance from
    a start in a random direction.
    """

    distance: Tensor
    new: Tensor
    own: Tensor
    left: Tensor


class FastAdaptation(Study):
    """Losses and distances to the optima after t steps from w_m(alpha), minus those from w_r = w_m(0).

    Features are random matrices with entries of one law, optima are N(0, v I). Tasks descend with rate eta.

    `distance_gap` is F_t(w_m) - F_t(w_r) (Definition 1) on new tasks. `loss_gap` is the sum over tasks of
    l_t(w_m) - l_t(w_r): on new tasks (`tasks=new`), and on those of training (`tasks=own`). All are means over
    repetitions, each with its own tasks. On new tasks the expectation over all optima is taken exactly, as one draw of
    them is all noise; tasks of training have one draw, on which w_m and w_r depend.

    `left` is E tr Q^(2t) / d, Q = I - 2 eta H: what remains of `distance_gap` if w_m and w_r differ alike in all
    directions.

    Args:
        inputs: law of each entry of the features, and its numbers.
        samples: K.
        width: d.
        tasks: of training.
        new_tasks: over which F_t is a mean, and losses are summed.
        alpha: rate of MAML.
        eta: rate of adaptation.
        variance: v, of each entry of the optima.
        steps: those t.
        repetitions: their number.
    """

    title = "fast adaptation of MAML and joint training"

    def __init__(
        self,
        *,
        inputs: list[str],
        samples: int,
        width: int,
        tasks: int,
        new_tasks: int,
        alpha: float,
        eta: float,
        variance: float,
        steps: list[int],
        repetitions: int,
    ):
        self.law, self.samples = law_of(inputs), samples
        self.design = designs.random_matrix(self.law, width)
        self.tasks, self.new_tasks, self.variance = tasks, new_tasks, variance
        self.alpha, self.eta, self.steps, self.repetitions = alpha, eta, sorted(steps), repetitions

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields gaps and `left` by t, the extreme eigenvalues of new tasks' H, and the mean of the features' law."""
        found: list[Found] = []
        extremes: list[tuple[float, float]] = []
        for repetition in range(self.repetitions):
            own_draw, eigenvalues = self._repetition(torch.Generator().manual_seed(key.sub(str(repetition)).integer()))
            found.append(own_draw)
            extremes.append(eigenvalues)
        distance, new, own, left = (torch.stack(values, -1).tolist() for values in zip(*found, strict=True))
        yield repeated("distance_gap", distance[0], "squared distance")
        for i, t in enumerate(self.steps):
            yield repeated("distance_gap", distance[i], "squared distance", t=t)
            yield repeated("loss_gap", new[i], "target units squared", t=t, tasks="new")
            yield repeated("loss_gap", own[i], "target units squared", t=t, tasks="own")
            yield repeated("left", left[i], "share", t=t)
        yield exact("eigenvalue", min(low for low, _ in extremes), which="least")
        yield exact("eigenvalue", max(high for _, high in extremes), which="largest")
        yield exact("mean_feature", self.law.mean)

    def _repetition(self, generator: Generator) -> tuple[Found, tuple[float, float]]:
        own, new = (self.design.draw(n, self.samples, generator) for n in (self.tasks, self.new_tasks))
        optima = math.sqrt(self.variance) * torch.randn(
            self.tasks, self.design.width, generator=generator, dtype=torch.float64
        )
        eigenvalues = torch.linalg.eigvalsh(new.mT @ new / self.samples)
        shrink = (1 - 2 * self.eta * eigenvalues).square()
        found = Found(
            linear_meta.gap(own, new, self.alpha, self.eta, self.steps, variance=self.variance).mean(-1),
            linear_meta.gap(own, new, self.alpha, self.eta, self.steps, variance=self.variance, loss=True).sum(-1),
            self._own_losses(own, optima),
            torch.stack([(shrink**t).mean() for t in self.steps]),
        )
        return found, (float(eigenvalues.min()), float(eigenvalues.max()))

    def _own_losses(self, features: Tensor, optima: Tensor) -> Tensor:
        rates = torch.tensor([self.alpha, 0.0], dtype=torch.float64)
        starts = linear_meta.minimiser(features, optima, rates)
        maml, joint = linear_meta.adapted_loss(starts, features, optima, self.eta, self.steps).sum(-1).unbind(1)
        return maml - joint
