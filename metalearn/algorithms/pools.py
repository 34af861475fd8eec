"""Support and query examples of a task as one pool, and minibatches of it."""

import torch
from torch import Tensor

from metalearn.episode import Episode, Examples
from metalearn.random import TaskKey


def pooled(episodes: Episode) -> Examples:
    """Support and then query examples of each task, `[B, S + Q, ...]`."""
    return Examples(
        torch.cat([episodes.support.x, episodes.query.x], 1), torch.cat([episodes.support.y, episodes.query.y], 1)
    )


def minibatches(key: TaskKey, n: int, size: int, count: int) -> Tensor:
    """Rows of the minibatches of each task's pool of n examples.

    Without replacement; the pool is reshuffled whenever it is used up, and a batch may straddle two shuffles, as in
    the code of Nichol et al. (Reptile).

    Returns:
        `[B, count, size]` int64 in 0..n-1.
    """
    orders = key.permutations(n, -(-count * size // n))
    return orders.flatten(1)[:, : count * size].unflatten(1, (count, size))


def take(pool: Examples, rows: Tensor) -> Examples:
    """The examples at `rows` `[B, m]` of each task."""
    task = torch.arange(len(rows), device=rows.device)[:, None]
    return Examples(pool.x[task, rows], pool.y[task, rows])
