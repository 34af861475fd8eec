"""What prototypical and matching networks share: nothing is adapted, queries are compared with the support set."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.bn import normalization, sets_with_support
from metalearn.episode import Examples, Params, Theta
from metalearn.functional import Trajectory
from metalearn.learner import MetaLearner
from metalearn.ops import Normalization
from metalearn.random import TaskKey


class Metric(MetaLearner):
    """Predict a query from its embedding and those of the support set.

    With batch statistics the support and query sets are embedded together, as in the training code of Snell et al.
    and of Ravi & Larochelle; their evaluations use running averages.
    """

    needs_head: ClassVar[bool] = False

    @abstractmethod
    def compare(self, theta: Theta, support: Tensor, y: Tensor, query: Tensor) -> Tensor:
        """Outputs `[B, n, outputs]` for queries `[B, n, D]` from a support set `[B, S, D]` with targets y."""

    def adapt(self, theta: Theta, support: Examples, *, steps: int, key: TaskKey | None = None) -> Trajectory:
        """No task parameters: `[{}]`. The support set's embedding depends on how the query is normalised."""
        return [{}]

    def predict(
        self, theta: Theta, phi: Params, x: Tensor, *, support: Examples, bn: str, record: Normalization | None = None
    ) -> Tensor:
        """Outputs `[B, n, outputs]`, support and queries embedded under the same normalisation."""
        shots, queries = support.x.shape[1], x.shape[1]

        def embed(z: Tensor, norm: Normalization) -> Tensor:
            return self.run_net(self.network(theta) | phi, z, when="query", stop="feat", norm=norm)

        if bn == "support_plus_one":
            z = embed(sets_with_support(x, support.x), Normalization(sets=queries)).unflatten(1, (queries, -1))
            z, y = z.flatten(0, 1), support.y.repeat_interleave(queries, 0)
            return self.compare(theta, z[:, :shots], y, z[:, shots:]).squeeze(1).unflatten(0, (-1, queries))
        norm = normalization(embed, support.x, bn, self.running.statistics(), record)
        z = embed(torch.cat([support.x, x], 1), norm)
        return self.compare(theta, z[:, :shots], support.y, z[:, shots:])
