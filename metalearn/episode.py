"""The data that every algorithm sees: examples, episodes, parameters.

Shape letters: `B` tasks, `N` way, `K` shot, `Q` queries per class, `S = N*K` support examples.
All tensors carry the task axis first; there is no unbatched form.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn.ops import Statistics
from metalearn.random import TaskKey

Params = dict[str, Tensor]
"""Parameters of one network by name: `[*shape]` shared by all tasks, or `[B, *shape]` one per task."""

Theta = dict[str, Params]
"""All meta-parameters, grouped by the learner's attribute that owns them: `theta["net"]`, ..."""


class Examples(NamedTuple):
    """Inputs `x` `[B, n, *input]` and targets `y`: `[B, n]` labels in 0..N-1, or `[B, n, outputs]` numbers."""

    x: Tensor
    y: Tensor


class Episode(NamedTuple):
    """A stack of B tasks.

    `support` and `query` are ordered by class (all examples of label 0, then of label 1, ...).
    `latent` holds the ground truth of each task (amplitude, class ids, ...) for analysis, pairing and tests;
    algorithms adapt from `support` alone.
    """

    support: Examples
    query: Examples
    latent: dict[str, Tensor]

    @property
    def tasks(self) -> int:
        """Number of tasks B."""
        return self.support.x.shape[0]

    def select(self, tasks: slice | Tensor) -> "Episode":
        """The tasks of a slice (or of an index tensor), as an episode stack."""
        return Episode(
            Examples(self.support.x[tasks], self.support.y[tasks]),
            Examples(self.query.x[tasks], self.query.y[tasks]),
            {name: value[tasks] for name, value in self.latent.items()},
        )

    def to(self, dtype: torch.dtype) -> "Episode":
        """Floating-point inputs and targets in another precision."""

        def cast(part: Examples) -> Examples:
            return Examples(*(t.to(dtype) if t.is_floating_point() else t for t in part))

        return Episode(cast(self.support), cast(self.query), self.latent)


class MetaBatch(NamedTuple):
    """The tasks of one meta-step (on one rank), or a stack of frozen evaluation tasks.

    step: the meta-step they are drawn for; total: tasks of that meta-step over all ranks; key: their coordinates.
    """

    step: int
    total: int
    episodes: Episode
    key: TaskKey


class TaskOutput(NamedTuple):
    """What a learner makes of a stack of tasks.

    loss: `[B]`, differentiated in theta. prediction: `[B, n, outputs]` on the query set, None where there is none.
    phi: the adapted parameters. aux: per-task reports `[B]`, detached, never used for control flow; differentiating
    the output may add to them.
    seen: batch-norm statistics of the query pass. state: new values of the learner's state, leaves `[B, *shape]`.
    """

    loss: Tensor
    prediction: Tensor | None
    phi: Params
    aux: dict[str, Tensor]
    seen: Statistics
    state: dict[str, Any]
