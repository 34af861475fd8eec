"""alpha* from features (Z1, Z2, Z5-Z8, Z11, Z12): closed forms, enumerated laws, plain loops, counter-examples."""

import itertools
import math

import pytest
import torch
from oracles import VALUES, assert_close, normal
from torch import Tensor

from metalearn.theory import alpha_star, stacks
from metalearn.theory.alpha_star import (
    Estimate,
    bootstrap,
    corollary1,
    deviation,
    gaussian_limit,
    gaussian_split,
    head_rate,
    heuristic,
    heuristic_range,
    iid_limit,
    limit,
    of_curvature,
    split,
    stacked,
    stacked_kernel,
)

LINEAR = VALUES["linear_maml"]
NORMAL_MOMENTS = (1.0, 0.0, 1.0, 0.0, 3.0, 0.0, 15.0)


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def exact(value: float) -> float:
    return pytest.approx(value, rel=1e-12)


def ragged(seed: int = 0) -> list[Tensor]:
    """Four tasks of 2 to 5 samples and three features."""
    return [normal(k, 3, seed=seed + k) for k in (2, 5, 3, 4)]


SINGLE = {
    "limit": limit,
    "of_curvature": lambda tasks: of_curvature([2 / len(phi) * phi.mT @ phi for phi in tasks]),
    "deviation": deviation,
    "heuristic": heuristic,
    "stacked": stacked,
    "wide stacked": lambda tasks: stacked(
        [torch.cat([phi, phi**2 + 1, phi**3, phi.cos(), phi.sin()], 1) for phi in tasks]
    ),
    "stacked_kernel": lambda tasks: stacked_kernel(
        torch.cat(list(tasks)) @ torch.cat(list(tasks)).mT, [*map(len, tasks)]
    ),
    "split": lambda tasks: split(tasks, [phi.flip(1) + 1 for phi in tasks]),
}
single = pytest.mark.parametrize("estimator", SINGLE.values(), ids=SINGLE)


# ---- fixtures of the specification -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VALUES["alpha_gaussian_closed_form"], ids=lambda c: f"K={c['K']},d={c['d']}")
def test_gaussian_closed_forms_are_those_of_the_fixture(case):
    shape = case["K"], case["d"], case["s"]
    assert gaussian_limit(*shape) == exact(case["eq3.3"])
    assert gaussian_split(*shape) == exact(case["cor2"])


def test_estimators_give_the_numbers_of_the_fixture():
    features = tensor(LINEAR["inputs"]["Phi"])
    assert limit(features).value == exact(LINEAR["alpha_eq3.3"])
    one = LINEAR["alpha_H1_single_task"]
    assert split(tensor([one["Phi_u"]]), tensor([one["Phi_t"]])).value == exact(one["value"])
    psi, over = tensor(LINEAR["overparam"]["Psi_all"]), LINEAR["overparam"]
    for tasks in (psi[:, None], psi[None]):
        assert stacked(tasks).value == exact(over["alpha_H14"])
        assert deviation(tasks).value == exact(over["alpha_H15_population_std"])
        assert deviation(tasks, unbiased=True).value == exact(over["alpha_H15_unbiased_std"])


@pytest.mark.parametrize("case", VALUES["h18_range"], ids=lambda c: f"N={c['N']}")
def test_heuristic_range_is_that_of_the_fixture(case):
    low, high = heuristic_range(case["N"], case["K"], case["d"])
    assert (low, high) == (exact(case["min"]), exact(case["max_n_obs_NK"]))


# ---- closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("K", "d", "s"), [(10, 5, 1.0), (3, 8, 2.0)])
def test_gaussian_features_give_the_closed_forms(K, d, s):
    """Z1: within 4 standard errors, which are below half a percent."""
    train, validation = s * normal(15000, K, d, seed=0), s * normal(15000, 2 * K, d, seed=1)
    for found, expected in (
        (limit(train), gaussian_limit(K, d, s)),
        (split(train, validation), gaussian_split(K, d, s)),
    ):
        assert found.se < 0.005 * expected
        assert abs(found.value - expected) < 4 * found.se


def test_iid_limit_is_the_gaussian_closed_form():
    for K, d in itertools.product((1, 2, 5, 50), (1, 2, 7, 20)):
        assert iid_limit(K, d, NORMAL_MOMENTS) == exact(gaussian_limit(K, d))


@pytest.mark.parametrize(("K", "d"), [(1, 3), (2, 2), (3, 1), (4, 1), (2, 3)])
def test_iid_limit_is_exact_on_an_enumerated_law(K, d):
    """A law of two points, not centred: all 2^(K d) matrices with their probabilities, as weighted tasks."""
    points, chances = tensor([-0.5, 2.0]), tensor([0.7, 0.3])
    which = torch.cartesian_prod(*[torch.arange(2)] * (K * d)).view(-1, K, d)
    phi, weight = points[which], chances[which].prod(-1).prod(-1)
    g = phi.mT @ phi
    expected = K * (weight * (g @ g).diagonal(dim1=1, dim2=2).sum(1)).sum()
    expected /= 2 * (weight * (g @ g @ g).diagonal(dim1=1, dim2=2).sum(1)).sum()
    moments = [float((chances * points**p).sum()) for p in range(7)]
    assert iid_limit(K, d, moments) == exact(float(expected))


def test_uniform_features_of_the_paper():
    """U(-5, 5), K = 50, d = 20: 0.0357 by the specification's Monte-Carlo."""
    moments = [5**p / (p + 1) * (p % 2 == 0) for p in range(7)]
    assert iid_limit(50, 20, moments) == pytest.approx(0.0357, abs=5e-5)


# ---- what the estimates are --------------------------------------------------------------------------------------


def test_estimates_minimise_the_mean_loss_after_a_step():
    """E tr[(I - alpha A) B (I - alpha A)], as the expectation over an isotropic a, has slope 0 and is least there."""
    train, validation = ragged(), ragged(10)

    def loss(alpha: float, query: list[Tensor]) -> float:
        total = 0.0
        for phi, psi in zip(train, query, strict=True):
            m = torch.eye(3, dtype=torch.float64) - 2 * alpha / len(phi) * phi.mT @ phi
            total += float((psi @ m).square().sum()) / len(psi)
        return total

    for alpha, query in ((limit(train).value, train), (split(train, validation).value, validation)):
        at, h = loss(alpha, query), 1e-4
        assert loss(alpha + h, query) > at < loss(alpha - h, query)
        assert (loss(alpha + h, query) - loss(alpha - h, query)) / (2 * h) == pytest.approx(0, abs=1e-8)


def test_one_step_of_the_estimate_solves_tasks_of_one_curvature():
    """Z5, Z12: G = lambda I gives alpha = K / (2 lambda), and (I - 2 alpha / K G) = 0: least squares in one step."""
    q = torch.linalg.qr(normal(3, 6, 4, seed=0)).Q
    found = limit(1.5 * q)
    assert found.value == exact(6 / (2 * 1.5**2)) and found.se < 1e-12
    w, a, phi = normal(4, seed=1), normal(4, seed=2), 1.5 * q[0]
    gradient = 2 / 6 * phi.mT @ (phi @ (w - a))
    assert_close(w - found.value * gradient, a)
    assert limit(q).value == exact(6 / 2)


def test_split_on_the_same_samples_is_the_limit():
    """Z6."""
    assert split(ragged(), ragged()) == pytest.approx(limit(ragged()), rel=1e-12)


def test_split_takes_either_side():
    """K < d and K > d use other products; a zero column of both changes the side and not the value."""
    u, t = normal(5, 4, 3, seed=0), normal(5, 7, 3, seed=1)
    wide = torch.nn.functional.pad(u, (0, 3)), torch.nn.functional.pad(t, (0, 3))
    assert split(u, t) == pytest.approx(split(*wide), rel=1e-12)
    expected = sum(float(torch.trace(a.mT @ a @ b.mT @ b)) for a, b in zip(u, t, strict=True)) * 4 / 2
    expected /= sum(float(torch.trace(a.mT @ a @ b.mT @ b @ a.mT @ a)) for a, b in zip(u, t, strict=True))
    assert split(u, t).value == exact(expected)


@pytest.mark.parametrize("estimator", [limit, stacked])
def test_both_sides_agree(estimator):
    """Z7: orthogonal rotation into more features than samples leaves all inner products."""
    phi = normal(6, 4, 3, seed=0)
    rotation = torch.linalg.qr(normal(40, 3, seed=1)).Q
    assert estimator(phi) == pytest.approx(estimator(phi @ rotation.mT), rel=1e-12)


@pytest.mark.parametrize("estimator", [limit, deviation, heuristic, stacked, split], ids=lambda e: e.__name__)
def test_scale_of_the_features(estimator):
    """Z2: features times c divide alpha* by c^2, its standard error too."""
    features = (ragged(), ragged(5)) if estimator is split else (ragged(),)
    expected = estimator(*features)
    found = estimator(*([3 * phi for phi in tasks] for tasks in features))
    assert found == pytest.approx(Estimate(expected.value / 9, expected.se / 9), rel=1e-10)


@single
def test_standard_error_is_the_jackknife_over_tasks(estimator):
    """The whole estimate again without each task, in a loop."""
    tasks = ragged()
    left = tensor([estimator(tasks[:i] + tasks[i + 1 :]).value for i in range(4)])
    assert estimator(tasks).se == pytest.approx(float((3 / 4 * (left - left.mean()).square().sum()).sqrt()), rel=1e-9)
    assert math.isnan(estimator(tasks[:1]).se)


@single
def test_order_of_tasks_and_samples_does_not_matter(estimator):
    shuffled = [phi.flip(0) for phi in reversed(ragged())]
    assert estimator(shuffled) == pytest.approx(estimator(ragged()), rel=1e-10)


def test_tensors_in_chunks_are_iterables(monkeypatch):
    """And generators: each task is looked at once."""
    phi, psi = normal(7, 4, 3, seed=0), normal(7, 5, 3, seed=1)
    curvature = phi.mT @ phi
    for limit_of_memory in (2**22, 30):
        monkeypatch.setattr(stacks, "CHUNK", limit_of_memory)
        for estimator in (limit, deviation, heuristic, stacked):
            assert estimator(iter(phi)) == pytest.approx(estimator(phi), rel=1e-12)
        assert split(iter(phi), psi) == pytest.approx(split(phi, psi), rel=1e-12)
        assert of_curvature(iter(curvature)) == pytest.approx(of_curvature(curvature), rel=1e-12)


def test_of_curvature_on_grams_and_with_another_query_curvature():
    train, validation = ragged(), ragged(5)
    a = [2 / len(f) * f.mT @ f for f in train]
    b = [2 / len(f) * f.mT @ f for f in validation]
    assert of_curvature(a) == pytest.approx(limit(train), rel=1e-12)
    assert of_curvature([2 / len(f) * f @ f.mT for f in train]) == pytest.approx(limit(train), rel=1e-12)
    assert of_curvature(a, b) == pytest.approx(split(train, validation), rel=1e-12)


def test_ratio_of_sums_is_not_the_mean_of_ratios():
    tasks = [normal(4, 3, seed=0), 3 * normal(4, 3, seed=1)]
    alone = [limit([phi]).value for phi in tasks]
    powers = [[float(torch.linalg.matrix_power(phi.mT @ phi, p).trace()) for phi in tasks] for p in (2, 3)]
    assert limit(tasks).value == exact(4 * sum(powers[0]) / (2 * sum(powers[1])))
    assert limit(tasks).value < 0.9 * sum(alone) / 2


def test_float32_features_are_worked_on_in_float64():
    phi = normal(3, 5, 4, seed=0).float()
    assert limit(phi) == limit(phi.double())


def test_features_that_tell_nothing_are_refused():
    with pytest.raises(ValueError, match="all zero"):
        limit(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="constant"):
        deviation(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="at least one task"):
        limit([])
    with pytest.raises(ValueError, match=r"shape \[3, 4\], not \[T, K, d\]"):
        limit(torch.ones(3, 4))
    with pytest.raises(ValueError, match="shorter"):
        split(ragged(), ragged()[:3])
    for other, said in ((normal(1, 4, 2, seed=0), "3 tasks, the other 1"), (normal(2, 4, 2, seed=0), "3 tasks")):
        with pytest.raises(ValueError, match=said):
            split(normal(3, 4, 2, seed=0), other)
    with pytest.raises(ValueError, match="2 features in one set and 1 in the other"):
        split(normal(3, 4, 2, seed=0), normal(3, 4, 1, seed=0))
    for zero in (torch.zeros(2, 3, 4), torch.full((2, 3, 4), math.nan)):
        with pytest.raises(ValueError, match="all zero or not finite"):
            corollary1(zero)
    with pytest.raises(ValueError, match="no tasks"):
        corollary1([])


def test_numbers_out_of_range_are_refused_by_name():
    for keys in ({"tasks": 0}, {"samples": 0}, {"width": -1}, {"observations": 0}):
        name, value = next(iter(keys.items()))
        with pytest.raises(ValueError, match=f"{name}={value}: must be > 0"):
            heuristic_range(**{"tasks": 2, "samples": 3, "width": 4} | keys)
    with pytest.raises(ValueError, match="range of features .* is empty"):
        heuristic_range(2, 3, 4, low=1.0, high=1.0)
    for form in (gaussian_limit, gaussian_split):
        with pytest.raises(ValueError, match="s=0.0: must be > 0"):
            form(3, 4, 0.0)
    with pytest.raises(ValueError, match="samples=0: must be > 0"):
        alpha_star.epsilon(0.1, 0, 1.0, 2.0)
    with pytest.raises(ValueError, match="largest=1.0: must be >= smallest=2.0"):
        alpha_star.epsilon(0.1, 10, 2.0, 1.0)


@pytest.mark.parametrize("offset", [1e4, 1e7])
def test_spread_of_entries_far_from_zero(offset):
    """sigma^2 of features whose mean is 1e7 times that, in tasks of different sizes and means."""
    tasks = [offset + i + phi for i, phi in enumerate(ragged())]
    entries = torch.cat([(phi - offset).flatten() for phi in tasks])
    for unbiased in (False, True):
        variance = float(entries.var(unbiased=unbiased))
        assert deviation(tasks, unbiased=unbiased).value == pytest.approx(1 / (2 * 14 * variance), rel=1e-9)
        assert heuristic(tasks, unbiased=unbiased).value == pytest.approx(1 / (2 * 3 * variance), rel=1e-9)


# ---- intervals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [limit, deviation, heuristic, stacked], ids=lambda e: e.__name__)
def test_bootstrap_agrees_with_the_jackknife(estimator):
    """For many similar tasks both are normal intervals: ends within 0.6 of 3.92 standard errors."""
    tasks = list(1 + normal(150, 4, 3, seed=3))
    value, se = estimator(tasks)
    low, high = bootstrap(estimator, tasks)
    assert abs(low - (value - 1.96 * se)) < 0.6 * se and abs(high - (value + 1.96 * se)) < 0.6 * se
    assert bootstrap(estimator, tasks) == (low, high) != bootstrap(estimator, tasks, seed=1)
    narrow = bootstrap(estimator, tasks, level=0.5)
    assert low < narrow.low < narrow.high < high


def test_bootstrap_intervals_cover_the_truth():
    """Of 100 samples of 150 tasks, about 95 intervals hold the closed form (88 is 3.2 standard deviations below)."""
    samples, truth = normal(100, 150, 10, 2, seed=0), gaussian_limit(10, 2)
    held = [low < truth < high for low, high in (bootstrap(limit, s, resamples=200) for s in samples)]
    assert 88 <= sum(held)


@pytest.mark.parametrize("estimator", [limit, deviation, heuristic, stacked], ids=lambda e: e.__name__)
def test_one_task_has_no_interval(estimator):
    """As it has no standard error."""
    assert all(map(math.isnan, bootstrap(estimator, ragged()[:1])))


def test_intervals_of_the_stacked_estimate_are_positive():
    """Five very different tasks: influences on alpha itself give a negative end, those on log alpha do not."""
    tasks = [scale * normal(3, 2, seed=i) for i, scale in enumerate((0.1, 0.3, 1.0, 3.0, 9.0))]
    terms = stacked.terms(tasks)
    value, linear = terms.estimate().value, terms._replace(drawn=None).interval()
    low, high = terms.interval()
    assert linear.low < 0 < low < value < high
    assert (low, high) == pytest.approx([value * math.exp(end / value - 1) for end in linear], rel=1e-9)


@pytest.mark.parametrize("estimator", [deviation, heuristic], ids=lambda e: e.__name__)
def test_resamples_without_any_spread_have_no_finite_rate(estimator):
    """One task of three has features that are not 0: some resamples leave it out, and none gives a negative rate."""
    low, high = bootstrap(estimator, torch.cat([normal(1, 4, 3, seed=0), torch.zeros(2, 4, 3)]))
    assert 0 < low < high == math.inf


def test_intervals_refuse_what_is_no_level_or_number():
    terms = limit.terms(ragged())
    for level in (0.0, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"level={level}: must be > 0 and < 1"):
            terms.interval(level=level)
    with pytest.raises(ValueError, match="resamples=0: must be > 0"):
        terms.interval(resamples=0)
    with pytest.raises(ValueError, match="tasks=0: must be > 0"):
        bootstrap(limit, [])


# ---- ranges and bounds -------------------------------------------------------------------------------------------


def test_heuristic_range_brackets_every_variance_that_it_allows():
    """Z11: features in [m, M] of which both ends occur."""
    for seed, (low, high) in enumerate([(0.0, 1.0), (-2.0, 3.0)]):
        phi = low + (high - low) * normal(5, 2, 3, seed=seed).sigmoid()
        phi[0, 0, 0], phi[0, 0, 1] = low, high
        ends = heuristic_range(5, 2, 3, 30, low, high)
        assert ends.low < heuristic(phi).value < ends.high
    middle = torch.full((5, 2, 3), 0.5, dtype=torch.float64)
    middle[0, 0, 0], middle[0, 0, 1] = 0, 1
    assert heuristic(middle).value == exact(heuristic_range(5, 2, 3, 30).high)
    halves = tensor([0.0, 1.0]).repeat(15).view(5, 2, 3)
    assert heuristic(halves).value == exact(heuristic_range(5, 2, 3, 30).low)


def test_deterministic_features_obey_corollary_1():
    """Z8, with the larger lower bound 1 / (2 sigma^2)."""
    for seed in range(20):
        phi = normal(1, 6, 4, seed=seed) * torch.logspace(-1, 1, 4, dtype=torch.float64)
        low, high = corollary1(phi, deterministic=True)
        assert corollary1(phi).low == exact(low / 4)
        assert low <= limit(phi).value <= high


def test_corollary_1_lower_bound_fails_for_random_features():
    """C-10: one Gaussian feature, any K: K / (2 (K + 4) s^2) < 1 / (2 s^2); the upper bound holds."""
    for K in (1, 5, 50):
        assert gaussian_limit(K, 1, 2.0) == exact(K / (2 * (K + 4) * 4)) and gaussian_limit(K, 1, 2.0) < 1 / (2 * 4)
    phi = normal(20000, 5, 1, seed=0)
    low, high = corollary1(phi)
    assert limit(phi).value + 4 * limit(phi).se < low and low == high


def test_h15_does_not_follow_from_h14():
    """C-10: exact for N(0, 1) entries, and drawn; a rank-one Psi."""
    for (n, d), h14, h15 in (((20, 2000), 0.00490, 0.0250), ((100, 100), 0.1986, 0.0050)):
        assert gaussian_limit(n, d) == pytest.approx(h14, abs=10 ** (-5 if n < d else -4)) and 1 / (2 * n) == exact(h15)
        draws = [psi[:, None] for psi in normal(8, n, d, seed=d)]
        assert sum(stacked(psi).value for psi in draws) / 8 == pytest.approx(h14, rel=0.03)
        assert sum(deviation(psi).value for psi in draws) / 8 == pytest.approx(h15, rel=0.03)
    assert stacked(torch.full((4, 5, 7), 3.0)).value == exact(1 / (2 * 7 * 9))


def test_example_2_holds_for_one_feature_alone():
    """C-10: E[Y^4] / (2 E[Y^6]) at K = 1; N(0, s^2) has 1 / (2 (d + 4) s^2)."""
    printed = NORMAL_MOMENTS[4] / (2 * NORMAL_MOMENTS[6])
    assert iid_limit(1, 1, NORMAL_MOMENTS) == exact(printed)
    for d in (2, 10):
        assert iid_limit(1, d, NORMAL_MOMENTS) == exact(1 / (2 * (d + 4))) and 1 / (2 * (d + 4)) < 0.9 * printed


def test_epsilon_of_proposition_1():
    """l_S / l_I^2 without adaptation; with G = lambda I it is that of C^T C."""
    assert alpha_star.epsilon(0.0, 10, 2.0, 3.0) == exact(3 / 4)
    m = 1 - 2 * 0.3 / 10 * 2
    assert alpha_star.epsilon(0.3, 10, 2.0, 2.0) == exact(1 / (2 * m * m))
    assert alpha_star.epsilon(5 / 2, 10, 2.0, 2.0) == math.inf


# ---- online estimate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gram_mean", "feature_mean", "diag"])
def test_head_rate_is_that_of_plain_matrices(kind):
    features = normal(3, 6, 4, seed=0).abs()
    for own, rate in zip(features, head_rate(features, kind), strict=True):
        f = torch.stack([row / row.norm() for row in own])
        spread = {
            "gram_mean": (f @ f.mT).mean(),
            "feature_mean": (f.mT @ f).mean(),
            "diag": (f.mT @ f).diagonal().mean(),
        }
        assert_close(rate, 1 / (2 * 6 * spread[kind]))


def test_head_rate_ranges():
    """Equal rows give 1 / (2 n), orthogonal ones 1 / 2; `diag` knows the shape only; no scale, no gradient."""
    row, n = normal(5, seed=0).requires_grad_(), 20
    assert_close(head_rate(row.expand(n, 5)), torch.tensor(1 / (2 * n), dtype=torch.float64))
    assert_close(head_rate(7 * torch.eye(n, dtype=torch.float64)), torch.tensor(0.5, dtype=torch.float64))
    assert_close(head_rate(normal(2, n, 5, seed=1), "diag"), torch.full((2,), 5 / (2 * n * n), dtype=torch.float64))
    assert not head_rate(row.expand(n, 5)).requires_grad
    features = normal(n, 64, seed=2).relu()
    assert 1 / (2 * n) < float(head_rate(features)) < 0.1
    with pytest.raises(ValueError, match="'gram' is none of gram_mean, feature_mean, diag"):
        head_rate(features, "gram")
