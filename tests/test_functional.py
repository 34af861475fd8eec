"""Inner loops against ordinary automatic differentiation, finite differences and plain loops."""

from itertools import pairwise
from typing import Any

import oracles
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import ROUNDING, assert_close, distance, finite_differences, normal
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn.algorithms import MAML
from metalearn.functional import gradient_descent, per_task, surrogate, unrolled

TASKS = 2
RATES: dict[str, Any] = {
    "number": 0.3,
    "scalar": torch.tensor(0.3, dtype=torch.float64),
    "per leaf": {"w": normal(2, 3, seed=8), "b": torch.tensor(-0.4, dtype=torch.float64), "idle": normal(1, seed=9)},
    "per task": {"w": normal(TASKS, 1, 1, seed=10), "b": normal(TASKS, 2, seed=11), "idle": normal(1, seed=9)},
}


def loss(phi: dict[str, Tensor], context: Any) -> Tensor:
    """A two-layer regression whose first layer is context; nothing uses `idle`."""
    (body, x), y = context
    out = torch.tanh(torch.tanh(x @ body["v"].mT) @ phi["w"].mT + phi["b"].unsqueeze(1))
    return (out - y).square().flatten(1).sum(1)


def problem(rates: str = "scalar") -> tuple[Any, list[Tensor]]:
    """Arguments (start, context, lr) of an inner loop, and all their tensors."""
    start = {"w": normal(TASKS, 2, 3, seed=0), "b": normal(TASKS, 2, seed=1), "idle": normal(TASKS, 1, seed=2)}
    context = (({"v": normal(3, 2, seed=3)}, normal(TASKS, 3, 2, seed=4)), normal(TASKS, 3, 2, seed=5))
    arguments = pytree.tree_map_only(Tensor, lambda t: t.clone().requires_grad_(), (start, context, RATES[rates]))
    return arguments, [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]


def objective(trajectory: list[dict[str, Tensor]]) -> Tensor:
    """Depends on the parameters after every step, non-linearly."""
    return torch.stack([(p * (k + 1)).sin().sum() for k, phi in enumerate(trajectory) for p in phi.values()]).sum()


def derivative(method: Any, arguments: Any, leaves: list[Tensor], steps: int, **options: Any) -> list[Tensor]:
    value = objective(method(loss, *arguments, steps, **options))
    return list(torch.autograd.grad(value, leaves, materialize_grads=True))


@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_adjoint_is_differentiation_through_the_steps(steps, rates, first_order, remember):
    """In every leaf of start, context and lr."""
    arguments, leaves = problem(rates)
    trajectory = gradient_descent(loss, *arguments, steps, first_order=first_order, remember=remember)
    assert_close(trajectory, unrolled(loss, *arguments, steps))
    actual = derivative(gradient_descent, arguments, leaves, steps, first_order=first_order, remember=remember)
    assert_close(actual, derivative(unrolled, arguments, leaves, steps, first_order=first_order))


@pytest.mark.parametrize("rates", ["scalar", "per leaf"])
def test_adjoint_is_the_slope(rates):
    """Finite differences in every leaf; the first-order derivative is something else."""
    arguments, leaves = problem(rates)
    slopes = finite_differences(lambda: objective(gradient_descent(loss, *arguments, 3)), leaves)
    exact, first = (derivative(gradient_descent, arguments, leaves, 3, first_order=f) for f in (False, True))
    assert_close(exact, slopes, 1e-6)
    assert distance(first, slopes) > 0.1


@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize("first_order", [False, True])
def test_clipped_gradients(first_order, remember):
    """The adjoint of bounded entries is zero: against differentiation through clamp, and finite differences."""
    arguments, leaves = problem("per leaf")
    options: dict[str, Any] = {"first_order": first_order, "clip": 1.5}
    trajectory = gradient_descent(loss, *arguments, 3, remember=remember, **options)
    assert_close(trajectory, unrolled(loss, *arguments, 3, **options))
    moved = torch.cat(
        [((a[k] - b[k]) / arguments[2][k]).flatten() for a, b in pairwise(trajectory) for k in a if k != "idle"]
    )
    bounded = (moved.abs() > 1.5 - ROUNDING).double().mean()
    assert moved.abs().max() < 1.5 + ROUNDING and 0.2 < bounded < 0.8
    actual = derivative(gradient_descent, arguments, leaves, 3, remember=remember, **options)
    assert_close(actual, derivative(unrolled, arguments, leaves, 3, **options))
    if not first_order:
        slopes = finite_differences(lambda: objective(gradient_descent(loss, *arguments, 3, clip=1.5)), leaves)
        assert_close(actual, slopes, 1e-6)


def test_first_order_takes_inner_gradients_as_constants():
    """phi_K = start - sum_k lr g_k with constant g_k: identity in start, nothing in context, -sum_k <g_k, v> in lr."""
    (start, context, lr), _ = problem()
    trajectory = gradient_descent(loss, start, context, lr, 3, first_order=True)
    v = {k: normal(*p.shape, seed=20) for k, p in start.items()}
    value = torch.stack([(trajectory[-1][k] * v[k]).sum() for k in v]).sum()
    to_lr, *to_start = torch.autograd.grad(value, [lr, *start.values()], retain_graph=True)
    assert_close(to_start, list(v.values()))
    moved = torch.stack([((trajectory[-1][k] - start[k]) * v[k]).sum() for k in v]).sum()  # -lr sum_k <g_k, v>
    assert_close(to_lr, moved.detach() / lr.detach())


def test_first_order_ignores_the_context():
    arguments, leaves = problem()
    context = [t for t in pytree.tree_leaves(arguments[1])]
    value = objective(gradient_descent(loss, *arguments, 2, first_order=True))
    assert torch.autograd.grad(value, context, allow_unused=True) == (None,) * len(context)


@pytest.mark.parametrize("used", [1, 2])
def test_an_early_step_may_be_used_alone(used):
    """Then the steps after it have no influence."""
    arguments, leaves = problem()
    gradients = []
    for steps in (used, 3):
        value = objective(gradient_descent(loss, *arguments, steps)[used : used + 1])
        gradients.append(torch.autograd.grad(value, leaves))
    assert_close(*gradients)


def test_recomputation_changes_no_bit_and_calls_the_loss_once_more_a_step():
    arguments, leaves = problem()
    calls = []

    def counted(phi: Any, context: Any) -> Tensor:
        calls.append(1)
        return loss(phi, context)

    gradients, counts = [], []
    for remember in (True, False):
        calls.clear()
        value = objective(gradient_descent(counted, *arguments, 3, remember=remember))
        gradients.append(torch.autograd.grad(value, leaves, materialize_grads=True))
        counts.append(len(calls))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert counts == [3, 6]


def test_unused_parameters_stay_and_pass_their_gradient_on():
    (start, context, lr), _ = problem()
    end = gradient_descent(loss, start, context, lr, 3)[-1]
    assert torch.equal(end["idle"], start["idle"])
    slope, to_lr = torch.autograd.grad(end["idle"].sum(), [start["idle"], lr])
    assert torch.equal(slope, torch.ones_like(slope))
    assert to_lr == 0


def test_linear_loss_has_no_second_order_term():
    """Constant inner gradients c, which depend on the context: d phi_K / d start = I, d phi_K / d c = -K lr I."""
    w, c = (normal(TASKS, 3, seed=s).requires_grad_() for s in (0, 1))
    end = gradient_descent(lambda phi, c: (phi["w"] * c).sum(1), {"w": w}, c, 0.1, 3)[-1]["w"]
    to_w, to_c = torch.autograd.grad(end.sum(), [w, c])
    assert_close((to_w, to_c), (torch.ones_like(w), torch.full_like(c, -0.3)))


def test_tasks_do_not_touch_each_other():
    """Every task alone ends at the same parameters, and sends no gradient to another's start."""
    (start, ((body, x), y), lr), _ = problem()
    for i in range(TASKS):
        together = gradient_descent(loss, start, ((body, x), y), lr, 3)[-1]
        one = slice(i, i + 1)
        alone = gradient_descent(loss, {k: p[one] for k, p in start.items()}, ((body, x[one]), y[one]), lr, 3)[-1]
        assert_close({k: p[one] for k, p in together.items()}, alone)
        slope = torch.autograd.grad(together["w"][i].sum(), start["w"])[0]
        assert [bool(s.any()) for s in slope] == [j == i for j in range(TASKS)]


def test_second_derivatives_and_second_uses_are_refused():
    """Rather than wrong: the adjoint is not differentiable itself, and its steps are freed by one use."""
    arguments, leaves = problem()
    value = objective(gradient_descent(loss, *arguments, 2))
    slope = torch.autograd.grad(value, leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(value, leaves[0])


def test_surrogate_has_the_value_and_the_gradient_asked_for():
    params = {"w": normal(TASKS, 2, 3, seed=0).requires_grad_(), "scalar": normal(TASKS, seed=1).requires_grad_()}
    grads = {k: normal(*p.shape, seed=2) for k, p in params.items()}
    value = surrogate(normal(TASKS, seed=3), params, grads)
    assert torch.equal(value, normal(TASKS, seed=3))
    assert_close(torch.autograd.grad(value.sum(), list(params.values())), tuple(grads.values()))


def test_shared_leaves_are_expanded_and_others_kept():
    shapes = {"shared": torch.Size([2, 3]), "own": torch.Size([3])}
    out = per_task({"shared": normal(2, 3, seed=0), "own": normal(4, 3, seed=1)}, 4, shapes)
    assert_close(out, {"shared": normal(2, 3, seed=0).expand(4, 2, 3), "own": normal(4, 3, seed=1)})


@st.composite
def conv_mamls(draw: Any) -> tuple[MAML, Any]:
    """A MAML learner with a small random convolutional network, and tasks for it.

    At least 2x2 pixels reach every batch norm: where two numbers are normalised, rounding alone moves the outer
    gradient by up to 1e-11.
    """
    blocks, side = draw(st.sampled_from([(1, 4), (1, 5), (2, 5), (2, 8), (3, 9)]))
    way = draw(st.integers(2, 3))
    net = oracles.conv_net(
        way,
        input_shape=(2, side, side),
        blocks=blocks,
        width=draw(st.integers(1, 3)),
        downsample=draw(st.sampled_from(["maxpool", "stride"])),
        readout=draw(st.sampled_from(["flatten", "mean"])),
        bn=draw(st.booleans()),
        bn_affine=draw(st.sampled_from(["full", "beta", "none"])),
        bn_affine_inner=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
    )
    learner = oracles.build(
        MAML,
        net,
        "classification",
        alpha=draw(st.sampled_from([0.05, 0.3])),
        adapted=draw(st.sampled_from(["", "head", "block1"])),
        first_order=draw(st.booleans()),
        inner_steps=draw(st.integers(1, 5)),
    )
    counts = {"way": way, "shot": draw(st.integers(1, 2)), "queries": draw(st.integers(1, 2)), "side": side}
    return learner, oracles.pictures(draw(st.integers(1, 3)), **counts, seed=draw(st.integers(0, 99)))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(conv_mamls())
def test_outer_gradient_of_any_network_is_that_of_the_plain_loop(case):
    """Adjoint, fast convolution and batch-norm kernels, frozen parts, chunks: all against primitive operations."""
    learner, episodes = case
    losses, grads = oracles.plain_maml(learner, episodes)
    result = oracles.meta_gradient(learner, oracles.meta_batch(episodes))
    assert_close(result.loss, losses)
    assert distance(result.grads, grads) < ROUNDING
