"""Batch norm by the batch's own statistics, ReLU and 2x2 max-pooling as one operation.

Batch norm is monotone in each channel, so pooling comes first (by minimum where gamma < 0) and everything after it
works on a quarter of the pixels: the library's separate operators, and automatic differentiation through them, pass
over the full activations many times. The result is the same function, with the same derivatives of every order.
"""

import ctypes
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from metalearn.ops import native
from metalearn.ops.layout import Strides, dense, empty, is_beside, same_layout, strides
from metalearn.ops.norm import Moments, Normalization, batch_norm


def norm_relu_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    before: Tensor | None,
    *,
    pool: int,
    layer: str,
    eps: float,
    norm: Normalization,
) -> Tensor:
    """max-pool(relu(batch_norm(x))) for each task.

    Args:
        x: `[B, n, C, H, W]`.
        weight: gamma, `[C]` or `[B, C]`; None for 1.
        bias: beta, `[C]` or `[B, C]`; None for 0.
        before: bias of the layer before, `[C]` or `[B, C]`; cancels under batch statistics.
        layer: name under which statistics are looked up and recorded.
        eps: added to the variance.
        norm: where the statistics come from.
        pool: 2 for 2x2 maxima (odd last rows and columns are dropped), 1 for none.

    Returns:
        `[B, n, C, H // pool, W // pool]`.
    """
    if native.library(x) is None or norm.given is not None:
        h = torch.relu(batch_norm(x, weight, bias, before, layer=layer, eps=eps, norm=norm))
        return h if pool == 1 else max_pool(h)
    tasks, _, channels = x.shape[:3]
    gamma = x.new_ones(channels) if weight is None else weight
    beta = x.new_zeros(channels) if bias is None else bias
    constants = _Constants(eps, pool, norm.sets)
    gamma, beta = (p.expand(tasks, channels).contiguous() for p in (gamma, beta))
    y, mean, r = _Block.apply(dense(x), gamma, beta, constants)
    if norm.record:
        mean, var = mean[:, 0], r[:, 0].reciprocal().square() - eps
        norm.seen[layer] = Moments(mean if before is None else mean + before.detach(), var, x[0, :, 0].numel())
    return y


def max_pool(h: Tensor) -> Tensor:
    """2x2 maximum of `[B, n, C, H, W]`, keeping the memory order of the tasks."""
    tasks, n, channels = h.shape[:3]
    if h.stride(0) > h.stride(1):
        return F.max_pool2d(h.flatten(0, 1), 2).unflatten(0, (tasks, n))
    return F.max_pool2d(h.transpose(0, 1).flatten(1, 2), 2).unflatten(1, (tasks, channels)).transpose(0, 1)


class _Constants(NamedTuple):
    eps: float
    pool: int
    sets: int


class _Shape(ctypes.Structure):
    """The kernels' `Block`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tasks", "sets", "m", "channels", "height", "width", "pool", "parts")),
        ("full", Strides),
        ("pooled", Strides),
    ]


def _pooled(shape: tuple[int, ...], pool: int) -> tuple[int, ...]:
    return (*shape[:3], shape[3] // pool, shape[4] // pool)


@functools.lru_cache(1024)
def _shape(shape: tuple[int, ...], beside: bool, sets: int, pool: int, parts: int) -> _Shape:
    tasks, n, channels, height, width = shape
    where = strides(shape, beside), strides(_pooled(shape, pool), beside)
    return _Shape(tasks, sets, n // sets, channels, height, width, pool, parts, *where)


def _call(name: str, x: Tensor, constants: _Constants, *arguments: Tensor | float) -> None:
    units = len(x) * constants.sets
    parts = native.parts(units, x.shape[2])
    shape = _shape(x.shape, bool(is_beside(x)), constants.sets, constants.pool, parts)
    native.call(name, shape, units * parts, *arguments)


class _Block(Function):
    """(x, gamma, beta) to (y, mean, r), of which only y is differentiable; mean and r `[B, sets, C]`.

    `picked`, kept for the derivatives, is x at the pixel that pooling chose, `choice` its index 0..3 in the window (4
    where ReLU gives 0), both of y's shape.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, constants: _Constants) -> tuple[Tensor, ...]:
        pooled, beside = _pooled(x.shape, constants.pool), bool(is_beside(x))
        y, picked, choice = (empty(pooled, beside, dtype) for dtype in (x.dtype, x.dtype, torch.uint8))
        mean = x.new_empty(len(x), constants.sets, x.shape[2])
        r = torch.empty_like(mean)
        _call("block_forward", x, constants, x, gamma, beta, constants.eps, y, picked, choice, mean, r)
        ctx.save_for_backward(x, gamma, beta, picked, choice, mean, r)
        ctx.constants = constants
        ctx.mark_non_differentiable(mean, r)
        ctx.set_materialize_grads(False)
        return y, mean, r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is None:
            return None, None, None, None
        g = same_layout(grads[0], ctx.saved_tensors[3])
        return *_BlockBackward.apply(g, *ctx.saved_tensors, ctx.constants), None


class _BlockBackward(Function):
    """(g, x, gamma) to (dx, dgamma, dbeta); what else is passed is a function of x, whose part is in that of x."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        picked: Tensor,
        choice: Tensor,
        mean: Tensor,
        r: Tensor,
        constants: _Constants,
    ) -> Any:
        dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
        _call("block_backward", x, constants, g, x, picked, choice, gamma, mean, r, dx, dgamma, dbeta)
        ctx.save_for_backward(g, x, gamma, beta, picked, choice, mean, r, dgamma, dbeta)
        ctx.constants = constants
        return dx, dgamma.sum(1), dbeta.sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        c, c_gamma, c_beta = grads
        g, x, gamma, beta, picked, choice, mean, r, dgamma, dbeta = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _by_differentiation(ctx.constants, g, x, gamma, beta, grads)
        c = same_layout(c, x)
        c_gamma, c_beta = (v.unsqueeze(1).expand_as(mean).contiguous() for v in (c_gamma, c_beta))
        to_g, to_x, to_gamma = torch.empty_like(g), torch.empty_like(x), torch.empty_like(mean)
        _call(
            "block_twice", x, ctx.constants,
            c, c_gamma, c_beta, g, x, picked, choice, gamma, mean, r, dgamma, dbeta, to_g, to_x, to_gamma,
        )  # fmt: skip
        return to_g, to_x, to_gamma.sum(1), None, None, None, None, None, None


def _by_differentiation(
    constants: _Constants, g: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, grads: tuple[Tensor, ...]
) -> Any:
    """The double backward by automatic differentiation of the plain form, for derivatives beyond the second."""
    # aliases, so that the gradients below stop here even where g itself depends on x
    g, x, gamma = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, x, gamma))
    sets = x.unflatten(1, (constants.sets, -1))
    var, mean = torch.var_mean(sets, dim=(2, 4, 5), keepdim=True, correction=0)
    z = ((sets - mean) * torch.rsqrt(var + constants.eps)).flatten(1, 2)
    offset = beta.detach().requires_grad_()
    y = torch.relu(z * gamma[:, None, :, None, None] + offset[:, None, :, None, None])
    y = y if constants.pool == 1 else max_pool(y)
    first = torch.autograd.grad(y, (x, gamma, offset), g, create_graph=True, materialize_grads=True)
    live = [(o, c) for o, c in zip(first, grads, strict=True) if o.requires_grad]
    outputs, cotangents = zip(*live, strict=True)
    to = torch.autograd.grad(outputs, (g, x, gamma), cotangents, create_graph=True, materialize_grads=True)
    return *to, None, None, None, None, None, None
