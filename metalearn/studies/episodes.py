"""Tasks of the data sets here, for studies: by their indices, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from metalearn.datasets.base import Dataset, Split
from metalearn.episode import Examples
from metalearn.random import Key


def drawn(dataset: Dataset, split: Split, key: Key, tasks: Tensor) -> tuple[Examples, Examples]:
    """Support and query sets of regression tasks, x `[T, n, p]` and y `[T, n]`."""
    episode = dataset.fetch(split, dataset.draw(split, key, torch.zeros_like(tasks), tasks))
    support, query = (Examples(e.x.double(), e.y[..., 0].double()) for e in (episode.support, episode.query))
    return support, query
