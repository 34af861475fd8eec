"""Quadratic regression in tangent features: the study's losses against explicit steps, and what was measured before."""

import pytest
import torch

from metalearn.datasets.quadratic import Quadratic
from metalearn.random import Key
from metalearn.studies import TangentQuadratic
from metalearn.studies.episodes import drawn
from metalearn.studies.tangent_quadratic import Problem
from metalearn.theory import alpha_star, kernel_meta
from metalearn.theory.two_layer import TwoLayer

KEY = Key(1, "test")
RATES = torch.tensor([-0.01, 0.0, 0.03], dtype=torch.float64)


@pytest.fixture
def problem():
    """Four inputs, fewer samples than features: all directions are independent."""
    net = TwoLayer.drawn(KEY.sub("net"), 4, 12, "uniform")
    return Problem(net, Quadratic(p=4, shot=3, queries=3, test_queries=5), KEY.sub("tasks"), 6)


def test_starts_are_those_of_the_kernel_formula(problem):
    y = problem.support.y.flatten()
    c = kernel_meta.coefficients(problem.kernel, y, RATES, [3] * 6)
    w = problem.starts(problem.directions.cut(1e-12), RATES)
    assert torch.allclose(w, c @ problem.psi, atol=1e-8)
    assert torch.allclose(problem.psi @ w[0], y)


def test_losses_are_those_of_an_explicit_step(problem):
    kept = problem.directions.cut(1e-2)
    assert len(kept.values) < 18
    w = problem.starts(kept, RATES)
    curves = problem.losses(7, kept, RATES)
    support, query = drawn(problem.data, "test", problem.key.sub("test"), torch.arange(7))
    for i, alpha in enumerate(RATES.tolist()):
        for t in (0, 6):
            start = w[i].clone().requires_grad_()
            phi, psi = problem.net.features(support.x[t]), problem.net.features(query.x[t])
            (gradient,) = torch.autograd.grad((phi @ start - support.y[t]).square().mean(), start)
            after = w[i] - alpha * gradient
            assert torch.allclose(curves.fresh[i, t], (psi @ after - query.y[t]).square().mean())
            assert torch.allclose(curves.same[i, t], (phi @ after - support.y[t]).square().mean())


def test_estimates_are_those_of_the_features(problem):
    features = problem.psi.view(6, 3, -1)
    found = problem.estimates()
    for by, estimator in {"eq3.3": alpha_star.limit, "H.14": alpha_star.stacked, "H.15": alpha_star.deviation}.items():
        assert found[by] == pytest.approx(estimator(features))


def study(**keys):
    keys = {"width": 2048, "inputs": 1, "nu": 1.0, "sigma": 0.0, "test_tasks": 200, "queries": 30} | keys
    return TangentQuadratic(cutoffs=[1e-6], points=21, zoom=1, **keys)


def test_the_zoomed_grid_has_the_rates_of_the_whole_one_and_as_many_near_0():
    keys = {"tasks": [3], "samples": [2], "init": "normal", "width": 10, "inputs": 1, "nu": 1.0, "sigma": 0.0}
    keys |= {"low": -3.0, "high": 7.0, "points": 41, "test_tasks": 2, "queries": 1, "cutoffs": [1e-6]}
    whole, zoomed = (TangentQuadratic(**keys, zoom=zoom).grid.tolist() for zoom in (1.0, 5.0))
    assert whole == pytest.approx([(-3 + i / 4) / 10 for i in range(41)]) and 0.0 in whole
    assert set(whole) < set(zoomed) and sorted(zoomed) == zoomed
    assert [a for a in zoomed if -0.061 < a < 0.141] == pytest.approx([(-0.6 + i / 20) / 10 for i in range(41)])


MEASURED = [  # (N, K), init, p, h: the best rate on the step's points and on fresh ones, eq. 3.3, H.14, H.15
    ((50, 15), "uniform", 1, 2048, 1.17e-3, 1.23e-3, 1.07e-3, 1.29e-3, 6.43e-3),
    ((112, 7), "uniform", 1, 2048, 1.03e-3, 1.13e-3, 1.03e-3, 1.33e-3, 6.6e-3),
    ((50, 15), "uniform", 10, 1024, 7.2e-3, 6.1e-3, 7.2e-3, 8.0e-3, 4.44e-2),
    ((50, 15), "normal", 1, 2048, 2.1e-4, 2.3e-4, 2.17e-4, 2.6e-4, 1.09e-3),
    ((50, 15), "normal", 10, 1024, 1.8e-4, 1.9e-4, 1.9e-4, 2.6e-4, 7.4e-4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "init", "inputs", "width", "same", "fresh", "eq33", "h14", "h15"), MEASURED)
def test_rates_are_those_measured_before(pair, init, inputs, width, same, fresh, eq33, h14, h15):
    """An independent measurement of other draws: estimates to 15 %, best rates to 40 % (heavy tails of the losses)."""
    (tasks, samples), high = pair, 3 * same * width
    keys = {"low": 0.0, "high": high, "init": init, "inputs": inputs, "width": width}
    found = study(tasks=[tasks], samples=[samples], **keys).measure(Key(0, "study/tangent_quadratic"), [])
    means = {m.name: m.summary["mean"] for m in found}
    for by, value in {"eq3.3": eq33, "H.14": h14, "H.15": h15}.items():
        assert means[f"estimate@K={samples},N={tasks},by={by}"] == pytest.approx(value, rel=0.15)
    for query, value in {"same": same, "fresh": fresh}.items():
        assert means[f"best@K={samples},N={tasks},cutoff=1e-06,query={query}"] == pytest.approx(value, rel=0.4)
