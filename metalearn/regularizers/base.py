"""The hooks of a regularizer; the base class is the identity (`regularizer=none`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from metalearn.episode import Episode, Params, TaskOutput, Theta
from metalearn.random import TaskKey

if TYPE_CHECKING:
    from metalearn.learner import MetaLearner


class Regularizer(nn.Module):
    """Does nothing. A method overrides the hooks it needs; hooks that are not overridden cost nothing.

    A regularizer may own meta-parameters: as a child of the learner it gets devices, checkpoints and the outer
    optimizer, and finds them in `theta["regularizer"]`.
    """

    def features(self, h: Tensor, site: str, when: Literal["inner", "query"], own: Params) -> Tensor:
        """Map the activations `[B, n, ...]` at a site of the network, while adapting or on the query set.

        It must be pure: chunks of tasks run at the same time, in any order.
        `own` are this regularizer's meta-parameters by name; using `self`'s instead would cut their gradient.
        """
        return h

    def episodes(self, episodes: Episode, key: TaskKey) -> Episode:
        """Rewrite training episodes before anything sees them."""
        return episodes

    def task_gradients(self, grads: Params) -> Params:
        """Rewrite the outer gradients of the tasks, leaves `[B, *shape]` to `[B, *shape]`."""
        return grads

    def penalty(self, learner: MetaLearner, theta: Theta, episodes: Episode, out: TaskOutput) -> Tensor | None:
        """A scalar added to the outer objective, from all tasks' outputs at once; None for none."""
        return None

    def overrides(self, hook: str) -> bool:
        """Whether this regularizer does something at `hook`."""
        return getattr(type(self), hook) is not getattr(Regularizer, hook)
