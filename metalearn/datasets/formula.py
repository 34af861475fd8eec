"""What data sets of curves share: tasks are made from a formula, and no files are read."""

from typing import Self

import torch
from torch import Tensor

from metalearn.datasets.base import Dataset, Draw, Split
from metalearn.episode import Episode, Examples
from metalearn.random import Key


class Formula(Dataset):
    """Regression of one number on K points of a drawn curve.

    Args:
        shot, queries: support and query points in training.
        test_shot, test_queries: the same in validation and test; None means as in training.
    """

    kind = "regression"
    label_space = "shared"
    input_shape = (1,)

    def __init__(self, *, shot: int, queries: int, test_shot: int | None, test_queries: int | None):
        test = (test_shot or shot, test_queries or queries)
        self._sizes = {"train": (shot, queries), "val": test, "test": test}
        self.device = torch.device("cpu")

    def outputs(self, split: Split) -> int:
        return 1

    def data_hash(self) -> str:
        return "formula"

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        return self

    def points(self, split: Split) -> int:
        """Support and query points of a task together."""
        return sum(self._sizes[split])

    def noise(self, split: Split, key: Key, step: Tensor, task: Tensor, deviation: float) -> Draw:
        """Noise of all targets, but of query targets in validation and test; nothing to draw at deviation 0."""
        if not deviation:
            return {}
        noise = key.sub("noise").normal(self.points(split), step, task) * deviation
        if split != "train":
            noise[..., self._sizes[split][0] :] = 0
        return {"noise": noise}

    def episode(self, split: Split, x: Tensor, y: Tensor, draw: Draw, latent: dict[str, Tensor]) -> Episode:
        """Tasks with the drawn noise on their targets.

        Args:
            split: see above.
            x: inputs `[B, n, *input]`, the support points first.
            y: clean targets `[B, n]`.
            draw: what `draw` drew.
            latent: see `Episode`.
        """
        if "noise" in draw:
            y = y + draw["noise"].to(self.device)
        shot, y = self._sizes[split][0], y.unsqueeze(-1)
        return Episode(Examples(x[:, :shot], y[:, :shot]), Examples(x[:, shot:], y[:, shot:]), latent)
