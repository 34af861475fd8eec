"""HSML against limits, closed forms, library cells and plain loops (float64)."""

import math
from typing import Any

import oracles
import pytest
import torch
from oracles import assert_close, meta_batch, normal, outer_gradient
from table import GATED, create, outer_value
from torch import Tensor, nn

from metalearn.algorithms import HSML
from metalearn.algorithms.hsml import Tree
from metalearn.embedding import GRU, RecurrentAutoencoder, by_shot, picture_network
from metalearn.episode import Episode, Examples
from metalearn.random import Key

PICTURES, CURVES = ("hsml", "classification"), ("hsml", "regression")
both = pytest.mark.parametrize("case", [PICTURES, CURVES], ids="-".join)


def tasks_for(case: tuple[str, str], seed: int = 0) -> Episode:
    return oracles.pictures(seed=seed) if case == PICTURES else oracles.curves(seed=seed)


def params(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def drawn(module: nn.Module) -> nn.Module:
    """In double precision, with N(0, 1/4) parameters."""
    for i, p in enumerate(module.double().parameters()):
        p.data = normal(*p.shape, seed=200 + i) / 2
    return module


def embedded(learner: Any, support: Examples) -> Tensor:
    """g."""
    return learner.autoencoder(learner.theta()["autoencoder"], learner.embed(learner.theta(), support))[0].detach()


def permuted(support: Examples, order: list[int]) -> Examples:
    return Examples(support.x[:, order], support.y[:, order])


@both
def test_open_gates_are_maml(case):
    """H1: eta = 1 leaves MAML's gradient of theta, to the last bit of rounding."""
    learner, episodes = create(case, xi=0.0), tasks_for(case)
    learner.gates.weight.data.zero_()
    learner.gates.bias.data.fill_(1e3)
    maml = create(("maml", case[1]))
    maml.net.load_state_dict(learner.net.state_dict())
    grads = outer_gradient(learner, episodes)
    assert_close({k: g for k, g in grads.items() if k.startswith("net.")}, outer_gradient(maml, episodes))
    assert_close(outer_value(learner, episodes), outer_value(maml, episodes))


@both
def test_query_loss_is_that_of_gradient_steps_from_gated_parameters(case):
    """One task after the other; the outer objective adds xi L_r."""
    learner, episodes = create(case), tasks_for(case)
    start, error, _ = learner.start(learner.theta(), episodes.support)
    phi = learner.adapt(learner.theta(), episodes.support, steps=2)[-1]
    losses = []
    for i in range(episodes.tasks):
        support, query = (Examples(p.x[i], p.y[i]) for p in episodes[:2])
        own = {k: start[k][i] for k in learner.shapes}
        end = oracles.descend(learner.net, own, support, 0.3, 2, list(learner.shapes))
        assert_close({k: p[i] for k, p in phi.items()}, end)
        losses.append(oracles.loss(oracles.forward(learner.net, end, query.x), query.y))
    out = learner.task_loss(learner.theta(), episodes, meta_batch(episodes).key)
    assert_close(out.loss, torch.stack(losses) + 0.1 * error)
    assert_close(out.aux["reconstruction"], error.detach())


def test_gates_scale_each_entry():
    """theta * sigmoid(b) when the gates see nothing of the task; batch norm's are left alone where loops may not move
    them."""
    net = oracles.conv_net(bn_affine="beta", bn_affine_inner=False)
    learner, support = create(PICTURES, net), oracles.pictures().support
    learner.gates.weight.data.zero_()
    start = learner.start(learner.theta(), support)[0]
    eta = iter(torch.sigmoid(learner.gates.bias).split(learner.gates.sizes))
    for name, p in net.named_parameters():
        if ".norm." in name:
            assert start[name] is learner.theta()["net"][name]
        else:
            assert_close(start[name], (p * next(eta).view_as(p)).expand(4, *p.shape))


# ---- the tree ----------------------------------------------------------------------------------------------------


def plain_tree(p: dict[str, Tensor], g: Tensor, widths: list[int], s: float) -> Tensor:
    """The specification's formulas for one task, cluster by cluster."""
    near = torch.stack([torch.exp(-(g - mu).square().sum() / (2 * s)) for mu in p["centres"]])
    values = [near[c] / near.sum() * torch.tanh(g @ p["leaf_weight"][c] + p["leaf_bias"][c]) for c in range(widths[0])]
    for layer, parents in enumerate(widths[1:], 1):
        nodes = [torch.zeros_like(g) for _ in range(parents)]
        for value in values:
            weights = torch.ones(1, dtype=g.dtype)
            if parents > 1:
                v, b = p[f"assign_weight{layer}"], p[f"assign_bias{layer}"]
                weights = torch.softmax(torch.stack([value @ v[q] + b[q] for q in range(parents)]), 0)
            for q in range(parents):
                up = torch.tanh(value @ p[f"weight{layer}"][q] + p[f"bias{layer}"][q])
                nodes[q] = nodes[q] + weights[q] * up
        values = nodes
    return values[0]


@pytest.mark.parametrize("widths", [[4, 2, 1], [3, 1], [5, 3, 2, 1]])
def test_tree_is_the_plain_one(widths):
    tree, g = drawn(Tree(3, widths, 2.0)), normal(6, 3, seed=0)
    h, _ = tree(params(tree), g)
    assert_close(h, torch.stack([plain_tree(params(tree), one, widths, 2.0) for one in g]))


def test_trees_of_each_task_are_its_own():
    """Parameters with a task axis."""
    g, own = normal(3, 4, seed=0), [params(drawn(Tree(4, [3, 2, 1], 2.0))) for _ in range(3)]
    own = [{k: v * (i + 1) for k, v in p.items()} for i, p in enumerate(own)]
    tree = Tree(4, [3, 2, 1], 2.0)
    together, _ = tree({k: torch.stack([p[k] for p in own]) for k in own[0]}, g)
    assert_close(together, torch.stack([plain_tree(p, one, [3, 2, 1], 2.0) for p, one in zip(own, g, strict=True)]))


def test_assignments_sum_to_one():
    """H2; and a sharp leaf layer picks the nearest centre."""
    tree, g = drawn(Tree(3, [4, 2, 1], 2.0)), normal(6, 3, seed=0)
    for soft in tree(params(tree), g)[1]:
        assert_close(soft.sum(-1), torch.ones(soft.shape[:-1], dtype=torch.float64))
    tree.sigma = 1e-6
    nearest = torch.cdist(g, params(tree)["centres"]).argmin(1)
    assert_close(tree(params(tree), g)[1][0], nn.functional.one_hot(nearest, 4).double())


def test_one_leaf_and_one_node():
    """H3: three layers of tanh, wherever the centre is."""
    tree, g = drawn(Tree(3, [1, 1, 1], 2.0)), normal(6, 3, seed=0)
    p = params(tree)
    leaf = torch.tanh(g @ p["leaf_weight"][0] + p["leaf_bias"])
    node = torch.tanh(leaf @ p["weight1"][0] + p["bias1"])
    assert_close(tree(p, g)[0], torch.tanh(node @ p["weight2"][0] + p["bias2"]))
    assert_close(tree(p | {"centres": 5 + p["centres"]}, g)[0], tree(p, g)[0])


# ---- the task embedding ------------------------------------------------------------------------------------------


def test_order_of_the_support_set():
    """H4: matters with `rnn`, does not with `mean`; whole classes may be stored in any order."""
    for encoder, moves in (("rnn", True), ("mean", False)):
        for case, order in ((CURVES, [1, 0, 2, 4, 3]), (PICTURES, [1, 0, 2, 3, 4, 5])):
            learner, support = create(case, encoder=encoder, hidden=4, example_widths=[3]), tasks_for(case).support
            change = (embedded(learner, permuted(support, order)) - embedded(learner, support)).abs().max()
            assert change > 1e-3 if moves else change < oracles.ROUNDING
    learner, support = create(PICTURES), oracles.pictures().support
    assert_close(embedded(learner, permuted(support, [4, 5, 0, 1, 2, 3])), embedded(learner, support))


def test_examples_come_shot_by_shot():
    """As the authors': all classes once, then again; classes of unequal size too. Curves keep their order."""
    y = torch.tensor([[0, 0, 0, 1, 2, 2], [2, 0, 1, 1, 0, 0]])
    x = torch.arange(6.0).expand(2, 6).unsqueeze(-1)
    ordered = by_shot(Examples(x, y), 3)
    assert ordered.y.tolist() == [[0, 1, 2, 0, 2, 0], [0, 1, 2, 0, 1, 0]]
    assert ordered.x.squeeze(-1).tolist() == [[0, 3, 4, 1, 5, 2], [1, 2, 0, 4, 3, 5]]
    support = oracles.curves().support
    assert by_shot(support, 1) is support


def test_examples_that_the_embedding_does_not_see():
    """`embedded=3` of three classes: the first example of each."""
    learner, support = create(PICTURES, embedded=3), oracles.pictures().support
    x = support.x.clone()
    x[:, 1::2] += 1.0
    assert_close(embedded(learner, Examples(x, support.y)), embedded(learner, support))
    x[:, 4] += 1.0
    assert (embedded(learner, Examples(x, support.y)) - embedded(learner, support)).abs().max() > 1e-3


def test_labels_are_part_of_an_example():
    """One-hot beside the picture's embedding, the number beside x."""
    learner, support = create(PICTURES), oracles.pictures().support
    z = learner.embed(learner.theta(), support).detach()
    assert_close(z[..., -3:], torch.eye(3, dtype=torch.float64).repeat(2, 1).expand(4, 6, 3))
    learner, support = create(CURVES), oracles.curves().support
    theta = learner.theta()["examples"]
    pairs = torch.cat([support.x, support.y], -1)
    assert_close(learner.embed(learner.theta(), support), pairs @ theta["fc1.weight"].mT + theta["fc1.bias"])


def test_gru_is_the_librarys_where_they_agree():
    """The library resets after the matrix product, which is the same for a diagonal matrix."""
    gru, library, x = drawn(GRU(3, 4)), nn.GRU(3, 4, batch_first=True).double(), normal(2, 5, 3, seed=0)
    p = params(gru)
    p["candidate_weight"][:, 3:] = torch.diag(normal(4, seed=1))
    weight = torch.cat([p["gates_weight"], p["candidate_weight"]])
    library.load_state_dict(
        {
            "weight_ih_l0": weight[:, :3],
            "weight_hh_l0": weight[:, 3:],
            "bias_ih_l0": torch.cat([p["gates_bias"], p["candidate_bias"]]),
            "bias_hh_l0": torch.zeros(12, dtype=torch.float64),
        }
    )
    assert_close(gru(p, x), library(x)[0].detach())


def test_gru_without_gates_is_a_recurrent_network():
    """r = 1, u = 0: resets before the product are not at issue."""
    gru, library, x = drawn(GRU(3, 4)), nn.RNN(3, 4, batch_first=True).double(), normal(2, 5, 3, seed=0)
    p = params(gru)
    p["gates_weight"].zero_()
    p["gates_bias"] = torch.tensor([1e3] * 4 + [-1e3] * 4, dtype=torch.float64)
    w = p["candidate_weight"]
    states = {"weight_ih_l0": w[:, :3], "weight_hh_l0": w[:, 3:], "bias_ih_l0": p["candidate_bias"]}
    library.load_state_dict(states | {"bias_hh_l0": torch.zeros(4, dtype=torch.float64)})
    assert_close(gru(p, x), library(x)[0].detach())


def test_autoencoder_gives_the_sequence_back_from_its_end():
    """g is the mean of the states; the decoder starts at the last one, reads its own outputs, and is reversed."""
    auto, z = drawn(RecurrentAutoencoder(2, 3)), normal(4, 5, 2, seed=0)
    p = params(auto)
    g, error = auto(p, z)
    cell, readout = (
        {k.removeprefix(f"{n}."): v for k, v in p.items() if k.startswith(n)} for n in ("decoder", "readout")
    )
    states = auto.encoder({k.removeprefix("encoder."): v for k, v in p.items()}, z)
    h, given, out = states[:, -1:], torch.zeros(4, 1, 2, dtype=torch.float64), []
    for _ in range(5):
        h = auto.decoder.step(cell, given, h)
        given = h @ readout["weight"].mT + readout["bias"]
        out.append(given)
    assert_close(g, states.mean(1))
    assert_close(error, (z - torch.cat(out, 1).flip(1)).square().mean((1, 2)))


@pytest.mark.parametrize("encoder", ["rnn", "mean"])
@both
def test_reconstruction_teaches_the_autoencoder_alone(case, encoder):
    """H5: L_r has no gradient in the network, the tree and the gates; all of the autoencoder has one."""
    learner, episodes = create(case, encoder=encoder, hidden=4, example_widths=[3]), tasks_for(case)
    error = learner.start(learner.theta(), episodes.support)[1]
    grads = torch.autograd.grad(error.sum(), list(learner.parameters()), materialize_grads=True)
    reached = {name for (name, _), g in zip(learner.named_parameters(), grads, strict=True) if g.any()}
    own = {n for n, _ in learner.named_parameters() if n.startswith(("autoencoder", "examples"))}
    assert reached == {n for n in own if ".pool." not in n}  # what makes g of the code is not reconstructed


@pytest.mark.parametrize("case", [PICTURES, CURVES], ids="-".join)
def test_the_mean_encoder_learns(case):
    """G1 for encoder=mean."""
    episodes = oracles.pictures(2, side=1) if case == PICTURES else oracles.curves(2)
    learner = create(case, oracles.mlp(3 if case == PICTURES else 1), encoder="mean", hidden=4, example_widths=[3])
    grads = list(outer_gradient(learner, episodes).values())
    actual, slopes = oracles.slopes_along(lambda: outer_value(learner, episodes), list(learner.parameters()), grads)
    assert oracles.distance([actual], [slopes]) < 1e-6


@both
def test_queries_do_not_enter_the_adaptation(case):
    learner, episodes = create(case), tasks_for(case)
    ends = []
    for query in (episodes.query, tasks_for(case, seed=5).query):
        out = learner.task_loss(learner.theta(), Episode(episodes.support, query, {}), meta_batch(episodes).key)
        ends.append((out.phi, out.aux))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


# ---- pictures ----------------------------------------------------------------------------------------------------


def test_local_response_normalisation():
    """b_c = a_c / (1 + 0.001 / 9 sum of a^2 over nine neighbouring channels)^0.75, then 3x3 maxima."""
    net = drawn(picture_network((1, 6, 6), 12, [4]))
    p, x = params(net), 10 * normal(1, 2, 1, 6, 6, seed=0)
    a = torch.relu(nn.functional.conv2d(x[0], p["conv1.weight"], padding=2))
    pooled = nn.functional.max_pool2d(a, 3, 2, 1)
    expected = torch.empty_like(pooled)
    for c in range(12):
        near = pooled[:, max(0, c - 4) : c + 5].square().sum(1)
        expected[:, c] = pooled[:, c] / (1 + 1e-3 / 9 * near) ** 0.75
    assert_close(net.run(p, x, stop="conv1")[0], expected)
    assert float((expected - pooled).abs().max()) > 1e-3


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 84, 84)])
def test_pictures_of_all_sizes(shape):
    """The published widths; a quarter of the side is left, rounded up."""
    net = picture_network(shape, 32, [384, 64])
    assert net.stage("conv2").shape == (32, shape[1] // 4, shape[2] // 4)
    net.reset(Key(0, "init"))
    z = net.run(net_params := params(net), torch.rand(1, 2, *shape))
    assert z.shape == (1, 2, 64) and z.std() > 0
    assert net_params["fc1.weight"].shape == (384, 32 * (shape[1] // 4) ** 2)


def test_initial_gates():
    """Half of every weight, or 0.88 of it with gate_bias=2, about; each tensor's map has the range of its own size."""
    for bias, kept in ((0.0, 0.5), (2.0, 0.88)):
        learner = HSML(net=oracles.conv_net(), kind="classification", **{**GATED, "hidden": 8, "gate_bias": bias})
        learner.initialize(0)
        assert bool((learner.gates.bias == bias).all())
        for block, n in zip(learner.gates.weight.split(learner.gates.sizes), learner.gates.sizes, strict=True):
            bound = math.sqrt(6 / (16 + n))
            assert 0.8 * bound < block.abs().max() <= bound
        start = learner.start(learner.theta(), oracles.pictures().to(torch.float32).support)[0]
        weight = learner.net.block2.conv.weight
        assert abs(float((start["block2.conv.weight"] / weight).mean().detach()) - kept) < 0.03


def test_every_part_is_drawn_from_the_seed():
    learners = [HSML(net=oracles.mlp(), kind="regression", **GATED) for _ in range(3)]
    for learner, seed in zip(learners, (0, 0, 1), strict=True):
        learner.initialize(seed)
    for name, p in learners[0].named_parameters():
        same, other = (dict(learner.named_parameters())[name] for learner in learners[1:])
        assert torch.equal(p, same)
        assert torch.equal(p, other) == (name.endswith("bias") and not name.startswith(("net", "tree")))
