"""Bernacchia's regression (Z10): the fixture, least squares on explicit residuals, sampling, the outcome of Fig. 11."""

import math

import pytest
import torch
from oracles import VALUES, assert_close, generator, normal
from torch import Tensor

from metalearn.theory import bernacchia, stacks
from metalearn.theory.alpha_star import split
from metalearn.theory.bernacchia import Setting, Tasks, best_test_rate, draw, losses, minimiser

GRID = torch.tensor([-0.3, 0.0, 0.2, 0.7], dtype=torch.float64)
SMALL = Setting(tasks=3, support=4, query=5, test_support=6, width=7, noise=0.3, spread=0.8, centre=0.4)
WIDE = Setting(tasks=2, support=4, query=3, test_support=6, width=9, noise=0.3, spread=0.8)


def residuals(tasks: Tasks, run: int, omega: Tensor, alpha: float) -> Tensor:
    """Of all query samples of a run, by explicit steps."""
    found = []
    for i in range(tasks.support.x.shape[1]):
        x, y, z, v = (part[run, i] for part in (*tasks.support, *tasks.query))
        theta = omega - alpha / len(y) * x.mT @ (x @ omega - y)
        found.append(z @ theta - v)
    return torch.cat(found)


def test_fixture_of_the_specification():
    case = VALUES["bernacchia_test_loss"]
    setting = Setting(width=case["p"], test_support=case["n_r"], noise=case["sigma"])
    assert float(best_test_rate(case["R"], setting)) == pytest.approx(case["alpha_r_star"], rel=1e-12)
    for alpha, value in case["loss_at"].items():
        assert float(bernacchia.loss_at(case["R"], setting, float(alpha))) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("setting", [SMALL, WIDE], ids=["m n_v > p", "m n_v < p"])
def test_minimiser_is_least_squares_on_the_residuals(setting):
    """Residuals are linear in omega: their columns are differences; the solution of least norm."""
    tasks = draw(setting, 2, generator(0))
    omega = minimiser(tasks, GRID)
    assert omega.shape == (4, 2, setting.width)
    for i, alpha in enumerate(GRID.tolist()):
        for run in range(2):
            zero = residuals(tasks, run, torch.zeros(setting.width).double(), alpha)
            columns = [residuals(tasks, run, e, alpha) - zero for e in torch.eye(setting.width).double()]
            assert_close(omega[i, run], torch.linalg.pinv(torch.stack(columns, 1)) @ -zero, 1e-8)
    assert_close(minimiser(tasks, 0.2), omega[2], 1e-9)
    interpolates = float(residuals(tasks, 0, omega[2, 0], 0.2).norm()) < 1e-10
    assert interpolates == (setting is WIDE)


def test_drawn_tasks_have_the_stated_law():
    setting = Setting(tasks=300, support=6, query=40, width=5, noise=0.5, spread=2.0, centre=1.0)
    (x, y), (z, v) = draw(setting, 4, generator(0))
    assert x.shape == (4, 300, 6, 5) and v.shape == (4, 300, 40)
    assert abs(float(z.mean())) < 0.01 and float(z.var()) == pytest.approx(1, abs=0.01)
    w = torch.linalg.lstsq(z, v[..., None]).solution[..., 0]
    noise = (v - (z @ w[..., None])[..., 0]).square().sum() / (4 * 300 * 35)
    assert float(noise) == pytest.approx(0.25, rel=0.03)
    assert float(w.mean()) == pytest.approx(1, abs=0.1)
    error = 0.25 * 5 / (40 - 5 - 1)  # of least squares
    assert float((w - 1).square().sum(-1).mean()) == pytest.approx(4 + error, rel=0.1)
    assert float((y - (x @ w[..., None])[..., 0]).square().mean()) == pytest.approx(0.25 + error, rel=0.1)


def test_expected_loss_is_the_mean_of_sampled_ones():
    """Z10: within 4 standard errors over runs, for several rates at once and for one."""
    omega = normal(3, 1, 7, seed=0).expand(3, 400, 7)
    alpha = torch.tensor([-0.2, 0.1, 0.5], dtype=torch.float64)
    sample = bernacchia.sampled_loss(omega, SMALL, alpha, generator(1), tasks=10, points=5)
    expected = bernacchia.expected_loss(omega, SMALL, alpha[:, None])[:, 0]
    assert sample.shape == (3, 400)
    assert ((sample.mean(1) - expected).abs() < 4 * sample.std(1) / math.sqrt(400)).all()
    one = bernacchia.sampled_loss(omega[1], SMALL, 0.1, generator(1), tasks=10, points=5)
    assert_close(one, sample[1])


def test_best_test_rate_is_where_the_loss_is_least():
    for r in (1e-3, 0.1, 10.0):
        best = float(best_test_rate(r, SMALL))
        around = bernacchia.loss_at(r, SMALL, best + torch.tensor([-1e-3, 0, 1e-3], dtype=torch.float64)).tolist()
        assert best > 0 and around[0] > around[1] < around[2]
        assert around[0] - around[1] == pytest.approx(around[2] - around[1], rel=1e-6)


def test_estimate_is_twice_corollary_2():
    """The factor 1/2 of these losses doubles the rate; 5 / 36 for Fig. 11."""
    assert Setting().estimate() == pytest.approx(5 / 36, rel=1e-12)
    tasks = draw(Setting(tasks=4000, width=8), 1, generator(0))
    found = split(tasks.support.x[0], tasks.query.x[0])
    assert abs(2 * found.value - Setting(width=8).estimate()) < 4 * 2 * found.se


def test_losses_are_those_of_their_parts(monkeypatch):
    tasks = draw(SMALL, 5, generator(0))
    for train, test in ((GRID, GRID), (GRID, 0.2), (0.2, GRID)):
        pairs = [(a, a) for a in GRID] if train is test else [(a, 0.2) if train is GRID else (0.2, a) for a in GRID]
        expected = [bernacchia.expected_loss(minimiser(tasks, a), SMALL, b) for a, b in pairs]
        assert_close(losses(SMALL, train, test, 5, generator(0)), torch.stack(expected), 1e-9)
    monkeypatch.setattr(stacks, "CHUNK", 2000)
    assert losses(SMALL, GRID, 0.2, 5, generator(0)).shape == (4, 5)


def test_outcome_of_figure_11():
    """Same rate in training and test: least near the estimate 0.139, at 0.0388. Test rate 0.2: flat, least near 0."""
    grid = torch.tensor([-0.1, 0.0, 0.1, 0.14, 0.2], dtype=torch.float64)
    same = losses(Setting(), grid, grid, 40, generator(0))
    assert same.mean(1).tolist() == pytest.approx([0.0477, 0.0418, 0.0391, 0.0388, 0.0393], abs=2e-4)
    assert int(same.mean(1).argmin()) == 3
    fixed = losses(Setting(), grid, 0.2, 40, generator(0)).mean(1)
    assert float(fixed.min()) == pytest.approx(0.0390, abs=2e-4) and int(fixed.argmin()) in (0, 1, 2)
    assert float(fixed.max() - fixed.min()) < 0.1 * float(same.mean(1).max() - same.mean(1).min())
