"""Sine curves: MAML with one step on the last layer of networks that were trained jointly, over alpha."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.backbones import MLP
from metalearn.datasets.sinusoid import Sinusoid
from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, estimate, over, repeated
from metalearn.studies.episodes import drawn
from metalearn.theory import alpha_star
from metalearn.theory.kernel_meta import adapted_loss
from metalearn.theory.one_step import OneStep

CHUNK = 500
"""Test tasks at once."""
UNIT = "target units squared"
METRICS = ("mse_before", "mse_after", "mse_after_same")
EXCESS = {"excess_after": "mse_after", "excess_after_same": "mse_after_same"}


class SineLastLayer(Study):
    """Features are the second hidden layer of a trained network with 1 appended, for the bias.

    The networks are the runs that the study's schema needs. For each, and for each alpha, the last layer before
    adaptation is the least of the training tasks' loss after one step of that rate on the same points (eq. 3.1); test
    tasks step from there. Every network has training and test tasks of its own, so that what varies among networks
    counts tasks as well.

    Args:
        pretrain_seeds: seeds of the networks, by which these are called.
        shot: points of a task K.
        tasks: training tasks of each network, which its estimate and its last layers are of.
        test_tasks: new tasks of each network.
        queries: points that these are judged on.
        alphas: the grid.
    """

    title = "Sine curves: one step on the last layer"

    def __init__(
        self, *, pretrain_seeds: list[int], shot: int, tasks: int, test_tasks: int, queries: int, alphas: list[float]
    ):
        self.seeds, self.tasks, self.test_tasks = pretrain_seeds, tasks, test_tasks
        self.alphas = torch.tensor(alphas, dtype=torch.float64)
        self.curves = Sinusoid(variant="unravel", shot=shot, queries=shot, test_queries=queries)

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields `alpha_lim`, `alpha_split`, and for each alpha `mse_before`, `mse_after` and `mse_after_same`.

        `mse_after_same` is of the points that the step was taken on, as eq. 3.3 supposes; the others are of queries, as
        Corollary 2, whose estimate is `alpha_split`. Each is a mean over networks, and of each network by its seed,
        over tasks. `excess_after` and `excess_after_same` are of a network alone: the error at a rate less that at the
        best other rate, task by task; negative at the best rate of the grid.
        """
        keys = [key.sub(f"network {seed}") for seed in self.seeds]
        networks = [Network.of(self.curves, s, k, self.tasks) for s, k in zip(starts, keys, strict=True)]
        for metric in networks[0].estimates:
            each = [n.estimates[metric] for n in networks]
            yield repeated(metric, [e.value for e in each], of="networks")
            for seed, one in zip(self.seeds, each, strict=True):
                yield estimate(metric, *one, self.tasks, network=seed)
        means = []
        for seed, network, k in zip(self.seeds, networks, keys, strict=True):
            losses = self._tested(network, k)
            means.append(losses.mean(-1))
            yield from self._of_network(dict(zip(METRICS, losses, strict=True)), seed)
        for m, metric in enumerate(METRICS):
            for alpha, each in zip(self.alphas.tolist(), torch.stack(means)[:, m].mT.tolist(), strict=True):
                yield repeated(metric, each, UNIT, of="networks", alpha=alpha)

    def _of_network(self, losses: dict[str, Tensor], seed: int) -> Iterator[Measured]:
        """Means and differences of losses `[A, T]`, without the values of tasks, which are millions."""
        for name, values in (losses | {e: excess(losses[m]) for e, m in EXCESS.items()}).items():
            for alpha, own in zip(self.alphas.tolist(), values, strict=True):
                yield over(name, own.tolist(), UNIT, alpha=alpha, network=seed)._replace(values=())

    def _tested(self, network: Network, key: Key) -> Tensor:
        """Losses `[3, A, T]` of new tasks, in the order of `METRICS`."""
        heads = network.problem.minimisers(self.alphas)
        found = []
        for tasks in torch.arange(self.test_tasks).split(CHUNK):
            support, query = drawn(self.curves, "test", key.sub("test"), tasks)
            phi, psi = network.layers(support.x), network.layers(query.x)
            own, across = phi @ phi.mT, psi @ phi.mT
            for alpha, head in zip(self.alphas.tolist(), heads, strict=True):
                r, q = phi @ head - support.y, psi @ head - query.y
                before, after = q.square().mean(-1), adapted_loss(r, own, alpha, 1, (q, across))
                found.append(torch.stack([before, after, adapted_loss(r, own, alpha)]))
        count = len(self.alphas)
        return torch.stack([torch.cat(found[i::count], -1) for i in range(count)], 1)


def excess(losses: Tensor) -> Tensor:
    """Losses `[A, T]` less those of the rate with the least mean among the others."""
    means = losses.mean(1)
    best, second = means.topk(2, largest=False).indices
    found = losses - losses[best]
    found[best] = losses[best] - losses[second]
    return found


class Network(NamedTuple):
    """The frozen layers of a trained network, and what training tasks say of its last layer.

    estimates: `alpha_lim` of eq. 3.3 and `alpha_split` of Corollary 2. problem: gives the last layers.
    """

    layers: Layers
    estimates: dict[str, alpha_star.Estimate]
    problem: OneStep

    @classmethod
    def of(cls, curves: Sinusoid, state: State, key: Key, tasks: int) -> Network:
        """From a learner's state and so many tasks."""
        layers = Layers(state)
        support, query = drawn(curves, "train", key.sub("training"), torch.arange(tasks))
        features = layers(support.x)
        split = alpha_star.split(features, layers(query.x))
        problem = OneStep.of(features, features @ features.mT, support.y)
        return cls(layers, {"alpha_lim": alpha_star.limit(features), "alpha_split": split}, problem)


class Layers:
    """The frozen layers of a trained `MLP` in float64: x `[T, n, 1]` to features with 1 appended, `[T, n, d]`.

    Args:
        state: of a learner.
    """

    def __init__(self, state: State):
        self.parameters = {k.removeprefix("net."): p.double() for k, p in state.items() if k.startswith("net.")}
        widths = [len(p) for k, p in self.parameters.items() if k.endswith(".bias") and k != "head.bias"]
        inputs = self.parameters["h1.weight"].shape[1]
        self.net = MLP(input_shape=(inputs,), outputs=self.parameters["head.bias"].numel(), hidden=widths).double()

    def __call__(self, x: Tensor) -> Tensor:
        features = self.net.run(self.parameters, x, stop="feat")
        return torch.cat([features, torch.ones_like(features[..., :1])], -1)
