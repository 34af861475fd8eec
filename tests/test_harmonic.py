"""Sums of two sine waves: their law, their noise, and what a draw may depend on."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from metalearn.datasets.harmonic import Harmonic
from metalearn.random import Key

SPLITS = ("train", "val", "test")


def draw(dataset, split="train", tasks=500, seed=0):
    """The draw and the episodes of many tasks of one meta-step."""
    drawn = dataset.draw(split, Key(seed, "train"), torch.tensor(0), torch.arange(tasks))
    return drawn, dataset.fetch(split, drawn)


def law(x, latent):
    a, b = latent["amplitudes"].double().numpy(), latent["phases"].double().numpy()
    w = latent["frequency"].double().numpy()[:, None]
    return a[:, :1] * np.sin(w * x + b[:, :1]) + a[:, 1:] * np.sin(2 * w * x + b[:, 1:])


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_targets_follow_the_law_and_its_noise(noise):
    """Residuals are N(0, noise) in training and on support sets, independent at each point; else zero to rounding.

    Float32 angles up to 2 * 7 * 8 are off by up to 1e-5, and amplitudes are below 5.
    """
    dataset = Harmonic(shot=5, queries=7, test_shot=6, test_queries=9, noise_std=noise)
    for split in SPLITS:
        found = draw(dataset, split)[1]
        for name, part, n in (("support", found.support, (5, 6)), ("query", found.query, (7, 9))):
            assert part.x.shape == part.y.shape == (500, n[split != "train"], 1)
            x, y = part.x[..., 0].double().numpy(), part.y[..., 0].double().numpy()
            residual = y - law(x, found.latent)
            if noise and (split == "train" or name == "support"):
                assert kstest(residual.flatten() / noise, "norm").pvalue > 1e-3
                assert abs(np.corrcoef(residual.T) - np.eye(n[split != "train"])).max() < 0.2
            else:
                assert abs(residual).max() < 1e-4


def test_task_parameters_and_inputs_have_their_distributions():
    found = draw(Harmonic(test_shot=3, test_queries=2), "val", tasks=20_000)[1]
    latent = {k: v.double().numpy() for k, v in found.latent.items()}
    for name, low, high in (("frequency", 5, 7), ("phases", 0, 2 * math.pi), ("centre", -4, 4)):
        assert low <= latent[name].min() and latent[name].max() <= high
        for column in latent[name].reshape(20_000, -1).T:
            assert kstest(column, "uniform", (low, high - low)).pvalue > 1e-3
    x = torch.cat([found.support.x, found.query.x], 1)[..., 0].double().numpy() - latent["centre"][:, None]
    columns = np.concatenate([latent["amplitudes"], x], 1)  # independent and N(0, 1)
    for column in columns.T:
        assert kstest(column, "norm").pvalue > 1e-3
    everything = np.concatenate([columns, latent["phases"], latent["frequency"][:, None], latent["centre"][:, None]], 1)
    correlations = np.corrcoef(everything.T) - np.eye(everything.shape[1])
    assert abs(correlations).max() < 5 / math.sqrt(20_000)


def test_predicting_zero_has_error_one():
    """E f^2 = (1 + 1) / 2; E f^4 = 2 * 3 * 3/8 + 6/4, so f^2 deviates by 1.66 and the mean of the tasks by 0.012."""
    clean = draw(Harmonic(test_queries=20, noise_std=0.1), "test", tasks=20_000)[1].query.y
    assert abs(float(clean.square().mean()) - 1) < 0.06
    noisy = draw(Harmonic(tasks=None, noise_std=0.5), "train", tasks=20_000)[1].query.y
    assert abs(float(noisy.square().mean()) - 1.25) < 0.06


def curves(dataset, split, tasks, seed=0):
    return set(map(tuple, draw(dataset, split, tasks, seed)[0]["curve"].tolist()))


def test_training_tasks_are_fixed():
    """480 of them whatever the run's seed, others with dataset.seed, fresh ones in validation and test."""
    fixed = curves(Harmonic(), "train", 10_000)
    assert len(fixed) == 480 and curves(Harmonic(), "train", 10_000, seed=1) == fixed
    assert not fixed & curves(Harmonic(seed=1), "train", 2000)
    assert len(curves(Harmonic(tasks=3), "train", 100)) == 3 and curves(Harmonic(tasks=3), "train", 100) < fixed
    for split in ("val", "test"):
        assert len(curves(Harmonic(), split, 2000) - fixed) == 2000
    points = draw(Harmonic(), tasks=10_000)[0]
    assert len(set(points["x"][:, 0].tolist())) > 9_900  # a task comes again with fresh points and noise
    assert len(set(points["noise"][:, 0].tolist())) > 9_900
    assert len(curves(Harmonic(tasks=None), "train", 2000)) == 2000


@pytest.mark.parametrize("tasks", [480, None])
def test_draws_are_those_of_one_at_a_time(tasks):
    dataset, key = Harmonic(tasks=tasks), Key(0, "train")
    for split in SPLITS:
        block = dataset.draw(split, key, torch.arange(3)[:, None], torch.arange(4)[None])
        together = dataset.fetch(split, {k: v.flatten(0, 1) for k, v in block.items()})
        for step in range(3):
            for task in range(4):
                single = dataset.draw(split, key, torch.tensor([step]), torch.tensor([task]))
                assert all(torch.equal(block[k][step, task], single[k][0]) for k in block)
                alone, i = dataset.fetch(split, single), 4 * step + task
                for one, many in zip((*alone.support, *alone.query), (*together.support, *together.query), strict=True):
                    assert torch.equal(one[0], many[i])


def test_sizes():
    dataset = Harmonic(shot=3)
    assert draw(dataset, "train")[1].query.x.shape[1] == 10 and draw(dataset, "test")[1].query.x.shape[1] == 100
    alike = Harmonic(shot=3, queries=4, test_queries=None)
    assert draw(alike, "test")[1].support.x.shape[1] == 3 and draw(alike, "test")[1].query.x.shape[1] == 4
    assert {dataset.outputs(s) for s in SPLITS} == {1} and dataset.input_shape == (1,)
