"""Meta-SGD against closed forms, its limits MAML and ANIL, and plain loops (float64)."""

import oracles
import pytest
import torch
from oracles import INPUTS, QUADRATIC, assert_close, forms, linear_form, normal, outer_gradient, quadratic
from table import Case, bits, create, each, outer_value, tasks_for
from torch import Tensor

from metalearn.algorithms import MetaSGD
from metalearn.episode import Episode, Examples
from metalearn.learner import MetaLearner

BOTH: list[Case] = [("meta_sgd", "classification"), ("meta_sgd", "regression")]


def with_rates(case: Case, value: float, **changes: object) -> MetaLearner:
    """The learner of a case with the same rate everywhere."""
    learner = create(case, **changes)
    with torch.no_grad():
        for rate in learner.rates.parameters():
            rate.fill_(value)
    return learner


def of(group: str, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{group}."): g for k, g in grads.items() if k.startswith(f"{group}.")}


def vector(rates: Tensor, theta: Tensor, **arguments: object) -> MetaLearner:
    """Meta-SGD of a linear form at theta with these rates."""
    learner = linear_form(MetaSGD, theta, alpha=0.1, **arguments)
    with torch.no_grad():
        learner.rates.head.weight.copy_(rates[None])
    return learner


def test_quadratic_fixture():
    """Numbers of the specification, one step, with a negative rate."""
    i, expected = INPUTS, {k: torch.tensor(v, dtype=torch.float64) for k, v in QUADRATIC["meta_sgd_k1"].items()}
    support = quadratic(i["A_support_hessian"][None], i["c_support"][None])
    episodes = Episode(support, quadratic(i["D_query_hessian"][None], i["c_query"][None]), {})
    learner = vector(expected["lr_vector"], i["theta"], inner_steps=1)
    assert_close(learner.adapt(learner.theta(), support, steps=1)[-1]["head.weight"][0, 0], expected["phi"])
    grads = outer_gradient(learner, episodes)
    assert_close(grads["net.head.weight"][0], expected["grad_theta"])
    assert_close(grads["rates.head.weight"][0], expected["grad_lr"])


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_of_quadratics(steps, first_order):
    """S4: phi <- phi - a A (phi - c), k times with the same rates.

    v_k = D (phi_k - c'), v_j = (I - A diag a) v_(j+1) (of first order: v_k); d theta = v_0, d a = -sum_j g_j v_(j+1).
    """
    (a, c), (d, c_query) = forms(5, 3, seed=0), forms(5, 3, seed=2)
    theta, rates = normal(3, seed=4), normal(3, seed=5) / 3
    learner = vector(rates, theta, inner_steps=steps, first_order=first_order)
    phi, inner = theta.expand(5, 3), []
    for _ in range(steps):
        inner.append(torch.einsum("bij,bj->bi", a, phi - c))
        phi = phi - rates * inner[-1]
    v, to_rates = torch.einsum("bij,bj->bi", d, phi - c_query), torch.zeros(5, 3, dtype=torch.float64)
    for g in reversed(inner):
        to_rates = to_rates - g * v
        v = v if first_order else v - torch.einsum("bij,bj->bi", a, rates * v)
    grads = outer_gradient(learner, Episode(quadratic(a, c), quadratic(d, c_query), {}))
    assert_close(grads["net.head.weight"][0], v.mean(0))
    assert_close(grads["rates.head.weight"][0], to_rates.mean(0))


@each(BOTH)
@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"recompute": True}], ids=str)
def test_equal_rates_are_those_of_maml(case, options):
    """S1: theta's gradient and the loss, several steps."""
    episodes = tasks_for(case)
    learner, maml = with_rates(case, 0.3, **options), create(("maml", case[1]), **options)
    assert_close(of("net", outer_gradient(learner, episodes)), of("net", outer_gradient(maml, episodes)))
    assert_close(outer_value(learner, episodes), outer_value(maml, episodes))


@each(BOTH)
def test_zero_rates_are_joint_training(case):
    """S2, G4: theta has the gradient of the query loss; each rate minus the mean product of both losses' gradients."""
    learner, episodes = with_rates(case, 0.0, inner_steps=1), tasks_for(case)
    theta = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}

    def gradient(task: Examples) -> dict[str, Tensor]:
        value = oracles.loss(oracles.forward(learner.net, theta, task.x), task.y)
        grads = torch.autograd.grad(value, list(theta.values()), materialize_grads=True)
        return dict(zip(theta, grads, strict=True))

    tasks = [[Examples(part.x[i], part.y[i]) for part in episodes[:2]] for i in range(episodes.tasks)]
    pairs = [(gradient(support), gradient(query)) for support, query in tasks]
    grads = outer_gradient(learner, episodes)
    assert_close(of("net", grads), {k: torch.stack([q[k] for _, q in pairs]).mean(0) for k in theta})
    assert_close(of("rates", grads), {k: -torch.stack([s[k] * q[k] for s, q in pairs]).mean(0) for k in theta})
    still = of("net", outer_gradient(with_rates(case, 0.3, inner_steps=0), episodes))
    assert_close(still, of("net", grads))


@each(BOTH)
def test_zero_rates_in_the_body_are_anil(case):
    """S3; and with `adapted=head` there are no others."""
    learner, episodes = with_rates(case, 0.3), tasks_for(case)
    with torch.no_grad():
        for name, rate in learner.rates.named_parameters():
            rate.mul_(name.startswith("head"))
    anil = of("net", outer_gradient(create(("anil", case[1])), episodes))
    assert_close(of("net", outer_gradient(learner, episodes)), anil)
    head = with_rates(case, 0.3, adapted="head")
    assert {name for name, _ in head.rates.named_parameters()} == {"head.weight", "head.bias"}
    assert_close(of("net", outer_gradient(head, episodes)), anil)


def test_rates_are_those_of_what_may_move():
    """Batch norm's scale and offset have rates only if inner loops may adapt them."""
    net = oracles.conv_net(bn_affine_inner=False)
    learner = create(("meta_sgd", "classification"), net)
    assert {k for k, _ in learner.rates.named_parameters()} == {k for k in net.shapes() if ".norm." not in k}


def test_initial_rates():
    """Constant, or uniform in 0.005..0.1: standard deviation 0.095 / sqrt(12) = 0.0274, within four standard errors."""
    learner = create(("meta_sgd", "classification"), alpha=0.07)
    learner.initialize(seed=0)
    assert {float(r) for p in learner.rates.parameters() for r in p.detach().flatten()} == {0.07}

    learner = create(("meta_sgd", "classification"), oracles.conv_net(width=16), rate_init="uniform")
    learner.initialize(seed=0)
    rates = torch.cat([p.detach().flatten() for p in learner.rates.parameters()])
    assert 0.005 <= rates.min() < 0.006 and 0.099 < rates.max() < 0.1 and len(rates) > 2000
    assert float(rates.mean()) == pytest.approx(0.0525, abs=4 * 0.0274 / len(rates) ** 0.5)
    before = bits(learner)
    learner.initialize(seed=1)
    assert all(not torch.equal(before[k], v) for k, v in learner.state_dict().items() if k.startswith("rates."))


def test_reports_describe_the_rates():
    learner = vector(torch.tensor([-0.5, 0.25, 2.0], dtype=torch.float64), normal(3, seed=0), inner_steps=1)
    assert learner.reports() == {
        "rate_min": -0.5,
        "rate_median": 0.25,
        "rate_max": 2.0,
        "rate_negative": pytest.approx(1 / 3),
    }
