"""Outer optimizers, schedules and clipping against those of PyTorch."""

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from oracles import assert_close, meta_batch, normal
from torch import nn
from torch.optim import lr_scheduler

from metalearn.algorithms import MAML
from metalearn.meta_gradient import meta_gradient
from metalearn.optim import SGD, Adam, OuterOptimizer, clipped

TOTAL = 20
SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "constant": ({}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "cosine": ({"final_lr": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=TOTAL, eta_min=0.1)),
    "linear": ({"final_lr": 0.1}, lambda o: lr_scheduler.LinearLR(o, 1.0, end_factor=0.2, total_iters=TOTAL)),
    "step": ({"decay_every": 6, "decay_factor": 0.3}, lambda o: lr_scheduler.StepLR(o, step_size=6, gamma=0.3)),
}


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate([(3, 2), (4,), ()])]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_is_that_of_torch(schedule):
    options, scheduler = SCHEDULES[schedule]
    ours, theirs = SGD(lr=0.5, schedule=schedule, **options), torch.optim.SGD(parameters(), lr=0.5)
    course = scheduler(theirs)
    for step in range(TOTAL + 1):
        assert ours.rate(step, TOTAL) == pytest.approx(course.get_last_lr()[0], rel=1e-12)
        theirs.step()
        course.step()


@pytest.mark.parametrize(
    "schedule, last", [("constant", 0.5), ("cosine", 0.1), ("linear", 0.1), ("step", 0.5 * 0.3**3)]
)
def test_rate_at_both_ends(schedule, last):
    optimizer = Adam(lr=0.5, schedule=schedule, **SCHEDULES[schedule][0])
    assert optimizer.rate(0, TOTAL) == 0.5
    assert optimizer.rate(TOTAL, TOTAL) == pytest.approx(last, rel=1e-12)


def torch_clip(params: list[nn.Parameter], value: float | None, norm: float | None) -> None:
    if value is not None:
        nn.utils.clip_grad_value_(params, value)
    if norm is not None:
        nn.utils.clip_grad_norm_(params, norm)


@pytest.mark.parametrize("value", [None, 0.4])
@pytest.mark.parametrize("norm", [None, 0.9, 100.0])
def test_clipping_is_that_of_torch(value, norm):
    """Entries first, then the norm of what is left."""
    params, grads = parameters(), [normal(*p.shape, seed=10 + i) for i, p in enumerate(parameters())]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    torch_clip(params, value, norm)
    before = [g.clone() for g in grads]
    assert_close(clipped(grads, SGD(lr=1.0, clip_value=value, clip_norm=norm)), [p.grad for p in params])
    assert_close(grads, before)


OPTIMIZERS: dict[str, tuple[OuterOptimizer, Callable[[Any], torch.optim.Optimizer]]] = {
    "adam": (Adam(lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
    "adam options": (
        Adam(lr=0.1, betas=[0, 0.99], eps=1e-3, weight_decay=0.2),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.99), eps=1e-3, weight_decay=0.2),
    ),
    "sgd": (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "sgd options": (
        SGD(lr=0.1, momentum=0.9, weight_decay=0.2),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.2),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_steps_are_steps_of_torch(name):
    """On the clipped meta-gradient, at the rate of the schedule."""
    ours, build = OPTIMIZERS[name]
    ours.schedule, ours.clip_value, ours.clip_norm = "linear", 0.05, 0.1
    (learner, twin) = (oracles.build(MAML, oracles.mlp(), "regression", alpha=0.3, inner_steps=1) for _ in range(2))
    learner.attach(ours, 4)
    outer, theirs = learner.configure_optimizers(), build(twin.parameters())
    for step in range(4):
        batch = meta_batch(oracles.curves(seed=step), step)
        for parameter, grad in zip(twin.parameters(), meta_gradient(twin, batch).grads, strict=True):
            parameter.grad = grad
        torch_clip(list(twin.parameters()), 0.05, 0.1)
        theirs.param_groups[0]["lr"] = 0.1 * (1 - step / 4)
        theirs.step()
        learner.meta_step(batch, outer)
        assert_close(list(learner.parameters()), list(twin.parameters()))
