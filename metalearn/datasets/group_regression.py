"""Regression on curves of several families (the toy mixture of Yao, Wei, Huang & Li, HSML, ICML 2019)."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metalearn.datasets.base import Draw, Split
from metalearn.datasets.formula import Formula
from metalearn.datasets.grouped import draw_groups
from metalearn.episode import Episode
from metalearn.random import Key

Family = Literal["sine", "line", "quadratic", "cubic"]


class Law(NamedTuple):
    """Ranges of the parameters of y = amplitude sin(frequency x) + constant + linear x + quadratic x^2 + cubic x^3."""

    amplitude: tuple[float, float] = (0.0, 0.0)
    frequency: tuple[float, float] = (0.0, 0.0)
    constant: tuple[float, float] = (0.0, 0.0)
    linear: tuple[float, float] = (0.0, 0.0)
    quadratic: tuple[float, float] = (0.0, 0.0)
    cubic: tuple[float, float] = (0.0, 0.0)


LAWS: dict[str, Law] = {
    "sine": Law(amplitude=(0.1, 5.0), frequency=(0.8, 1.2), constant=(0.0, 2 * math.pi)),
    "line": Law(constant=(-3.0, 3.0), linear=(-3.0, 3.0)),
    "quadratic": Law(constant=(-3.0, 3.0), linear=(-2.0, 2.0), quadratic=(-0.2, 0.2)),
    "cubic": Law(constant=(-3.0, 3.0), linear=(-2.0, 2.0), quadratic=(-0.2, 0.2), cubic=(-0.1, 0.1)),
}
LOW, HIGH = -5.0, 5.0
"""Range of x."""


class GroupRegression(Formula):
    """Curves of known families from K points; inputs and targets `[n, 1]`, unscaled, x uniform in [-5, 5].

    A training task's family is drawn uniformly; validation and test episode i is of family i modulo their number.
    The family is `latent["group"]`, an index into `families`; the curve's six parameters are in `latent` by name.
    Noise is on all training targets and on every support set; query targets of validation and test are clean.

    Args:
        families: names of the families, of `LAWS`; each is a group.
        noise_std: standard deviation of the noise, in the target's units.
        shot, queries: support and query points in training.
        test_shot, test_queries: the same in validation and test; None means as in training.
        seed: of nothing here.
    """

    def __init__(
        self,
        *,
        families: Sequence[Family] = ("sine", "line", "quadratic"),
        noise_std: float = 0.0,
        shot: int = 10,
        queries: int = 10,
        test_shot: int | None = None,
        test_queries: int | None = None,
        seed: int = 0,
    ):
        super().__init__(shot=shot, queries=queries, test_shot=test_shot, test_queries=test_queries)
        self.groups, self.noise_std, self.seed = tuple(families), noise_std, seed
        self._ranges = torch.tensor([LAWS[name] for name in self.groups])  # [families, parameters, 2]

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        group = draw_groups(split, key, step, task, [1.0] * len(self.groups))
        low, high = self._ranges[group].unbind(-1)
        u = key.sub("curve").uniform(len(Law._fields), step, task)
        x = key.sub("x").uniform(self.points(split), step, task, low=LOW, high=HIGH)
        draw = {"group": group, "curve": low + u * (high - low), "x": x}
        return draw | self.noise(split, key, step, task, self.noise_std)

    def fetch(self, split: Split, draw: Draw) -> Episode:
        x, curve = draw["x"].to(self.device), draw["curve"].to(self.device)
        amplitude, frequency, constant, linear, quadratic, cubic = curve.unsqueeze(-1).unbind(1)
        y = amplitude * torch.sin(frequency * x) + constant + x * (linear + x * (quadratic + x * cubic))
        latent = {"group": draw["group"].to(self.device), **dict(zip(Law._fields, curve.unbind(1), strict=True))}
        return self.episode(split, x.unsqueeze(-1), y, draw, latent)
