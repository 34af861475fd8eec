"""Where the numbers of a task-batched activation `[B, n, C, H, W]` lie, as the compiled kernels know it.

The channels of a pixel are side by side, and the pixels of a picture in order. The tasks are *beside* the channels
(`[n, H, W, B, C]` in memory) or outermost (`[B, n, H, W, C]`).
"""

import ctypes
import functools

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Strides(ctypes.Structure):
    """The kernels' `Layout`."""

    _fields_ = [(name, ctypes.c_int64) for name in ("task", "example", "pixel")]


@functools.lru_cache(4096)
def order(shape: Shape, beside: bool) -> tuple[int, ...]:
    """Strides of one of the two layouts."""
    tasks, n, channels, height, width = shape
    picture = height * width * channels
    if beside:
        return channels, tasks * picture, 1, width * tasks * channels, tasks * channels
    return n * picture, picture, 1, width * channels, channels


@functools.lru_cache(4096)
def _is_beside(shape: Shape, stride: tuple[int, ...]) -> bool | None:
    for beside in (True, False):  # strides of single entries mean nothing
        if all(a == b or size == 1 for a, b, size in zip(stride, order(shape, beside), shape, strict=True)):
            return beside
    return None


def is_beside(x: Tensor) -> bool | None:
    """Whether the tasks of x lie beside its channels, or outermost (False); None if x is in neither layout."""
    return _is_beside(x.shape, x.stride())


def dense(x: Tensor) -> Tensor:
    """x in one of the two layouts, copied if need be."""
    return x if is_beside(x) is not None else empty(x.shape, True, x.dtype).copy_(x)


def empty(shape: Shape, beside: bool, dtype: torch.dtype) -> Tensor:
    """An activation with undefined values in one of the two layouts."""
    return torch.empty_strided(shape, order(tuple(shape), beside), dtype=dtype)


def same_layout(g: Tensor, like: Tensor) -> Tensor:
    """g, copied if it does not lie as `like` does."""
    return g if g.stride() == like.stride() else torch.empty_like(like).copy_(g)


def strides(shape: Shape, beside: bool) -> Strides:
    """Strides of one of the two layouts, for the kernels."""
    task, example, _, _, pixel = order(shape, beside)
    return Strides(task, example, pixel)
