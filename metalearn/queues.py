"""Tasks that wait until there are enough of their group for an outer update."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn.episode import Episode, Examples, MetaBatch
from metalearn.random import TaskKey


class Waiting(NamedTuple):
    """Tasks in the order in which they came, and the coordinates of their draws."""

    episodes: Episode
    step: Tensor
    task: Tensor

    def select(self, tasks: slice | Tensor) -> Waiting:
        """Some of them."""
        rows = tasks.to(self.step.device) if isinstance(tasks, Tensor) else tasks
        return Waiting(self.episodes.select(tasks), self.step[rows], self.task[rows])


class Queues:
    """One queue for each of m groups; part of a checkpoint, so that a resumed run makes the same updates."""

    def __init__(self, m: int):
        self._waiting: list[Waiting | None] = [None] * m

    def push(self, batch: MetaBatch, group: Tensor) -> list[MetaBatch]:
        """Let the tasks of a meta-batch wait in their groups' queues.

        Args:
            batch: B tasks.
            group: `[B]`, the group of each.

        Returns:
            For each group of which B tasks wait now, the oldest B of them as a meta-batch. (There are fewer than 2 B:
            B - 1 waited before, and B came.)
        """
        return [full for i in range(len(self._waiting)) if (full := self._push(i, batch, group == i)) is not None]

    def _push(self, group: int, batch: MetaBatch, mine: Tensor) -> MetaBatch | None:
        waiting, size, key = self._waiting[group], batch.total, batch.key
        if not bool(mine.any()):
            return None
        if waiting is None and bool(mine.all()):
            return batch  # as it is, without a copy
        arrived = Waiting(batch.episodes, key.step, key.task).select(mine)
        waiting = arrived if waiting is None else _join(waiting, arrived)
        full = len(waiting.step) >= size
        rest = waiting.select(slice(size, None)) if full else waiting
        self._waiting[group] = rest if len(rest.step) else None
        if not full:
            return None
        first = waiting.select(slice(size))
        return batch._replace(episodes=first.episodes, key=TaskKey(key.key, first.step, first.task))

    def state(self) -> list[list[Any]]:
        """Plain lists and dictionaries of tensors; an empty list for an empty queue."""
        plain: list[list[Any]] = []
        for waiting in self._waiting:
            if waiting is None:
                plain.append([])
                continue
            (support, query, latent), step, task = waiting
            plain.append([[list(support), list(query), dict(latent)], step, task])
        return plain

    def load(self, state: list[list[Any]]) -> None:
        """What `state` gave."""
        self._waiting = [_waiting(*plain) if plain else None for plain in state]


def _waiting(episodes: list[Any], step: Tensor, task: Tensor) -> Waiting:
    support, query, latent = episodes
    return Waiting(Episode(Examples(*support), Examples(*query), latent), step, task)


def _join(first: Waiting, then: Waiting) -> Waiting:
    """Both, where the second lies."""
    return pytree.tree_map(lambda a, b: torch.cat([a.to(b.device), b]), first, then)  # type: ignore[no-any-return]
