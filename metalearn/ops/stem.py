"""The first block of a network on pictures: 3x3 convolution of data, batch norm, ReLU and 2x2 max-pooling in one.

Its activations are the largest of the network and its convolution the cheapest, so the convolution is computed again
wherever it is needed and never stored. Batch norm needs no pass over it at all: the mean and variance of conv(x, w) are
m.w and w' C w with m and C the mean and covariance of the data's 3x3 patches, which do not change while w adapts. What
remains is y = relu(a v + b), v the convolution at the pixel of each window where a v is largest (a, b: batch norm as an
affine map), with v linear in w and sparse in its adjoint.
"""

import ctypes
import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from metalearn.ops import conv, native
from metalearn.ops.layout import Strides, empty, same_layout, strides
from metalearn.ops.norm import Moments, Normalization

MOST_INPUTS = 4  # channels; the work on patches grows with their square


def fits(x: Tensor, weight: Tensor, stride: int, pool: int) -> bool:
    """Whether `stem` covers a block: data of few channels that needs no gradient, 3x3 filters, pooling."""
    matches = (
        x.shape[2] == weight.shape[-3] and weight.dtype == x.dtype and (weight.dim() == 4 or len(weight) == len(x))
    )
    small = matches and x.shape[2] <= MOST_INPUTS and weight.shape[-2:] == (3, 3) and (stride, pool) == (1, 2)
    return small and not x.requires_grad and conv.operands is None and native.library(x) is not None


def stem(
    x: Tensor,
    filters: Tensor,
    before: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    layer: str,
    eps: float,
    norm: Normalization | None,
) -> Tensor:
    """max-pool(relu(batch_norm(conv(x)))) for each task, of data x.

    Args:
        x: `[B, n, C, H, W]`, a constant.
        filters: `[O, C, 3, 3]` shared, or `[B, O, C, 3, 3]` one per task.
        before: the convolution's bias, `[O]` or `[B, O]`; without effect under batch statistics.
        weight: gamma, `[O]` or `[B, O]`; None for 1.
        bias: beta, `[O]` or `[B, O]`; None for 0.
        layer: name under which statistics are looked up and recorded.
        eps: added to the variance.
        norm: where the statistics come from; None for a block without batch norm.

    Returns:
        `[B, n, O, H // 2, W // 2]`.
    """
    tasks, shared = len(x), filters.dim() == 4
    w = filters.flatten(-3).mT.contiguous()  # [9 C, O] or [B, 9 C, O]
    sets = 1 if norm is None or norm.given is not None else norm.sets
    x = x if x[0, 0].is_contiguous() else x.contiguous()

    def rows(p: Tensor) -> Tensor:  # [O] or [B, O] to [B or 1, 1, O]
        return p.unsqueeze(-2) if p.dim() == 2 else p[None, None]

    if norm is None:
        a, b = x.new_ones(()), rows(w.new_zeros(w.shape[-1]) if before is None else before)
    else:
        if norm.given is None:
            mean, covariance = patches(x, sets)
            own = w if shared else w.unsqueeze(1)
            mu = (mean.unsqueeze(-2) @ own).squeeze(-2)
            var = ((covariance @ own) * own).sum(-2).clamp(min=0)
            if norm.record:
                seen = mu[:, 0].detach() if before is None else (mu[:, 0] + before).detach()
                norm.seen[layer] = Moments(seen, var[:, 0].detach(), x[0, :, 0].numel())
        else:
            mu, var, _ = norm.given[layer]
            mu, var = rows(mu if before is None else mu - before), rows(var)
        a = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * rows(weight)
        b = -a * mu if bias is None else rows(bias) - a * mu
    a, b = (p.expand(tasks, sets, w.shape[-1]).contiguous() for p in (a, b))
    return _Pick.apply(w, a, b, _Data(x, sets, not shared))[0]


class _Patches:
    """Moments of a tensor's patches, kept as long as the tensor is: its inner steps share them."""

    def __init__(self) -> None:
        self.by_id: dict[tuple[int, int], tuple[Any, int, tuple[Tensor, Tensor]]] = {}

    def __call__(self, x: Tensor, sets: int) -> tuple[Tensor, Tensor]:
        key = (id(x), sets)
        found = self.by_id.get(key)
        if found is not None and found[0]() is x and found[1] == x._version:
            return found[2]
        value = _patch_moments(x, sets)
        self.by_id[key] = (weakref.ref(x, lambda _: self.by_id.pop(key, None)), x._version, value)
        return value


patches = _Patches()


class _Data(NamedTuple):
    """Pictures `[B, n, C, H, W]` in `sets` sets, and whether tasks lie beside the channels in the result."""

    x: Tensor
    sets: int
    beside: bool


class _Shape(ctypes.Structure):
    """The kernels' `Stem`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tasks", "sets", "m", "inputs", "channels", "height", "width", "parts")),
        *((name, ctypes.c_int64) for name in ("x_task", "x_example", "w_task")),
        ("pooled", Strides),
    ]


def _patch_moments(x: Tensor, sets: int) -> tuple[Tensor, Tensor]:
    """Mean `[B, sets, 9 C]` and covariance `[B, sets, 9 C, 9 C]` of the zero-padded 3x3 patches of each set."""
    taps = 9 * x.shape[2]
    mean, covariance = x.new_empty(len(x), sets, taps), x.new_empty(len(x), sets, taps, taps)
    _call("stem_moments", _Data(x, sets, True), 1, 0, mean, covariance)
    return mean, covariance


@functools.lru_cache(1024)
def _shape(
    shape: tuple[int, ...], x_strides: tuple[int, ...], sets: int, beside: bool, channels: int, w_task: int, parts: int
) -> _Shape:
    tasks, n, inputs, height, width = shape
    pooled = strides((tasks, n, channels, height // 2, width // 2), beside)
    return _Shape(tasks, sets, n // sets, inputs, channels, height, width, parts, *x_strides[:2], w_task, pooled)


def _call(name: str, data: _Data, channels: int, w_task: int, *tensors: Tensor) -> None:
    x, sets, beside = data
    units = len(x) * sets
    parts = native.parts(units, channels)
    shape = _shape(x.shape, x.stride(), sets, beside, channels, w_task, parts)
    native.call(name, shape, units * parts, x, *tensors)


def _pooled(data: _Data, channels: int, dtype: torch.dtype) -> Tensor:
    tasks, n, _, height, width = data.x.shape
    return empty((tasks, n, channels, height // 2, width // 2), data.beside, dtype)


def _stride(w: Tensor) -> int:
    return w.stride(0) if w.dim() == 3 else 0


class _Pick(Function):
    """(w, a, b) to y = relu(a v + b): w `[9 C, O]` or `[B, 9 C, O]`, a and b `[B, sets, O]`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, a: Tensor, b: Tensor, data: _Data) -> tuple[Tensor, Tensor, Tensor]:
        y, picked = (_pooled(data, w.shape[-1], w.dtype) for _ in range(2))
        choice = _pooled(data, w.shape[-1], torch.uint8)
        _call("stem_pick", data, w.shape[-1], _stride(w), w, a, b, y, picked, choice)
        ctx.save_for_backward(w, a, b, picked, choice)
        ctx.data = data
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(picked, choice)
        return y, picked, choice

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is None:
            return None, None, None, None
        w, a, b, picked, choice = ctx.saved_tensors
        g = same_layout(grads[0], picked)
        return *_Pull.apply(g, w, a, b, picked, choice, ctx.data), None


class _Pull(Function):
    """(g, w, a) to (dw, da, db) = (a S, sum g v, sum g), sums over live pixels, S that of g times the chosen patch.

    v is a function of w, whose part in the derivative is in that of w; b has no influence.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, w: Tensor, a: Tensor, b: Tensor, picked: Tensor, choice: Tensor, data: _Data
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = w.new_zeros(*a.shape[:2], *w.shape[-2:])
        da, db = torch.zeros_like(a), torch.zeros_like(a)
        _call("stem_pull", data, w.shape[-1], 0, g, picked, choice, sums, da, db)
        ctx.save_for_backward(g, w, a, b, picked, choice, sums)
        ctx.data = data
        dw = (sums * a.unsqueeze(-2)).sum((0, 1) if w.dim() == 2 else 1)
        return dw, da, db

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g, w, a, b, picked, choice, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _by_differentiation(ctx.data, g, w, a, b, grads)
        cw, ca, cb = (c.contiguous() for c in grads)
        to_g = torch.empty_like(g)
        _call("stem_push", ctx.data, w.shape[-1], _stride(w), cw, ca, cb, a, picked, choice, to_g)
        to_a = (sums * (cw if w.dim() == 2 else cw.unsqueeze(1))).sum(-2)
        to_w = (sums * ca.unsqueeze(-2)).sum((0, 1) if w.dim() == 2 else 1)
        return to_g, to_w, to_a, None, None, None, None


def _by_differentiation(data: _Data, g: Tensor, w: Tensor, a: Tensor, b: Tensor, grads: tuple[Tensor, ...]) -> Any:
    """The double backward by automatic differentiation of the plain form, for derivatives beyond the second."""
    # aliases, so that the gradients below stop here even where g itself depends on w
    g, w, a = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, w, a))
    tasks, n, _, height, width = data.x.shape
    b = b.detach().requires_grad_()
    columns = torch.nn.functional.unfold(data.x.flatten(0, 1), 3, padding=1).mT  # [B n, H W, 9 C]
    v = columns.unflatten(0, (tasks, data.sets, -1)).flatten(2, 3) @ (w if w.dim() == 2 else w.unsqueeze(1))
    y = torch.relu(v * a.unsqueeze(-2) + b.unsqueeze(-2))
    y = y.reshape(tasks * n, height, width, -1).permute(0, 3, 1, 2)
    y = torch.nn.functional.max_pool2d(y, 2).unflatten(0, (tasks, n))
    first = torch.autograd.grad(y, (w, a, b), g, create_graph=True, materialize_grads=True)
    live = [(o, c) for o, c in zip(first, grads, strict=True) if o.requires_grad]
    outputs, cotangents = zip(*live, strict=True)
    to = torch.autograd.grad(outputs, (g, w, a), cotangents, create_graph=True, materialize_grads=True)
    return *to, None, None, None, None
