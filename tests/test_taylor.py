"""Taylor expansions of MAML, FOMAML and Reptile: T1-T5 of the specification, and the engine's learners (F4, R5)."""

import oracles
import pytest
import torch
from oracles import assert_close, build, meta_batch, normal, outer_gradient
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from metalearn.algorithms import MAML, Reptile
from metalearn.algorithms.pools import minibatches, pooled
from metalearn.episode import Episode, Examples
from metalearn.learner import MetaLearner
from metalearn.random import Key
from metalearn.theory import taylor
from metalearn.theory.taylor import ALGORITHMS, COEFFICIENTS, Gradients

KEY = Key(0, "test")


def flat(g: Gradients) -> Tensor:
    return torch.stack(list(g)).flatten(1)


def ratio(losses: list[taylor.Loss], phi: Tensor, alpha: float = 1e-4) -> list[float]:
    """By what halving alpha divides the residuals of the three expansions."""
    return [
        float(a / b)
        for a, b in zip(taylor.residual(losses, phi, alpha), taylor.residual(losses, phi, alpha / 2), strict=True)
    ]


# ---- gradients and expansions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_taylor_gradients_are_the_products_of_explicit_hessians(k):
    """g_MAML = (I - alpha H_1) ... (I - alpha H_{k-1}) g_k with H_j at phi_j, one task after the other."""
    losses, phi = taylor.log_cosh(KEY, 3, k)
    found, alpha = taylor.gradients(losses, phi, 0.3), 0.3
    for task in range(3):

        def alone(loss, task=task):
            return lambda p: loss(torch.cat([phi[:task], p[None], phi[task + 1 :]]))[task]

        at, product, total = phi[task], torch.eye(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        for loss in losses:
            g = jacobian(alone(loss), at)
            total, last = total + g, g
            before, product = product, product @ (torch.eye(5, dtype=torch.float64) - alpha * hessian(alone(loss), at))
            at = at - alpha * g
        assert_close(found.fomaml[task], last)
        assert_close(found.maml[task], before @ last)
        assert_close(found.reptile[task], total)
        assert_close(found.reptile[task], (phi[task] - at) / alpha)
        if k > 1:  # else all three are the gradient
            assert float((found.maml - found.fomaml).norm()) > 0.01


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_taylor_residuals_are_of_second_order(k, seed):
    """T1. Tolerance: the alpha^3 term moves the ratio by about alpha; rounding (1e-16 of 1e-9) by less."""
    assert ratio(*taylor.log_cosh(Key(seed, "T1"), 4, k)) == pytest.approx([4.0] * 3, abs=0.02)


def test_taylor_residuals_without_the_first_order_are_of_first_order(monkeypatch):
    """What T1 would see if the expansions lacked a term: halving alpha halves the residual."""
    losses, phi = taylor.log_cosh(KEY, 4, 3)
    zeroth = taylor.expansion(losses, phi, 0.0)
    monkeypatch.setattr(taylor, "expansion", lambda *_: zeroth)
    assert ratio(losses, phi) == pytest.approx([2.0] * 3, abs=0.02)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_taylor_expansions_of_linear_losses_are_exact(k):
    """T2."""
    losses, phi = taylor.linear(KEY, 4, k)
    assert_close(flat(taylor.gradients(losses, phi, 0.7)), flat(taylor.expansion(losses, phi, 0.7)))


def test_taylor_expansions_of_two_quadratics_are_exact_without_second_derivatives():
    """FOMAML's and Reptile's second minibatch sees one step, in which a quadratic has nothing of second order."""
    q = taylor.random_quadratics(KEY, 4, 2)
    exact, expanded = taylor.gradients(q.losses, q.phi, 0.1), taylor.expansion(q.losses, q.phi, 0.1)
    assert_close(exact[1:], expanded[1:])
    assert float((exact.maml - expanded.maml).norm()) > 1e-3


# ---- AvgGrad, AvgGradInner and their coefficients ----------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 5])
def test_taylor_averages_over_orders_are_the_table(k):
    """The mean over all k! orders of the expansions is a AvgGrad - b alpha AvgGradInner, task by task and exactly."""
    from itertools import permutations

    losses, phi = taylor.log_cosh(KEY, 3, k)
    avg_grad, avg_grad_inner = taylor.averages(losses, phi)
    expanded = [taylor.expansion(order, phi, 0.2) for order in permutations(losses)]
    for i, name in enumerate(ALGORITHMS):
        a, b = COEFFICIENTS[name](k)
        mean = torch.stack([e[i] for e in expanded]).mean(0)
        assert_close(mean, a * avg_grad - b * 0.2 * avg_grad_inner)


def test_taylor_coefficients_of_two_minibatches_are_the_published_ones():
    """Overview, eq. 33-35, and the order of the general ones: 2 (k - 1) > k - 1 > (k - 1) / 2 per AvgGrad."""
    assert [COEFFICIENTS[name](2) for name in ALGORITHMS] == [(1, 2), (1, 1), (2, 1)]
    for k in range(2, 9):
        ratios = [b / a for a, b in (COEFFICIENTS[name](k) for name in ALGORITHMS)]
        assert ratios == [2 * (k - 1), k - 1, (k - 1) / 2]


@pytest.mark.parametrize("k", [2, 3])
def test_taylor_coefficients_are_recovered_by_regression(k):
    """T3, within 3 standard errors over tasks (fixed seed), which are small enough to tell the algorithms apart."""
    for name, (value, slope) in taylor.coefficients(KEY, k, tasks=10_000).items():
        a, b = COEFFICIENTS[name](k)
        for fit, expected in ((value, (a, 0.0)), (slope, (0.0, b))):
            assert torch.all((fit.value - torch.tensor(expected, dtype=torch.float64)).abs() <= 3 * fit.error)
        assert float(value.error[0]) < 0.02 and float(slope.error[1]) < 0.15


@pytest.mark.parametrize("k", [2, 3, 4])
def test_taylor_coefficients_within_a_sample_err_by_order_alpha(k):
    """T3 with all orders averaged: halving alpha halves the error, where there is any."""
    q = taylor.random_quadratics(KEY, 50, k)
    coarse, fine = (taylor.in_sample_coefficients(q, alpha) for alpha in (1e-4, 5e-5))
    for name in ALGORITHMS:
        errors = [abs(found[name][1] - COEFFICIENTS[name](k)[1]) for found in (coarse, fine)]
        if k == 2 and name != "maml":
            assert max(errors) < 1e-9  # exact for quadratics; 1e-16 over alpha and the basis's angle
        else:
            assert errors[0] < 0.01 and errors[0] / errors[1] == pytest.approx(2, abs=0.02)


def test_taylor_expectations_are_those_of_the_sample():
    """The exact AvgGrad and AvgGradInner that T3 regresses on, within 4 standard errors of the estimators."""
    q = taylor.random_quadratics(KEY, 20_000, 3)
    for estimates, exact in zip(taylor.averages(q.losses, q.phi), (q.avg_grad, q.avg_grad_inner), strict=True):
        error = estimates.std(0) / len(estimates) ** 0.5
        assert torch.all((estimates.mean(0) - exact).abs() <= 4 * error)
        assert torch.all(error < 0.02 * exact)


def test_taylor_inner_average_of_equal_hessians():
    """T4: A^2 (phi - mean of c)."""
    root, c, phi = normal(2, 3, 3, seed=0), normal(2, 4, 3, seed=1), normal(2, 3, seed=2)
    a = root @ root.mT
    avg_grad, avg_grad_inner = taylor.averages([taylor.quadratic(a, c[:, i]) for i in range(4)], phi)
    away = (phi - c.mean(1)).unsqueeze(-1)
    assert_close(avg_grad, (a @ away).squeeze(-1))
    assert_close(avg_grad_inner, (a @ a @ away).squeeze(-1))


def test_taylor_inner_average_is_half_the_slope_of_the_inner_product():
    """T5: AvgGradInner = 1/2 d (gbar_1 . gbar_2) / d phi."""
    losses, phi = taylor.log_cosh(KEY, 4, 2)
    start = phi.clone().requires_grad_()
    g = [torch.autograd.grad(loss(start).sum(), start, create_graph=True)[0] for loss in losses]
    (slope,) = torch.autograd.grad((g[0] * g[1]).sum(), start)
    assert_close(taylor.averages(losses, phi)[1], slope / 2)


def test_taylor_regression_refuses_parallel_vectors():
    """With E[A] a multiple of I."""
    v = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="parallel"):
        taylor.regress(torch.ones(5, 3, dtype=torch.float64), v, 2 * v)


# ---- the engine's learners ---------------------------------------------------------------------------------------


def on_network(learner: MetaLearner, parts: list[Examples]) -> tuple[list[taylor.Loss], Tensor]:
    """A learner's network as losses of one long vector, one for each part, and its parameters for all tasks."""
    theta = dict(learner.net.named_parameters())
    sizes = [p.numel() for p in theta.values()]

    def loss(part: Examples) -> taylor.Loss:
        def value(phi: Tensor) -> Tensor:
            leaves = {k: v.reshape(-1, *theta[k].shape) for k, v in zip(theta, phi.split(sizes, 1), strict=True)}
            return learner.loss(learner.net.run(leaves, part.x), part.y)

        return value

    start = torch.cat([p.detach().flatten() for p in theta.values()])
    return [loss(part) for part in parts], start.expand(len(parts[0].x), -1)


def vector(learner: MetaLearner, episodes: Episode) -> Tensor:
    return torch.cat([g.flatten() for g in outer_gradient(learner, episodes).values()])


def beyond(learner, episodes: Episode, losses, phi, which: str) -> list[float]:
    """How far the learner's gradient is from its expansion at two alphas, the second half the first."""
    residuals = []
    for alpha in (1e-4, 5e-5):
        learner.use_rate(alpha)
        expanded = getattr(taylor.expansion(losses, phi, alpha), which).mean(0)
        residuals.append(float((vector(learner, episodes) - expanded).norm()))
    return residuals


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("first_order", [False, True])
def test_taylor_engine_maml_obeys_the_expansion(steps, first_order):
    """F4: the support loss `steps` times, then the query loss: k = steps + 1 minibatches."""
    episodes = oracles.curves(3)
    learner = build(MAML, oracles.mlp(), "regression", alpha=0.3, inner_steps=steps, first_order=first_order)
    losses, phi = on_network(learner, [episodes.support] * steps + [episodes.query])
    which = "fomaml" if first_order else "maml"
    assert_close(vector(learner, episodes), getattr(taylor.gradients(losses, phi, 0.3), which).mean(0))
    residuals = beyond(learner, episodes, losses, phi, which)
    assert residuals[0] / residuals[1] == pytest.approx(4, abs=0.02)


def drawn(episodes: Episode, variant: str, k: int) -> list[Examples]:
    """The k minibatches of four that MAML's variants descend."""
    tail = variant == "tail"
    pool = episodes.support if tail else pooled(episodes)
    rows = minibatches(meta_batch(episodes).key.sub("minibatch"), pool.y.shape[1], 4, k - tail)
    batches = [
        Examples(pool.x[torch.arange(3)[:, None], r], pool.y[torch.arange(3)[:, None], r]) for r in rows.unbind(1)
    ]
    return [*batches, episodes.query] if tail else batches


@pytest.mark.parametrize("variant", ["last_minibatch", "tail"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("first_order", [False, True])
def test_taylor_engine_minibatches_obey_the_expansion(variant, k, first_order):
    """F4 for the variants: the gradient at the last of k minibatches; the residual is of second order in alpha."""
    episodes = oracles.curves(3)
    options = {"variant": variant, "minibatch": 4, "inner_steps": k, "first_order": first_order}
    learner = build(MAML, oracles.mlp(), "regression", alpha=0.3, **options)
    losses, phi = on_network(learner, drawn(episodes, variant, k))
    which = "fomaml" if first_order else "maml"
    assert_close(vector(learner, episodes), getattr(taylor.gradients(losses, phi, 0.3), which).mean(0))
    residuals = beyond(learner, episodes, losses, phi, which)
    if k == 1:
        assert max(residuals) < 1e-12
    else:
        assert residuals[0] / residuals[1] == pytest.approx(4, abs=0.02)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_taylor_engine_reptile_obeys_the_expansion(steps):
    """R5: minibatches of the pool as Reptile draws them. Its outer gradient is theta - U(theta) = alpha g_Reptile."""
    episodes = oracles.curves(3)
    learner = build(
        Reptile, oracles.mlp(), "regression", alpha=0.3, inner_steps=steps, inner_optimizer="sgd", inner_batch=4
    )
    pool = Examples(*(torch.cat(parts, 1) for parts in zip(*episodes[:2], strict=True)))
    rows = minibatches(meta_batch(episodes).key.sub("minibatch"), 12, 4, steps)
    task = torch.arange(3)[:, None]
    losses, phi = on_network(learner, [Examples(pool.x[task, r], pool.y[task, r]) for r in rows.unbind(1)])
    assert_close(vector(learner, episodes) / 0.3, taylor.gradients(losses, phi, 0.3).reptile.mean(0))
    residuals = []
    for learner.alpha in (1e-3, 5e-4):  # the difference of parameters loses 1e-16 / alpha
        expanded = taylor.expansion(losses, phi, learner.alpha).reptile.mean(0)
        residuals.append(float((vector(learner, episodes) / learner.alpha - expanded).norm()))
    if steps == 1:
        assert max(residuals) < 1e-12
    else:
        assert residuals[0] / residuals[1] == pytest.approx(4, abs=0.1)
