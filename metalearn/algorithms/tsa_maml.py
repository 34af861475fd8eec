"""Task-similarity-aware MAML (TSA-MAML): one initialisation for each group of similar tasks.

Zhou, Zou, Yuan, Feng, Xiong & Hoi, "Task similarity aware meta learning: theory-inspired improvement on MAML", UAI 2021
(section 4.1, Algorithm 1), with the authors' code where the paper is silent. Paper and code take the inner gradient on
the support set; the D^ts in the printed objective and Algorithm 1 is read as a slip, as it would leak labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from metalearn.algorithms.maml import MAML
from metalearn.clustering import Vectors, centroids, cluster, majority
from metalearn.data import Episodes
from metalearn.episode import Episode, Examples, MetaBatch, Params, TaskOutput, Theta
from metalearn.evaluation.metrics import TaskMean
from metalearn.functional import per_task
from metalearn.learner import Diverged
from metalearn.meta_gradient import MetaGradient
from metalearn.parameters import Parameters
from metalearn.phases import Phase, Piece
from metalearn.prerequisites import take
from metalearn.queues import Queues
from metalearn.random import TaskKey
from metalearn.schema import BadInput

if TYPE_CHECKING:
    from metalearn.analysis import Analysis

GROUP = "chosen_group"
PIECE = 64  # tasks that are adapted and kept at once before training; changes rounding alone
WINDOW = 500  # outer updates that usage is told of
KEPT = {"net", "regularizer", "running", "estimated_rate"}  # of the run that comes first
MOST = 0.95  # share of the tasks of one group above which routing has collapsed


class Collapsed(Diverged):
    """Routing to the current initialisations sends nearly all tasks to one group."""


class TSAMAML(MAML):
    """MAML from theta_g(T), where g(T) is the nearest of m reference points to the parameters adapted from theta*.

    theta* is the solution of vanilla MAML (`inherit`) and frozen: `theta["net"]`. Before training, k-means divides the
    displacements Delta_T = GD_{id_steps}(theta*; S_T) - theta* of `tasks` training tasks into m clusters, and the means
    of their members' parameters are the initial theta_1, ..., theta_m: `theta["groups"]`, named `<group>.<parameter>`.
    Parameters that the inner loop does not move (batch-norm scales and offsets with `backbone.bn_affine_inner=false`)
    are theta*'s in every group, and learned there. Routing sees support sets alone, normalised by batch statistics as
    in clustering. Running averages of batch norm are one set for all groups.

    A meta-step draws B tasks. With `per_group_queue` they wait in the queue of their group, and a group whose queue
    holds B of them makes one outer update with the oldest B: none, one or more updates a meta-step, and one on average.
    So S meta-steps draw exactly the tasks that S meta-steps of MAML draw, and schedules run over them; fewer than m
    updates are outstanding at the end. (The authors' code counts updates, of 4 tasks.) With `mixed` each meta-step is
    one update of all groups that its tasks chose, by the sum of their losses divided by B.

    Args:
        m: number of groups.
        tasks: training tasks that are clustered.
        id_steps: inner steps from theta* that identify a task.
        cluster_params: which of the parameters that the inner loop moves are compared, in clustering and in routing.
            Labels are assigned to classes at random, so that the head tells permutations of them apart.
        routing: reference points: the `initial` centres (the authors' code), or the `current` theta_i (the paper). The
            latter move by far more than |Delta_T|, and all tasks then choose the one that moved least.
        batching: see above.
        collapse_steps: with `current`, stop when one group took more than 95 % of the tasks of so many updates; 0 for
            never.
        maml: arguments of `MAML`.
    """

    latent_reads: ClassVar[tuple[str, ...]] = (GROUP,)
    centres: Tensor
    usage: Tensor

    def __init__(
        self,
        *,
        m: int = 3,
        tasks: int = 1000,
        id_steps: int = 10,
        cluster_params: Literal["all", "body", "head"] = "all",
        routing: Literal["initial", "current"] = "initial",
        batching: Literal["per_group_queue", "mixed"] = "per_group_queue",
        collapse_steps: int = 500,
        **maml: Any,
    ):
        super().__init__(**maml)
        self.m, self.tasks, self.id_steps, self.routing, self.batching = m, tasks, id_steps, routing, batching
        self.collapse_steps = collapse_steps
        moving = [k for k in self.shapes if self.moves(k)]
        head = self.net.parameters_of("head")
        kept = {"all": set(moving), "body": set(moving) - head, "head": set(moving) & head}[cluster_params]
        if not kept:
            raise BadInput(f"algorithm.cluster_params={cluster_params}: the inner loop moves no such parameter")
        self.order = sorted(moving, key=lambda k: k not in kept)  # of the entries of a displacement
        self.compared = slice(0, sum(self.shapes[k].numel() for k in kept))
        self.groups = Parameters({f"{i}.{k}": p for i in range(m) for k, p in self.net.named_parameters()})
        self.register_buffer("centres", torch.zeros(m, self.compared.stop))  # minus theta*
        self.register_buffer("usage", torch.zeros(collapse_steps or WINDOW, m))  # shares of the last updates' tasks
        self.made = 0  # updates
        self.clusters: dict[str, Any] = {}
        self.queues = Queues(m)
        names = [name for name, _ in self.named_parameters()]
        shared = {name for name in names if not name.startswith(("net.", "groups."))}
        self.owned = [shared | {name for name in names if name.startswith(f"groups.{i}.")} for i in range(m)]

    def initialize(self, seed: int) -> None:
        """Draw theta*; all groups start there."""
        super().initialize(seed)
        self.place(torch.zeros(self.m, sum(self.shapes[k].numel() for k in self.order)))

    def place(self, centres: Tensor) -> None:
        """Set the group initialisations and the reference points to theta* + centres `[m, d]`."""
        shifts = self._named(centres)
        star = dict(self.net.named_parameters())
        with torch.no_grad():
            for name, parameter in self.groups.named_parameters():
                group, _, rest = name.partition(".")
                parameter.copy_(star[rest] + shifts[rest][int(group)] if rest in shifts else star[rest])
            self.centres.copy_(centres[:, self.compared])

    # ---- the method ------------------------------------------------------------------------------------------------

    def displacement(self, theta: Theta, support: Examples) -> Tensor:
        """Delta_T = GD_{id_steps}(theta*; S_T) - theta*: `[B, d]`, those entries first that are compared."""
        star = {k: self._shared(k, p.detach()) for k, p in self.network(theta).items()}
        with torch.no_grad():
            phi = self.descend(star, support, self.id_steps, self.alpha)[-1]
        return torch.cat([(phi[k] - star[k]).flatten(1) for k in self.order], 1)

    def route(self, theta: Theta, support: Examples) -> Tensor:
        """g(T) = argmin_i |theta* + Delta_T - reference_i|: `[B]` int64 in 0..m-1."""
        if self.m == 1:
            return torch.zeros(len(support.y), dtype=torch.int64, device=support.y.device)
        delta = self.displacement(theta, support)[:, self.compared]
        mode = "donot_use_mm_for_euclid_dist"  # the differences are far smaller than the distances from zero
        return torch.cdist(delta, self.references(theta), compute_mode=mode).argmin(1)

    def references(self, theta: Theta) -> Tensor:
        """What tasks are compared with, minus theta*: `[m, d]`."""
        if self.routing == "initial":
            return self.centres
        star = theta["net"]
        rows = [
            torch.cat([(self._own(theta, i, k) - self._shared(k, star[k])).detach().flatten() for k in self.order])
            for i in range(self.m)
        ]
        return torch.stack(rows)[:, self.compared]

    def start(self, theta: Theta, group: Tensor) -> Params:
        """The network of each task's group, leaves `[B, *shape]`."""
        chosen = {}
        for k, shape in self.shapes.items():
            each = [theta["groups"][f"{i}.{k}"] for i in range(self.m)]
            first, *others = (per_task({k: p}, len(group), self.shapes)[k] for p in each)
            for i, p in enumerate(others, 1):
                first = torch.where((group == i).view(-1, *[1] * len(shape)), p, first)
            chosen[k] = first
        return self.network(theta) | chosen

    def origin(self, theta: Theta, support: Examples, key: TaskKey | None) -> Params:
        """Theta_g(T); theta* before alpha is known, when all groups are there."""
        if math.isnan(self.alpha):
            return self.network(theta)
        return self.start(theta, self.route(theta, support))

    def task_loss(self, theta: Theta, episodes: Episode, key: TaskKey | None = None) -> TaskOutput:
        """Query loss of the parameters adapted from theta_g(T), for the group that `updates` found, if it did."""
        group = episodes.latent.get(GROUP)
        group = self.route(theta, episodes.support) if group is None else group
        phi = self.descend(self.start(theta, group), episodes.support, self.inner_steps, self.alpha)[-1]
        usage = group[:, None] == torch.arange(self.m, device=group.device)
        return self.query_output(theta, phi, episodes, {GROUP: group})._replace(state={"usage": usage.to(self.usage)})

    # ---- outer updates -----------------------------------------------------------------------------------------------

    def updates(self, batch: MetaBatch) -> list[MetaBatch]:
        """All tasks at once, or those of each group whose queue is full."""
        if self.batching == "mixed":
            return [batch]
        theta, seen = self.constants(), self.regularizer.episodes(batch.episodes, batch.key)
        group = torch.cat(self.in_chunks(lambda chunk: self.route(theta, seen.select(chunk).support), seen))
        latent = batch.episodes.latent | {GROUP: group}
        batch = batch._replace(episodes=batch.episodes._replace(latent=latent))
        return self.queues.push(batch, group)

    def touched(self, result: MetaGradient) -> Collection[str]:
        """The initialisations of the groups that had tasks; theta* never."""
        return set().union(*(self.owned[i] for i in result.aux[GROUP].unique().tolist()))

    def absorb(self, state: dict[str, Any]) -> None:
        """Count which groups the tasks chose."""
        self.usage[self.made % len(self.usage)] = state["usage"]
        self.made += 1
        if self.routing == "current" and self.collapse_steps and self.made >= self.collapse_steps:
            most, group = self.usage.mean(0).max(0)
            if self.m > 1 and most > MOST:
                raise Collapsed(
                    f"algorithm.routing=current: group {int(group)} took {most:.1%} of the tasks of "
                    f"{self.collapse_steps} updates, up to meta-step {self.meta_steps}; use routing=initial"
                )

    def reports(self) -> dict[str, float]:
        """Each group's share of the last updates' tasks, and their entropy in nats (log m: all alike)."""
        found = {k: v for k, v in super().reports().items() if k != GROUP}
        share = self.usage[: max(1, min(self.made, len(self.usage)))].mean(0)
        found["usage_entropy"] = float(-torch.special.xlogy(share, share).sum())
        return found | {f"usage_{i}": float(s) for i, s in enumerate(share)}

    # ---- before the first meta-step ----------------------------------------------------------------------------------

    def inherit(self, states: Sequence[dict[str, Any]]) -> None:
        """Take theta* from a run of MAML, and what it learned inside a regularizer."""
        (state,) = states
        if foreign := {name.partition(".")[0] for name in state} - KEPT:
            raise BadInput(f"algorithm.pretrained: must be a run of maml, and it has {', '.join(sorted(foreign))}, too")
        own = {k: p for k, p in self.named_parameters() if not k.startswith("groups.")}
        take(own, state, "algorithm.pretrained: ")
        with torch.no_grad():
            for name, average in self.running.named_buffers():
                average.copy_(state[f"running.{name}"])

    def phases(self, data: Episodes) -> list[Phase]:
        """Collect the displacements of training tasks; then cluster them."""

        def collect(i: int, _: Iterator[Piece]) -> Piece:
            episodes = data.stream("collect", i * PIECE, min(self.tasks, (i + 1) * PIECE)).episodes
            theta = self.constants()
            deltas = torch.cat(self.in_chunks(lambda c: self.displacement(theta, episodes.select(c).support), episodes))
            if bad := (~deltas.isfinite().all(1)).nonzero().flatten().tolist():
                raise Diverged(f"parameters of collected task {i * PIECE + bad[0]} are not finite, {self._rate()}")
            vectors = Vectors(torch.zeros_like(deltas[0]), len(deltas))
            vectors.add(deltas)
            h, scale = vectors.stored()
            return {"h": h, "scale": scale} | {k: v for k, v in episodes.latent.items() if k == "group"}

        def divide(_: int, pieces: Iterator[Piece]) -> Piece:
            seed = data.train_key.sub("cluster").integer() % 2**32
            return clustered(pieces, self.tasks, self.m, self.compared, seed, self.centres)

        return [Phase("collect", -(-self.tasks // PIECE), collect), Phase("cluster", 1, divide)]

    def begin(self, pieces: Iterator[Piece]) -> dict[str, float]:
        """Start the groups at the centres of their clusters."""
        (found,) = pieces
        self.place(found["centres"].to(self.centres))
        self.clusters = {k: v for k, v in found.items() if k.startswith("cluster_")}
        return {k: v["mean"] for k, v in self.clusters.items() if isinstance(v, dict)}

    def analyse(self, data: Episodes) -> Analysis:
        """Usage of the initialisations, purities, and how alike tasks of one group are."""
        from metalearn.evaluation import routing

        return routing.analyse(self, data)

    # ---- state -------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """The tasks that wait, and what is known of the clusters."""
        return {"queues": self.queues.state(), "made": self.made, "clusters": self.clusters}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """What `get_extra_state` gave."""
        self.queues.load(state["queues"])
        self.made, self.clusters = state["made"], state["clusters"]

    # ---- names -------------------------------------------------------------------------------------------------------

    def _named(self, vectors: Tensor) -> Params:
        """Vectors `[n, d]` as parameters `[n, *shape]`, by name."""
        parts = vectors.split([self.shapes[k].numel() for k in self.order], 1)
        return {k: part.unflatten(1, self.shapes[k]) for k, part in zip(self.order, parts, strict=True)}

    def _shared(self, name: str, p: Tensor) -> Tensor:
        """A parameter that all tasks share, without a task axis."""
        return p[0] if name in self.shapes and p.dim() > len(self.shapes[name]) else p

    def _own(self, theta: Theta, group: int, name: str) -> Tensor:
        return self._shared(name, theta["groups"][f"{group}.{name}"])

    def _rate(self) -> str:
        return f"algorithm.alpha = {self.alpha}, algorithm.id_steps = {self.id_steps}"


def clustered(pieces: Iterator[Piece], n: int, m: int, compared: slice, seed: int, like: Tensor) -> Piece:
    """k-means of displacements: the centres `[m, d]` in all dimensions, and how good the clusters are.

    Args:
        pieces: of the phase `collect`.
        n: displacements in all of them.
        m: number of clusters.
        compared: dimensions in which they are clustered.
        seed: of k-means++.
        like: a tensor of the device to work on and of the type of the centres.
    """
    first = next(pieces)
    vectors, groups = Vectors(like.new_zeros(first["h"].shape[1]), n), list[Tensor]()
    for piece in itertools.chain([first], pieces):
        vectors.restore(piece["h"].to(like.device), piece["scale"].to(like.device))
        groups += [piece["group"]] if "group" in piece else []
    found = cluster(vectors.part(compared), m, seed=seed)
    stats: Piece = {"cluster_silhouette": TaskMean(found.silhouette.tolist()).compute("1")}
    stats["cluster_sizes"] = found.labels.bincount(minlength=m).tolist()
    if groups:
        stats["cluster_purity"] = TaskMean(majority(found.labels, torch.cat(groups)).tolist()).compute("fraction")
    return {"centres": centroids(vectors, found.labels, m)[0], "labels": found.labels} | stats
