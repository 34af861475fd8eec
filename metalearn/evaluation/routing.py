"""How a trained TSA-MAML tells tasks apart: which initialisations they choose, and where they lie (figures 1 and 3)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metalearn.analysis import Analysis, table_figure
from metalearn.clustering import Vectors, cluster, gram_matrix, majority, purity, silhouette
from metalearn.episode import Episode
from metalearn.evaluation.metrics import TaskMean

if TYPE_CHECKING:
    from metalearn.algorithms.tsa_maml import TSAMAML
    from metalearn.data import Episodes

COMPARED = 600  # test tasks whose parameters are compared with each other


def analyse(learner: TSAMAML, data: Episodes) -> Analysis:
    """Usage of the initialisations by the frozen test tasks, and how alike tasks of one group are.

    Returns:
        metrics: `routing_purity` (share of test tasks whose group is the most frequent one of the initialisation that
        they chose) where tasks have ground-truth groups; `cluster_purity`, the same of the clusters of training tasks,
        and their `silhouette`. data: `usage`, tasks by true group and chosen initialisation (one row where there are no
        groups), and `similarity`, see `similarities`.
    """
    theta, chosen, truth = learner.constants(), list[Tensor](), list[Tensor]()

    def route(episodes: Episode, chunk: slice) -> Tensor:
        return learner.route(theta, episodes.select(chunk).support)

    for batch in data.evaluation("test"):
        episodes = batch.episodes
        chosen += learner.in_chunks(partial(route, episodes), episodes)
        truth += [episodes.latent["group"]] if "group" in episodes.latent else []
    groups, choice = data.dataset.groups if truth else ("all tasks",), torch.cat(chosen).cpu()
    group = torch.cat(truth).cpu() if truth else torch.zeros_like(choice)
    usage = (group * learner.m + choice).bincount(minlength=len(groups) * learner.m).unflatten(0, (-1, learner.m))
    names = {"cluster_silhouette": "silhouette", "cluster_purity": "cluster_purity"}
    metrics = {names[k]: v for k, v in learner.clusters.items() if k in names}
    if truth:
        metrics["routing_purity"] = TaskMean(majority(choice, group).tolist()).compute("fraction")
    counts = usage.tolist()
    found = {
        "usage": {"groups": list(groups) if truth else None, "counts": counts},
        "cluster_sizes": learner.clusters.get("cluster_sizes"),
        "similarity": similarities(learner, data),
    }
    columns = [f"theta {i + 1}" for i in range(learner.m)]
    figure = table_figure(counts, groups, columns, "initialisations that test tasks chose")
    return Analysis(metrics, found, {"usage": figure})


def similarities(learner: TSAMAML, data: Episodes) -> dict[str, Any]:
    """In numbers what figure 1 shows: whether tasks of one ground-truth group lie together.

    Of the first test tasks (`COMPARED`), in several spaces: `support_means` (of inputs, and of targets where they are
    numbers); `from_star` (Delta_T, adapted from theta*); `from_routed` (adapted from the chosen initialisation,
    relative to theta*); `moved_from_routed` (the same, relative to that initialisation). Each adaptation takes
    `id_steps`.

    Returns:
        For each space the mean `silhouette` of the ground-truth groups, and of k-means with as many clusters (m where
        there are no groups) the `kmeans_silhouette` and `kmeans_purity`; None for what cannot be said.
    """
    theta, spaces, truth = learner.constants(), dict[str, Vectors](), list[Tensor]()
    total = min(COMPARED, data.frozen["test"])

    def work(episodes: Episode, chunk: slice) -> dict[str, Tensor]:
        support = episodes.select(chunk).support
        inputs = support.x.flatten(2).mean(1)
        if learner.kind == "regression":
            inputs = torch.cat([inputs, support.y.flatten(2).mean(1)], 1)
        delta, group = learner.displacement(theta, support), learner.route(theta, support)
        own, star = learner.start(theta, group), theta["net"]
        phi = learner.descend(own, support, learner.id_steps, learner.alpha)[-1]

        def flat(origin: dict[str, Tensor]) -> Tensor:
            return torch.cat([(phi[k] - origin[k]).flatten(1) for k in learner.order], 1)

        return {"support_means": inputs, "from_star": delta, "from_routed": flat(star), "moved_from_routed": flat(own)}

    done = 0
    for batch in data.evaluation("test"):
        episodes = batch.episodes.select(slice(max(0, total - done)))
        if not episodes.tasks:
            break
        done += episodes.tasks
        truth += [episodes.latent["group"]] if "group" in episodes.latent else []
        for part in learner.in_chunks(partial(work, episodes), episodes):
            for name, vectors in part.items():
                spaces.setdefault(name, Vectors(torch.zeros_like(vectors[0]), total)).add(vectors)
    group = torch.cat(truth) if truth else None
    seed = data.evaluation_key.sub("kmeans").integer() % 2**32
    return {name: _likeness(vectors, group, learner.m, seed) for name, vectors in spaces.items()}


def _likeness(vectors: Vectors, group: Tensor | None, m: int, seed: int) -> dict[str, float | None]:
    gram, count = gram_matrix(vectors), m
    found: dict[str, float | None] = dict.fromkeys(("silhouette", "kmeans_silhouette", "kmeans_purity"))
    if group is not None:
        count = int(group.max()) + 1
        found["silhouette"] = float(silhouette(gram, group, count).double().mean())
    try:
        clusters = cluster(vectors, count, seed=seed, gram=gram)
    except ValueError:  # fewer vectors that differ than clusters
        return found
    found["kmeans_silhouette"] = float(clusters.silhouette.double().mean())
    found["kmeans_purity"] = None if group is None else purity(clusters.labels, group)
    return found
