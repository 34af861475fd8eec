"""3x3 convolution with filters of each task's own by the compiled kernels, closed under differentiation.

Forward pass, data gradient and weight gradient, each with derivatives made of the other two, as in
`metalearn.ops.conv`. The kernels read filters as [3, 3, inputs, outputs]; gradients come in that memory order, and so
do filters that were moved along them: only those that the tasks still share are reordered, once for all tasks.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from metalearn.ops import native
from metalearn.ops.layout import Strides, dense, empty, is_beside, strides


def fits(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether the kernels cover this convolution and are made for this processor."""
    if weight.dtype != x.dtype or weight.dim() != 5 or weight.shape[0] != len(x) or weight.shape[2] != x.shape[2]:
        return False
    if weight.shape[-2:] != (3, 3) or (stride, padding) != (1, 1):
        return False
    library = native.library(x)
    return library is not None and bool(library.conv_worthwhile())


def task_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Cross-correlation of `[B, n, C, H, W]` with `[B, O, C, 3, 3]`, padded by 1: `[B, n, O, H, W]`."""
    return _Convolution.apply(dense(x), weight, _packed(weight))


def _packed(w: Tensor) -> Tensor:
    """Filters `[B, O, C, 3, 3]` in the memory order [3, 3, C, O]; those that tasks share, once."""
    w = w.detach().permute(0, 3, 4, 2, 1)
    if w.stride(0) == 0 and len(w) > 1:
        return w[:1].contiguous().expand(w.shape)
    return w.contiguous()


class _Shape(ctypes.Structure):
    """The kernels' `Conv`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tasks", "n", "inputs", "outputs", "height", "width")),
        ("x", Strides),
        ("y", Strides),
        ("w_task", ctypes.c_int64),
    ]


Place = tuple[torch.Size, bool]
"""Shape of an activation, and whether its tasks lie beside the channels."""


@functools.lru_cache(1024)
def _shape(x: Place, y: Place, w_task: int) -> _Shape:
    (tasks, n, inputs, height, width), outputs = x[0], y[0][2]
    return _Shape(tasks, n, inputs, outputs, height, width, strides(*x), strides(*y), w_task)


def _call(name: str, x: Place, y: Place, w_task: int, *tensors: Tensor) -> None:
    native.call(name, _shape(x, y, w_task), x[0][0], *tensors)


def _place(x: Tensor) -> Place:
    return x.shape, bool(is_beside(x))


class _Convolution(Function):
    """y = conv(x, w); `packed` is w for the kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, packed)
        beside = _place(x)[1]
        y = empty((*x.shape[:2], w.shape[1], *x.shape[3:]), beside, x.dtype)
        _call("conv_forward", (x.shape, beside), (y.shape, beside), packed.stride(0), x, packed, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g, (x, w, packed) = dense(grads[0]), ctx.saved_tensors
        dx = _DataGradient.apply(g, w, packed) if ctx.needs_input_grad[0] else None
        dw = _WeightGradient.apply(x, g) if ctx.needs_input_grad[1] else None
        return dx, dw, None


class _DataGradient(Function):
    """The gradient in x of <g, conv(x, w)>: bilinear in g and w."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(g, w, packed)
        beside = _place(g)[1]
        dx = empty((*g.shape[:2], w.shape[2], *g.shape[3:]), beside, g.dtype)
        _call("conv_data", (dx.shape, beside), (g.shape, beside), packed.stride(0), g, packed, dx)
        return dx

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dx, (g, w, packed) = dense(grads[0]), ctx.saved_tensors
        dg = _Convolution.apply(dx, w, packed) if ctx.needs_input_grad[0] else None
        dw = _WeightGradient.apply(dx, g) if ctx.needs_input_grad[1] else None
        return dg, dw, None


class _WeightGradient(Function):
    """The gradient in w of <g, conv(x, w)>: bilinear in x and g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        dw = x.new_empty(len(x), 3, 3, x.shape[2], g.shape[2])
        _call("conv_weight", _place(x), _place(g), 0, x, g, dw)
        return dw.permute(0, 4, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dw, (x, g) = grads[0], ctx.saved_tensors
        packed = _packed(dw)
        dx = _DataGradient.apply(g, dw, packed) if ctx.needs_input_grad[0] else None
        dg = _Convolution.apply(x, dw, packed) if ctx.needs_input_grad[1] else None
        return dx, dg
