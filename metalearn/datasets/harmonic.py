"""Harmonic regression: sums of two sine waves (Lacoste et al. 2018, https://arxiv.org/abs/1806.07528)."""

import math

import torch
from torch import Tensor

from metalearn.datasets.base import Draw, Split
from metalearn.datasets.formula import Formula
from metalearn.episode import Episode
from metalearn.random import Key

FREQUENCY = (5.0, 7.0)
CENTRE = (-4.0, 4.0)


class Harmonic(Formula):
    """Curves y = a1 sin(w x + b1) + a2 sin(2 w x + b2) from K noisy points; inputs and targets `[n, 1]`, unscaled.

    For each task w ~ U(5, 7), b1, b2 ~ U(0, 2 pi), a1, a2 ~ N(0, 1), and its inputs lie around a centre of its own:
    x ~ N(mu, 1), mu ~ U(-4, 4) (the inputs are torchmeta's; the paper leaves them open). E[y^2] = 1 without noise, so
    predicting zero has a mean squared error of 1.

    Noise is on all training targets and on every support set; query targets of validation and test are clean. The
    fixed training tasks are drawn once with `seed`; a meta-step picks among them and draws fresh points. Validation
    and test tasks are always fresh.

    Args:
        shot, queries: support and query points in training.
        test_shot, test_queries: the same in validation and test; None means as in training.
        tasks: number of fixed training tasks; None for fresh tasks at each meta-step.
        noise_std: standard deviation of the noise, in the target's units.
        seed: of the fixed training tasks.
    """

    def __init__(
        self,
        *,
        shot: int = 10,
        queries: int = 10,
        test_shot: int | None = None,
        test_queries: int | None = 100,
        tasks: int | None = 480,
        noise_std: float = 0.1,
        seed: int = 0,
    ):
        super().__init__(shot=shot, queries=queries, test_shot=test_shot, test_queries=test_queries)
        self.tasks, self.noise_std, self.seed = tasks, noise_std, seed

    def _curves(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Tensor:
        """`[..., 6]`: a1, a2, w, b1, b2 and mu of each task."""
        index: tuple[Tensor, ...] = (step, task)
        if split == "train" and self.tasks:
            index = (key.sub("which").integers(1, step, task, size=self.tasks)[..., 0],)
            key = Key(self.seed, "harmonic/training tasks")
        low = torch.tensor([FREQUENCY[0], 0.0, 0.0, CENTRE[0]])
        high = torch.tensor([FREQUENCY[1], 2 * math.pi, 2 * math.pi, CENTRE[1]])
        uniform = low + key.sub("curve").uniform(4, *index) * (high - low)
        return torch.cat([key.sub("amplitudes").normal(2, *index), uniform], -1)

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        curve = self._curves(split, key, step, task)
        draw = {"curve": curve, "x": curve[..., 5:] + key.sub("x").normal(self.points(split), step, task)}
        return draw | self.noise(split, key, step, task, self.noise_std)

    def fetch(self, split: Split, draw: Draw) -> Episode:
        x, curve = draw["x"].to(self.device), draw["curve"].to(self.device)
        a1, a2, w, b1, b2, _ = (c.unsqueeze(-1) for c in curve.unbind(-1))
        y = a1 * torch.sin(w * x + b1) + a2 * torch.sin(2 * w * x + b2)
        latent = {"amplitudes": curve[:, :2], "frequency": curve[:, 2], "phases": curve[:, 3:5], "centre": curve[:, 5]}
        return self.episode(split, x.unsqueeze(-1), y, draw, latent)
