"""Empirical risk minimisation: joint training on all tasks' examples, without an inner loop; fine-tuning in test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from metalearn.algorithms.maml import MAML
from metalearn.algorithms.pools import pooled
from metalearn.episode import Episode, Examples, Params, TaskOutput, Theta
from metalearn.ops import Normalization
from metalearn.random import TaskKey
from metalearn.schema import BadInput

if TYPE_CHECKING:
    from metalearn.datasets.base import Dataset


class ERM(MAML):
    """theta descends the mean loss of all tasks' support and query examples; in test it is fine-tuned by MAML's loop.

    With `form=global` the network is a classifier of all training classes: its labels are `latent["class_ids"]`, the
    one case of a latent that is learned from, because in the pooled problem they are the labels. A new task has other
    classes, so adaptation begins with a new head for the task's N classes in place of it. With `form=fixed_label`, and
    in regression, labels mean the same in all tasks and the whole network is kept.

    Batch norm normalises each task's pool by itself. So the objective is a mean over tasks, and the gradient is MAML's
    with alpha = 0 on the same examples. Statistics of few classes are noise to a classifier of all of them: train it on
    wide tasks, as `dataset.way` may differ from `dataset.test_way` with `form=global`.

    Args:
        alpha: learning rate of the fine-tuning, for the loss that `inner_loss_reduction` defines.
        form: of classification, `global` or `fixed_label`; None for `global`. Without effect in regression.
        new_head: its initial weights, `zero` or `drawn` for each task (Xavier uniform); biases are zero.
        adapted: prefix of the parameters that fine-tuning moves; empty for all, `head` for the last layer.
        learner: arguments of `MAML`; `inner_steps` has no effect.

    Raises:
        BadInput: with `form=global`, if the last layer is no linear map or `adapted` leaves out a part of it.
    """

    latent_reads: ClassVar[tuple[str, ...]] = ("class_ids",)

    def __init__(
        self,
        *,
        alpha: float,
        form: Literal["global", "fixed_label"] | None = None,
        new_head: Literal["zero", "drawn"] = "zero",
        adapted: str = "",
        **learner: Any,
    ):
        super().__init__(alpha=alpha, adapted=adapted, **learner)
        self.new_head = new_head
        self.head = self.net.stage(self.net.stages[-1]).kernel if _replaces_head(self.kind, form) else None
        if _replaces_head(self.kind, form) and self.head is None:
            raise BadInput("algorithm.form=global: the network's last layer must be a linear map")
        if self.head is not None and not all(self.moves(name) for name in self.head if name):
            raise BadInput(f"algorithm.adapted={adapted}: must include the head, which algorithm.form=global replaces")

    @classmethod
    def head_width(cls, dataset: Dataset, arguments: dict[str, Any]) -> int:
        """As many outputs as there are training classes, with `form=global`."""
        replaces = _replaces_head(dataset.kind, arguments["form"])
        return dataset.classes("train") if replaces else super().head_width(dataset, arguments)

    def task_loss(self, theta: Theta, episodes: Episode, key: TaskKey | None = None) -> TaskOutput:
        """The loss of each task's pool at theta."""
        pool, norm = pooled(episodes), Normalization(record=True)
        y = pool.y
        if self.head is not None:
            y = episodes.latent["class_ids"].to(y.device).gather(1, y)
        prediction = self.predict(theta, {}, pool.x, support=episodes.support, bn="batch", record=norm)
        queries = episodes.query.x.shape[1]
        return TaskOutput(self.loss(prediction, y), prediction[:, -queries:], {}, {}, norm.seen, {})

    def origin(self, theta: Theta, support: Examples, key: TaskKey | None) -> Params:
        """Theta, with a new head if the tasks need one."""
        start = self.network(theta)
        return start | self._fresh_head(start, support, key)

    def _fresh_head(self, start: Params, support: Examples, key: TaskKey | None) -> Params:
        """A head for the N classes of each task, leaves `[B, N, ...]`."""
        if self.head is None:
            return {}
        like, tasks, way = start[self.head.weight], len(support.y), int(support.y.max()) + 1
        width = like.shape[-1]
        weight = like.new_zeros(tasks, way, width)
        if self.new_head == "drawn":
            if key is None:
                raise ValueError("algorithm.new_head=drawn draws a head for each task: adapt needs the tasks' key")
            limit = (6 / (way + width)) ** 0.5
            draws = key.sub("head").uniform(way * width, low=-limit, high=limit)
            weight = draws.to(like).view(tasks, way, width)
        fresh = {self.head.weight: weight}
        return fresh if self.head.bias is None else fresh | {self.head.bias: like.new_zeros(tasks, way)}


def _replaces_head(kind: str, form: str | None) -> bool:
    return kind == "classification" and form != "fixed_label"
