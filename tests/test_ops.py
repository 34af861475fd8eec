"""Task-batched operations against plain PyTorch, one task after the other, up to their third derivatives."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_close, distance, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from metalearn.ops import Normalization, batch_norm, conv, conv2d, linear
from metalearn.ops.norm import Moments

TASKS, N, EPS = 2, 3, 0.1  # so large an eps matters next to the variance
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # same numbers, another order in memory
    "contiguous": lambda x: x,
    "tasks inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "as convolved": lambda x: x.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2),
    "channels last": lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def own(p: Tensor, dims: int, task: int) -> Tensor:
    """The task's part of a parameter that has `dims` axes when it is shared."""
    return p if p.dim() == dims else p[task]


def derivative(f: Callable[..., Tensor], inputs: Sequence[Tensor], order: int) -> tuple[Tensor, ...]:
    """The order-th derivative along fixed directions but one; the last differentiation records no graph."""
    value = f(*inputs).sin().sum()
    for k in range(order):
        grads = torch.autograd.grad(value, inputs, create_graph=k + 1 < order)
        value = torch.stack([(g * normal(*g.shape, seed=k)).sum() for g in grads]).sum()
    return grads


# ---- convolution -------------------------------------------------------------------------------------------------


def conv_inputs(shared: bool, layout: str = "contiguous") -> list[Tensor]:
    x, w = normal(TASKS, N, 2, 5, 4, seed=0), normal(*(() if shared else (TASKS,)), 3, 2, 3, 3, seed=1)
    return [LAYOUTS[layout](x).requires_grad_(), w.requires_grad_()]


def plain_conv(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    return torch.stack([F.conv2d(x[i], own(w, 4, i), None, stride, padding) for i in range(TASKS)])


@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 1), (1, 0), (2, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False])
def test_convolution_is_that_of_each_task(shared, layout, stride, padding):
    inputs = conv_inputs(shared, layout)
    plain = plain_conv(*inputs, stride, padding)
    assert_close(conv2d(*inputs, stride=stride, padding=padding), plain)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_derivatives_of_convolution(shared, order, stride):
    inputs = conv_inputs(shared)
    actual = derivative(lambda x, w: conv2d(x, w, stride=stride, padding=1), inputs, order)
    assert_close(actual, derivative(lambda x, w: plain_conv(x, w, stride, 1), inputs, order))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_derivatives_of_convolution_are_slopes(shared, stride):
    x, w = conv_inputs(shared)
    inputs = x.detach()[:, :1, :, :4, :3].requires_grad_(), w
    assert gradcheck(lambda x, w: conv2d(x, w, stride=stride, padding=1), inputs)
    assert gradgradcheck(lambda x, w: conv2d(x, w, stride=stride, padding=1), inputs)


# ---- affine map --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [(4,), (TASKS, 4)])
@pytest.mark.parametrize("weight", [(4, 2), (TASKS, 4, 2)])
def test_affine_map_is_that_of_each_task(weight, bias):
    inputs = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate([(TASKS, N, 2), weight, bias])]

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.stack([x[i] @ own(w, 2, i).T + own(b, 1, i) for i in range(TASKS)])

    assert_close(linear(*inputs), plain(*inputs))
    assert_close(derivative(linear, inputs, 2), derivative(plain, inputs, 2))
    assert gradcheck(linear, inputs)
    assert gradgradcheck(linear, inputs)


# ---- batch norm --------------------------------------------------------------------------------------------------


def norm_inputs(shared: bool = True, layout: str = "contiguous", channels: int = 3) -> list[Tensor]:
    """X, gamma with entries of both signs and one zero, and beta."""
    shape = (channels,) if shared else (TASKS, channels)
    x, gamma, beta = normal(TASKS, N, channels, 2, 3, seed=0), normal(*shape, seed=1), normal(*shape, seed=2)
    gamma[..., 0], gamma[..., -1] = 0, -0.7
    return [LAYOUTS[layout](x).requires_grad_(), gamma.requires_grad_(), beta.requires_grad_()]


def per_channel(p: Tensor) -> Tensor:
    return p[:, None, None]


def plain_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The formula, task by task."""
    out = []
    for i, task in enumerate(x):
        mean, var = task.mean((0, 2, 3)), task.var((0, 2, 3), correction=0)
        z = (task - per_channel(mean)) / per_channel(torch.sqrt(var + EPS))
        out.append(per_channel(own(gamma, 1, i)) * z + per_channel(own(beta, 1, i)))
    return torch.stack(out)


def fast_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    before: Tensor | None = None,
    norm: Normalization | None = None,
) -> Tensor:
    return batch_norm(x, gamma, beta, before, layer="norm", eps=EPS, norm=norm or Normalization())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False])
def test_batch_norm_is_the_formula(shared, layout, channels):
    x, gamma, beta = norm_inputs(shared, layout, channels)
    assert_close(fast_norm(x, gamma, beta), plain_norm(x, gamma, beta))
    assert_close(fast_norm(x, None, beta), plain_norm(x, torch.ones_like(gamma), beta))
    assert_close(fast_norm(x, None, None), plain_norm(x, torch.ones_like(gamma), torch.zeros_like(beta)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_derivatives_of_batch_norm(shared, order, layout, channels):
    """The second is the hand-written formula, the third goes through its differentiable twin.

    One channel is a case of its own: a shared scale, expanded over the tasks, is then a vector of stride 0.
    """
    inputs = norm_inputs(shared, layout, channels)
    assert_close(derivative(fast_norm, inputs, order), derivative(plain_norm, inputs, order))


@pytest.mark.parametrize("order", [2, 3])
def test_derivatives_of_batch_norm_without_affine_parameters(order):
    inputs = norm_inputs()[:1]
    one, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    actual = derivative(lambda x: fast_norm(x, None, None), inputs, order)
    assert_close(actual, derivative(lambda x: plain_norm(x, one, zero), inputs, order))


@pytest.mark.parametrize("shared", [True, False])
def test_derivatives_of_batch_norm_are_slopes(shared):
    inputs = norm_inputs(shared, channels=2)
    assert gradcheck(fast_norm, inputs)
    assert gradgradcheck(fast_norm, inputs)


def test_the_bias_before_batch_statistics_cancels():
    x, gamma, beta = norm_inputs()
    before = normal(TASKS, 3, seed=3).requires_grad_()
    assert_close(plain_norm(x + before[:, None, :, None, None], gamma, beta), plain_norm(x, gamma, beta))
    out = fast_norm(x, gamma, beta, before)
    assert torch.equal(out, fast_norm(x, gamma, beta))
    assert torch.autograd.grad(out.sin().sum(), before, allow_unused=True) == (None,)


@pytest.mark.parametrize("before", [None, normal(3, seed=3), normal(TASKS, 3, seed=3)])
def test_recorded_moments_are_those_of_the_input(before):
    """Of x + before over examples and pixels, the variance biased."""
    x, gamma, beta = norm_inputs()
    norm = Normalization(record=True)
    fast_norm(x, gamma, beta, before, norm)
    shifted = x if before is None else x + before.expand(TASKS, 3)[:, None, :, None, None]
    mean, var, count = norm.seen["norm"]
    assert_close((mean, var), (shifted.mean((1, 3, 4)), shifted.var((1, 3, 4), correction=0)))
    assert count == N * 2 * 3
    assert not (mean.requires_grad or var.requires_grad)


@pytest.mark.parametrize("shared", [True, False])
def test_given_moments_are_used(shared):
    """Those of this very input, with its bias, give the batch-norm of the batch; gradients reach mean and variance."""
    x, gamma, beta = norm_inputs(shared)
    before = normal(3, seed=3)
    norm = Normalization(record=True)
    own_statistics = fast_norm(x, gamma, beta, before, norm)
    assert_close(fast_norm(x, gamma, beta, before, Normalization(given=norm.seen)), own_statistics)

    def by_moments(mean: Tensor, var: Tensor) -> Tensor:
        return fast_norm(x, gamma, beta, before, Normalization(given={"norm": Moments(mean, var, 0)}))

    assert gradcheck(by_moments, [normal(3, seed=s).square().requires_grad_() for s in (4, 5)])


@pytest.mark.parametrize("shared", [True, False])
def test_each_set_has_its_own_statistics(shared):
    x, gamma, beta = norm_inputs(shared)
    sets = [x, x.square(), x.exp()]
    out = fast_norm(torch.cat(sets, 1), gamma, beta, normal(3, seed=3), Normalization(sets=3))
    assert_close(out, torch.cat([plain_norm(part, gamma, beta) for part in sets], 1))


def test_bfloat16_operands_round_and_nothing_else(monkeypatch):
    """Value and both gradients of a convolution whose operands are rounded: as close as the rounding of the result."""
    x, w, g = (
        normal(*shape, seed=i).float() for i, shape in enumerate([(2, 3, 8, 5, 5), (2, 6, 8, 3, 3), (2, 3, 6, 5, 5)])
    )

    def results(x, w, g):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = conv2d(x, w, padding=1)
        return [y.detach(), *torch.autograd.grad(y, (x, w), g)]

    expected = results(*(t.bfloat16().float() for t in (x, w, g)))
    exact = results(x, w, g)
    monkeypatch.setattr(conv, "operands", torch.bfloat16)
    for found, want, unrounded in zip(results(x, w, g), expected, exact, strict=True):
        assert found.dtype == torch.float32
        assert distance([found], [want]) < 2**-8 < 10 * distance([found], [unrounded])
