"""ER, EPG and Dist2 of any learner on its own tasks: the quantities that TSA-MAML's theorems bound, for networks.

The theorems' constants say nothing about a network; what they are about can be measured (`metalearn.theory.bounds` has
the definitions). Shape letters: `B` tasks, `R` support sets of each, `q` = 0..steps, `P` adapted parameters.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn.datasets.base import Dataset, Split
from metalearn.episode import Episode, Examples, Params, Theta
from metalearn.learner import MetaLearner
from metalearn.random import Key, TaskKey
from metalearn.theory.bounds import dist2, squared_norm_of_mean


class Optima(NamedTuple):
    """What long training on a task's population reaches.

    phi: leaves `[B, *shape]`. risk: `[B]`, L_T there. slope: `[B]`, |grad L_T| there, 0 at a minimum.
    """

    phi: Params
    risk: Tensor
    slope: Tensor


class Diagnosis(NamedTuple):
    """Per task and after q = 0..steps inner steps, `[B, q]` each, on average over support sets.

    er: L_T(phi^q) - L_T(theta_T*). epg: |E_D grad L_T(phi^q)|^2 in the adapted parameters, unbiased (may be negative
    where it is small). dist2: |phi^q - theta_T*|^2. optima: what they were measured against.
    """

    er: Tensor
    epg: Tensor
    dist2: Tensor
    optima: Optima

    def summary(self) -> list[dict[str, Any]]:
        """One record per q: mean and 95 % half-width over tasks of each quantity."""
        records = []
        for q in range(self.er.shape[1]):
            record: dict[str, Any] = {"q": q}
            for name in ("er", "epg", "dist2"):
                values = getattr(self, name)[:, q]
                half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
                record[name] = {"mean": float(values.mean()), "ci95": half, "n": len(values)}
            records.append(record)
        return records


def diagnose(
    learner: MetaLearner,
    dataset: Dataset,
    *,
    tasks: int = 32,
    sets: int = 8,
    steps: int | None = None,
    split: Split = "test",
    bn: str = "batch",
    seed: int = 0,
    optima: Optima | None = None,
    fit_steps: int = 2000,
    fit_lr: float = 0.01,
) -> Diagnosis:
    """ER(q), EPG(q) and Dist2(q) of a learner that adapts parameters by steps.

    The queries of an episode are its task's population, so L_T is the mean loss over them; give the data set many
    (`dataset.test_queries`). Support sets of the usual size are drawn from them without replacement, as many per class
    as in an episode. A network has many minima: theta_T* and with it Dist2 depend on where the search starts. From the
    learner's own start it is the distance to a minimum within reach; the `optima` of another learner favour that one.

    Args:
        learner: anything with `adapt` and `predict`; its meta-parameters are not changed.
        dataset: where tasks come from; the first `tasks` of `seed`.
        tasks: B.
        sets: support sets R of each task, at least 2.
        steps: largest q; None for the learner's `test_steps`.
        split: which classes or curves.
        bn: batch-norm mode of all predictions.
        seed: names tasks and support sets.
        optima: theta_T* of these tasks from another call; None to search from where the learner starts (`fit`).
        fit_steps: of that search.
        fit_lr: its first rate.

    Raises:
        ValueError: if there are fewer than two support sets or fewer queries than one needs, if the learner adapts no
            parameters (prototypical networks), or if `optima` are of other ones than it does.
    """
    if sets < 2:
        raise ValueError(f"sets = {sets}: E over support sets needs at least 2")
    key = Key(seed, "diagnosis")
    theta: Theta = {g: {k: p.detach() for k, p in params.items()} for g, params in learner.theta().items()}
    like = next(p for params in theta.values() for p in params.values())
    index = torch.arange(tasks)
    zero = torch.zeros_like(index)
    episodes = dataset.fetch(split, dataset.draw(split, key.sub("tasks"), index, zero)).to(like.dtype)
    rows = _support_rows(episodes, dataset.outputs(split) if dataset.kind == "classification" else 1, sets, key)
    own = [TaskKey(key.sub("learner"), index, zero + r) for r in range(sets)]
    steps = learner.test_steps if steps is None else steps
    parts = []
    for chunk in learner.chunks(episodes, (bn,)):
        population = episodes.query.x[chunk], episodes.query.y[chunk]
        task = torch.arange(len(population[0]))[:, None]
        supports = [Examples(*(part[task, r] for part in population)) for r in rows[chunk].unbind(1)]
        with torch.no_grad():
            paths = [
                learner.adapt(theta, s, steps=steps, key=k.select(chunk)) for s, k in zip(supports, own, strict=True)
            ]
        _check(paths[0][0], optima)
        best = _select(optima, chunk) if optima else None
        best = best or fit(learner, theta, paths[0][0], supports[0], Examples(*population), bn, fit_steps, fit_lr)
        parts.append((*_measure(learner, theta, paths, supports, Examples(*population), bn, best), best))
    er, epg, distance, found = zip(*parts, strict=True)
    phi = {k: torch.cat([f.phi[k] for f in found]) for k in found[0].phi}
    whole = Optima(phi, torch.cat([f.risk for f in found]), torch.cat([f.slope for f in found]))
    return Diagnosis(torch.cat(er), torch.cat(epg), torch.cat(distance), whole)


def fit(
    learner: MetaLearner,
    theta: Theta,
    start: Params,
    support: Examples,
    population: Examples,
    bn: str,
    steps: int = 2000,
    lr: float = 0.01,
) -> Optima:
    """theta_T*: the best point on a path of Adam with a cosine schedule on the whole population, for each task.

    A local minimum near the start at best; `Optima.slope` says how stationary it is.
    """
    phi = {k: p.detach().clone().requires_grad_() for k, p in start.items()}
    adam = torch.optim.Adam(list(phi.values()), lr=lr)
    best = {k: p.detach().clone() for k, p in phi.items()}
    least = slope = next(iter(best.values())).new_full((len(population.y),), math.inf)
    for step in range(steps + 1):
        risk, gradient = _risk(learner, theta, phi, support, population, bn)
        better = risk < least
        for k, p in phi.items():
            best[k] = torch.where(better.view(-1, *[1] * (p.dim() - 1)), p.detach(), best[k])
            p.grad = gradient[k]
        slope = torch.where(better, flat(gradient).norm(dim=1), slope)
        least = torch.where(better, risk, least)
        for group in adam.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
        adam.step()
    return Optima(best, least, slope)


def flat(phi: Params) -> Tensor:
    """Leaves `[B, *shape]` as one vector per task, `[B, P]`."""
    return torch.cat([p.flatten(1) for p in phi.values()], 1)


def _support_rows(episodes: Episode, classes: int, sets: int, key: Key) -> Tensor:
    """`[B, R, S]`: rows of the queries (ordered by class), as many of each class as an episode's support set has."""
    tasks, queries = episodes.query.y.shape[:2]
    shot, size = episodes.support.y.shape[1] // classes, queries // classes
    if size < shot:
        raise ValueError(
            f"support sets of {shot} need as many queries, and there are {size} (a class); raise dataset.test_queries"
        )
    where = torch.arange(tasks)[:, None, None], torch.arange(sets)[:, None], torch.arange(classes)
    rows = key.sub("support sets").choice(shot, *where, size=size)
    rows = (rows + size * torch.arange(classes)[:, None]).flatten(2)
    return rows.to(episodes.query.x.device)


def _check(adapted: Params, optima: Optima | None) -> None:
    if not adapted:
        raise ValueError("this learner adapts no parameters: there is nothing to differentiate in, and no distance")
    shapes = {k: p.shape[1:] for k, p in adapted.items()}
    if optima is not None and {k: p.shape[1:] for k, p in optima.phi.items()} != shapes:
        raise ValueError(f"optima of {', '.join(optima.phi)}, and the learner adapts {', '.join(adapted)}")


def _select(optima: Optima, chunk: slice) -> Optima:
    return Optima({k: p[chunk] for k, p in optima.phi.items()}, optima.risk[chunk], optima.slope[chunk])


def _risk(
    learner: MetaLearner, theta: Theta, phi: Params, support: Examples, population: Examples, bn: str
) -> tuple[Tensor, Params]:
    """L_T and its gradient in phi, for each task."""
    at = {k: p.detach().requires_grad_() for k, p in phi.items()}
    with torch.enable_grad():
        risk = learner.loss(learner.predict(theta, at, population.x, support=support, bn=bn), population.y)
        grads = torch.autograd.grad(risk.sum(), list(at.values()), materialize_grads=True)
    return risk.detach(), dict(zip(at, grads, strict=True))


def _measure(
    learner: MetaLearner,
    theta: Theta,
    paths: list[list[Params]],
    supports: list[Examples],
    population: Examples,
    bn: str,
    best: Optima,
) -> tuple[Tensor, Tensor, Tensor]:
    """ER, EPG and Dist2, `[B, q]` each."""
    er, epg, distance = [], [], []
    for phis in zip(*paths, strict=True):  # after q steps, on each support set
        risks, gradients = zip(
            *(_risk(learner, theta, p, s, population, bn) for p, s in zip(phis, supports, strict=True)), strict=True
        )
        er.append(torch.stack(risks).mean(0) - best.risk)
        epg.append(squared_norm_of_mean(torch.stack([flat(g) for g in gradients], 1)))
        distance.append(torch.stack([dist2(flat(p), flat(best.phi)) for p in phis]).mean(0).detach())
    return torch.stack(er, 1), torch.stack(epg, 1), torch.stack(distance, 1)
