"""Batch-norm modes against loops over single queries, and running averages against torch.nn.BatchNorm2d."""

from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import assert_close, forward, meta_batch, normal
from torch import Tensor, nn

from metalearn.algorithms import MAML, ProtoNet
from metalearn.bn import MODES, RunningStatistics, task_mean
from metalearn.episode import Examples
from metalearn.learner import MetaLearner
from metalearn.ops import Normalization

NETS: dict[str, dict[str, Any]] = {
    "pool": {},
    "stride": {"downsample": "stride", "readout": "mean"},
    "beta": {"bn_affine": "beta", "conv_bias": False},
    "fixed": {"bn_affine": "none", "bn_affine_inner": False, "width": 1},
}


def trained(cls: type[MetaLearner], net: str, **arguments: Any) -> MetaLearner:
    """A learner whose running averages come from one meta-step."""
    outputs = 3 if cls.needs_head else 0
    learner = oracles.build(cls, oracles.conv_net(outputs, **NETS[net]), "classification", **arguments)
    learner.meta_step(meta_batch(oracles.pictures(seed=1)), learner.configure_optimizers())
    return learner


def given(learner: MetaLearner) -> dict[str, tuple[Tensor, Tensor]]:
    return {layer: (m.mean, m.var) for layer, m in learner.running.statistics().items()}


def outputs(learner: MetaLearner, params: dict[str, Tensor], s: Tensor, q: Tensor, bn: str) -> Tensor:
    """Outputs for the queries of one task, in the words of the modes' definitions."""
    if bn == "support_plus_one":
        return torch.cat([forward(learner.net, params, torch.cat([s, x[None]]))[-1:] for x in q])
    statistics = given(learner) if bn == "running" else {}
    if bn == "support_only":
        forward(learner.net, params, s, seen=statistics)
    return forward(learner.net, params, q, given=statistics)


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("net", NETS)
def test_predictions_are_those_of_single_queries(net, bn):
    learner, episodes = trained(MAML, net, alpha=0.3, inner_steps=1), oracles.pictures()
    phi = learner.adapt(learner.theta(), episodes.support, steps=2)[-1]
    actual = learner.predict(learner.theta(), phi, episodes.query.x, support=episodes.support, bn=bn)
    for i in range(episodes.tasks):
        params = learner.theta()["net"] | {k: p[i] for k, p in phi.items()}
        assert_close(actual[i], outputs(learner, params, episodes.support.x[i], episodes.query.x[i], bn))


def similarity(learner: MetaLearner, s: Examples, q: Tensor, bn: str) -> Tensor:
    """Minus squared distances of queries to class means, all embedded in one pass."""
    net, params, statistics = learner.net, learner.theta()["net"], given(learner) if bn == "running" else {}
    if bn == "support_only":
        forward(net, params, s.x, seen=statistics)
    z = forward(net, params, torch.cat([s.x, q]), given=statistics)
    centres = torch.stack([z[: len(s.y)][s.y == c].mean(0) for c in range(3)])
    return -(z[len(s.y) :, None] - centres).square().sum(-1)


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("net", NETS)
def test_prototypes_share_the_normalisation_of_their_queries(net, bn):
    learner, episodes = trained(ProtoNet, net), oracles.pictures()
    y = torch.stack([y.roll(i) for i, y in enumerate(episodes.support.y)])  # another order of the labels in each task
    support = Examples(episodes.support.x, y)
    actual = learner.predict(learner.theta(), {}, episodes.query.x, support=support, bn=bn)
    for i in range(episodes.tasks):
        s, q = Examples(support.x[i], y[i]), episodes.query.x[i]
        sets = q[:, None] if bn == "support_plus_one" else [q]
        assert_close(actual[i], torch.cat([similarity(learner, s, x, bn) for x in sets]))


def test_running_averages_are_those_of_torch():
    """Mean over tasks of what one torch.nn.BatchNorm2d a task keeps; the first step sets them, then momentum 0.1."""
    net = oracles.conv_net(blocks=1)
    running, params = RunningStatistics(net).double(), {k: normal(*s, seed=0) for k, s in net.shapes().items()}
    layers = [nn.BatchNorm2d(3, momentum=1.0).double() for _ in range(4)]
    for s in range(4):
        x, norm = oracles.pictures(seed=s).query.x, Normalization(record=True)
        net.run(params, x, norm=norm)
        running.absorb(task_mean(norm.seen))
        for layer, task in zip(layers, x, strict=True):
            layer(F.conv2d(task, params["block1.conv.weight"], params["block1.conv.bias"], padding=1))
            layer.momentum = 0.1
        mean, var, _ = running.statistics()["block1.norm"]
        assert_close(mean, torch.stack([layer.running_mean for layer in layers]).mean(0))
        assert_close(var, torch.stack([layer.running_var for layer in layers]).mean(0))


def test_training_absorbs_the_query_pass():
    """Of the adapted parameters before the outer update, over all chunks of tasks."""
    net = oracles.conv_net()
    learner = oracles.build(MAML, net, "classification", alpha=0.3, inner_steps=2, chunk_bytes=1)
    episodes, seen = oracles.pictures(), []
    theta = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    for i in range(episodes.tasks):
        support, (x, _) = (Examples(part.x[i], part.y[i]) for part in episodes[:2])
        seen.append({})
        forward(net, oracles.descend(net, theta, support, 0.3, 2, list(theta), True), x, seen=seen[-1])
    learner.meta_step(meta_batch(episodes), learner.configure_optimizers())
    for layer, n in (("block1.norm", 6 * 6 * 6), ("block2.norm", 6 * 3 * 3)):
        mean, var = (torch.stack(values).mean(0).detach() for values in zip(*(s[layer] for s in seen), strict=True))
        assert_close(given(learner)[layer], (mean, var * n / (n - 1)))
