"""The study of TSA-MAML's bounds on logistic regression, where all their premises hold (`metalearn.theory.bounds`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metalearn.random import Key
from metalearn.theory.bounds import Constants, Tasks, bound_terms, descend, empirical_constants, measure, newton

LOGISTIC = Constants(1.0, 0.25)
"""Of `logistic` where |x| <= 1."""
MIDDLE = 10
"""Samples K of a data set where K is not varied."""


def logistic(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """log(1 + exp(-y x . phi)) with y = +-1: G = 1 and L_s = 1/4 where |x| <= 1."""
    return torch.nn.functional.softplus(-y * torch.einsum("bnd,bd->bn", x, phi))


def logistic_tasks(
    key: Key, tasks: int, sets: int, samples: int, *, groups: int = 5, points: int = 4000, dimension: int = 5
) -> Tasks:
    """Well-specified logistic regression on the unit ball, in groups of similar tasks.

    x is uniform in the ball, P(y = 1) = sigmoid(x . w_T), w_T ~ N(c_g, I) around the centre c_g ~ N(0, 9 I) of its
    group. The `points` of a population, and so theta_T*, do not depend on `sets` and `samples`.
    """
    task = torch.arange(tasks)
    centres = 3 * key.sub("centres").normal(dimension, torch.arange(groups)).double()
    group = key.sub("group").integers(1, task, size=groups)[:, 0]
    w = centres[group] + key.sub("task").normal(dimension, task).double()
    direction = key.sub("direction").normal(points * dimension, task).double().unflatten(1, (points, dimension))
    radius = key.sub("radius").uniform(points, task).double() ** (1 / dimension)
    x = direction / direction.norm(dim=2, keepdim=True) * radius[..., None]
    chance = torch.sigmoid(torch.einsum("tmd,td->tm", x, w))
    y = torch.where(key.sub("label").uniform(points, task).double() < chance, 1.0, -1.0).double()
    optima = newton(logistic, torch.zeros_like(w), x, y)
    return Tasks(x, y, optima, torch.empty(tasks, 0, 0, dtype=torch.int64)).draw(key, sets, samples)


def group_starts(optima: Tensor, m: int, *, seed: int = 0) -> Tensor:
    """For each task the initialisation of its group, `[T, P]`: the nearest of m k-means centres of the theta_T*.

    This is routing by an oracle, who knows theta_T*. With m = 1 it is their mean, the best single theta* for (b).
    """
    from sklearn.cluster import KMeans

    found = KMeans(m, n_init=10, random_state=seed).fit(optima.numpy())
    labels = torch.from_numpy(found.labels_).long()
    centres = torch.stack([optima[labels == i].mean(0) for i in range(m)])
    return centres[labels]


def study(
    seed: int,
    *,
    tasks: int,
    sets: int,
    alphas: Sequence[float] = (1.0, 4.0),
    steps: Sequence[int] = (1, 2, 4, 8),
    samples: Sequence[int] = (5, 10, 20, 50, 100),
    groups: Sequence[int] = (1, 2, 3, 4, 5),
) -> dict[str, Any]:
    """Every number of `metalearn report bounds`, as plain lists of records."""
    key = Key(seed, "bounds")
    made = logistic_tasks(key, tasks, sets, MIDDLE)
    starts = {m: group_starts(made.optima, m) for m in groups}
    theorems = [
        record
        for n in samples
        for alpha in alphas
        for record in _records(made.draw(key, sets, n), starts[1], alpha, steps, {"K": n, "m": 1})
    ]
    corollary = [
        record
        for m, start in starts.items()
        for alpha in alphas
        for record in _records(made, start, alpha, steps, {"K": MIDDLE, "m": m})
    ]
    x, y = made.datasets()
    path = descend(logistic, starts[1].repeat_interleave(sets, 0), x, y, max(alphas), max(steps))
    constants = empirical_constants(logistic, (path[0], path[-1]), x, y)
    return {"theorems": theorems, "corollary": corollary, "empirical_constants": constants._asdict()}


def _records(
    tasks: Tasks, starts: Tensor, alpha: float, steps: Sequence[int], where: dict[str, Any]
) -> list[dict[str, Any]]:
    records = []
    for q, measured in measure(logistic, tasks, starts, alpha, (0, *steps)).items():
        record = {"alpha": alpha, "q": q, **where, **bound_terms(measured, LOGISTIC, alpha, q, where["K"])}
        record |= {"dist2_start": float(measured.start.mean()), "dist2": float(measured.distance.mean())}
        records.append(record | {"holds": _holds(record) if q else {}})  # without a step there is nothing to bound
    return records


def _holds(r: dict[str, Any]) -> dict[str, bool]:
    """Each inequality, up to rounding."""
    pairs = {
        "ER <= a": ("er", "a"),
        "a <= b": ("a", "b"),
        "EPG <= bound": ("epg", "epg_bound"),
        "gap <= 2 alpha G^2 q / K": ("gap", "convex_first"),
        "a <= b with L_s / 2": ("a", "b_smooth"),
    }
    return {name: r[low] <= r[high] + 1e-12 for name, (low, high) in pairs.items()}
