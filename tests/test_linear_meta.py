"""MAML on linear tasks in closed form (Z3-Z5, Z9): loops, least squares on stacked features, autograd, sampling."""

import math
import re
from pathlib import Path

import pytest
import torch
from oracles import VALUES, assert_close, finite_differences, normal
from torch import Tensor

from metalearn.theory import alpha_star, kernel_meta, linear_meta, stacks
from metalearn.theory.alpha_star import gaussian_limit, limit
from metalearn.theory.linear_meta import (
    Moments,
    adapted_distance,
    adapted_loss,
    best_alpha,
    forbidden_rates,
    gap,
    minimiser,
    population_risk,
    risk,
    slope,
    spread,
    task_risks,
    theorem2_rate,
)

LINEAR = VALUES["linear_maml"]
GRID = torch.linspace(0, 0.4, 5, dtype=torch.float64)


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tasks(n: int = 6, K: int = 7, d: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(n, K, d, seed=seed), normal(n, d, seed=seed + 1000)


def ragged() -> tuple[list[Tensor], Tensor]:
    return [normal(k, 3, seed=k) for k in (2, 5, 3, 4)], normal(4, 3, seed=9)


def adapted_features(phi: Tensor, alpha: float) -> Tensor:
    """C of one task, divided by sqrt(K)."""
    m = torch.eye(phi.shape[1], dtype=torch.float64) - 2 * alpha / len(phi) * phi.mT @ phi
    return phi @ m / math.sqrt(len(phi))


def stacked_problem(features: list[Tensor] | Tensor, optima: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    c = [adapted_features(phi, alpha) for phi in features]
    return torch.cat(c), torch.cat([x @ a for x, a in zip(c, optima, strict=True)])


# ---- minimisers --------------------------------------------------------------------------------------------------


def test_fixture_of_the_specification():
    features, optima = tensor(LINEAR["inputs"]["Phi"]), tensor(LINEAR["inputs"]["a"])
    assert_close(minimiser(features, optima, 0.0), tensor(LINEAR["w_erm"]))
    assert_close(slope(features, optima), tensor(LINEAR["dw_dalpha_at_0"]))
    for alpha, w in LINEAR["w_maml"].items():
        assert_close(minimiser(features, optima, float(alpha)), tensor(w))
    for alpha, value in LINEAR["risk_at_minimiser"].items():
        w = minimiser(features, optima, float(alpha))
        assert_close(risk(w, features, optima, float(alpha)), torch.tensor(value, dtype=torch.float64))
    f = LINEAR["F_t"]
    found = adapted_distance(tensor(f["w"]), features, optima, f["eta"], [0, 1, 3]).mean(-1)
    assert_close(found, tensor([f["t0"], f["t1"], f["t3"]]))


@pytest.mark.parametrize("problem", [tasks(), tasks(5, 2, 3), ragged()], ids=["K>d", "K<d", "ragged"])
def test_minimiser_is_least_squares_on_stacked_adapted_features(problem):
    features, optima = problem
    for alpha, w in zip(GRID, minimiser(*problem, GRID), strict=True):
        c, y = stacked_problem(features, optima, float(alpha))
        assert_close(w, torch.linalg.lstsq(c, y[:, None]).solution[:, 0], 1e-10)
    assert minimiser(*problem, GRID.view(5, 1)).shape == (5, 1, 3)


def test_gradient_of_the_meta_loss_is_zero_at_the_minimiser():
    """Z3, through the inner step by automatic differentiation."""
    features, optima = tasks()
    for alpha in GRID.tolist():
        w = minimiser(features, optima, alpha).requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for phi, a in zip(features, optima, strict=True):
            inner = (phi @ (w - a)).square().mean()
            (g,) = torch.autograd.grad(inner, w, create_graph=True)
            total = total + (phi @ (w - alpha * g - a)).square().mean() / 6
        assert_close(risk(w, features, optima, alpha), total)
        (g,) = torch.autograd.grad(total, w)
        assert float(g.norm()) < 1e-12


def test_slope_is_the_finite_difference():
    """Z4, at 0 and elsewhere."""
    for problem in (tasks(), ragged()):
        for alpha in (0.0, 0.13):
            at = torch.tensor([alpha], dtype=torch.float64)
            for i in range(3):
                (expected,) = finite_differences(lambda i=i, at=at, p=problem: minimiser(*p, at)[0, i], [at])
                assert_close(slope(*problem, alpha)[i], expected[0], 1e-6)


def test_slope_at_zero_is_the_formula_written_out():
    features, optima = tasks()
    g = features.mT @ features
    w = torch.linalg.solve(g.sum(0), (g @ optima[..., None]).sum(0)[:, 0])
    right = sum(4 / 7 * own @ own @ (w - a) for own, a in zip(g, optima, strict=True))
    assert_close(slope(features, optima), torch.linalg.solve(g.sum(0), right))


def test_minimisers_of_least_norm():
    """Features of rank 2 in 3, with more samples than features."""
    features, optima = normal(6, 7, 2, seed=0) @ normal(2, 3, seed=1), normal(6, 3, seed=2)
    for alpha in GRID.tolist():
        c, y = stacked_problem(features, optima, alpha)
        assert_close(minimiser(features, optima, alpha), torch.linalg.pinv(c, rtol=1e-10) @ y, 1e-8)


def test_weights_count_tasks_several_times():
    features, optima = tasks()
    weights = tensor([1, 3, 1, 2, 0, 1])
    which = torch.arange(6).repeat_interleave(weights.long())
    found, expected = Moments.of(features, optima, weights), Moments.of(features[which], optima[which])
    halves = Moments.of(features[:2], optima[:2], weights[:2]).plus(Moments.of(features[2:], optima[2:], weights[2:]))
    for moments in (found, halves):
        assert_close(moments[:3], expected[:3])
        assert moments.tasks == expected.tasks == 8


def test_chunks_of_tasks_change_nothing(monkeypatch):
    features, optima = tasks(11)
    start, fresh = normal(2, 3, seed=5), normal(9, 4, 3, seed=6)

    def everything() -> list[Tensor]:
        w = minimiser(features, optima, GRID)
        return [
            w,
            task_risks(w, features, optima, GRID),
            task_risks(w, features, optima, GRID, query=normal(11, 4, 3, seed=7)),
            population_risk(features, fresh, GRID),
            adapted_distance(start, features, optima, 0.01, 5),
            gap(features, fresh, GRID, 0.01, [1, 7]),
        ]

    expected = everything()
    monkeypatch.setattr(stacks, "CHUNK", 50)
    assert_close(everything(), expected)
    assert_close(minimiser(iter(features), optima, GRID), expected[0])


# ---- risks and the best rate -------------------------------------------------------------------------------------


def test_risks_are_those_of_explicit_steps():
    features, optima = tasks()
    query, w = normal(6, 4, 3, seed=3), normal(5, 3, seed=4)
    found, own = task_risks(w, features, optima, GRID, query), task_risks(w, features, optima, GRID)
    moments = Moments.of(features, optima)
    for i, alpha in enumerate(GRID.tolist()):
        for t, (phi, psi, a) in enumerate(zip(features, query, optima, strict=True)):
            adapted = w[i] - alpha * 2 / 7 * phi.mT @ (phi @ (w[i] - a))
            assert_close(found[i, t], (psi @ (adapted - a)).square().mean())
            assert_close(own[i, t], (phi @ (adapted - a)).square().mean())
    assert_close(moments.risk(w, GRID), own.mean(1), 1e-11)
    assert_close(task_risks(w[0], features, optima, 0.1), task_risks(w[:1], features, optima, GRID[1:2])[0])
    assert_close(moments.least_risk(GRID), risk(minimiser(features, optima, GRID), features, optima, GRID), 1e-10)


def test_best_alpha_is_the_minimum_of_a_fine_grid():
    for problem in (tasks(), ragged(), tasks(40, 15, 10), (3 * tasks()[0], tasks()[1])):
        found, moments = best_alpha(*problem), Moments.of(*problem)
        grid = torch.linspace(0, 4 * found, 2001, dtype=torch.float64)
        assert float(moments.least_risk(found)) <= float(moments.least_risk(grid).min()) * (1 + 1e-12)
        h = torch.tensor([-1e-4, 1e-4], dtype=torch.float64) * found
        low, high = moments.least_risk(found + h).tolist()
        assert low > float(moments.least_risk(found)) < high


def test_best_alpha_of_tasks_of_one_curvature_solves_them():
    """Z5: G = lambda I."""
    features = 1.5 * torch.linalg.qr(normal(5, 6, 4, seed=0)).Q
    found = best_alpha(features, normal(5, 4, seed=1))
    assert found == pytest.approx(6 / (2 * 1.5**2), rel=1e-6)


def differing(tasks: int, decades: float, seed: int) -> tuple[Tensor, Tensor]:
    scale = 10 ** (decades * torch.linspace(0, 1, tasks, dtype=torch.float64))[:, None, None]
    return scale * normal(tasks, 5, 2, seed=seed), normal(tasks, 2, seed=seed + 1000)


@pytest.mark.parametrize("problem", [differing(n, *rest) for n in (2, 3, 8) for rest in ((0.5, 3), (1.5, 4), (1.0, 5))])
def test_best_alpha_is_the_best_of_all_minima(problem):
    """Nothing on a fine grid 100 times as wide either way is better, by least squares; some have several minima."""
    found = best_alpha(*problem)

    def loss(alpha: float) -> float:
        c, y = stacked_problem(*problem, alpha)
        w = torch.linalg.lstsq(c, y[:, None]).solution[:, 0]
        return float((c @ w - y).square().sum())

    least = loss(found)
    assert min(map(loss, (found * torch.logspace(-4, 4, 1201, dtype=torch.float64)).tolist())) >= least * (1 - 1e-9)


def test_best_alpha_of_one_large_and_many_small_tasks():
    """Thirty tasks G = 0.1 K I and one of 2 K I: the rate that solves the small ones leaves w to the large one.

    There is a second minimum, 40 times as high, near the rate that solves the large one, 1 / (2 2).
    """
    curvatures = tensor([0.1] * 30 + [2.0])
    features = (2 * curvatures).sqrt()[:, None, None] * torch.eye(2, dtype=torch.float64)
    optima = normal(31, 2, seed=0)
    assert best_alpha(features, optima) == pytest.approx(1 / (2 * 0.1), rel=1e-6)
    moments = Moments.of(features, optima)
    below, at, above = moments.least_risk(tensor([0.2, 0.25, 0.3])).tolist()
    assert below > at < above and at > 40 * float(moments.least_risk(4.9))


def test_best_alpha_of_many_curvatures_is_found_where_sums_cancel():
    """A task of 1e4 times the curvature: at the small ones' rate, 1e-12 of the sums' terms is left of the meta-loss."""
    curvatures = tensor([1.0] * 5 + [1e4])
    features = (2 * curvatures).sqrt()[:, None, None] * torch.eye(2, dtype=torch.float64)
    assert best_alpha(features, normal(6, 2, seed=0)) == pytest.approx(1 / 2, rel=1e-6)


def test_best_alpha_of_features_that_are_nearly_dependent():
    """Twenty Gaussians of width 1 over [-5, 5]: sums of a condition of 1e12, beside least squares of its root."""
    x = -5 + 10 * torch.rand(2, 50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    features = torch.exp(-((x - torch.linspace(-5, 5, 20, dtype=torch.float64)) ** 2) / 2)
    optima = normal(2, 20, seed=0)

    def loss(alpha: float) -> float:
        c, y = stacked_problem(features, optima, alpha)
        u = torch.linalg.svd(c, full_matrices=False).U
        return float((y - u @ (u.mT @ y)).square().sum())

    assert 1e11 < float(torch.linalg.cond(Moments.of(features).matrix(0.0))) < 1e15
    found = best_alpha(features, optima)
    rates = found * torch.linspace(0.99, 1.01, 81, dtype=torch.float64)
    assert 0.999 < float(rates[int(torch.tensor([*map(loss, rates.tolist())]).argmin())]) / found < 1.001


def test_minimisers_of_dependent_features_do_not_grow():
    """What rounding leaves of the zeros among the eigenvalues is no direction, with many tasks and any scale."""
    for scale in (1e-3, 1.0, 1e4):
        features = scale * normal(500, 10, 5, seed=0) @ normal(5, 20, seed=1)
        optima, limit = normal(500, 20, seed=2), Moments.of(features).limit()
        across = torch.linalg.qr(normal(5, 20, seed=1).mT, mode="complete").Q[:, 5:]
        for w in minimiser(features, optima, limit * tensor([0, 0.5, 1, 3, 100])):
            assert float((across.mT @ w).abs().max()) < 1e-9


def test_minimiser_next_to_a_step_that_solves_all_tasks():
    """The sums over H, H^2 and H^3 cancel: what is left of them is either right or taken for nothing, never noise."""
    features = 1.5 * torch.linalg.qr(normal(5, 6, 4, seed=0)).Q
    optima = normal(5, 4, seed=1)
    for off in (1e-2, -1e-3, 1e-4, -1e-5):
        w = minimiser(features, optima, 6 / (2 * 1.5**2) * (1 + off))
        assert_close(w, optima.mean(0), 1e-15 / off**2 + 1e-12)
    for off in (1e-7, -1e-8, 1e-9, 0.0):
        assert_close(minimiser(features, optima, 6 / (2 * 1.5**2) * (1 + off)), torch.zeros(4, dtype=torch.float64))


def test_best_alpha_tends_to_the_limit():
    """Theorem 1: |alpha*(N) - alpha*_lim| falls; the moments' limit is that of the features."""
    features, optima = tasks(2048, 12, 4)
    assert Moments.of(features, optima).limit() == pytest.approx(limit(features).value, rel=1e-12)
    truth, errors = gaussian_limit(12, 4), []
    for n, repetitions in ((4, 8), (64, 8), (1024, 2)):
        parts = list(zip(features.split(n), optima.split(n), strict=True))[:repetitions]
        errors.append(sum(abs(best_alpha(*part) - truth) for part in parts) / repetitions)
    assert errors[0] > 3 * errors[1] > 6 * errors[2] and errors[2] < 0.03 * truth


def test_best_alpha_refuses_tasks_with_one_solution():
    features, optima = tasks()
    with pytest.raises(ValueError, match="one w solves all tasks"):
        best_alpha(features[:1], optima[:1])
    with pytest.raises(ValueError, match="one w solves all tasks"):
        best_alpha(features, optima[:1].expand(6, -1))


def test_bad_tasks_are_refused():
    """By name, and before anything is broadcast."""
    features, optima = tasks()
    start, empty = normal(3, seed=0), torch.zeros(6, 7, 3)
    for given in (optima[:5], optima[:1], normal(7, 3, seed=0)):
        for form in (features, list(features), iter(features)):
            with pytest.raises(ValueError, match="optima"):
                Moments.of(form, given)
        with pytest.raises(ValueError, match=f"optima of {len(given)} tasks do not belong to 6 tasks"):
            minimiser(features, given, 0.1)
        with pytest.raises(ValueError, match="optima"):
            minimiser(normal(6, 2, 30, seed=0), normal(len(given), 30, seed=1), 0.1)
        for call in (
            lambda a=given: best_alpha(features, a),
            lambda a=given: task_risks(start, features, a, 0.1),
            lambda a=given: adapted_distance(start, features, a, 0.1, 2),
            lambda a=given: slope(features, a),
        ):
            with pytest.raises(ValueError, match="optima of"):
                call()
    with pytest.raises(ValueError, match="weights of 2 tasks do not belong to 6 tasks"):
        Moments.of(features, optima, torch.ones(2))
    with pytest.raises(ValueError, match="query of 1 tasks do not belong to 6 tasks"):
        task_risks(start, features, optima, 0.1, features[:1])
    with pytest.raises(ValueError, match=r"optima have shape \[6, 1\], not \[T, 3\]"):
        task_risks(start, features, optima[:, :1], 0.1)
    for call in (
        lambda: minimiser([], optima[:0], 0.1),
        lambda: Moments.of(iter([])),
        lambda: gap([], [], 0.1, 0.1, 2),
    ):
        with pytest.raises(ValueError, match="there are no tasks"):
            call()
    with pytest.raises(ValueError, match="all features are zero"):
        best_alpha(empty, optima)
    with pytest.raises(ValueError, match="all features are zero"):
        Moments.of(empty).limit()
    for wide in (features, normal(6, 2, 30, seed=0)):
        with pytest.raises(ValueError, match="not finite"):
            minimiser(wide * math.nan, normal(6, wide.shape[2], seed=1), 0.1)
    with pytest.raises(ValueError, match="not finite"):
        best_alpha(features, optima * math.inf)
    with pytest.raises(ValueError, match=r"a kernel of shape \[6, 6\] and 6 labels are not those of 5 samples"):
        kernel_meta.coefficients(torch.eye(6), torch.ones(6), 0.1, [2, 3])


def test_spread_is_the_covariance_of_the_minimiser():
    """From w_m as a linear map of the optima, one unit vector at a time."""
    features, _ = tasks(4)
    total = torch.zeros(5, 3, 3, dtype=torch.float64)
    for unit in torch.eye(12, dtype=torch.float64).view(12, 4, 3):
        w = minimiser(features, unit, GRID)
        total += w[:, :, None] * w[:, None, :]
    assert_close(spread(features, GRID), total, 1e-10)


def test_population_risk_is_the_mean_over_sampled_optima():
    """Within 4 standard errors; and eq. 18.3 written out with Lambda_j."""
    features, fresh, draws = normal(5, 6, 3, seed=0), normal(40, 6, 3, seed=1), 4000
    alpha = 0.2
    c = [6 * adapted_features(phi, alpha).mT @ adapted_features(phi, alpha) for phi in features]
    whole, new = torch.linalg.inv(sum(c)), [adapted_features(phi, alpha) for phi in fresh]
    second = sum((x.mT @ x for x in new), torch.zeros(3, 3, dtype=torch.float64)) / 40
    maps = [whole @ own for own in c]
    written = 3 * (sum(torch.trace(x.mT @ second @ x) for x in maps) + torch.trace(second))
    found = population_risk(features, fresh, alpha, variance=3.0)
    assert_close(found, written)
    optima, other = math.sqrt(3) * normal(draws, 5, 3, seed=2), math.sqrt(3) * normal(draws, 3, seed=3)
    w = torch.einsum("jab,njb->na", torch.stack(maps), optima)
    values = torch.einsum("na,ab,nb->n", w - other, second, w - other)
    assert abs(float(values.mean() - found)) < 4 * float(values.std()) / math.sqrt(draws)


def test_population_risk_loses_its_first_term_with_many_tasks():
    fresh = normal(300, 6, 3, seed=1)
    alone = [population_risk(normal(n, 6, 3, seed=2), fresh, GRID) for n in (10, 1000)]
    floor = Moments.of(fresh).matrix(GRID).diagonal(dim1=1, dim2=2).sum(1) / 300
    assert ((alone[1] - floor) < 0.15 * (alone[0] - floor)).all() and (alone[1] > floor).all()


# ---- ranges of the theorems --------------------------------------------------------------------------------------


def test_forbidden_rates_are_where_the_lower_bound_is_not_positive():
    low, high = forbidden_rates(10, 0.8, 1.1)

    def bound(a: float) -> float:
        return 0.8 - 4 * a * 1.1**2 / 10 + 4 * a**2 * 0.8**3 / 100

    assert abs(bound(low)) < 1e-12 > abs(bound(high)) and bound(low / 2) > 0 > bound((low + high) / 2)
    assert low == pytest.approx(10 * (1.21 - math.sqrt(1.4641 - 0.4096)) / (2 * 0.512), rel=1e-12)
    assert forbidden_rates(10, 2.0, 2.0) == pytest.approx((2.5, 2.5))


def test_forbidden_rates_hold_the_best_one():
    """With G = lambda I the proof's ranges leave out alpha*_lim = K / (2 lambda) alone, where C^T C = 0."""
    low, high = forbidden_rates(10, 1.9, 2.1)
    assert low < 10 / (2 * 2.0) < high


def test_theorem_2_range_is_the_printed_one():
    for smallest, largest, c in ((0.5, 1.0, 0.3), (1.0, 1.0, 2.0)):
        a, b = 4 * largest**6 - smallest**6, 2 * largest**4 * 10
        root = 10 * math.sqrt(4 * largest**8 + 1.5 * c * smallest**4 * a / largest**3)
        assert theorem2_rate(10, smallest, largest, c) == pytest.approx((root - b) / (smallest**2 * a), rel=1e-12)
    assert 0 < theorem2_rate(50, 1e-3, 1e3, 1e-3) < 1e-9  # no cancellation


def test_ranges_of_the_theorems_refuse_what_is_no_range():
    for call in (forbidden_rates, lambda *ends: theorem2_rate(*ends, 1.0)):
        with pytest.raises(ValueError, match="smallest=0.0: must be > 0"):
            call(10, 0.0, 1.0)
        with pytest.raises(ValueError, match="largest=1.0: must be >= smallest=2.0"):
            call(10, 2.0, 1.0)
        with pytest.raises(ValueError, match="samples=0: must be > 0"):
            call(0, 1.0, 2.0)
    with pytest.raises(ValueError, match="c=0.0: must be > 0"):
        theorem2_rate(10, 1.0, 2.0, 0.0)


# ---- fast adaptation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [7, 2])
def test_adaptation_is_explicit_gradient_descent(K):
    """Z9, with more and with fewer samples than features."""
    features, optima = tasks(4, K)
    starts, rate = normal(2, 3, seed=5), 0.03
    distance, loss = (f(starts, features, optima, rate, 4) for f in (adapted_distance, adapted_loss))
    assert distance.shape == loss.shape == (5, 2, 4)
    for s, start in enumerate(starts):
        for t, (phi, a) in enumerate(zip(features, optima, strict=True)):
            w = start.clone().requires_grad_()
            for step in range(5):
                value = (phi @ (w - a)).square().mean()
                assert_close(loss[step, s, t], value.detach(), 1e-11)
                assert_close(distance[step, s, t], (w - a).detach().square().sum(), 1e-11)
                w = (w - rate * torch.autograd.grad(value, w)[0]).detach().requires_grad_()
    assert_close(adapted_distance(starts[0], features, optima, rate, [0, 3]), distance[[0, 3], 0])


def test_adaptation_on_few_dependent_samples():
    """Three samples of rank one in five features: the kernel's zero eigenvalues are rounding, and no directions."""
    features, optima, start = (
        normal(40, 3, 1, seed=0) @ normal(40, 1, 5, seed=1),
        normal(40, 5, seed=2),
        normal(5, seed=3),
    )
    h = features.mT @ features / 3
    step = torch.eye(5, dtype=torch.float64) - 0.02 * h
    moved = torch.linalg.matrix_power(step, 3) @ (start - optima)[..., None]
    assert_close(adapted_distance(start, features, optima, 0.01, [3])[0], moved.square().sum((1, 2)), 1e-11)
    assert_close(adapted_loss(start, features, optima, 0.01, [3])[0], (moved.mT @ h @ moved)[:, 0, 0], 1e-11)


def test_distances_to_zero_optima_are_enough_for_differences():
    """The mean over an optimum and its opposite."""
    features, optima = tasks(4)
    starts = normal(2, 3, seed=5)
    both = [adapted_distance(starts, features, sign * optima, 0.03, 3) for sign in (1, -1)]
    mean, alone = (both[0] + both[1]) / 2, adapted_distance(starts, features, None, 0.03, 3)
    assert_close(mean[:, 0] - mean[:, 1], alone[:, 0] - alone[:, 1], 1e-11)


@pytest.mark.parametrize("K", [6, 2])
@pytest.mark.parametrize("loss", [False, True])
def test_gap_is_the_mean_over_sampled_optima(K, loss):
    features, fresh, draws = normal(4, K, 3, seed=0), normal(3, K, 3, seed=1), 5000
    found = gap(features, fresh, GRID[:3], 0.05, [0, 2], variance=2.0, loss=loss)
    assert found.shape == (2, 3, 3) and float(found[:, 0].abs().max()) < 1e-13
    maps = torch.stack([minimiser(features, unit.view(4, 3), GRID[:3]) for unit in torch.eye(12, dtype=torch.float64)])
    starts = torch.einsum("uad,nu->nad", maps, math.sqrt(2) * normal(draws, 12, seed=2)).flatten(0, 1)
    after = (adapted_loss if loss else adapted_distance)(starts, fresh, None, 0.05, [0, 2]).unflatten(1, (draws, 3))
    sample = after - after[:, :, :1]
    error = sample.std(1) / math.sqrt(draws)
    assert ((sample.mean(1) - found).abs() <= 4 * error + 1e-13).all()


def test_maml_starts_nearer_to_new_tasks_than_joint_training():
    """Theorem 2 (sign and decay), at the rates of Fig. 5: F_t gap -0.0075 at t = 0, for U(-5, 5) and optima N(0, 3)."""
    draw = torch.Generator().manual_seed(0)
    total, runs = torch.zeros(3, dtype=torch.float64), 25
    for _ in range(runs):
        features = 10 * torch.rand(20 + 30, 50, 20, dtype=torch.float64, generator=draw) - 5
        total += gap(features[:20], features[20:], 1e-4, 1e-5, [0, 50, 2000], variance=3.0).mean(-1) / runs
    assert total[0].item() == pytest.approx(-0.007479, rel=0.02)
    assert total[1].item() == pytest.approx(-0.007356, rel=0.02)
    assert total[0] < total[1] < total[2] < 0


# ---- more features than samples ----------------------------------------------------------------------------------


def wide(n: int = 3, K: int = 4, d: int = 20) -> tuple[Tensor, Tensor]:
    return normal(n, K, d, seed=0), normal(n, d, seed=1)


def test_wide_minimisers_interpolate_at_every_rate():
    features, optima = wide()
    psi = features.flatten(0, 1)
    y = torch.einsum("nkd,nd->nk", features, optima).flatten()
    for w in minimiser(features, optima, torch.tensor([0.0, 0.01, 0.3, -0.2])):
        assert_close(w, torch.linalg.pinv(psi) @ y, 1e-9)
    assert_close(minimiser(iter(features), optima, 0.1), minimiser(features, optima, 0.1))


def test_wide_minimisers_where_a_step_is_singular():
    """2 alpha / K is one over an eigenvalue of the first task: then the solution of least norm depends on alpha."""
    features, optima = wide()
    value = torch.linalg.eigvalsh(features[0] @ features[0].mT)[-1]
    alpha = float(4 / (2 * value))
    c, y = stacked_problem(features, optima, alpha)
    w = minimiser(features, optima, alpha)
    assert_close(w, torch.linalg.pinv(c, rtol=1e-8) @ y, 1e-7)
    assert float((w - minimiser(features, optima, 0.0)).norm()) > 0.1


def test_wide_minimisers_of_tasks_with_shared_rows_and_different_sizes():
    """Dependent rows cannot all be fitted, so that each weighs 1 / K: by hand, stacked, and in as few features as rows.

    In the first direction one task of one sample wants 1, one of two samples -1: (1 - 1 / 2) / (1 + 1 / 2) = 1 / 3.
    """
    eye = torch.eye(6, dtype=torch.float64)
    features, optima = [eye[:1], eye[:2]], torch.zeros(2, 6, dtype=torch.float64)
    optima[0, 0], optima[1, 0], optima[1, 1] = 1, -1, 2
    assert_close(minimiser(features, optima, 0.0), tensor([1 / 3, 2, 0, 0, 0, 0]))
    assert float(risk(minimiser(features, optima, 0.0), [f[:1] for f in features], optima, 0.0)) == pytest.approx(
        10 / 9
    )
    mixed = [normal(k, 3, seed=k) @ normal(3, 12, seed=0) for k in (1, 4, 2, 3)]  # 10 rows of rank 3
    for problem in ((features, optima), (mixed, normal(4, 12, seed=1))):
        psi = torch.cat(problem[0])
        shape = torch.linalg.qr(psi.mT).Q  # as many directions as rows: the same tasks, and no wide ones
        narrow = [phi @ shape for phi in problem[0]], problem[1] @ shape
        for alpha in (0.0, 0.02, 0.3):
            c, y = stacked_problem(*problem, alpha)
            w = minimiser(*problem, alpha)
            assert_close(w, torch.linalg.pinv(c, rtol=1e-8) @ y, 1e-8)
            assert_close(w, minimiser(*narrow, alpha) @ shape.mT, 1e-8)


def test_wide_minimisers_interpolate_next_to_a_singular_step():
    """What a step shrinks to 1e-4 is still there: D k D has an eigenvalue of 1e-8 of the largest."""
    features, optima = wide()
    y = torch.einsum("nkd,nd->nk", features, optima).flatten()
    value = torch.linalg.eigvalsh(features[0] @ features[0].mT)[-1]
    for shrunk in (1e-3, 1e-4):
        w = minimiser(features, optima, float(4 / (2 * value)) * (1 + shrunk))
        assert_close(w, torch.linalg.pinv(features.flatten(0, 1)) @ y, 1e-5)


def test_kernel_coefficients_predict_what_the_weights_do():
    features, optima = wide()
    psi, x = features.flatten(0, 1), normal(5, 20, seed=4)
    y = torch.einsum("nkd,nd->nk", features, optima).flatten()
    c = kernel_meta.coefficients(psi @ psi.mT, y, GRID, [4, 4, 4])
    assert_close(c @ (psi @ x.mT), minimiser(features, optima, GRID) @ x.mT, 1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_kernel_adaptation_is_gradient_descent_on_the_weights(steps):
    """On training and on fresh inputs, with labels of no linear form."""
    phi, psi = normal(2, 4, 20, seed=0), normal(2, 6, 20, seed=1)
    y, z, start = normal(2, 4, seed=2), normal(2, 6, seed=3), normal(20, seed=4)
    residual, fresh = phi @ start - y, (psi @ start - z, psi @ phi.mT)
    alphas = torch.tensor([-0.01, 0.0, 0.02], dtype=torch.float64)
    own = kernel_meta.adapted_loss(residual, phi @ phi.mT, alphas, steps)
    other = kernel_meta.adapted_loss(residual, phi @ phi.mT, alphas, steps, fresh)
    for i, alpha in enumerate(alphas.tolist()):
        for t in range(2):
            w = start.clone()
            for _ in range(steps):
                w = w - alpha * 2 / 4 * phi[t].mT @ (phi[t] @ w - y[t])
            assert_close(own[i, t], (phi[t] @ w - y[t]).square().mean(), 1e-11)
            assert_close(other[i, t], (psi[t] @ w - z[t]).square().mean(), 1e-11)


# ---- the document --------------------------------------------------------------------------------------------------


def test_the_example_of_the_document_prints_what_it_says(capsys):
    page = (Path(__file__).parents[1] / "docs" / "theory.md").read_text(encoding="utf-8")
    section = page.split("## Closed forms of linear tasks")[1].split("\n## ")[0]
    (code,), (shown,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "text"))
    exec(compile(code, "docs/theory.md", "exec"), {})
    number = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    printed = capsys.readouterr().out
    assert number.sub("#", printed) == number.sub("#", shown)
    values = [[float(v) for v in number.findall(text)] for text in (printed, shown)]
    assert values[0] == pytest.approx(values[1], rel=0.02)  # other processors may round the last digit


def test_all_that_the_document_lists_is_there():
    page = (Path(__file__).parents[1] / "docs" / "theory.md").read_text(encoding="utf-8")
    table = page.split("## Closed forms of linear tasks")[1].split("\n## ")[0].split("| | |")[1]
    listed, module = 0, alpha_star
    modules = {m.__name__.rpartition(".")[2]: m for m in (alpha_star, kernel_meta, linear_meta)}
    for row in filter(lambda line: line.startswith("|"), table.splitlines()):
        name = re.match(r"\| \[(\w+)\.py\]", row)
        module = modules[name[1]] if name else module
        for word in re.findall(r"`(\w+)`", row):
            assert hasattr(module, word), f"{module.__name__} has no {word}"
            listed += 1
    assert listed > 25
