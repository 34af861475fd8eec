"""Prototypical networks (Snell, Swersky & Zemel, NeurIPS 2017, https://arxiv.org/abs/1703.05175)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.metric import Metric
from metalearn.episode import Theta
from metalearn.parameters import Parameters


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


def kernel_regression(z: Tensor, support: Tensor, y: Tensor, tau: Tensor) -> Tensor:
    """Mean of the support targets, weighted by softmax(-|z - z_j|^2 / tau).

    Args:
        z: `[B, n, D]` embedded queries.
        support: `[B, S, D]` embedded support sets.
        y: `[B, S, outputs]` targets.
        tau: bandwidth, in squared distances: one number, or `[B]`.

    Returns:
        `[B, n, outputs]`, each within the range of its support targets.
    """
    return (logits(z, support) / tau.view(-1, 1, 1)).softmax(-1) @ y


class ProtoNet(Metric):
    """Classify a query by its distance to the class means of the embedded support set; nothing is adapted.

    The paper has no regression. Targets that are numbers have no classes, so here every support example is a
    prototype (`kernel_regression`), with a bandwidth tau that is meta-learned from sqrt(D); with one-hot targets, one
    shot and tau = 1 that is the paper's posterior. Report it as "ProtoNet (kernel regression)": what TRLearner's
    regression tables call ProtoNet is not described there.
    """

    def __init__(self, **learner: Any):
        super().__init__(**learner)
        if self.kind == "regression":
            self.kernel = Parameters({"log_tau": torch.tensor(math.log(self.net.stage("feat").shape[0]) / 2)})

    def compare(self, theta: Theta, support: Tensor, y: Tensor, query: Tensor) -> Tensor:
        """Logits over the classes, or the kernel's mean of the support targets."""
        if self.kind == "regression":
            return kernel_regression(query, support, y, theta["kernel"]["log_tau"].exp())
        return logits(query, prototypes(support, y, int(y.max()) + 1))
