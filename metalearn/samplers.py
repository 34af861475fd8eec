"""Which tasks form the next meta-batch."""

import torch
from torch import Tensor


class Uniform:
    """Independent tasks: meta-step s consists of the tasks with coordinates (s, 0), ..., (s, B - 1)."""

    def tasks(self, meta_batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        """Task indices of one rank, `[B / world]` int64: every world-th, so that all ranks together draw 0..B-1."""
        return torch.arange(rank, meta_batch_size, world)
