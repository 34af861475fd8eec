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
        ValueError: if one has more tasks, or other features.
    """
    tasks = 1
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if len(first) != len(second):
            raise ValueError(f"one set of features has {len(first)} tasks, the other {len(second)}")
        tasks = tasks_at_once(first[:1].numel() + second[:1].numel())
    for a, b in zip(stacks(first, tasks), stacks(second, tasks), strict=True):
        if a.shape[2] != b.shape[2]:
            raise ValueError(f"a task has {a.shape[2]} features in one set and {b.shape[2]} in the other")
        yield a, b


def ranges(features: Features, extra: int = 0, **beside: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """`stacks` with the tasks' positions, where each task takes `extra` numbers besides its features.

    Args:
        features: of the tasks.
        extra: numbers.
        beside: by name, what else there is of each task (one row each), or None.

    Raises:
        ValueError: if there are no tasks, or more or fewer of them than rows of any of `beside`.
    """
    start = 0
    rows = {name: len(tensor) for name, tensor in beside.items() if tensor is not None}
    fit = tasks_at_once(features[:1].numel() + extra) if isinstance(features, Tensor) else None
    if isinstance(features, Tensor):
        _refuse_other_counts(rows, len(features))
    for phi in stacks(features, fit):
        end = start + len(phi)
        if end > min(rows.values(), default=end):
            raise ValueError(f"there are more tasks than {' or '.join(f'{n} {name}' for name, n in rows.items())}")
        yield slice(start, end), phi
        start = end
    if not start:
        raise ValueError("there are no tasks")
    _refuse_other_counts(rows, start)


def _refuse_other_counts(rows: dict[str, int], tasks: int) -> None:
    for name, count in rows.items():
        if count != tasks:
            raise ValueError(f"{name} of {count} tasks do not belong to {tasks} tasks")
