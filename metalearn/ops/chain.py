"""Affine maps with ReLU between them, as one operation: small networks are bound by the number of operations.

Forward pass, backward pass and its derivative are one compiled kernel each; derivatives beyond the second come from
automatic differentiation of the plain form.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from metalearn.ops import native
from metalearn.ops.linear import linear

MOST_LAYERS = 8
MOST_WIDTH = 128
"""Beyond that the library's matrix products are faster."""


class Layer(NamedTuple):
    """Weight `[O, D]` or `[B, O, D]`, and bias `[O]` or `[B, O]`."""

    weight: Tensor
    bias: Tensor


def chain(x: Tensor, layers: Sequence[Layer], *, last_relu: bool) -> Tensor:
    """relu(... relu(x W_1^T + b_1) ...) for each task.

    Args:
        x: `[B, n, D]`.
        layers: the affine maps in order.
        last_relu: whether the last one too is followed by ReLU.

    Returns:
        `[B, n, O]`, O of the last layer.
    """
    if not _fits(x, layers):
        return _plain(x, layers, last_relu)
    tasks = len(x)
    weights = [w if w.dim() == 3 else w.expand(tasks, *w.shape) for w, _ in layers]
    biases = [b if b.dim() == 2 else b.expand(tasks, *b.shape) for _, b in layers]
    leaves = [p if p[0].is_contiguous() else p.contiguous() for p in (*weights, *biases)]
    out: Tensor = _Chain.apply(x.contiguous(), last_relu, *leaves)[0]
    return out


def _fits(x: Tensor, layers: Sequence[Layer]) -> bool:
    narrow = len(layers) <= MOST_LAYERS and all(max(w.shape[-2:]) <= MOST_WIDTH for w, _ in layers)
    return narrow and native.library(x) is not None


def _plain(x: Tensor, layers: Sequence[Layer], last_relu: bool) -> Tensor:
    for i, (weight, bias) in enumerate(layers):
        x = linear(x, weight, bias)
        x = torch.relu(x) if last_relu or i + 1 < len(layers) else x
    return x


class _Shape(ctypes.Structure):
    """The kernels' `Chain`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tasks", "n", "layers", "last")),
        ("width", ctypes.c_int64 * (MOST_LAYERS + 1)),
        ("w_task", ctypes.c_int64 * MOST_LAYERS),
        ("b_task", ctypes.c_int64 * MOST_LAYERS),
    ]


@functools.lru_cache(1024)
def _shape(tasks: int, n: int, last: bool, widths: tuple[int, ...], strides: tuple[int, ...]) -> _Shape:
    layers = len(widths) - 1
    return _Shape(tasks, n, layers, last, widths, strides[:layers], strides[layers:])


def _of(x: Tensor, last: bool, leaves: Sequence[Tensor]) -> _Shape:
    weights = leaves[: len(leaves) // 2]
    widths = (x.shape[2], *(w.shape[1] for w in weights))
    return _shape(len(x), x.shape[1], last, widths, tuple(p.stride(0) for p in leaves))


def _call(name: str, shape: _Shape, *arguments: Any) -> None:
    native.call(name, shape, shape.tasks, *arguments)


class _Chain(Function):
    """(x, w_1.., b_1..) to (y, inner activations)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, last: bool, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        shape = _of(x, last, leaves)
        layers, (tasks, n) = shape.layers, x.shape[:2]
        y = x.new_empty(tasks, n, shape.width[layers])
        inner = x.new_empty(tasks, n * sum(shape.width[1:layers]))
        _call("chain_forward", shape, x, leaves[:layers], leaves[layers:], inner, y)
        ctx.save_for_backward(x, inner, y, *leaves)
        ctx.last = last
        ctx.mark_non_differentiable(inner)
        ctx.set_materialize_grads(False)
        return y, inner

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, inner, y, *leaves = ctx.saved_tensors
        if grads[0] is None:
            return None, None, *(None for _ in leaves)
        g = grads[0].contiguous()
        dx, *rest = _ChainBackward.apply(g, x, inner, y, ctx.last, ctx.needs_input_grad[0], *leaves)
        return dx, None, *rest


class _ChainBackward(Function):
    """(g, x, w.., b..) to (dx if wanted, dw.., db..); `inner` and `y` are functions of x and the leaves."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, inner: Tensor, y: Tensor, last: bool, wants_x: bool, *leaves: Tensor
    ) -> Any:
        shape = _of(x, last, leaves)
        layers = shape.layers
        delta, last_delta = torch.empty_like(inner), torch.empty_like(y)
        dx = torch.empty_like(x) if wants_x else None
        out = [torch.empty(p.shape, dtype=p.dtype) for p in leaves]
        _call(
            "chain_backward", shape, g, x, leaves[:layers], inner, y, delta, last_delta, dx, out[:layers], out[layers:]
        )
        ctx.save_for_backward(g, x, inner, y, delta, last_delta, *leaves)
        ctx.last, ctx.wants_x = last, wants_x
        return dx, *out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        g, x, inner, y, delta, last_delta, *leaves = ctx.saved_tensors
        if torch.is_grad_enabled():
            to_g, to_x, *to = _by_differentiation(ctx.last, g, x, leaves, grads)
            return to_g, to_x, None, None, None, None, *to
        shape = _of(x, ctx.last, leaves)
        layers = shape.layers
        cx = grads[0].contiguous() if ctx.wants_x and grads[0] is not None else None
        c = [v.contiguous() for v in grads[1:] if v is not None]
        to_g, to_x = torch.empty_like(g), torch.empty_like(x) if ctx.needs_input_grad[1] else None
        to = [torch.empty(p.shape, dtype=p.dtype) for p in leaves]
        given = (x, cx, c[:layers], c[layers:], leaves[:layers], inner, y, delta, last_delta)
        _call("chain_twice", shape, *given, to_g, to_x, to[:layers], to[layers:])
        return to_g, to_x, None, None, None, None, *to


def _by_differentiation(
    last: bool, g: Tensor, x: Tensor, leaves: Sequence[Tensor], grads: tuple[Tensor | None, ...]
) -> Any:
    """The double backward by automatic differentiation of the plain form, for derivatives beyond the second."""
    # aliases, so that the gradients below stop here even where g itself depends on x
    g, x, *leaves = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, x, *leaves))
    layers = [Layer(w, b) for w, b in zip(leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :], strict=True)]
    y = _plain(x, layers, last)
    first = torch.autograd.grad(y, (x, *leaves), g, create_graph=True, materialize_grads=True)
    live = [(o, c) for o, c in zip(first, grads, strict=True) if o.requires_grad and c is not None]
    outputs, cotangents = zip(*live, strict=True)
    return torch.autograd.grad(outputs, (g, x, *leaves), cotangents, create_graph=True, materialize_grads=True)
