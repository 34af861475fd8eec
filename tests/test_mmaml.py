"""MMAML against limits, symmetries and plain loops (float64)."""

from itertools import pairwise
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import assert_close, meta_batch, outer_gradient
from table import MODULATED, create, every_score, outer_value
from torch import Tensor, nn

from metalearn.algorithms import MMAML
from metalearn.backbones import Conv4, Module
from metalearn.backbones.conv4 import Block
from metalearn.episode import Episode, Examples
from metalearn.meta_gradient import meta_gradient
from metalearn.schema import BadInput

PICTURES, CURVES = ("mmaml", "classification"), ("mmaml", "regression")
both = pytest.mark.parametrize("case", [PICTURES, CURVES], ids="-".join)
NETS = {
    "non-affine": {"bn_affine": "none"},
    "offset": {"bn_affine": "beta", "bn_affine_inner": False},
    "affine": {"bn_affine": "full", "downsample": "stride", "readout": "mean"},
    "growing": {"bn_affine": "none", "growth": 2},
    "no norm": {"bn": False},
    "no bias": {"bn": False, "conv_bias": False},
}
Params = dict[str, Tensor]


def tasks_for(case: tuple[str, str], seed: int = 0) -> Episode:
    return oracles.pictures(seed=seed) if case == PICTURES else oracles.curves(seed=seed)


def forward(net: Any, params: Params, x: Tensor) -> Tensor:
    """One task's outputs, FiLM written out before every non-linearity."""
    for name in net.stages:
        stage, own = net.stage(name), {k.removeprefix(f"{name}."): p for k, p in params.items() if k.startswith(name)}
        film = (
            (1 + params[f"film.{name}.gamma"], params[f"film.{name}.beta"])
            if name[0] in "bh" and name != "head"
            else None
        )
        if isinstance(stage, Block):
            x = F.conv2d(x, own["conv.weight"], own.get("conv.bias"), stage.stride, padding=1)
            if stage.normalizes:
                x = F.batch_norm(x, None, None, own.get("norm.weight"), own.get("norm.bias"), True, eps=stage.eps)
            x = F.relu(film[0][:, None, None] * x + film[1][:, None, None])
            x = x if stage.stride == 2 else F.max_pool2d(x, 2)
        elif name == "feat":
            x = x.mean((2, 3)) if getattr(stage, "kind", "") == "mean" else x.flatten(1)
        else:
            x = F.linear(x, own["weight"], own["bias"])
            x = x if film is None else torch.tanh(film[0] * x + film[1])
    return x


def plain(learner: MMAML, episodes: Episode) -> tuple[Tensor, list[Tensor]]:
    """Query losses and the outer gradient, one task and one step after the other."""
    theta, losses = {k: p for k, p in learner.net.named_parameters()}, []
    tau = learner.modulation(learner.theta(), episodes.support)
    for i in range(episodes.tasks):
        support, query = (Examples(p.x[i], p.y[i]) for p in episodes[:2])
        phi = theta | {k: p[i] for k, p in tau.items()}
        moving = [k for k in theta if learner.net.adapts(k)]
        for _ in range(2):
            value = oracles.loss(forward(learner.net, phi, support.x), support.y)
            grads = torch.autograd.grad(value, [phi[k] for k in moving], create_graph=True)
            bound = learner.inner_clip or torch.inf
            phi = phi | {k: phi[k] - 0.3 * g.clamp(-bound, bound) for k, g in zip(moving, grads, strict=True)}
        losses.append(oracles.loss(forward(learner.net, phi, query.x), query.y))
    value = torch.stack(losses)
    return value.detach(), list(torch.autograd.grad(value.mean(), list(learner.parameters()), materialize_grads=True))


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("net", [*NETS, "mlp"])
def test_folding_is_film(net, clip):
    """In every kind of layer: losses and gradients of a plain loop with FiLM after the affine map."""
    case = CURVES if net == "mlp" else PICTURES
    learner = create(case, None if net == "mlp" else oracles.conv_net(**NETS[net]), inner_clip=clip)
    result, (losses, grads) = meta_gradient(learner, meta_batch(tasks_for(case))), plain(learner, tasks_for(case))
    assert_close(result.loss, losses)
    # entries of some 1e-3 beside others of some 10: rounding of the whole vector
    assert oracles.distance(result.grads, grads) < 1e-11


def test_inner_gradients_are_bounded():
    """By as much as the table's rows have."""
    learner, support = create(PICTURES), oracles.pictures().support
    trajectory = learner.adapt(learner.theta(), support, steps=2)
    moved = torch.cat([((a[k] - b[k]) / 0.3).flatten() for a, b in pairwise(trajectory) for k in learner.net.shapes()])
    assert (
        float(moved.detach().abs().max()) == pytest.approx(0.01) and 0.1 < (moved.abs() > 0.00999).double().mean() < 0.9
    )


@both
def test_silent_heads_are_maml(case):
    """MM1: gamma = beta = 0; non-affine batch norm in the convolutional network."""
    net = oracles.conv_net(bn_affine="none") if case == PICTURES else oracles.mlp()
    learner, episodes = create(case, net), tasks_for(case)
    for p in learner.heads.parameters():
        p.data.zero_()
    maml = create(("maml", case[1]), net, inner_clip=0.01)
    maml.net.load_state_dict(net.state_dict())
    grads = outer_gradient(learner, episodes)
    assert_close({k: g for k, g in grads.items() if k.startswith("net.")}, outer_gradient(maml, episodes))
    assert_close(every_score(learner, meta_batch(episodes)), every_score(maml, meta_batch(episodes)))


@both
def test_order_of_the_support_set(case):
    """MM2: the mean over examples has none; recurrent networks do."""
    support = tasks_for(case).support
    order = torch.randperm(support.x.shape[1], generator=oracles.generator(0))
    for encoder, moves in (("mean", False), ("rnn", True)):
        learner = create(case, encoder=encoder)
        e, other = (
            learner.embed(learner.theta(), s) for s in (support, Examples(support.x[:, order], support.y[:, order]))
        )
        change = float((e - other).detach().abs().max())
        assert change > 1e-3 if moves else change < oracles.ROUNDING


def test_labels_matter_for_vectors_alone():
    """The authors' embedding of pictures does not see labels."""
    for case, moves in ((PICTURES, False), (CURVES, True)):
        learner, support = create(case), tasks_for(case).support
        e, other = (learner.embed(learner.theta(), s) for s in (support, Examples(support.x, support.y + 1)))
        assert bool((e != other).any()) == moves


@both
def test_modulation_is_computed_once(case):
    """MM3: the inner loop moves the network's parameters, from theta, and leaves tau as it is."""
    learner, support = create(case), tasks_for(case).support
    theta = learner.theta()
    tau, trajectory = learner.modulation(theta, support), learner.adapt(theta, support, steps=3)
    for phi in trajectory:
        assert phi.keys() == theta["net"].keys() | tau.keys()
        torch.testing.assert_close({k: phi[k] for k in tau}, tau, rtol=0, atol=0)
    assert_close({k: trajectory[0][k][0] for k in theta["net"]}, dict(theta["net"]))
    assert tau.keys() == {f"film.{s}.{what}" for s in learner.net.stages[:2] for what in ("gamma", "beta")}


@both
def test_first_order_teaches_the_modulation(case):
    """MM4: through the query loss; what it learns is not the same as with second order."""
    grads = [outer_gradient(create(case, first_order=f), tasks_for(case)) for f in (True, False)]
    first, exact = ([g for k, g in part.items() if k.startswith(("examples", "heads"))] for part in grads)
    assert all(
        bool(g.any()) for k, g in grads[0].items() if k.startswith(("examples", "heads")) and "conv.bias" not in k
    )
    assert oracles.distance(first, exact) > 1e-2


@both
def test_the_recurrent_encoder_learns(case):
    """G1 for encoder=rnn; the last states of both directions are used."""
    episodes = oracles.pictures(2, side=3) if case == PICTURES else oracles.curves(2)
    net = oracles.mlp() if case == CURVES else oracles.conv_net(input_shape=(2, 3, 3), blocks=1)
    learner = create(case, net, encoder="rnn", inner_clip=None)
    grads = outer_gradient(learner, episodes)
    assert all(bool(g.any()) for k, g in grads.items() if "conv.bias" not in k)
    actual, slopes = oracles.slopes_along(
        lambda: outer_value(learner, episodes), list(learner.parameters()), list(grads.values()), directions=1
    )
    assert oracles.distance([actual], [slopes]) < 1e-6


@both
def test_queries_do_not_enter_the_adaptation(case):
    learner, episodes = create(case), tasks_for(case)
    ends = []
    for query in (episodes.query, tasks_for(case, seed=5).query):
        out = learner.task_loss(learner.theta(), Episode(episodes.support, query, {}), meta_batch(episodes).key)
        ends.append(out.phi)
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_the_authors_networks():
    """Filters double in both networks; 128 numbers of a task make 2 (32 + 64 + 128 + 256) of FiLM."""
    net = Conv4(
        input_shape=(1, 28, 28), outputs=5, width=32, growth=2, downsample="stride", readout="mean", bn_affine="none"
    )
    learner = MMAML(net=net, kind="classification", alpha=0.05)
    for part in (learner.net, learner.examples):
        assert [part.stage(f"block{i + 1}").shape for i in range(4)] == [
            (32, 14, 14),
            (64, 7, 7),
            (128, 4, 4),
            (256, 2, 2),
        ]
    assert learner.heads.weight.shape == (960, 128)
    assert sum(p.numel() for p in net.parameters()) == 389_125


# ---- networks of the user's own ----------------------------------------------------------------------------------


def chain(input_shape: Any, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3, affine=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(27, 4, bias=False),
        nn.Tanh(),
        nn.Linear(4, outputs),
    )


class Opaque(nn.Module):
    def __init__(self, input_shape: Any, outputs: int):
        super().__init__()
        self.layer = nn.Linear(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sin()


def test_a_users_chain_is_modulated():
    """Batch norm and linear maps without parameters of these names included; finite differences."""
    net = Module(input_shape=(2, 6, 6), outputs=3, factory="test_mmaml:chain")
    learner, episodes = create(PICTURES, net, inner_clip=None), oracles.pictures(2)
    assert sorted(learner.film.values()) == [3, 3, 4, 4]
    grads = list(outer_gradient(learner, episodes).values())
    actual, slopes = oracles.slopes_along(lambda: outer_value(learner, episodes), list(learner.parameters()), grads)
    assert oracles.distance([actual], [slopes]) < 1e-6


def test_a_network_without_known_layers_is_refused(recwarn):
    net = Module(input_shape=(2,), outputs=1, factory="test_mmaml:Opaque")
    with pytest.raises(BadInput, match="algorithm=mmaml: needs a backbone whose hidden layers are known"):
        MMAML(net=net, kind="regression", **MODULATED)
