"""Chunks of tasks on threads: one thread a chunk, each with one thread inside.

Tasks are independent, so this scales where threads inside an operator do not: a meta-step is hundreds of small
operators, each of which would end in a barrier. Python holds its lock only between operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tasks", initializer=torch.set_num_threads, initargs=(1,))


def over(work: Callable[[T], R], parts: Sequence[T], device: torch.device) -> Iterator[R]:
    """`work` of each part, in their order; on a CPU at most torch's number of threads at the same time.

    The split into parts is the caller's and does not depend on the number of threads; `work` must be pure.
    """
    threads = min(torch.get_num_threads(), len(parts))
    if device.type != "cpu" or threads == 1:
        yield from map(work, parts)
        return
    with one_thread():
        yield from _pool(threads).map(work, parts)


@contextmanager
def one_thread() -> Iterator[None]:
    """No threads inside operators meanwhile (partly a setting of the whole process)."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
