"""T-net and MT-net against closed forms, their limits and plain loops with T as a layer of its own (float64)."""

from typing import Any

import oracles
import pytest
import torch
from oracles import VALUES, assert_close, meta_batch, normal, outer_gradient
from table import Case, create, each, tasks_for
from torch import Tensor, nn

from metalearn.algorithms import MTNet, TNet
from metalearn.algorithms.tnet import mask, transformed
from metalearn.backbones import MLP, Conv4, Module
from metalearn.episode import Episode, Examples
from metalearn.learner import MetaLearner
from metalearn.random import Key, TaskKey
from metalearn.schema import BadInput

BOTH: list[Case] = [("tnet", "classification"), ("tnet", "regression")]
MASKED: list[Case] = [("mtnet", "classification"), ("mtnet", "regression")]
ALWAYS = 1e3  # a logit that no draw overcomes: 53 bits reach 37


def fill(parameters: nn.Module, value: Any) -> None:
    with torch.no_grad():
        for p in parameters.parameters():
            p.copy_(torch.eye(len(p)) if value == "eye" else torch.full_like(p, value))


def net_grads(learner: MetaLearner, episodes: Episode) -> dict[str, Tensor]:
    return {k: g for k, g in outer_gradient(learner, episodes).items() if k.startswith("net.")}


def plain(learner: Any, episodes: Episode) -> dict[str, Tensor]:
    """The outer gradient by loops over tasks and steps, with T (and, for MT-net, masked steps) written out."""
    theta = {k: p.detach().requires_grad_() for k, p in learner.named_parameters()}
    net = {k.removeprefix("net."): p for k, p in theta.items() if k.startswith("net.")}
    weights = {stage: kernel.weight for stage, kernel in learner.kernels.items()}
    net |= {f"{stage}.transform": theta[f"transforms.{weight}"] for stage, weight in weights.items()}
    moving, key = [k for k in net if not k.endswith(".transform")], meta_batch(episodes).key
    moving = [k for k in moving if learner.moves(k)]
    losses = []
    for i in range(episodes.tasks):
        support, query = (Examples(part.x[i], part.y[i]) for part in episodes[:2])
        phi, rate = dict(net), dict.fromkeys(moving, torch.tensor(learner.alpha, dtype=torch.float64))
        for name in moving if hasattr(learner, "zeta") else ():
            weight = weights[name.split(".")[0]]
            zeta = theta[f"zeta.{weight}"]
            two = torch.stack(
                [zeta + key.select(slice(i, i + 1)).sub(f"mask/{weight}").logistic(len(zeta))[0], 0 * zeta]
            )
            soft = two.softmax(0)[0]
            m = soft + ((two[0] > two[1]).double() - soft).detach()
            rate[name] = learner.alpha * m.view(-1, *[1] * (net[name].dim() - 1))
        for _ in range(learner.inner_steps):
            value = oracles.loss(oracles.forward(learner.net, phi, support.x), support.y)
            grads = torch.autograd.grad(value, [phi[k] for k in moving], create_graph=not learner.first_order)
            phi |= {k: phi[k] - rate[k] * g for k, g in zip(moving, grads, strict=True)}
        losses.append(oracles.loss(oracles.forward(learner.net, phi, query.x), query.y))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()), materialize_grads=True)
    return dict(zip(theta, grads, strict=True))


@each(BOTH + MASKED)
@pytest.mark.parametrize(
    "options", [{}, {"first_order": True}, {"inner_steps": 0}, {"recompute": True}, {"adapted": "head"}], ids=str
)
def test_outer_gradient_is_that_of_plain_loops(case, options):
    """In theta, T and zeta; also where T is reached by the query's forward pass alone (no steps, first order)."""
    learner, episodes = create(case, **options), tasks_for(case)
    grads = outer_gradient(learner, episodes)
    assert_close(grads, plain(learner, episodes), rtol=1e-11)  # gradients of up to 1e3 sum terms of both signs
    assert all(bool(g.any()) for k, g in grads.items() if k.startswith("transforms."))


@each(BOTH)
@pytest.mark.parametrize("options", [{}, {"inner_steps": 0}, {"adapted": "head"}, {"first_order": True}], ids=str)
def test_with_identities_it_is_maml(case, options):
    """T1, and G4 without steps."""
    learner, maml, episodes = create(case, **options), create(("maml", case[1]), **options), tasks_for(case)
    fill(learner.transforms, "eye")
    assert_close(net_grads(learner, episodes), net_grads(maml, episodes))


def test_linear_fixture():
    """T2, numbers of the specification; the mean over two outputs halves the sum's gradient, so alpha is doubled."""
    f = {k: v if isinstance(v, str) else torch.tensor(v, dtype=torch.float64) for k, v in VALUES["tnet_linear"].items()}
    net = MLP(input_shape=(2,), outputs=2, hidden=[])
    learner = oracles.build(TNet, net, "regression", alpha=2 * float(f["alpha"]), inner_steps=1)
    with torch.no_grad():
        net.head.weight.copy_(f["W"])
        net.head.bias.zero_()
        learner.transforms.head.weight.copy_(f["T"])
    phi = learner.adapt(learner.theta(), Examples(f["x"][None, None], f["y"][None, None]), steps=1)[-1]
    assert_close(phi["head.weight"][0], f["W_after"])
    assert_close(f["T"] @ phi["head.weight"][0], f["effective_A_after"])


def test_a_step_moves_the_product_by_the_metric():
    """T2: A = T W moves by -alpha T T^t dL/dA."""
    net, episodes = MLP(input_shape=(2,), outputs=3, hidden=[]), oracles.curves()
    y = normal(*episodes.support.y.shape[:2], 3, seed=9)
    learner = oracles.build(TNet, net, "regression", alpha=0.3, inner_steps=1)
    t, w, b = (p.detach() for p in (learner.transforms.head.weight, net.head.weight, net.head.bias))
    phi = learner.adapt(learner.theta(), Examples(episodes.support.x, y), steps=1)[-1]["head.weight"]
    for i in range(episodes.tasks):
        a = (t @ w).requires_grad_()
        (g,) = torch.autograd.grad(oracles.loss(episodes.support.x[i] @ a.mT + t @ b, y[i]), a)
        assert_close(t @ phi[i] - a.detach(), -0.3 * t @ t.mT @ g)


@each(MASKED)
def test_masks_of_ones_and_of_zeros(case):
    """T3: all rows, T-net; no rows, no adaptation."""
    learner, tnet, episodes = create(case), create(("tnet", case[1])), tasks_for(case)
    for value, options in ((ALWAYS, {}), (-ALWAYS, {"inner_steps": 0})):
        fill(learner.zeta, value)
        expected = create(("tnet", case[1]), **options)
        ours = outer_gradient(learner, episodes)
        theirs = outer_gradient(expected, episodes)
        assert_close({k: ours[k] for k in theirs}, theirs)
    phi = learner.adapt(learner.theta(), episodes.support, steps=2, key=meta_batch(episodes).key)
    assert all(torch.equal(phi[0][k], phi[2][k]) for k in phi[0])
    assert phi[0].keys() == tnet.adapt(tnet.theta(), episodes.support, steps=0)[0].keys()


@each(MASKED)
def test_a_task_has_one_mask_a_layer(case):
    """The same rows of W, b and batch norm's parameters move at every step and in every chunk."""
    learner, episodes = create(case), tasks_for(case)
    key = meta_batch(episodes).key
    phi = learner.adapt(learner.theta(), episodes.support, steps=3, key=key)
    rows = {k: [(end[k] != p).reshape(*p.shape[:2], -1).any(-1) for end in phi[1:]] for k, p in phi[0].items()}
    for stage, (weight, _) in learner.kernels.items():
        m = mask(learner.zeta.get_parameter(weight).detach(), key.sub(f"mask/{weight}")).bool()
        for name in learner.net.stage(stage).uses - {f"{stage}.conv.bias"}:  # which batch norm keeps from moving
            assert all(torch.equal(moved, m) for moved in rows[name])
    alone = learner.adapt(learner.theta(), episodes.select(slice(2, 3)).support, steps=3, key=key.select(slice(2, 3)))
    assert_close(alone[-1], {k: p[2:3] for k, p in phi[-1].items()})
    first = next(iter(rows))
    assert len({tuple(moved.tolist()) for moved in rows[first][0]}) > 1  # other rows in other tasks


def test_masks_are_bernoulli_and_pass_gradients_straight_through():
    """P(m = 1) = sigmoid(zeta) within four standard errors of 20,000 tasks; the gradient is that of the soft mask."""
    tasks = 20_000
    key = TaskKey(Key(0, "mask"), torch.zeros(tasks, dtype=torch.int64), torch.arange(tasks))
    zeta = torch.tensor([-1.5, 0.0, 0.7], dtype=torch.float64, requires_grad=True)
    m = mask(zeta, key)
    assert set(m.unique().tolist()) == {0.0, 1.0}
    p = zeta.sigmoid().detach()
    assert bool(((m.mean(0) - p).abs() < 4 * (p * (1 - p) / tasks).sqrt()).all())
    soft = torch.sigmoid(zeta + key.logistic(3))
    weights = normal(tasks, 3, seed=0)
    assert_close(*(torch.autograd.grad((weights * v).sum(), zeta)[0] for v in (m, soft)))


def test_masks_need_coordinates():
    learner, episodes = create(MASKED[1]), tasks_for(MASKED[1])
    with pytest.raises(ValueError, match="adapt needs the tasks' key"):
        learner.adapt(learner.theta(), episodes.support, steps=1)


@pytest.mark.parametrize("tasks", [None, 4])
@pytest.mark.parametrize("per_task_t", [False, True])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4, 4)])
def test_transformed_is_the_product(tasks, per_task_t, shape):
    """Whatever axes T and W have, and in the memory order of the convolutions: rows innermost."""
    w = normal(*([] if tasks is None else [tasks]), *shape, seed=0)
    t = normal(*([tasks] if tasks and per_task_t else []), 3, 3, seed=1)
    out = transformed(t, w, torch.Size(shape))
    full = torch.einsum("bop,bpx->box", t.expand(tasks or 1, 3, 3), w.reshape(tasks or 1, 3, -1)).reshape(w.shape)
    assert_close(out, full)
    assert len(shape) < 4 or out.stride(0 if tasks is None else 1) == 1


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_number_of_parameters():
    """T4: of the sinusoid's network 1,761 + 40^2 + 40^2 + 1; MT-net has a logit for each row besides."""
    for cls, extra in ((TNet, 0), (MTNet, 81)):
        learner = cls(net=MLP(input_shape=(1,), outputs=1, hidden=[40, 40]), kind="regression", alpha=0.01)
        assert count(learner) == 4_962 + extra
        learner.initialize(seed=0)
        assert all(torch.equal(t, torch.eye(len(t))) for t in learner.transforms.parameters())
        assert extra == 0 or not any(bool(z.any()) for z in learner.zeta.parameters())


def test_reports_the_probability_of_adaptation():
    learner = create(MASKED[1])
    fill(learner.zeta, 0.0)
    assert learner.reports() == {"adapted_rows": 0.5}


def with_norm(*, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """What `Conv4` of two blocks is, without the convolutions' bias."""
    blocks = [
        [nn.Conv2d(i, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)]
        for i in (input_shape[0], 3)
    ]
    return nn.Sequential(*blocks[0], *blocks[1], nn.Flatten(), nn.Linear(3, outputs))


def uncovered(*, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.GELU(), nn.Linear(4, outputs))


def test_a_users_chain_of_layers_is_transformed_too():
    """It gives what the same network of ours gives; anything else is refused."""
    theirs = Module(input_shape=(2, 6, 6), outputs=3, factory="test_tnet:with_norm")
    ours = Conv4(input_shape=(2, 6, 6), outputs=3, width=3, blocks=2, conv_bias=False)
    grads = []
    for net in (theirs, ours):
        learner = oracles.build(TNet, net, "classification", alpha=0.3, inner_steps=2)
        assert count(learner.transforms) == 3 * 9
        grads.append(list(outer_gradient(learner, oracles.pictures()).values()))
    assert_close(*grads)
    plain_path = Module(input_shape=(2, 6, 6), outputs=3, factory="test_tnet:uncovered")
    with pytest.raises(BadInput, match=r"algorithm=tnet, mtnet: every stage .* and stage 'head' is something else"):
        TNet(net=plain_path, kind="classification", alpha=0.3)
