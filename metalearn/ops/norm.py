"""Batch normalisation as a pure function, with the source of its statistics as an argument."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class Moments(NamedTuple):
    """Mean and (biased) variance of a layer's input, each `[B, C]` or shared `[C]`, over `size` values."""

    mean: Tensor
    var: Tensor
    size: int


Statistics = dict[str, Moments]
"""Moments by the name of the layer."""


@dataclass
class Normalization:
    """How the batch-norm layers normalise in one forward pass, and what they saw.

    Attributes:
        given: statistics to use; None means those of the batch being forwarded.
        sets: the n examples of a task are this many consecutive sets of equal size, each with its own statistics.
        seen: filled with the batch statistics of each layer when `record` is set.
        record: whether to fill `seen` (not with several sets).
    """

    given: Statistics | None = None
    sets: int = 1
    record: bool = False
    seen: Statistics = field(default_factory=dict)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    before: Tensor | None,
    *,
    layer: str,
    eps: float,
    norm: Normalization,
) -> Tensor:
    """gamma (x + before - mean) / sqrt(var + eps) + beta, for each task and channel.

    Args:
        x: `[B, n, C, H, W]` without the bias of the layer before.
        weight: gamma, `[C]` or `[B, C]`; None for 1.
        bias: beta, `[C]` or `[B, C]`; None for 0.
        before: the preceding layer's bias, `[C]` or `[B, C]`. With batch statistics it cancels exactly and is not
            even added, so its gradient is exactly zero.
        layer: name under which statistics are looked up and recorded.
        eps: added to the variance.
        norm: where the statistics come from.

    Returns:
        `[B, n, C, H, W]`.
    """
    if norm.given is None and norm.sets == 1:
        y, moments = _own_statistics(x, weight, bias, eps)
        if norm.record:
            norm.seen[layer] = moments if before is None else moments._replace(mean=moments.mean + before.detach())
        return y
    if norm.given is None:
        return _set_statistics(x, weight, bias, eps, norm.sets)
    mean, var, _ = norm.given[layer]
    mean = mean if before is None else mean - before
    y = (x - _channels(mean)) * _channels(torch.rsqrt(var + eps))
    if weight is not None:
        y = y * _channels(weight)
    return y if bias is None else y + _channels(bias)


def _channels(value: Tensor) -> Tensor:
    """`[C]` or `[B, C]`, shaped to broadcast against `[B, n, C, H, W]`."""
    return value[..., None, :, None, None] if value.dim() == 2 else value[:, None, None]


def _own_statistics(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    """Normalise each task and channel over its own examples and pixels; the tasks lie in the channel axis."""
    tasks, channels = x.shape[0], x.shape[2]
    gamma = x.new_ones(channels) if weight is None else weight
    beta = x.new_zeros(channels) if bias is None else bias
    flat = x.transpose(0, 1).flatten(1, 2)
    # contiguous: with one channel the expanded vector is a view of stride 0, and the CPU kernel ignores strides
    scale, offset = (p.expand(tasks, -1).flatten().contiguous() for p in (gamma, beta))
    y, mean, r = _BatchNorm.apply(flat, scale, offset, eps)
    var = r.reciprocal().square() - eps
    moments = Moments(mean.view(tasks, channels), var.view(tasks, channels), x[0, :, 0].numel())
    return y.unflatten(1, (tasks, channels)).transpose(0, 1), moments


def _set_statistics(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, sets: int) -> Tensor:
    """Normalise each task, channel and set over the set's own examples and pixels."""
    tasks, n, channels, height, width = x.shape
    rows = x.permute(1, 3, 4, 0, 2).reshape(sets, -1, tasks, channels)
    centred = rows - rows.mean(1, keepdim=True)
    var = torch.linalg.vector_norm(centred, dim=1, keepdim=True).square() / rows.shape[1]
    scale = torch.rsqrt(var + eps) * (1.0 if weight is None else weight)
    y = centred * scale if bias is None else torch.addcmul(bias, centred, scale)
    return y.reshape(n, height, width, tasks, channels).permute(3, 0, 4, 1, 2)


class _BatchNorm(Function):
    """y = gamma z + beta with z = (x - mean) r, r = 1 / sqrt(var + eps), over all axes but the channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, r = torch.ops.aten.native_batch_norm(x, gamma, beta, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, gamma, mean, r)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, r)
        return y, mean, r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gamma, mean, r = ctx.saved_tensors
        return *_BatchNormBackward.apply(grads[0], x, gamma, mean, r, ctx.eps), None


class _BatchNormBackward(Function):
    """(g, x, gamma) to (dx, dgamma, dbeta) = (gamma r P g, sum g z, sum g), P g = g - M[g] - z M[g z], M the mean.

    `mean` and `r` are functions of x; their part of the derivative is in the formula for x.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, r: Tensor, eps: float) -> Any:
        dx, dgamma, dbeta = _native(g, x, gamma, mean, r)
        ctx.save_for_backward(g, x, gamma, mean, r, dgamma, dbeta)
        ctx.eps = eps
        return dx, dgamma, dbeta

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            return _differentiable_double_backward(ctx, grads)
        c, c_gamma, c_beta = grads
        g, x, gamma, mean, r, sum_gz, sum_g = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        rpc, sum_cz, sum_c = _native(c, x, torch.ones_like(gamma), mean, r)
        sum_cg = _native(c, g, None, torch.zeros_like(r), torch.ones_like(r), data=False)[1]
        kappa = (sum_cg - (sum_c * sum_g + sum_cz * sum_gz) / n) / n  # M[c P g]
        # d/dg = gamma r P c + c_gamma z + c_beta, with z = r x - r mean
        slope = c_gamma * r
        to_g = torch.addcmul(_at(c_beta - slope * mean), rpc, _at(gamma)).addcmul_(x, _at(slope))
        # d/dx = -gamma r M[g z] (r P c) + (c_gamma - gamma r M[c z]) (r P g) - gamma r^2 kappa z
        by_g = (c_gamma - gamma * r * sum_cz / n) * r
        by_z = -gamma * r * r * kappa - by_g * sum_gz / n
        constant = -by_g * sum_g / n - by_z * r * mean
        to_x = torch.addcmul(_at(constant), rpc, _at(-gamma * r * sum_gz / n))
        to_x = to_x.addcmul_(g, _at(by_g)).addcmul_(x, _at(by_z * r))
        return to_g, to_x, r * n * kappa, None, None, None


def _at(channels: Tensor) -> Tensor:
    return channels[:, None, None]


def _native(
    g: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, r: Tensor, *, data: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's kernel: gamma r P g (if `data`), sum g z and sum g for each channel, in one pass."""
    g = g.contiguous(memory_format=torch.channels_last)
    return torch.ops.aten.native_batch_norm_backward(g, x, gamma, None, None, mean, r, True, 0.0, [data, True, True])


def _differentiable_double_backward(ctx: Any, grads: tuple[Tensor, ...]) -> Any:
    """The same by automatic differentiation of the formula, for derivatives beyond the second."""
    # aliases, so that the gradients below stop here even where g itself depends on x
    g, x, gamma = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors[:3])
    var, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    r = torch.rsqrt(var + ctx.eps)
    z = (x - mean) * r
    p = g - g.mean((0, 2, 3), keepdim=True) - z * (g * z).mean((0, 2, 3), keepdim=True)
    outputs = (_at(gamma) * r * p, (g * z).sum((0, 2, 3)), g.sum((0, 2, 3)))
    total = sum((o * c).sum() for o, c in zip(outputs, grads, strict=True))
    return *torch.autograd.grad(total, (g, x, gamma), create_graph=True, materialize_grads=True), None, None, None
