"""Regression on curves of several families (the toy mixture of Yao, Wei, Huang & Li, HSML, ICML 2019)."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metalearn.datasets.base import Dataset, Draw, Split
from metalearn.datasets.grouped import draw_groups
from metalearn.episode import Episode, Examples
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


class GroupRegression(Dataset):
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

    kind = "regression"
    label_space = "shared"
    input_shape = (1,)

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
        self.groups, self.noise_std, self.seed = tuple(families), noise_std, seed
        self._ranges = torch.tensor([LAWS[name] for name in self.groups])  # [families, parameters, 2]
        test = (test_shot or shot, test_queries or queries)
        self._sizes = {"train": (shot, queries), "val": test, "test": test}
        self.device = torch.device("cpu")

    def outputs(self, split: Split) -> int:
        return 1

    def data_hash(self) -> str:
        return "formula"

    def to(self, device: torch.device | str) -> "GroupRegression":
        self.device = torch.device(device)
        return self

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        shot, queries = self._sizes[split]
        group = draw_groups(split, key, step, task, [1.0] * len(self.groups))
        low, high = self._ranges[group].unbind(-1)
        u = key.sub("curve").uniform(len(Law._fields), step, task)
        x = key.sub("x").uniform(shot + queries, step, task, low=LOW, high=HIGH)
        draw = {"group": group, "curve": low + u * (high - low), "x": x}
        if self.noise_std:
            draw["noise"] = key.sub("noise").normal(shot + queries, step, task) * self.noise_std
            if split != "train":
                draw["noise"][..., shot:] = 0
        return draw

    def fetch(self, split: Split, draw: Draw) -> Episode:
        shot = self._sizes[split][0]
        x, curve = draw["x"].to(self.device), draw["curve"].to(self.device)
        amplitude, frequency, constant, linear, quadratic, cubic = curve.unsqueeze(-1).unbind(1)
        y = amplitude * torch.sin(frequency * x) + constant + x * (linear + x * (quadratic + x * cubic))
        if "noise" in draw:
            y = y + draw["noise"].to(self.device)
        x, y = x.unsqueeze(-1), y.unsqueeze(-1)
        latent = {"group": draw["group"].to(self.device), **dict(zip(Law._fields, curve.unbind(1), strict=True))}
        return Episode(Examples(x[:, :shot], y[:, :shot]), Examples(x[:, shot:], y[:, shot:]), latent)
