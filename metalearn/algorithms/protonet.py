"""Prototypical networks (Snell, Swersky & Zemel, NeurIPS 2017, https://arxiv.org/abs/1703.05175)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.bn import normalization, sets_with_support
from metalearn.episode import Examples, Params, Theta
from metalearn.functional import Trajectory
from metalearn.learner import MetaLearner
from metalearn.ops import Normalization
from metalearn.random import TaskKey


def prototypes(z: Tensor, y: Tensor, way: int) -> Tensor:
    """Mean embedding of each class (Snell et al. 2017, eq. 1).

    Args:
        z: `[B, S, D]` embedded support sets.
        y: `[B, S]` labels in 0..way-1.
        way: number of classes N.

    Returns:
        `[B, N, D]`; NaN for a class without support examples, rather than a silent zero prototype.
    """
    member = F.one_hot(y, way).to(z.dtype)
    return (member.mT @ z) / member.sum(1).unsqueeze(-1)


def logits(z: Tensor, centres: Tensor) -> Tensor:
    """Minus the squared Euclidean distances (eq. 2) of `[B, n, D]` to `[B, N, D]`: `[B, n, N]`."""
    return 2 * z @ centres.mT - centres.square().sum(-1).unsqueeze(-2) - z.square().sum(-1, keepdim=True)


class ProtoNet(MetaLearner):
    """Classify a query by its distance to the class means of the embedded support set; nothing is adapted.

    With batch statistics the support and query sets are embedded together, as in the authors' training code; their
    evaluation uses running averages.
    """

    needs_head: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("classification",)

    def adapt(self, theta: Theta, support: Examples, *, steps: int, key: TaskKey | None = None) -> Trajectory:
        """No task parameters: `[{}]`. Prototypes depend on how the query is normalised, see `predict`."""
        return [{}]

    def predict(
        self, theta: Theta, phi: Params, x: Tensor, *, support: Examples, bn: str, record: Normalization | None = None
    ) -> Tensor:
        """Logits `[B, n, N]` from prototypes embedded under the same normalisation as the queries."""
        way, shots, queries = int(support.y.max()) + 1, support.x.shape[1], x.shape[1]

        def embed(z: Tensor, norm: Normalization) -> Tensor:
            return self.run_net(self.network(theta) | phi, z, when="query", stop="feat", norm=norm)

        if bn == "support_plus_one":
            z = embed(sets_with_support(x, support.x), Normalization(sets=queries)).unflatten(1, (queries, -1))
            z, y = z.flatten(0, 1), support.y.repeat_interleave(queries, 0)
            return logits(z[:, shots:], prototypes(z[:, :shots], y, way)).squeeze(1).unflatten(0, (-1, queries))
        norm = normalization(embed, support.x, bn, self.running.statistics(), record)
        z = embed(torch.cat([support.x, x], 1), norm)
        return logits(z[:, shots:], prototypes(z[:, :shots], support.y, way))
