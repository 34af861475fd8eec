"""Which tasks form the next meta-batch."""

import torch
from torch import Tensor

from metalearn.episode import Episode, Examples
from metalearn.random import Key


class Uniform:
    """Independent tasks: meta-step s consists of the tasks with coordinates (s, 0), ..., (s, B - 1).

    Args:
        corrupted: share of the training tasks of a meta-batch whose targets are shuffled, among the support and among
            the query examples: tasks that no learner should follow (the setting that motivates gradient agreement,
            Eshratifar et al. 2018). Exactly the tasks i with floor((i + 1) corrupted) > floor(i corrupted), so that
            every meta-batch of 1 / corrupted tasks has one. Validation and test tasks stay as they are.
    """

    def __init__(self, *, corrupted: float = 0.0):
        self.corrupted = corrupted

    def tasks(self, meta_batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        """Task indices of one rank, `[B / world]` int64: every world-th, so that all ranks together draw 0..B-1."""
        return torch.arange(rank, meta_batch_size, world)

    def corrupt(self, episodes: Episode, key: Key, step: Tensor, task: Tensor) -> Episode:
        """Shuffle the targets of those tasks of a stack, with coordinates `[B]`, that are to be corrupted."""
        # 1e-9: a share such as 0.3 is not exact, and multiples of 1 / share must not fall below whole numbers
        bad = (((task + 1) * self.corrupted + 1e-9).floor() > (task * self.corrupted + 1e-9).floor()).nonzero()[:, 0]
        if not len(bad):
            return episodes

        def shuffled(part: Examples, name: str) -> Examples:
            order = key.sub(name).permutation(part.y.shape[1], step[bad], task[bad]).to(part.y.device)
            rows = bad.to(part.y.device)
            y = part.y.clone(memory_format=torch.contiguous_format)
            y[rows] = part.y[rows[:, None], order]
            return Examples(part.x, y)

        return Episode(shuffled(episodes.support, "support"), shuffled(episodes.query, "query"), episodes.latent)
