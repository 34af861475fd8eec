"""MAML, FOMAML and ANIL against closed forms (float64)."""

import math

import oracles
import pytest
import torch
from oracles import (
    INPUTS,
    QUADRATIC,
    VALUES,
    assert_close,
    forms,
    linear_form,
    meta_batch,
    normal,
    outer_gradient,
    quadratic,
    slope,
)
from table import Case, create, outer_value, tasks_for
from torch import Tensor

from metalearn.algorithms import MAML, Reptile
from metalearn.algorithms.pools import pooled
from metalearn.cells import expand
from metalearn.episode import Episode, Examples
from metalearn.functional import per_task, unrolled
from metalearn.identity import identity
from metalearn.schema import BadInput


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_quadratic_fixture(steps):
    """Numbers of the specification for MAML (M1), FOMAML (F2) and Reptile on the support set alone (R3)."""
    i, expected = INPUTS, {k: torch.tensor(v, dtype=torch.float64) for k, v in QUADRATIC[f"k={steps}"].items()}
    support = quadratic(i["A_support_hessian"][None], i["c_support"][None])
    episodes = Episode(support, quadratic(i["D_query_hessian"][None], i["c_query"][None]), {})
    arguments = {"alpha": float(i["alpha"]), "inner_steps": steps}
    maml, fomaml = (linear_form(MAML, i["theta"], first_order=f, **arguments) for f in (False, True))
    assert_close(maml.adapt(maml.theta(), support, steps=steps)[-1]["head.weight"][0, 0], expected["phi"])
    assert_close(outer_value(maml, episodes), expected["query_loss"])
    assert_close(slope(maml, episodes), expected["maml_grad"])
    assert_close(slope(fomaml, episodes), expected["fomaml_grad"])
    reptile = linear_form(Reptile, i["theta"], inner_optimizer="sgd", inner_batch=None, **arguments)
    both = Episode(support, support, {})  # the pool's mean loss is that of the support set
    assert_close(slope(reptile, both) / i["alpha"], expected["reptile_grad_support_only"])


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_outer_gradient_of_quadratics(steps, first_order):
    """M1, F2: phi = c + (I - alpha A)^k (theta - c), gradient = mean over tasks of (I - alpha A)^k D (phi - c')."""
    (a, c), (d, c_query), theta = forms(5, 3, seed=0), forms(5, 3, seed=2), normal(3, seed=4)
    learner = linear_form(MAML, theta, alpha=0.2, inner_steps=steps, first_order=first_order)
    power = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - 0.2 * a, steps)
    phi = c + torch.einsum("bij,bj->bi", power, theta - c)
    grads = torch.einsum("bij,bj->bi", d, phi - c_query)
    expected = grads if first_order else torch.einsum("bij,bj->bi", power, grads)
    assert_close(slope(learner, Episode(quadratic(a, c), quadratic(d, c_query), {})), expected.mean(0))


@pytest.mark.parametrize("alpha", ["0.05", "0.1"])
def test_linear_regression_is_minimal_at_the_closed_form(alpha):
    """M2: the fixture's minimiser of the empirical objective, support = query, without noise."""
    fixture = VALUES["linear_maml"]
    x, a = (torch.tensor(fixture["inputs"][k], dtype=torch.float64) for k in ("Phi", "a"))
    examples = Examples(x, x @ a.unsqueeze(-1))
    w = torch.tensor(fixture["w_maml"][alpha], dtype=torch.float64)
    learner = linear_form(MAML, w, alpha=float(alpha), inner_steps=1)
    episodes = Episode(examples, examples, {})
    assert_close(slope(learner, episodes), torch.zeros(2, dtype=torch.float64))
    assert_close(outer_value(learner, episodes), torch.tensor(fixture["risk_at_minimiser"][alpha], dtype=torch.float64))


class Linear(MAML):
    """A loss without curvature."""

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction * y).flatten(1).mean(1)


def test_without_curvature_first_order_is_exact():
    """M3, F1."""
    episodes, theta = oracles.curves(inputs=3), normal(3, seed=0)
    exact, first = (
        slope(linear_form(Linear, theta, alpha=0.3, inner_steps=3, first_order=f), episodes) for f in (False, True)
    )
    assert_close(first, exact)
    assert_close(exact, (episodes.query.x * episodes.query.y).mean((0, 1)))


def test_one_step_on_the_query_set_itself():
    """M4: k = 1, S = Q: (I - alpha H(theta)) grad L(phi)."""
    support = oracles.curves(1).support
    learner = create(("maml", "regression"), inner_steps=1)
    theta = [p.detach() for p in learner.net.parameters()]

    def value(*params: Tensor) -> Tensor:
        return oracles.loss(
            oracles.forward(learner.net, dict(zip(learner.shapes, params, strict=True)), support.x[0]), support.y[0]
        )

    first = torch.autograd.functional.jacobian(value, tuple(theta))
    at_phi = torch.autograd.functional.jacobian(value, tuple(p - 0.3 * g for p, g in zip(theta, first, strict=True)))
    curved = torch.autograd.functional.hvp(value, tuple(theta), at_phi)[1]
    expected = [g - 0.3 * h for g, h in zip(at_phi, curved, strict=True)]
    assert_close(list(outer_gradient(learner, Episode(support, support, {})).values()), expected)


class Cosh(MAML):
    """Cosh of the error."""

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        return torch.cosh(prediction - y).flatten(1).mean(1)


def test_scalar_with_cosh_loss():
    """M5, two steps: d phi / d theta is the product of 1 - alpha cosh(phi_j - c)."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    theta, c, c_query, alpha = 0.4, -0.2, 0.7, 0.3
    learner = linear_form(Cosh, torch.tensor([theta], dtype=torch.float64), alpha=alpha, inner_steps=2)
    phi, chain = theta, 1.0
    for _ in range(2):
        phi, chain = phi - alpha * math.sinh(phi - c), chain * (1 - alpha * math.cosh(phi - c))
    episodes = Episode(Examples(one, c * one), Examples(one, c_query * one), {})
    assert slope(learner, episodes).item() == pytest.approx(chain * math.sinh(phi - c_query), rel=oracles.ROUNDING)


def test_anil_is_maml_with_rates_zero_in_the_body():
    """A1, by differentiation through all steps of all parameters."""
    learner, episodes = create(("anil", "classification")), oracles.pictures()
    theta = learner.theta()["net"]
    rates = {k: 0.3 if k.startswith("head") else 0.0 for k in theta}

    def support_loss(phi: dict[str, Tensor], support: Examples) -> Tensor:
        return learner.loss(learner.net.run(phi, support.x), support.y)

    phi = unrolled(support_loss, per_task(theta, 4, learner.shapes), episodes.support, rates, 2)[-1]
    objective = learner.loss(learner.net.run(phi, episodes.query.x), episodes.query.y).mean()
    expected = torch.autograd.grad(objective, list(theta.values()), materialize_grads=True)
    assert_close(list(outer_gradient(learner, episodes).values()), list(expected))


def test_anil_of_one_layer_is_maml():
    """A2."""
    episodes, grads = oracles.curves(), []
    for name in ("anil", "maml"):
        grads.append(outer_gradient(create((name, "regression"), oracles.mlp(hidden=())), episodes))
    assert_close(*grads)


def test_sum_over_shots_is_a_step_times_the_way():
    """The loss of Finn et al.'s code: its alpha is way times smaller than that of the mean."""
    episodes = oracles.pictures(way=3)
    ends = []
    for alpha, reduction in ((0.1, "sum_over_shots"), (0.3, "mean")):
        learner = create(("maml", "classification"), alpha=alpha, inner_loss_reduction=reduction)
        ends.append(list(outer_gradient(learner, episodes).values()))
    assert_close(*ends)


# ---- minibatches -------------------------------------------------------------------------------------------------


FIRST: Case = ("fomaml", "regression")
POOL = {"variant": "last_minibatch", "minibatch": None}


def whole(episodes: Episode) -> Episode:
    """Support and query sets, both the pool."""
    return Episode(pooled(episodes), pooled(episodes), {})


@pytest.mark.parametrize("name", ["maml", "fomaml", "meta_sgd", "tnet", "mtnet", "anil"])
def test_on_whole_sets_the_variants_are_fewer_steps(name):
    """k whole pools are k - 1 steps and the outer gradient on the pool; `tail` is k - 1 steps on the support set."""
    for kind in ("classification", "regression"):
        case, episodes = (name, kind), tasks_for((name, kind))
        last = outer_gradient(create(case, inner_steps=3, **POOL), episodes)
        assert_close(last, outer_gradient(create(case, inner_steps=2), whole(episodes)))
        tail = outer_gradient(create(case, inner_steps=3, variant="tail"), episodes)
        assert_close(tail, outer_gradient(create(case, inner_steps=2), episodes))


def test_one_minibatch_is_joint_training():
    """k = 1: the gradient at theta, of the pool (which is ERM's, and Reptile's after one step) or of the query set."""
    episodes = oracles.curves()
    last = outer_gradient(create(FIRST, inner_steps=1, **POOL), episodes)
    assert_close(last, outer_gradient(create(("erm", "regression")), episodes))
    reptile = outer_gradient(create(("reptile", "regression"), alpha=0.3, inner_steps=1), episodes)
    assert_close({k: 0.3 * g for k, g in last.items()}, reptile)
    tail = outer_gradient(create(FIRST, inner_steps=1, variant="tail", minibatch=4), episodes)
    assert_close(tail, outer_gradient(create(("maml", "regression"), alpha=0.0), episodes))


@pytest.mark.parametrize("k", [2, 5])
def test_the_last_minibatch_is_what_reptile_adds_with_it(k):
    """F4: g_k = (U_(k-1) - U_k) / alpha, on the same draws."""
    episodes = oracles.curves()
    reptile, fomaml = {"inner_batch": 4}, {"variant": "last_minibatch", "minibatch": 4}
    ends = [
        outer_gradient(create(("reptile", "regression"), alpha=0.05, inner_steps=steps, **reptile), episodes)
        for steps in (k - 1, k)
    ]
    last = outer_gradient(create(FIRST, alpha=0.05, inner_steps=k, **fomaml), episodes)
    assert_close({name: (ends[1][name] - ends[0][name]) / 0.05 for name in last}, last, rtol=1e-11)


def test_the_tail_is_reserved():
    """No inner step sees the query set."""
    episodes, other = oracles.curves(), oracles.curves(seed=5)
    learner = create(FIRST, inner_steps=4, variant="tail", minibatch=2)
    phi = [
        learner.task_loss(learner.theta(), Episode(episodes.support, query, {}), meta_batch(episodes).key).phi
        for query in (episodes.query, other.query)
    ]
    assert_close(*phi)
    moved = learner.task_loss(learner.theta(), other, meta_batch(other).key).phi
    assert oracles.distance(list(moved.values()), list(phi[0].values())) > 1e-3


def test_minibatches_need_coordinates_and_plain_steps():
    learner, episodes = create(FIRST, variant="tail", minibatch=2), oracles.curves()
    with pytest.raises(ValueError, match="variant=tail draws minibatches: task_loss needs the tasks' key"):
        learner.task_loss(learner.theta(), episodes)
    with pytest.raises(BadInput, match="algorithm.variant=tail: MMAML adapts by more than gradient steps"):
        create(("mmaml", "regression"), variant="tail")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm.minibatch=5"], "algorithm.minibatch=5: needs algorithm.variant=last_minibatch or tail"),
        (["algorithm.variant=tail", "algorithm.inner_steps=0"], "algorithm.inner_steps=0: must be >= 1 with"),
        (["algorithm=hsml", "algorithm.variant=tail"], "algorithm.variant: no such key for algorithm=hsml"),
    ],
)
def test_keys_of_the_variants(arguments, message):
    with pytest.raises(BadInput, match=message):
        expand(["algorithm=fomaml", *arguments] if "algorithm=hsml" not in arguments else arguments)


def test_the_standard_variant_is_the_cell_it_was():
    """New keys at their defaults enter no id."""
    (plain,), (given,) = (expand(["algorithm=fomaml", *more]) for more in ([], ["algorithm.variant=query"]))
    assert plain.cell_id == given.cell_id
    train, _ = identity(plain.config, plain.data_hash)
    assert {k: v for k, v in train.items() if k.startswith("algorithm.")} == {
        "algorithm._target_": "metalearn.algorithms.MAML",
        "algorithm.epoch": 1,
        "algorithm.first_order": True,
    }
