"""Sinusoid regression (Finn et al. 2017) in the variants that papers use."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metalearn.datasets.base import Draw, Split
from metalearn.datasets.formula import Formula
from metalearn.episode import Episode
from metalearn.random import Key

Variant = Literal["finn", "reptile", "unravel", "trlearner_offset", "trlearner_phase"]
TRAINING_TASKS = 480


class Law(NamedTuple):
    """Ranges of amplitude, angular frequency, b and x; what b is; noise and whether training tasks are fixed.

    y = A sin(w x - b) for `minus`, A sin(w x + b) for `plus`, A sin(w x) + b for `offset`.
    """

    amplitude: tuple[float, float]
    frequency: tuple[float, float]
    b: tuple[float, float]
    role: Literal["minus", "plus", "offset"]
    noise: float = 0.0
    tasks: int | None = None
    x: tuple[float, float] = (-5.0, 5.0)


LAWS: dict[str, Law] = {
    "finn": Law((0.1, 5.0), (1.0, 1.0), (0.0, math.pi), "minus"),
    "reptile": Law((0.1, 5.0), (1.0, 1.0), (0.0, 2 * math.pi), "plus"),
    "unravel": Law((0.0, math.pi), (1.0, 1.0), (0.0, math.pi), "plus"),
    "trlearner_offset": Law((0.1, 5.0), (0.5, 2.0), (0.0, 2 * math.pi), "offset", 0.3, TRAINING_TASKS),
    "trlearner_phase": Law((0.1, 5.0), (0.5, 2.0), (0.0, 2 * math.pi), "plus", 0.3, TRAINING_TASKS),
}


class Sinusoid(Formula):
    """Curves y = A sin(w x + b) from K noisy or clean points; inputs and targets `[n, 1]`, unscaled.

    Noise (standard deviation 0.3, TRLearner variants only) is on all training targets and on every support set; query
    targets of validation and test are clean. TRLearner's 480 training tasks are drawn once with `seed`; a meta-step
    picks among them and draws fresh points.

    Args:
        variant: law of the curves, see `LAWS` (contract, section 6).
        shot, queries: support and query points in training.
        test_shot, test_queries: the same in validation and test; None means as in training.
        seed: of the fixed training tasks.
    """

    def __init__(
        self,
        *,
        variant: Variant = "finn",
        shot: int = 10,
        queries: int = 10,
        test_shot: int | None = None,
        test_queries: int | None = 100,
        seed: int = 0,
    ):
        super().__init__(shot=shot, queries=queries, test_shot=test_shot, test_queries=test_queries)
        self.law, self.seed = LAWS[variant], seed

    def _curves(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Tensor:
        """`[..., 3]`: amplitude, angular frequency and b of each task."""
        if split == "train" and self.law.tasks:
            which = key.sub("which").integers(1, step, task, size=self.law.tasks)[..., 0]
            u = Key(self.seed, "sinusoid/training tasks").uniform(3, which)
        else:
            u = key.sub("curve").uniform(3, step, task)
        low = torch.tensor([r[0] for r in (self.law.amplitude, self.law.frequency, self.law.b)])
        high = torch.tensor([r[1] for r in (self.law.amplitude, self.law.frequency, self.law.b)])
        return low + u * (high - low)

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        low, high = self.law.x
        draw = {
            "curve": self._curves(split, key, step, task),
            "x": key.sub("x").uniform(self.points(split), step, task, low=low, high=high),
        }
        return draw | self.noise(split, key, step, task, self.law.noise)

    def fetch(self, split: Split, draw: Draw) -> Episode:
        x, curve = draw["x"].to(self.device), draw["curve"].to(self.device)
        amplitude, frequency, b = (c.unsqueeze(-1) for c in curve.unbind(-1))
        angle = frequency * x
        if self.law.role == "offset":
            y = amplitude * torch.sin(angle) + b
        else:
            y = amplitude * torch.sin(angle + b if self.law.role == "plus" else angle - b)
        latent = {"amplitude": curve[:, 0], "frequency": curve[:, 1], "b": curve[:, 2]}
        return self.episode(split, x.unsqueeze(-1), y, draw, latent)
