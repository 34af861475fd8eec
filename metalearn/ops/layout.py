"""Where the numbers of a task-batched activation `[B, n, C, H, W]` lie, as the compiled kernels know it."""

import ctypes
from typing import Any

import torch
from torch import Tensor


class Strides(ctypes.Structure):
    """The kernels' `Layout`."""

    _fields_ = [(name, ctypes.c_int64) for name in ("task", "example", "pixel")]


def orders(shape: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides of the two layouts of `kernels.cpp`: tasks beside the channels, and tasks outermost."""
    tasks, n, channels, height, width = shape
    picture = height * width * channels
    beside = (channels, tasks * picture, 1, width * tasks * channels, tasks * channels)
    return beside, (n * picture, picture, 1, width * channels, channels)


def order_of(x: Tensor) -> tuple[int, ...] | None:
    """The strides of x in the layout that it lies in, with those of single entries put right; None if in neither."""
    for order in orders(x.shape):
        if all(a == b or size == 1 for a, b, size in zip(x.stride(), order, x.shape, strict=True)):
            return order
    return None


def dense(x: Tensor) -> Tensor:
    """x in one of the two layouts, copied if need be."""
    return x if order_of(x) else torch.empty_strided(x.shape, orders(x.shape)[0], dtype=x.dtype).copy_(x)


def same_layout(g: Tensor, like: Tensor) -> Tensor:
    """g, copied if it does not lie as `like` does."""
    return g if g.stride() == like.stride() else torch.empty_like(like).copy_(g)


def strides(shape: Any, beside: bool) -> Strides:
    """Strides of one of the two layouts, for the kernels."""
    order = orders(shape)[0 if beside else 1]
    return Strides(order[0], order[1], order[4])
