"""Reptile against closed forms and plain loops (float64)."""

from typing import Any

import oracles
import pytest
import torch
from oracles import assert_close, forms, linear_form, meta_batch, normal, outer_gradient, quadratic, slope
from table import CASES, assert_same_bits, bits, create, each, select, step, tasks_for
from torch import nn

from metalearn.algorithms import Reptile
from metalearn.algorithms.pools import minibatches, pooled
from metalearn.episode import Episode, Examples

PLAIN: dict[str, Any] = {"inner_optimizer": "sgd", "inner_batch": None, "alpha": 0.2}


def test_one_step_of_reptile_is_joint_training():
    """R1, R2: alpha times the gradient of the mean loss of the union of all pools."""
    learner, episodes = create(("reptile", "regression"), inner_steps=1), oracles.curves()
    theta = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
    union = Examples(*(part.flatten(0, 1) for part in pooled(episodes)))
    value = 0.3 * oracles.loss(oracles.forward(learner.net, theta, union.x), union.y)
    expected = torch.autograd.grad(value, list(theta.values()))
    assert_close(list(outer_gradient(learner, episodes).values()), list(expected))


@each([("reptile", "classification"), ("reptile", "regression")])
def test_reptile_moves_to_the_mean_of_plain_loops(case):
    """R6 for several tasks: theta - mean of U(theta); with SGD of rate 1, theta becomes that mean."""
    learner, episodes = create(case), tasks_for(case)
    theta = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
    ends = [
        oracles.descend(learner.net, theta, Examples(x, y), 0.3, 2, list(theta), first_order=True)
        for x, y in zip(*pooled(episodes), strict=True)
    ]
    step(learner, meta_batch(episodes))
    means = {k: torch.stack([end[k] for end in ends]).mean(0) for k in theta}
    assert_close(dict(learner.net.named_parameters()), means)


@pytest.mark.parametrize("steps", [1, 3])
def test_reptile_rests_where_displacements_cancel(steps):
    """R3: at (sum_i M_i)^-1 sum_i M_i c_i with M_i = I - (I - alpha A_i)^k; with equal A, at the mean of the c_i."""
    a, c = forms(3, 2, seed=0)
    eye = torch.eye(2, dtype=torch.float64)
    for forms_a in (a, a[:1].expand(3, 2, 2)):
        m = eye - torch.linalg.matrix_power(eye - 0.2 * forms_a, steps)
        rest = torch.linalg.solve(m.sum(0), torch.einsum("bij,bj->i", m, c))
        task = quadratic(forms_a, c)
        learner = linear_form(Reptile, rest, inner_steps=steps, **PLAIN)
        assert_close(slope(learner, Episode(task, task, {})), torch.zeros(2, dtype=torch.float64))
    assert_close(rest, c.mean(0))


@each([case for case in CASES if case[0] == "reptile_serial"])
def test_serial_reptile_is_one_task_after_the_other(case):
    """R4: with one task it is the batched form, and with several as many meta-steps of one."""
    serial, batched = create(case), create(case, serial=False)
    batch = meta_batch(tasks_for(case))
    step(serial, batch)
    for i in range(batch.total):
        step(batched, select(batch, slice(i, i + 1)))
    assert_same_bits(bits(serial), bits(batched))


@pytest.mark.parametrize("state", ["carry", "reset"])
def test_inner_adam_is_that_of_torch(state):
    """beta1 = 0, over three tasks in turn (serial, epsilon = 1, so that each starts where the last one ended).

    Tolerance: epsilon = 1e-8 is added before the bias correction here (as in the authors' TensorFlow), after it in
    PyTorch, which changes a step by alpha 1e-8 sqrt(1000) / |g|.
    """
    a, c = forms(3, 2, seed=0)
    theta, task = normal(2, seed=5), quadratic(a, c)
    learner = linear_form(
        Reptile,
        theta,
        alpha=0.1,
        inner_steps=4,
        inner_optimizer="adam",
        inner_state=state,
        inner_batch=None,
        serial=True,
    )
    step(learner, meta_batch(Episode(task, task, {})))
    w = nn.Parameter(theta.clone())
    adam = torch.optim.Adam([w], lr=0.1, betas=(0.0, 0.999))
    for form, minimum in zip(a, c, strict=True):
        if state == "reset":
            adam = torch.optim.Adam([w], lr=0.1, betas=(0.0, 0.999))
        for _ in range(4):
            w.grad = form @ (w.detach() - minimum)
            adam.step()
    assert_close(learner.net.head.weight.detach()[0], w.detach(), rtol=1e-6)
    assert int(learner.taken) == (12 if state == "carry" else 0)


def test_tasks_of_a_batch_carry_the_mean_of_their_moments():
    """After one inner step from zero: (1 - beta2) times the mean over tasks of the squared gradients."""
    (a, c), theta = forms(3, 2, seed=0), normal(2, seed=5)
    task = quadratic(a, c)
    learner = linear_form(Reptile, theta, alpha=0.1, inner_steps=1, inner_batch=None)
    step(learner, meta_batch(Episode(task, task, {})))
    squares = torch.einsum("bij,bj->bi", a, theta - c).square()
    assert_close(learner.second_head_weight[0], 0.001 * squares.mean(0))
    assert int(learner.taken) == 1


def test_minibatches_go_through_whole_shuffles():
    """Seven batches of three of five examples: four and a bit shuffles, each holding every row once."""
    key = meta_batch(oracles.curves(6)).key
    rows = minibatches(key, n=5, size=3, count=7)
    assert rows.shape == (6, 7, 3)
    shuffles = rows.flatten(1)[:, :20].unflatten(1, (4, 5))
    assert torch.equal(shuffles.sort(-1).values, torch.arange(5).expand(6, 4, 5))
    assert len({tuple(order) for order in shuffles.flatten(0, 1).tolist()}) > 20  # of 120 orders, 24 drawn


def test_reptile_descends_its_minibatches():
    """Gradient steps on the drawn rows, in their order."""
    learner, episodes = create(("reptile", "regression"), test_inner_batch=2), oracles.curves()
    key = meta_batch(episodes).key
    end = learner.adapt(learner.theta(), episodes.support, steps=3, key=key)[-1]
    rows = minibatches(key.sub("minibatch"), n=5, size=2, count=3)
    for i in range(episodes.tasks):
        phi = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
        for row in rows[i]:
            task = Examples(episodes.support.x[i, row], episodes.support.y[i, row])
            phi = oracles.descend(learner.net, phi, task, 0.3, 1, list(phi), first_order=True)
        assert_close({k: p[i] for k, p in end.items()}, {k: p.detach() for k, p in phi.items()})
