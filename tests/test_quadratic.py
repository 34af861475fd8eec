"""Quadratic regression: its law, moments, and that frozen tasks are the same for all runs."""

import math

import numpy as np
import pytest
import torch
from runs import cell_of, result
from scipy.stats import kstest
from test_data import draw, episodes, flat, same

from metalearn.cells import expand
from metalearn.datasets.quadratic import Quadratic
from metalearn.record import episodes_id
from metalearn.run import run
from metalearn.schema import BadInput

SPLITS = ("train", "val", "test")


@pytest.mark.parametrize(("p", "sigma"), [(1, 0.0), (1, 0.2), (3, 0.0), (3, 0.5)])
def test_targets_follow_the_law_and_its_noise(p, sigma):
    """Residuals of all points are N(0, sigma), independent; zero (to rounding) without noise."""
    dataset = Quadratic(p=p, sigma=sigma, w0=0.3, shot=5, queries=7, test_shot=6, test_queries=9)
    assert dataset.input_shape == (p,) and dataset.outputs("train") == 1
    for split in SPLITS:
        found = draw(dataset, split, tasks=500)[1]
        w, b = (found.latent[k].double().numpy() for k in ("w", "b"))
        for part, n in ((found.support, (5, 6)), (found.query, (7, 9))):
            size = n[split != "train"]
            assert part.x.shape == (500, size, p) and part.y.shape == (500, size, 1)
            x, y = part.x.double().numpy(), part.y[..., 0].double().numpy()
            residual = y - np.square(np.einsum("tnp,tp->tn", x, w) + b[:, None])
            if sigma:
                assert kstest(residual.flatten() / sigma, "norm").pvalue > 1e-3
                assert abs(np.corrcoef(residual.T) - np.eye(size)).max() < 0.2
            else:
                assert abs(residual).max() < 1e-4


@pytest.mark.parametrize(("p", "nu", "w0"), [(1, 0.2, 0.0), (4, 1.0, -0.5), (9, 0.0, 0.5)])
def test_tasks_and_inputs_have_their_distributions(p, nu, w0):
    """w, b and x are independent; w ~ N(w0, nu^2 / p), the others N(0, 1)."""
    found = draw(Quadratic(p=p, nu=nu, w0=w0, shot=2, queries=1), tasks=20_000)[1]
    x = torch.cat([found.support.x, found.query.x], 1).flatten(1)
    columns = [found.latent["b"][:, None], x]
    scaled = (found.latent["w"].double() - w0) / (nu / math.sqrt(p)) if nu else None
    if scaled is None:
        assert (found.latent["w"] == w0).all()
    else:
        columns.append(scaled)
    columns = torch.cat([c.double() for c in columns], 1).numpy()
    for column in columns.T:
        assert kstest(column, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(columns.T) - np.eye(columns.shape[1])).max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize(
    ("p", "nu", "w0", "sigma"), [(1, 0.2, 0.0, 0.2), (1, 1.0, 0.5, 0.0), (4, 0.8, 0.3, 1.0), (10, 1.0, 0.0, 0.5)]
)
def test_moments_of_the_targets(p, nu, w0, sigma):
    """With q = |w|^2, the root of a clean target is N(0, 1 + q): E y = 1 + E q, and E y^2 = 3 E (1 + q)^2 + sigma^2.

    E q = p w0^2 + nu^2, and Var q = 2 nu^4 / p + 4 w0^2 nu^2. Five standard errors, measured over tasks.
    """
    query = draw(Quadratic(p=p, nu=nu, w0=w0, sigma=sigma, queries=4), tasks=60_000)[1].query.y.double()
    q, spread = p * w0**2 + nu**2, 2 * nu**4 / p + 4 * w0**2 * nu**2
    for values, expected in ((query, 1 + q), (query.square(), 3 * ((1 + q) ** 2 + spread) + sigma**2)):
        means = values.flatten(1).mean(1)
        assert abs(float(means.mean()) - expected) < 5 * float(means.std()) / math.sqrt(60_000)


def test_sizes():
    dataset = Quadratic(shot=3)
    assert draw(dataset, "train")[1].query.x.shape[1] == 10 and draw(dataset, "test")[1].query.x.shape[1] == 100
    alike = Quadratic(shot=3, queries=4, test_queries=None)
    assert draw(alike, "test")[1].support.x.shape[1] == 3 and draw(alike, "test")[1].query.x.shape[1] == 4


def test_frozen_tasks_are_those_of_all_seeds_and_algorithms():
    one, other = (flat(list(episodes(Quadratic(p=2), seed=s).evaluation("test"))) for s in (0, 1))
    assert same(one, other) and not same(
        one, flat(list(episodes(Quadratic(p=2), evaluation_seed=1).evaluation("test")))
    )
    ids = {episodes_id(c) for c in expand(["dataset=quadratic", "algorithm=maml,anil", "seed=0,1"])}
    assert len(ids) == 1
    assert (
        len(ids | {episodes_id(expand(["dataset=quadratic", f"dataset.{k}"])[0]) for k in ("nu=1", "w0=1", "p=2")}) == 4
    )


def test_a_run_learns_something(tmp_path):
    """One adapted step lowers the error of a hundred meta-steps."""
    cell = cell_of(tmp_path, "dataset=quadratic", "trainer.max_steps=100", "trainer.val_every=0")
    assert run(cell) == "done"
    metrics = result(tmp_path, cell)["metrics"]
    assert metrics["mse"]["mean"] < metrics["mse@step=0"]["mean"]


@pytest.mark.parametrize("line", ["dataset.p=0", "dataset.sigma=-1", "dataset.nu=-0.1"])
def test_what_cannot_be_is_refused(line):
    with pytest.raises(BadInput, match=f"{line}.*must be >="):
        expand(["dataset=quadratic", line])
