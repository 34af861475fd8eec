"""Task-batched convolution whose derivatives of every order stay inside the fast convolution kernels.

Forward pass, data gradient and weight gradient are three bilinear maps, and the derivative of each is made of the
other two. PyTorch's own double backward of a grouped convolution falls back to a loop over groups instead.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from metalearn.ops import task_conv

operands: torch.dtype | None = None
"""What convolutions multiply, if not the numbers as they come; sums are kept and returned in float32."""


def multiply_in(dtype: torch.dtype | None) -> None:
    """Set `operands` for this process."""
    global operands
    operands = dtype


def _rounded(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if operands is None else tuple(t.to(operands) for t in tensors)


class Geometry(NamedTuple):
    """Stride, zero padding on each side and number of groups of one convolution."""

    stride: int
    padding: int
    groups: int


def _backward(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, data: bool) -> Tensor:
    stride, padding, groups = geometry
    mask = [data, not data, False]
    dtype = g.dtype
    g, x, w = _rounded(g, x, w)
    out = torch.ops.aten.convolution_backward(
        g, x, w, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, mask
    )
    return (out[0] if data else out[1]).to(dtype)


class _Convolution(Function):
    """y = conv(x, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        dtype = x.dtype
        x, w = _rounded(x, w)
        return F.conv2d(x, w, None, geometry.stride, geometry.padding, 1, geometry.groups).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (x, w) = grads, ctx.saved_tensors
        dx = _DataGradient.apply(g, w, x.shape, ctx.geometry) if ctx.needs_input_grad[0] else None
        dw = _WeightGradient.apply(x, g, w.shape, ctx.geometry) if ctx.needs_input_grad[1] else None
        return dx, dw, None


class _DataGradient(Function):
    """The gradient in x of <g, conv(x, w)>: bilinear in g and w."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.geometry = geometry
        x = torch.empty(
            shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last
        )  # only its shape is read
        return _backward(g, x, w, geometry, data=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dx,), (g, w) = grads, ctx.saved_tensors
        dg = _Convolution.apply(dx, w, ctx.geometry) if ctx.needs_input_grad[0] else None
        dw = _WeightGradient.apply(dx, g, w.shape, ctx.geometry) if ctx.needs_input_grad[1] else None
        return dg, dw, None, None


class _WeightGradient(Function):
    """The gradient in w of <g, conv(x, w)>: bilinear in x and g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.geometry = geometry
        return _backward(g, x, x.new_empty(shape), geometry, data=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dw,), (x, g) = grads, ctx.saved_tensors
        dx = _DataGradient.apply(g, dw, x.shape, ctx.geometry) if ctx.needs_input_grad[0] else None
        dg = _Convolution.apply(x, dw, ctx.geometry) if ctx.needs_input_grad[1] else None
        return dx, dg, None, None


def conv2d(x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Cross-correlation of each task's pictures with its own, or with shared, filters.

    Args:
        x: `[B, n, C, H, W]`.
        weight: `[O, C, k, k]` shared, or `[B, O, C, k, k]` one per task.
        stride: step of the filter in both directions.
        padding: zeros added on each side.

    Returns:
        `[B, n, O, H', W']`. With per-task filters the tasks lie in the channel axis of one grouped channels-last
        convolution, and the result is a view of its output.
    """
    tasks, n = x.shape[:2]
    if operands is None and task_conv.fits(x, weight, stride, padding):
        return task_conv.task_conv(x, weight)
    if weight.dim() == 4:
        flat = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        y = _Convolution.apply(flat, weight, Geometry(stride, padding, 1))
        return y.unflatten(0, (tasks, n))
    flat = x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    y = _Convolution.apply(flat, weight.flatten(0, 1), Geometry(stride, padding, tasks))
    return y.unflatten(1, (tasks, weight.shape[1])).transpose(0, 1)
