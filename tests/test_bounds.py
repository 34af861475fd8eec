"""The bounds of TSA-MAML: B1-B3 of the specification, their terms against slow loops, and learners."""

import math

import numpy as np
import oracles
import pytest
import torch
from oracles import assert_close, build, normal
from torch import Tensor

from metalearn.algorithms import MAML, ProtoNet, Reptile
from metalearn.backbones import MLP
from metalearn.data import Episodes
from metalearn.datasets.base import Dataset
from metalearn.datasets.sinusoid import Sinusoid
from metalearn.episode import Episode
from metalearn.functional import per_task
from metalearn.optim import Adam
from metalearn.random import Key
from metalearn.samplers import Uniform
from metalearn.theory import bounds, diagnosis
from metalearn.theory.bounds import Constants, Tasks
from metalearn.theory.diagnosis import Optima, diagnose
from metalearn.theory.logistic import LOGISTIC, group_starts, logistic, logistic_tasks, study

KEY = Key(0, "test")


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return logistic_tasks(KEY, 20, 10, 10, points=400)


# ---- the terms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "q", "theorem1", "theorem2"), [(1.0, 1, 0.4, 0.02), (1.0, 4, 3.25, 1.3203125), (4.0, 2, 6.4, 5.12)]
)
def test_bounds_first_terms_are_those_of_the_fixture(alpha, q, theorem1, theorem2):
    """Numbers of the specification: G = 1, L = 1/4, K = 10."""
    assert bounds.generalization_term(LOGISTIC, alpha, q, 10) == pytest.approx(theorem1, rel=1e-12)
    assert bounds.gradient_term(LOGISTIC, alpha, q, 10) == pytest.approx(theorem2, rel=1e-12)


def test_bounds_first_terms_grow_with_q_and_vanish_with_samples():
    """B2: 1 / K and 1 / K^2; for small alpha 4 G^2 alpha q / K, twice what convex stability gives."""
    c = Constants(1.3, 0.7)
    for alpha in (0.1, 1.0):
        for term, power in ((bounds.generalization_term, 1), (bounds.gradient_term, 2)):
            values = [term(c, alpha, q, 10) for q in range(9)]
            assert values[0] == 0 and values == sorted(set(values))
            assert term(c, alpha, 3, 30) == pytest.approx(values[3] / 3**power, rel=1e-12)
    for q in (1, 5):
        small = bounds.generalization_term(c, 1e-9, q, 10)
        assert small == pytest.approx(4 * 1.3**2 * 1e-9 * q / 10, rel=1e-7)
        assert small == pytest.approx(2 * bounds.convex_generalization_term(c, 1e-9, q, 10), rel=1e-7)
        assert bounds.convex_generalization_term(c, 1.4, q, 10) < bounds.generalization_term(c, 1.4, q, 10)


def test_bounds_distance_factor_without_convexity():
    """1 / (2 alpha) fails for a single data set that is not convex, 1 / (2 alpha) + L_s / 2 holds: one step on cos."""
    start, reached, optimum = 0.1, 0.1 + math.sin(0.1), 0.6
    excess, distance = math.cos(reached) - math.cos(optimum), (start - optimum) ** 2
    assert bounds.distance_factor(1.0, 1.0, convex=True) * distance < excess
    assert excess < bounds.distance_factor(1.0, 1.0, convex=False) * distance
    with pytest.raises(ValueError, match="exceeds 1 / L_s = 0.5"):
        bounds.distance_factor(0.6, 2.0, convex=True)


# ---- what is measured --------------------------------------------------------------------------------------------


def test_bounds_measured_quantities_are_those_of_plain_loops(tasks):
    """Each task, data set and step in turn, with the gradients of logistic regression written out."""
    alpha, q, starts = 3.0, 2, normal(20, 5, seed=0)
    found = bounds.measure(logistic, tasks, starts, alpha, (q,))[q]

    def risk(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
        return float(np.log1p(np.exp(-y * (x @ w))).mean())

    def slope(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return -(x * (y / (1 + np.exp(y * (x @ w))))[:, None]).mean(0)

    for t in (0, 7):
        x, y, best = (v[t].numpy() for v in (tasks.x, tasks.y, tasks.optima))
        ends = []
        for rows in tasks.rows[t].numpy():
            w = starts[t].numpy()
            for _ in range(q):
                w = w - alpha * slope(w, x[rows], y[rows])
            ends.append((w, x[rows], y[rows]))
        least = risk(best, x, y)
        expected = {
            "excess": np.mean([risk(w, x, y) - least for w, *_ in ends]),
            "empirical": np.mean([risk(*end) - least for end in ends]),
            "own_gradient": np.mean([(slope(*end) ** 2).sum() for end in ends]),
            "start": ((starts[t].numpy() - best) ** 2).sum(),
            "distance": np.mean([((w - best) ** 2).sum() for w, *_ in ends]),
        }
        pairs = [slope(a, x, y) @ slope(b, x, y) for i, (a, *_) in enumerate(ends) for b, *_ in ends[:i]]
        expected["gradient"] = np.mean(pairs)
        for name, value in expected.items():
            assert float(getattr(found, name)[t]) == pytest.approx(float(value), rel=1e-10), name


def test_bounds_square_of_a_mean_is_unbiased():
    """Over all ordered pairs of four vectors it averages to the square of their mean; the biased one to more."""
    v = normal(4, 3, seed=0)
    pairs = torch.stack([torch.stack([a, b]) for a in v for b in v])
    exact = v.mean(0).square().sum()
    assert_close(bounds.squared_norm_of_mean(pairs).mean(), exact)
    biased = bounds.squared_norm_of_mean(pairs, unbiased=False)
    assert_close(biased, pairs.mean(1).square().sum(1))
    assert float(biased.mean()) > 1.1 * float(exact)
    with pytest.raises(ValueError, match="at least two samples"):
        bounds.squared_norm_of_mean(v[:1])


def test_bounds_optima_are_those_of_long_descent(tasks):
    """Tolerance: what 1,500 steps of descent leave in the flattest direction."""
    assert float(bounds.slopes(logistic, tasks.optima, tasks.x, tasks.y).norm(dim=1).max()) < 1e-10
    x, y = tasks.x[:3], tasks.y[:3]
    assert_close(tasks.optima[:3], bounds.descend(logistic, 0 * tasks.optima[:3], x, y, 4.0, 1500)[-1], rtol=1e-3)


def test_bounds_optima_that_are_not_reached_are_refused(tasks):
    with pytest.raises(ArithmeticError, match="is left after 1 Newton steps"):
        bounds.newton(logistic, 0 * tasks.optima, tasks.x, tasks.y, steps=1)


def test_bounds_constants_of_logistic_regression(tasks):
    """Closed forms |x| sigma and |x|^2 sigma (1 - sigma) at their largest; never above G = 1 and L_s = 1/4."""
    x, y = tasks.datasets()
    phi = normal(len(x), 5, seed=1)
    found = bounds.empirical_constants(logistic, [phi], x, y)
    chance, norm = torch.sigmoid(-y * torch.einsum("bnd,bd->bn", x, phi)), x.norm(dim=2)
    assert found.lipschitz == pytest.approx(float((norm * chance).max()), rel=1e-10)
    assert found.smoothness == pytest.approx(float((norm.square() * chance * (1 - chance)).max()), rel=1e-10)
    assert found.lipschitz <= LOGISTIC.lipschitz and found.smoothness <= LOGISTIC.smoothness


def test_bounds_smoothness_is_the_largest_eigenvalue_in_size():
    """Two layers of width one: an indefinite Hessian of rank two. Without curvature it is zero."""

    def loss(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (phi[:, :1] * torch.tanh(phi[:, 1:] * x[..., 0]) - y).square()

    phi, x, y = normal(3, 2, seed=0), normal(3, 4, 1, seed=1), 3 * normal(3, 4, seed=2)
    found = bounds.empirical_constants(loss, [phi], x, y, steps=500)
    largest, steepest = 0.0, 0.0
    for t in range(3):
        for i in range(4):

            def alone(p: Tensor, t=t, i=i) -> Tensor:
                return loss(p[None], x[t : t + 1, i : i + 1], y[t : t + 1, i : i + 1]).sum()

            eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(alone, phi[t]))
            largest = max(largest, float(eigenvalues.abs().max()))
            steepest = max(steepest, float(torch.autograd.functional.jacobian(alone, phi[t]).norm()))
    assert found.smoothness == pytest.approx(largest, rel=1e-6)
    assert found.lipschitz == pytest.approx(steepest, rel=1e-10)
    linear = bounds.empirical_constants(lambda p, x, y: (p[:, None] * x).sum(-1), [phi], normal(3, 4, 2, seed=3), y)
    assert linear.smoothness == 0.0 and linear.lipschitz > 0


# ---- the theorems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_bounds_hold_for_logistic_regression(tasks, alpha):
    """B1, and the sharper forms of `docs/theory.md`. Slack against E_D: the first term, at least 0.2."""
    starts = group_starts(tasks.optima, 1)
    gaps = []
    for q, measured in bounds.measure(logistic, tasks, starts, alpha, (1, 2, 4, 8)).items():
        r = bounds.bound_terms(measured, LOGISTIC, alpha, q, 10)
        assert 0 < r["er"] <= r["a"] <= r["b_smooth"] <= r["b"]
        assert 0 <= r["epg"] <= r["epg_bound"]
        assert r["gap"] <= r["convex_first"] < r["first"]
        gaps.append(r["gap"])
    assert gaps == sorted(gaps)  # more steps, more of the data set's own


def wave(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """1 - cos(x . phi - y): not convex, G = L_s = 1 where |x| <= 1."""
    return 1 - torch.cos(torch.einsum("bnd,bd->bn", x, phi) - y)


@pytest.mark.parametrize("loss", [logistic, wave])
def test_bounds_exchanging_one_sample_moves_the_end_by_little(tasks, loss):
    """Stability behind the first terms: G |theta^q - theta'^q| is half of them, even with rho = 1 + alpha L_s."""
    c, alpha = (LOGISTIC, 4.0) if loss is logistic else (Constants(1.0, 1.0), 1.0)
    (x, y), start = tasks.datasets(), normal(200, 5, seed=0)
    other = x.clone(), y.clone()
    other[0][:, 0], other[1][:, 0] = -x[:, 0].flip(0), y[:, 0] + 1.0 if loss is wave else y[:, 0]
    paths = [bounds.descend(loss, start, *data, alpha, 8) for data in ((x, y), other)]
    for q in (1, 2, 4, 8):
        moved = float((paths[0][q] - paths[1][q]).norm(dim=1).max())
        growth = ((1 + alpha * c.smoothness) ** q - 1) / (10 * c.smoothness)
        bound = alpha * q / 10 if loss is logistic else growth
        assert 0.05 * alpha / 10 < moved <= 2 * c.lipschitz * bound
        assert 2 * c.lipschitz**2 * growth <= bounds.generalization_term(c, alpha, q, 10)


def test_bounds_b_holds_in_expectation_without_convexity():
    """Descent and smoothness at the minimum need no convexity, and L_s / 2 is enough."""
    x = KEY.sub("x").uniform(200, torch.arange(30), low=-1.0).double().unsqueeze(-1)
    y = 2 * x[..., 0] + KEY.sub("y").normal(200, torch.arange(30)).double()
    grid = torch.linspace(-20, 20, 4001).double()
    risk = torch.stack([wave(g.expand(30, 1), x, y).mean(1) for g in grid], 1)
    best = grid[risk.argmin(1), None]
    for _ in range(60):  # Newton's steps from the best of the grid
        at = best.clone().requires_grad_()
        g = bounds.slopes(wave, at, x, y, create_graph=True)
        best = best - g.detach() / torch.autograd.grad(g.sum(), at)[0]
    inside = risk[:, 1:-1]
    assert bool((((inside < risk[:, :-2]) & (inside < risk[:, 2:])).sum(1) > 1).all())  # several minima each
    made = Tasks(x, y, best, torch.empty(30, 0, 0)).draw(KEY, 50, 5)
    for shift in (-4.0, -1.0, 3.0, 6.0):
        for q, measured in bounds.measure(wave, made, best + shift, 1.0, (1, 4)).items():
            r = bounds.bound_terms(measured, Constants(1.0, 1.0), 1.0, q, 5, convex=False)
            assert 0 <= r["er"] <= r["a"] <= r["b_smooth"] < r["b"]


def test_bounds_distance_falls_with_more_groups(tasks):
    """B3, Corollary 1: the sum of squares within k-means clusters against the total; one group per task leaves none."""
    distances = [float(bounds.dist2(group_starts(tasks.optima, m), tasks.optima).mean()) for m in (1, 2, 3, 5, 20)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-20
    spread = tasks.optima.var(0, correction=0).sum()
    assert distances[0] == pytest.approx(float(spread), rel=1e-12)
    er = [bounds.measure(logistic, tasks, group_starts(tasks.optima, m), 4.0, (1,))[1].mean()["excess"] for m in (1, 5)]
    assert er[1] < er[0]


def test_bounds_population_does_not_depend_on_the_data_sets():
    a, b = logistic_tasks(KEY, 3, 2, 4, points=50), logistic_tasks(KEY, 3, 5, 7, points=50)
    for name in ("x", "y", "optima"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)
    assert a.rows.shape == (3, 2, 4) and b.rows.shape == (3, 5, 7)
    assert float(a.x.norm(dim=2).max()) <= 1 + 1e-12


def test_bounds_study_is_what_its_parts_say():
    found = study(0, tasks=12, sets=4, samples=(10, 20), steps=(1, 2), groups=(1, 2))
    assert len(found["theorems"]) == 2 * 2 * 3 and len(found["corollary"]) == 2 * 2 * 3
    for r in (*found["theorems"], *found["corollary"]):
        assert all(r["holds"].values()) and bool(r["holds"]) == (r["q"] > 0)
    same = [r for r in found["theorems"] if r["K"] == 10]
    assert same == [r for r in found["corollary"] if r["m"] == 1]


# ---- learners ----------------------------------------------------------------------------------------------------


class Fixed(Dataset):
    """These episodes, always."""

    label_space = "permuted"

    def __init__(self, episodes: Episode):
        self.episodes, self.input_shape = episodes, tuple(episodes.query.x.shape[2:])
        self.kind = "regression" if episodes.query.y.is_floating_point() else "classification"

    def outputs(self, split):
        return 1 if self.kind == "regression" else int(self.episodes.query.y.max()) + 1

    def draw(self, split, key, step, task):
        return {"index": step}

    def fetch(self, split, draw):
        return self.episodes.select(draw["index"])

    def data_hash(self):
        return "fixed"


@pytest.fixture
def linear():
    """A MAML learner of linear regression, its tasks, and their theta_T*."""
    learner = build(MAML, oracles.LinearForm(2), "regression", alpha=0.1, inner_steps=1, test_steps=3)
    data = Fixed(oracles.curves(4, shot=5, queries=40))
    best = torch.linalg.lstsq(data.episodes.query.x, data.episodes.query.y).solution.mT
    zero = torch.zeros(4, dtype=torch.float64)
    risk = (data.episodes.query.x @ best.mT - data.episodes.query.y).square().mean((1, 2))
    return learner, data, Optima({"head.weight": best}, risk, zero)


def test_bounds_diagnosis_of_linear_regression_is_a_closed_form(linear):
    """One task and support set after the other: L_T(w) - L_T* = |X (w - w*)|^2 / n, and its gradient."""
    learner, data, optima = linear
    found = diagnose(learner, data, tasks=4, sets=3, optima=optima)
    assert found.er.shape == found.epg.shape == found.dist2.shape == (4, 4)
    rows = diagnosis._support_rows(data.episodes, 1, 3, Key(0, "diagnosis"))
    start = learner.net.head.weight.detach()[0]
    for t in range(4):
        x, y, best = data.episodes.query.x[t], data.episodes.query.y[t, :, 0], optima.phi["head.weight"][t, 0]
        at = [start.clone() for _ in range(3)]
        for q in range(4):
            slopes = [2 * x.mT @ (x @ w - y) / 40 for w in at]
            assert_close(found.er[t, q], torch.stack([(x @ (w - best)).square().mean() for w in at]).mean(), 1e-10)
            assert_close(found.dist2[t, q], torch.stack([(w - best).square().sum() for w in at]).mean(), 1e-10)
            pairs = [slopes[i] @ slopes[j] for i, j in ((0, 1), (0, 2), (1, 2))]
            assert_close(found.epg[t, q], torch.stack(pairs).mean(), 1e-10)
            at = [w - 0.1 * 2 * x[r].mT @ (x[r] @ w - y[r]) / 5 for w, r in zip(at, rows[t], strict=True)]


def test_bounds_fit_finds_the_minimum_of_linear_regression(linear):
    learner, data, optima = linear
    found = diagnose(learner, data, tasks=4, sets=2, fit_steps=1500)
    assert_close(found.optima.phi["head.weight"], optima.phi["head.weight"], rtol=1e-3)
    assert_close(found.optima.risk, optima.risk, rtol=1e-6)
    assert float(found.optima.slope.max()) < 1e-3 and float(found.er.min()) > -1e-9


def test_bounds_support_sets_are_as_those_of_episodes():
    """As many of every class, none twice, another set each time, the same for another call."""
    episodes = oracles.pictures(3, way=3, shot=2, queries=6)
    rows = diagnosis._support_rows(episodes, 3, 4, KEY)
    assert rows.shape == (3, 4, 6) and torch.equal(rows, diagnosis._support_rows(episodes, 3, 4, KEY))
    labels = episodes.query.y[torch.arange(3)[:, None, None], rows]
    assert torch.equal(labels, episodes.support.y[:, None].expand(-1, 4, -1))
    sets = {tuple(sorted(r)) for r in rows.flatten(0, 1).tolist()}
    assert all(len(set(s)) == 6 for s in sets) and len(sets) > 6
    with pytest.raises(ValueError, match=r"support sets of 2 need as many .* raise dataset.test_queries"):
        diagnosis._support_rows(oracles.pictures(3, shot=2, queries=1), 3, 2, KEY)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (MAML, {"alpha": 0.1}),
        (MAML, {"alpha": 0.1, "adapted": "head"}),
        (Reptile, {"alpha": 0.01, "test_inner_batch": 4}),
    ],
)
def test_bounds_diagnosis_of_any_learner(cls, arguments):
    """Through `adapt` and `predict` alone; chunks change nothing, and the learner is left as it was."""
    data = Fixed(oracles.pictures(4, shot=2, queries=6))
    learner = build(cls, oracles.conv_net(), "classification", inner_steps=1, test_steps=2, **arguments)
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    whole = diagnose(learner, data, tasks=4, sets=3, fit_steps=20)
    assert whole.er.shape == whole.epg.shape == whole.dist2.shape == (4, 3)
    assert bool((whole.dist2 >= 0).all()) and bool((whole.optima.risk <= whole.er[:, 0] + whole.optima.risk).all())
    assert [r["q"] for r in whole.summary()] == [0, 1, 2]
    assert whole.summary()[0]["er"]["mean"] == pytest.approx(float(whole.er[:, 0].mean()))
    learner.chunk_bytes = 1
    chunked = diagnose(learner, data, tasks=4, sets=3, fit_steps=20)
    assert_close(chunked, whole, rtol=1e-9)
    again = diagnose(learner, data, tasks=4, sets=3, optima=whole.optima)
    assert_close(again, whole, rtol=1e-9)
    torch.testing.assert_close(dict(learner.state_dict()), before, rtol=0, atol=0)


def test_bounds_diagnosis_refuses_what_it_cannot_say(linear):
    learner, data, optima = linear
    with pytest.raises(ValueError, match="adapts no parameters"):
        prototypes = build(ProtoNet, oracles.conv_net(0), "classification")
        diagnose(prototypes, Fixed(oracles.pictures(4, queries=6)), tasks=4)
    with pytest.raises(ValueError, match="at least 2"):
        diagnose(learner, data, tasks=4, sets=1)
    with pytest.raises(ValueError, match=r"optima of body, and the learner adapts head.weight"):
        diagnose(learner, data, tasks=4, sets=2, optima=optima._replace(phi={"body": optima.phi["head.weight"]}))


def test_bounds_diagnosis_of_a_trained_sinusoid_learner():
    """A short meta-training makes a few steps worth taking: ER falls in q, and below where it was before."""
    data = Sinusoid(shot=10, queries=10, test_queries=100)
    net = MLP(input_shape=(1,), outputs=1, hidden=[20, 20], activation="tanh")
    learner = MAML(net=net, kind="regression", alpha=0.02, inner_steps=2, test_steps=5).double()
    learner.initialize(0)
    learner.attach(Adam(lr=0.01), 120)
    outer = learner.configure_optimizers()
    options = {"max_steps": 120, "val_every": 0, "val_episodes": 0, "test_episodes": 0}
    source = Episodes(data, Uniform(), meta_batch_size=8, **options, seed=0, evaluation_seed=0, dtype=torch.float64)
    untrained = diagnose(learner, data, tasks=8, sets=3, fit_steps=200)
    for batch in source.training(0, 120):
        learner.meta_step(batch, outer)
    trained = diagnose(learner, data, tasks=8, sets=3, fit_steps=200)
    er = trained.er.mean(0)
    assert float(er[5]) < 0.5 * float(er[0]) and float(er[5]) < 0.5 * float(untrained.er[:, 5].mean())
    assert float(trained.er.min()) > 0 and float(trained.epg.mean(0)[5]) < float(trained.epg.mean(0)[0])
    start = per_task(learner.theta()["net"], 8, learner.shapes)
    assert_close(trained.dist2[:, 0], bounds.dist2(diagnosis.flat(start), diagnosis.flat(trained.optima.phi)).detach())
