"""Gradient agreement against its closed forms (float64)."""

import oracles
import pytest
import torch
from oracles import VALUES, assert_close, build, meta_batch, normal, outer_gradient
from table import STEPS, bits, create, each, regularizer, select, step, tasks_for
from torch import Tensor

from metalearn.algorithms import MAML, ProtoNet, Reptile
from metalearn.cells import expand
from metalearn.episode import Episode, Examples
from metalearn.learner import Diverged
from metalearn.meta_gradient import meta_gradient
from metalearn.outer import Agreement, agreement
from metalearn.schema import BadInput

PAIRS = [("gradient_agreement", "maml"), ("reptile_agreement", "reptile")]


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", VALUES["gradient_agreement_weights"])
def test_fixture(fixture):
    """GA3 among others: numbers of the specification."""
    g = rows(*fixture["g"])
    w = agreement(g)
    assert_close(w, rows(fixture["w"])[0])
    if "combined" in fixture:
        assert_close(w @ g, rows(fixture["combined"])[0])


@pytest.mark.parametrize("seed", range(5))
def test_identities(seed):
    """GA1 sum |w| = 1, GA4 scale and rotation, GA7 permutation, GA8 the combined step agrees with the sum."""
    g, order = normal(6, 4, seed=seed), torch.tensor([3, 1, 5, 0, 2, 4])
    w, rotation = agreement(g), torch.linalg.qr(normal(4, 4, seed=seed + 50))[0]
    assert_close(w.abs().sum(), torch.ones((), dtype=torch.float64))
    for other in (-3.0 * g, 1e-9 * g, g @ rotation):
        assert_close(agreement(other), w)
    assert_close(agreement(g[order]), w[order])
    s = g @ g.sum(0)
    assert_close(w @ s, s.square().sum() / s.abs().sum())
    assert float((w @ g) @ g.sum(0)) >= 0


def test_the_weights_minimise_the_quadratic():
    """GA5: argmin over w of -sum_ij w_i g_i g_j + mu/2 |w|^2 with mu = sum |s|."""
    g = normal(5, 3, seed=1)
    s, w = g @ g.sum(0), agreement(g).requires_grad_()
    value = -(w[:, None] * (g @ g.mT)).sum() + s.abs().sum() / 2 * w.square().sum()
    assert_close(torch.autograd.grad(value, w)[0], torch.zeros(5, dtype=torch.float64))


def test_equal_and_single_tasks():
    """GA2: w = 1/N; GA6: w = 1."""
    v = normal(1, 3, seed=0)
    assert_close(agreement(v.expand(4, 3)), torch.full((4,), 0.25, dtype=torch.float64))
    assert_close(agreement(v), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("g", [rows([1.0, 2.0], [-1.0, -2.0]), torch.zeros(3, 2, dtype=torch.float64)])
def test_without_a_direction_all_weights_are_zero(g):
    assert torch.equal(agreement(g), torch.zeros(len(g), dtype=torch.float64))


def test_clipping_bounds_the_norms_by_the_median():
    """Norms 1, 1, 2, 100 and 0: the median of those above zero is 1.5 (nanmedian takes the lower, 1)."""
    g = rows([1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 100.0], [0.0, 0.0])
    clipped = rows([1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.0])
    assert_close(agreement(g, clip=3.0), agreement(clipped))
    assert_close(agreement(g, clip=1000.0), agreement(g))


def test_reports():
    said = Agreement().reports(rows([0.2, 0.2, 0.2, -0.4])[0])
    assert said["agreement_negative"] == 0.25 and said["agreement_sum"] == pytest.approx(0.2)
    entropy = -(3 * 0.2 * torch.tensor(0.2).log() + 0.4 * torch.tensor(0.4).log())
    assert said["agreement_entropy"] == pytest.approx(float(entropy))
    assert Agreement().reports(torch.full((8,), 0.125))["agreement_entropy"] == pytest.approx(
        float(torch.tensor(8.0).log())
    )


# ---- the outer update --------------------------------------------------------------------------------------------


def displacements(learner: MAML | Reptile, episodes: Episode) -> Tensor:
    """theta - phi_i by plain loops over the tasks, `[B, P]`."""
    theta = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
    found = []
    for i in range(episodes.tasks):
        parts = [Examples(part.x[i], part.y[i]) for part in episodes[:2]]
        task = Examples(*(torch.cat(p) for p in zip(*parts, strict=True))) if isinstance(learner, Reptile) else parts[0]
        phi = oracles.descend(learner.net, theta, task, 0.3, 2, list(theta), first_order=True)
        found.append(torch.cat([(theta[k] - phi[k]).detach().flatten() for k in theta]))
    return torch.stack(found)


@pytest.mark.parametrize("vector", ["displacement", "meta_grad"])
@pytest.mark.parametrize("first_order", [False, True])
@each([("gradient_agreement", "classification"), ("gradient_agreement", "regression")])
def test_weighted_maml(case, vector, first_order):
    """GA-MAML: the gradient of sum_i w_i L_i(phi_i) with w detached (Eshratifar et al. 2018, Algorithm 1, line 9)."""
    learner = create(case, first_order=first_order, combine=Agreement(vector=vector))
    plain, batch = create(("maml", case[1]), first_order=first_order), meta_batch(tasks_for(case))
    alone = [meta_gradient(plain, select(batch, slice(i, i + 1))).grads for i in range(batch.total)]
    stacked = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in alone])
    w = agreement(displacements(learner, batch.episodes) if vector == "displacement" else stacked)
    result = meta_gradient(learner, batch)
    assert_close(torch.cat([g.flatten() for g in result.grads]), w @ stacked)
    assert_close(result.aux["weight"], w)


@each([("reptile_agreement", "classification"), ("reptile_agreement", "regression")])
def test_weighted_reptile(case):
    """GA-Reptile: theta <- theta + epsilon sum_i w_i (phi_i - theta), here with epsilon 1."""
    learner, episodes = create(case), tasks_for(case)
    before, g = torch.cat([p.detach().flatten() for p in learner.parameters()]), displacements(learner, episodes)
    step(learner, meta_batch(episodes))
    after = torch.cat([p.detach().flatten() for p in learner.parameters()])
    assert_close(after, before - agreement(g) @ g)


@pytest.mark.parametrize("name, host", PAIRS)
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_equal_tasks_make_it_the_host(name, host, kind):
    """GA2: with B copies of a task all weights are 1/B."""
    episodes = tasks_for((name, kind)).select(torch.zeros(4, dtype=torch.int64))
    assert_close(outer_gradient(create((name, kind)), episodes), outer_gradient(create((host, kind)), episodes))


@pytest.mark.parametrize("cls, arguments", [(ProtoNet, {}), (MAML, {**STEPS, "adapted": "head"})])
def test_anything_with_task_gradients_can_agree(cls, arguments):
    """Prototypical networks and ANIL, by their outer gradients."""
    net = oracles.conv_net(3 if cls.needs_head else 0)
    learner, plain = (
        build(cls, net, "classification", **arguments, combine=c) for c in (Agreement(vector="meta_grad"), None)
    )
    batch = meta_batch(oracles.pictures(5))
    alone = [meta_gradient(plain, select(batch, slice(i, i + 1))).grads for i in range(5)]
    stacked = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in alone])
    assert_close(torch.cat([g.flatten() for g in meta_gradient(learner, batch).grads]), agreement(stacked) @ stacked)


def test_one_task_at_a_time_where_theta_takes_no_task_axis(monkeypatch):
    """The slow way to the tasks' gradients gives what the fast one gives."""
    learner, batch = create(("gradient_agreement", "classification")), meta_batch(oracles.pictures(5))
    fast = meta_gradient(learner, batch)
    monkeypatch.setattr(MAML, "stacks", False)
    assert_close(meta_gradient(learner, batch), fast)


def test_the_regularizers_hook_comes_first():
    """Weights are those of the gradients that the hook leaves."""
    hook = regularizer(task_gradients=lambda grads: {k: g.flip(0) for k, g in grads.items()})
    rule = Agreement(vector="meta_grad")
    episodes = oracles.curves(4)
    a, b = (create(("gradient_agreement", "regression"), combine=rule, regularizer=r) for r in (None, hook))
    one, other = (meta_gradient(learner, meta_batch(episodes)) for learner in (a, b))
    assert_close(one.grads, other.grads)
    assert_close(one.aux["weight"], other.aux["weight"].flip(0))


# ---- what can go wrong -------------------------------------------------------------------------------------------


def test_cancelling_tasks_update_nothing():
    """Two tasks whose displacements are opposite: no step, no change of the optimizer's state."""
    w, x = torch.zeros(2, dtype=torch.float64), normal(1, 3, 2, seed=0)
    y = x @ rows([1.0], [2.0])
    learner = oracles.linear_form(MAML, w, alpha=0.1, inner_steps=1, combine=Agreement())
    task = Examples(torch.cat([x, x]), torch.cat([y, -y]))
    before = bits(learner)
    result = step(learner, meta_batch(Episode(task, task, {})))
    assert not result.aux["weight"].any() and learner.meta_steps == 1
    torch.testing.assert_close(bits(learner), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gradient_agreement", "reptile_agreement"])
def test_a_bad_task_stops_the_run_or_is_left_out(name):
    """Left out, the others' step is that of a batch without it; if none is left, the run stops."""
    case, others = (name, "classification"), torch.tensor([0, 1, 3, 4])
    batch = meta_batch(tasks_for(case))
    batch.episodes.support.x[2] = torch.nan
    with pytest.raises(Diverged, match="task 2 is not finite"):
        step(create(case), batch)
    learner, without = (create(case, combine=Agreement(drop=True)) for _ in range(2))
    step(learner, batch)
    step(without, select(batch, others))
    torch.testing.assert_close(bits(learner), bits(without), rtol=1e-12, atol=1e-12)
    assert learner.reports()["agreement_zero"] == 0.2
    batch.episodes.support.x[:] = torch.nan
    with pytest.raises(Diverged, match="tasks? 0"):
        step(learner, batch)


def test_a_coupled_objective_has_no_task_gradients():
    penalty = regularizer(penalty=lambda learner, theta, episodes, out: out.loss.square().sum())
    with pytest.raises(ValueError, match="Agreement needs an outer objective that is a mean over tasks"):
        create(("gradient_agreement", "regression"), regularizer=penalty)


def test_weights_are_constants():
    """No gradient runs through them, and the outer gradient has no graph."""
    result = meta_gradient(create(("gradient_agreement", "regression")), meta_batch(oracles.curves(4)))
    assert not any(t.requires_grad for t in (*result.grads, result.aux["weight"]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("algorithm=maml algorithm.outer_vector=meta_grad", "algorithm.outer_vector=meta_grad: needs algorithm.outer="),
        ("algorithm=maml algorithm.outer_drop=true", "algorithm.outer_drop=True: needs algorithm.outer=agreement"),
        ("algorithm=protonet algorithm.outer=agreement", "protonet adapts no parameters of the network; use meta_grad"),
        ("algorithm=gradient_agreement trainer.devices=2", "trainer.devices=2: must be 1 with algorithm.outer=agreem"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(BadInput, match=message):
        expand(arguments.split())
