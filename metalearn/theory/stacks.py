"""Many tasks' feature matrices in pieces that fit into memory, in float64.

Features are one tensor `[T, K, d]` (`T` tasks, `K` samples, `d` features) or an iterable of `[K, d]`, where K may
differ. An iterable is passed through once, one task at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

Features = Tensor | Iterable[Tensor]
CHUNK = 2**22
"""Numbers that are worked on at once."""


def tasks_at_once(numbers: int) -> int:
    """How many tasks fit into `CHUNK` if each takes so many numbers; at least one."""
    return max(1, CHUNK // max(1, numbers))


def stacks(features: Features, tasks: int | None = None) -> Iterator[Tensor]:
    """`[t, K, d]` each: one task of an iterable, or `tasks` of a tensor (as many as fit, if None).

    Raises:
        ValueError: for other shapes.
    """
    if isinstance(features, Tensor):
        if features.dim() != 3:
            raise ValueError(f"features have shape {list(features.shape)}, not [T, K, d]")
        for chunk in features.detach().split(tasks or tasks_at_once(features[:1].numel())):
            yield chunk.double()
        return
    for phi in features:
        if phi.dim() != 2:
            raise ValueError(f"a task's features have shape {list(phi.shape)}, not [K, d]")
        yield phi.detach().double()[None]


def pairs(first: Features, second: Features) -> Iterator[tuple[Tensor, Tensor]]:
    """`stacks` of two, in step.

    Raises:
        ValueError: if one has more tasks.
    """
    tasks = 1
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        tasks = tasks_at_once(first[:1].numel() + second[:1].numel())
    return zip(stacks(first, tasks), stacks(second, tasks), strict=True)


def ranges(features: Features, extra: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """`stacks` with the tasks' positions, where each task takes `extra` numbers besides its features."""
    start = 0
    fit = tasks_at_once(features[:1].numel() + extra) if isinstance(features, Tensor) else None
    for phi in stacks(features, fit):
        yield slice(start, start + len(phi)), phi
        start += len(phi)
