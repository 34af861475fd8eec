"""Reptile (Nichol, Achiam & Schulman 2018, https://arxiv.org/abs/1803.02999), batched and serial."""

from typing import Any, Literal

import torch
from torch import Tensor

from metalearn.algorithms.pools import minibatches, pooled, take
from metalearn.episode import Episode, Examples, MetaBatch, Params, TaskOutput, Theta
from metalearn.functional import Trajectory, gradient, per_task, surrogate
from metalearn.learner import MetaLearner
from metalearn.ops import Normalization, Statistics
from metalearn.random import TaskKey

BETA2, EPS = 0.999, 1e-8
Moments = tuple[Params, Tensor]


class Reptile(MetaLearner):
    """theta moves towards the parameters U_i(theta) that `inner_steps` inner steps on task i end at.

    Support and query examples are pooled in training. The outer optimizer receives the pseudo-gradient
    theta - U_i(theta), averaged over tasks; SGD of rate epsilon then makes theta <- theta + epsilon mean(U_i - theta).

    Args:
        alpha: learning rate of the inner optimizer.
        inner_optimizer: `adam` (beta1 = 0, beta2 = 0.999, as in the authors' runs) or `sgd`.
        inner_state: Adam's second moments at the start of a task: `carry` those that training tasks left, or
            `reset` to zero. The authors carry them from task to task; here all tasks of an update start from the
            same ones, and their mean is carried on (the same thing when `serial`). Evaluation never changes them.
        inner_batch, test_inner_batch: minibatch sizes in training and evaluation; None for the whole pool.
        serial: update theta after each task of the meta-batch instead of once for all.
        learner: arguments of `MetaLearner`.
    """

    def __init__(
        self,
        *,
        alpha: float,
        inner_optimizer: Literal["sgd", "adam"] = "adam",
        inner_state: Literal["carry", "reset"] = "carry",
        inner_batch: int | None = 10,
        test_inner_batch: int | None = 5,
        serial: bool = False,
        **learner: Any,
    ):
        super().__init__(**learner)
        self.alpha, self.inner_optimizer, self.inner_state = alpha, inner_optimizer, inner_state
        self.inner_batch, self.test_inner_batch, self.serial = inner_batch, test_inner_batch, serial
        self.register_buffer("taken", torch.zeros(()))  # inner Adam steps behind the carried moments
        for name, shape in self.shapes.items():
            self.register_buffer(_buffer(name), torch.zeros(shape))

    def adapt(self, theta: Theta, support: Examples, *, steps: int, key: TaskKey | None = None) -> Trajectory:
        """U(theta): `steps` inner steps on minibatches of the support set."""
        return self._descend(theta, support, steps, self.test_inner_batch, key)[0]

    def task_loss(self, theta: Theta, episodes: Episode, key: TaskKey | None = None) -> TaskOutput:
        """A loss whose value is that of the last minibatch and whose gradient in theta is theta - U(theta)."""
        found = self._descend(theta, pooled(episodes), self.inner_steps, self.inner_batch, key)
        trajectory, loss, (second, taken), seen = found
        start = per_task(theta["net"], episodes.tasks, self.shapes)
        displacement = {k: start[k] - trajectory[-1][k] for k in start}
        state = {**second, "taken": taken.expand(episodes.tasks)} if self.inner_state == "carry" else {}
        return TaskOutput(surrogate(loss, start, displacement), None, trajectory[-1], {}, seen, state)

    @property
    def exact(self) -> bool:
        """A displacement is not the slope of an objective."""
        return False

    def updates(self, batch: MetaBatch) -> list[MetaBatch]:
        """One update for all tasks, or one for each in turn (`serial`)."""
        if not self.serial:
            return [batch]
        alone = [slice(i, i + 1) for i in range(batch.episodes.tasks)]
        return [batch._replace(total=1, episodes=batch.episodes.select(i), key=batch.key.select(i)) for i in alone]

    def absorb(self, state: dict[str, Any]) -> None:
        """Carry the inner optimizer's moments on."""
        for name, value in state.items():
            self.get_buffer("taken" if name == "taken" else _buffer(name)).copy_(value)

    def _descend(
        self, theta: Theta, pool: Examples, steps: int, size: int | None, key: TaskKey | None
    ) -> tuple[Trajectory, Tensor, Moments, Statistics]:
        """The inner loop, without any graph: parameters after each step; loss, moments and statistics of the last."""
        tasks, n = pool.y.shape[:2]
        phi = {k: p.detach() for k, p in per_task(theta["net"], tasks, self.shapes).items()}
        moments, own, norm = self._moments(tasks), self.network(theta), Normalization(record=True)
        trajectory, loss = [phi], phi[next(iter(phi))].new_zeros(tasks)
        rows = None if key is None or size is None else minibatches(key.sub("minibatch"), n, size, steps)
        for step in range(steps):
            x, y = pool if rows is None else take(pool, rows[:, step])
            with torch.enable_grad():
                phi = {k: p.detach().requires_grad_() for k, p in phi.items()}
                value = self.inner_loss(self.run_net(own | phi, x, when="inner", norm=norm), y)
                grads = gradient(value, {k: p for k, p in phi.items() if self.net.adapts(k)})
            moments, moves = self._rule(moments, grads)
            phi = {k: (p - moves[k] if k in moves else p).detach() for k, p in phi.items()}
            loss = value.detach()
            trajectory.append(phi)
        return trajectory, loss, moments, norm.seen

    def _moments(self, tasks: int) -> Moments:
        carried = {k: self.get_buffer(_buffer(k)).expand(tasks, *shape) for k, shape in self.shapes.items()}
        if self.inner_state == "carry":
            return carried, self.get_buffer("taken")
        return {k: torch.zeros_like(v) for k, v in carried.items()}, torch.zeros_like(self.get_buffer("taken"))

    def _rule(self, moments: Moments, grads: Params) -> tuple[Moments, Params]:
        """One step of the inner optimizer: its new state, and by how much each parameter is lowered."""
        if self.inner_optimizer == "sgd":
            return moments, {k: self.alpha * g for k, g in grads.items()}
        second, taken = moments
        second = second | {k: torch.lerp(g.square(), second[k], BETA2) for k, g in grads.items()}
        taken = taken + 1
        scale = self.alpha * torch.sqrt(1 - BETA2**taken)
        return (second, taken), {k: scale * g / (second[k].sqrt() + EPS) for k, g in grads.items()}


def _buffer(name: str) -> str:
    return f"second_{name.replace('.', '_')}"
