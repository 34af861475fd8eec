"""Which group each task belongs to, for data sets whose tasks come in groups."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metalearn.datasets.base import Split
from metalearn.random import Key


def draw_groups(split: Split, key: Key, step: Tensor, task: Tensor, weights: Sequence[float]) -> Tensor:
    """The group of each task: by chance in training, in turn in validation and test.

    Frozen episode i is task 0 of step i and belongs to group i modulo m, whatever the weights and the seeds. So groups
    have equally many episodes (to within one), and a table by groups is paired for all algorithms and seeds.

    Args:
        split: of classes or curves.
        key: of the tasks.
        step: their first coordinates, int64.
        task: their second; both broadcast together.
        weights: one for each of the m groups, not negative; training draws groups with these odds.

    Returns:
        int64, of the coordinates' common shape, in 0..m-1.
    """
    if split != "train":
        return (step + task) % len(weights)
    bounds = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    u = key.sub("group").uniform(1, step, task)[..., 0].double() * bounds[-1]
    return torch.searchsorted(bounds[:-1], u, right=True)
