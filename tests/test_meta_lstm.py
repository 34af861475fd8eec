"""Meta-LSTM against plain loops over torch's own LSTM cell, and gradient descent (float64)."""

import math
from typing import Any

import oracles
import pytest
import torch
from oracles import VALUES, Tree, assert_close, build, meta_batch, normal, outer_gradient
from peak import Peak
from table import create, tasks_for
from torch import Tensor, nn

from metalearn.algorithms import MAML, MetaLSTM
from metalearn.algorithms.meta_lstm import State, preprocess, update
from metalearn.algorithms.pools import minibatches
from metalearn.episode import Episode, Examples
from metalearn.meta_gradient import meta_gradient

Case = tuple[str, str]
BOTH = pytest.mark.parametrize("kind", ["classification", "regression"])


def as_descent(learner: MetaLSTM, alpha: float) -> MetaLSTM:
    """The same learner with gates that are 1 (to rounding) and alpha whatever they see."""
    with torch.no_grad():
        for parameter in learner.cell.parameters():
            parameter.zero_()
        learner.get_parameter("cell.gates.bias").copy_(
            torch.tensor([60.0, math.log(alpha / (1 - alpha))], dtype=torch.float64)
        )
    return learner


# ---- a plain loop ------------------------------------------------------------------------------------------------


def plain_features(x: Tensor) -> Tensor:
    rows = [
        [math.log(abs(v)) / 10, math.copysign(1, v)] if abs(v) >= math.exp(-10) else [-1.0, math.exp(10) * v]
        for v in x.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def plain_tasks(learner: MetaLSTM, episodes: Episode, rows: Any = None) -> tuple[list[Tree], list[Tensor], list[Tree]]:
    """One task after the other: theta's leaves by full name, query losses, and each task's final parameters.

    `rows` are those of the minibatches, `[B, T, m]`.
    """
    theta = {k: p.detach().clone().requires_grad_() for k, p in learner.named_parameters()}
    net = {k.removeprefix("net."): p for k, p in theta.items() if k.startswith("net.")}
    moving = [k for k in net if learner.net.adapts(k)]
    lstm = nn.LSTMCell(4, learner.hidden).double()
    weights = {
        "weight_ih": theta["cell.lstm.weight"][:, :4],
        "weight_hh": theta["cell.lstm.weight"][:, 4:],
        "bias_ih": theta["cell.lstm.bias"],
        "bias_hh": torch.zeros_like(theta["cell.lstm.bias"]),
    }

    def leaves(c: Tensor) -> Tree:
        parts = c.split([net[k].numel() for k in moving])
        return {k: part.view(net[k].shape) for k, part in zip(moving, parts, strict=True)}

    losses, ends = [], []
    for i in range(episodes.tasks):
        c = torch.cat([net[k].flatten() for k in moving])
        f = e = torch.zeros_like(c)
        state = None
        for t in range(learner.inner_steps):
            part = slice(None) if rows is None else rows[i, t]
            x, y = episodes.support.x[i][part], episodes.support.y[i][part]
            at = {k: p.detach().requires_grad_() for k, p in leaves(c).items()}
            value = oracles.loss(oracles.forward(learner.net, net | at, x), y)
            g = torch.cat([v.flatten() for v in torch.autograd.grad(value, list(at.values()), materialize_grads=True)])
            g = g / len(x) if learner.divide_grad_by_batch else g
            seen = plain_features(value.detach()[None]).expand(len(c), 2)
            state = torch.func.functional_call(lstm, weights, (torch.cat([seen, plain_features(g)], 1), state))
            w, b = theta["cell.gates.weight"], theta["cell.gates.bias"]
            f = torch.cat([state[0], c[:, None], f[:, None]], 1) @ w[0] + b[0]
            e = torch.cat([state[0], c[:, None], e[:, None]], 1) @ w[1] + b[1]
            c = torch.sigmoid(f) * c - torch.sigmoid(e) * g
        ends.append(net | leaves(c))
        query = episodes.query
        losses.append(oracles.loss(oracles.forward(learner.net, ends[-1], query.x[i]), query.y[i]))
    return theta, losses, ends


@BOTH
@pytest.mark.parametrize(
    "changes",
    [{}, {"inner_batch": 3}, {"divide_grad_by_batch": True}, {"recompute": True}, {"chunk_bytes": 1}],
    ids=lambda c: "-".join(c) or "plain",
)
def test_outer_gradient_is_that_of_a_plain_loop(kind, changes):
    """In c_0 and in every parameter of the cell."""
    case = ("meta_lstm", kind)
    learner, episodes = create(case, inner_steps=4, **changes), tasks_for(case, 3)
    batch = meta_batch(episodes)
    rows = None
    if learner.inner_batch:
        rows = minibatches(batch.key.sub("minibatch"), episodes.support.y.shape[1], 3, 4)
    theta, losses, _ = plain_tasks(learner, episodes, rows)
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()), materialize_grads=True)
    result = meta_gradient(learner, batch)
    assert_close(result.loss, torch.stack(losses).detach())
    assert_close(result.grads, list(expected))


def test_what_inner_loops_may_not_move_is_learned_all_the_same():
    """Batch norm's affine map with bn_affine_inner=false: no coordinate of the optimizer, and a direct gradient."""
    net = oracles.conv_net(bn_affine_inner=False)
    learner, episodes = build(MetaLSTM, net, "classification", inner_steps=3, hidden=3), oracles.pictures(2)
    theta, losses, _ = plain_tasks(learner, episodes)
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()), materialize_grads=True)
    assert_close(list(outer_gradient(learner, episodes).values()), list(expected))
    assert expected[list(theta).index("net.block1.norm.weight")].any()


# ---- what it reduces to ------------------------------------------------------------------------------------------


@BOTH
def test_constant_gates_are_gradient_descent(kind):
    """ML1; and ML3, since the optimizer's gradients are constants: the derivative in c_0 is that of first order."""
    case = ("meta_lstm", kind)
    episodes = tasks_for(case)
    learner, maml = as_descent(create(case, inner_steps=3), 0.3), create(("fomaml", kind), inner_steps=3)
    ours, theirs = (one.adapt(one.theta(), episodes.support, steps=3) for one in (learner, maml))
    assert_close([{k: phi[k] for k in maml.shapes} for phi in ours], theirs)
    grads = outer_gradient(learner, episodes)
    assert_close({k: grads[k] for k in outer_gradient(maml, episodes)}, outer_gradient(maml, episodes))


def test_constant_gates_descend_their_minibatches():
    """In the order in which they are drawn; divided by their size on demand."""
    episodes = oracles.curves()
    key = meta_batch(episodes).key
    rows = minibatches(key.sub("minibatch"), n=5, size=2, count=3)
    for divided in (False, True):
        changes: dict[str, Any] = {"inner_batch": 2, "divide_grad_by_batch": divided}
        learner = as_descent(create(("meta_lstm", "regression"), **changes), 0.3)
        end = learner.adapt(learner.theta(), episodes.support, steps=3, key=key)[-1]
        for i in range(episodes.tasks):
            phi = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
            for row in rows[i]:
                task = Examples(episodes.support.x[i, row], episodes.support.y[i, row])
                phi = oracles.descend(learner.net, phi, task, 0.15 if divided else 0.3, 1, list(phi), first_order=True)
            assert_close({k: p[i] for k, p in end.items()}, {k: p.detach() for k, p in phi.items()})


def test_preprocessing():
    """ML2: the fixture; at e^-p both branches give (-1, sign)."""
    fixture = VALUES["meta_lstm_preprocess_p10"]
    x = torch.tensor([case["x"] for case in fixture], dtype=torch.float64)
    assert_close(torch.stack(preprocess(x), -1), torch.tensor([case["out"] for case in fixture], dtype=torch.float64))
    edge = torch.tensor([-1.0, 1.0], dtype=torch.float64) * math.exp(-10)
    for beside in (edge * (1 - 1e-9), edge * (1 + 1e-9)):
        assert_close(preprocess(beside), (-torch.ones(2).double(), edge.sign()), rtol=1e-8)
    assert all(part.isnan().all() for part in preprocess(torch.tensor([math.nan])))


def test_coordinates_are_exchangeable():
    """ML4: permuting them permutes the update, and a coordinate's depends on no other."""
    learner = create(("meta_lstm", "regression"))
    cell = {k: p.detach() for k, p in learner.theta()["cell"].items()}
    c, g, features = normal(2, 7, seed=0), normal(2, 7, seed=1), normal(2, 4, 7, seed=2)
    state = State(normal(2, 3, 7, seed=3), normal(2, 3, 7, seed=4), normal(2, 2, 7, seed=5))
    whole, order = update(cell, c, g, features, state), torch.tensor([3, 0, 6, 1, 2, 5, 4])
    mixed = update(cell, c[:, order], g[:, order], features[..., order], State(*(s[..., order] for s in state)))
    assert_close(mixed[0], whole[0][:, order])
    assert_close(tuple(mixed[1]), tuple(s[..., order] for s in whole[1]))


def test_it_starts_near_gradient_descent():
    """Weights U(-0.01, 0.01), b_F ~ U(4, 6), b_I ~ U(-5, -4); another seed draws others."""
    learner = MetaLSTM(net=oracles.mlp(), kind="regression", inner_steps=1)
    found = []
    for seed in (0, 1):
        learner.initialize(seed)
        cell = {k: p.detach().clone() for k, p in learner.cell.named_parameters()}
        forget, enter = cell.pop("gates.bias").tolist()
        assert 4 <= forget <= 6 and -5 <= enter <= -4
        flat = torch.cat([p.flatten() for p in cell.values()])
        assert 0.0095 < float(flat.abs().max()) <= 0.01 and abs(float(flat.mean())) < 0.001
        found.append(flat)
    assert not torch.equal(*found)


# ---- batch norm --------------------------------------------------------------------------------------------------


def test_running_mode_uses_the_episodes_own_averages():
    """Of the support statistics at c_0, ..., c_{T-1}, as torch's batch norm keeps them, from 0 and 1 on."""
    learner, episodes = create(("meta_lstm", "classification"), bn_momentum=0.7), oracles.pictures()
    theta = learner.theta()
    trajectory = learner.adapt(theta, episodes.support, steps=3)
    pixels = {"block1.norm": 36, "block2.norm": 9}
    for i in range(episodes.tasks):
        averages: dict[str, tuple[Tensor, Tensor]] = {}
        for phi in trajectory:
            given = averages or {k: (torch.zeros(3).double(), torch.ones(3).double()) for k in pixels}
            own = {k: phi[k][i].detach() for k in learner.net.names}
            actual = learner.predict(theta, phi, episodes.query.x, support=episodes.support, bn="running")[i]
            assert_close(actual.detach(), oracles.forward(learner.net, own, episodes.query.x[i], given=given))
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            oracles.forward(learner.net, own, episodes.support.x[i], seen=seen)
            averages = {}
            for layer, (mean, var) in seen.items():
                n = len(episodes.support.x[i]) * pixels[layer]
                averages[layer] = (
                    0.3 * given[layer][0] + 0.7 * mean,
                    0.3 * given[layer][1] + 0.7 * var * n / (n - 1),
                )


def test_running_mode_does_not_depend_on_meta_training():
    learner, episodes = create(("meta_lstm", "classification")), oracles.pictures()
    phi = learner.adapt(learner.theta(), episodes.support, steps=2)[-1]

    def predict() -> Tensor:
        return learner.predict(learner.theta(), phi, episodes.query.x, support=episodes.support, bn="running").detach()

    before = predict()
    for name, buffer in learner.running.named_buffers():
        if name != "steps":
            buffer.add_(1.0)
    torch.testing.assert_close(predict(), before, rtol=0, atol=0)


# ---- memory ------------------------------------------------------------------------------------------------------


def peak(steps: int, **changes: Any) -> int:
    net = oracles.mlp(hidden=[40, 40])
    learner = build(MetaLSTM, net, "regression", inner_steps=steps, **changes)
    with Peak() as mode:
        meta_gradient(learner, meta_batch(oracles.curves(1)))
    return mode.bytes


@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_count_what_the_optimizer_keeps(recompute):
    """The estimate of a task's memory is right within a fifth: it is nearly all the optimizer's, not activations."""
    for steps in (1, 2, 6):
        learner = MetaLSTM(net=oracles.mlp(hidden=[40, 40]), kind="regression", inner_steps=steps, recompute=recompute)
        estimate = learner.double().task_bytes(oracles.curves(1))
        assert 0.8 < estimate / peak(steps, recompute=recompute) < 1.2
    assert peak(6, recompute=True) < 0.6 * peak(6)


def test_it_is_maml_neither_in_rate_nor_in_order():
    """A guard against a cell that is not used: its gradient is not zero, and phi is no plain descent's."""
    episodes = oracles.curves()
    learner, maml = create(("meta_lstm", "regression")), build(MAML, oracles.mlp(), "regression", alpha=0.3)
    ours, theirs = (one.adapt(one.theta(), episodes.support, steps=2)[-1] for one in (learner, maml))
    assert oracles.distance([ours[k] for k in maml.shapes], list(theirs.values())) > 1e-2
