"""How the outer gradients of the tasks of a meta-batch become one: transforms of stacked per-task gradients.

The mean needs none of this. A transform sees every task's gradient, leaves `[B, *shape]`, and gives each task a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from metalearn.episode import Params, TaskOutput, Theta

TINY = 1e-12


class Combine(ABC):
    """A rule for the weights w of `sum_i w_i g_i`, where the default is the mean, w_i = 1/B.

    Attributes:
        needs_phi: whether it looks at the tasks' adapted parameters.
        drop: whether a task of weight zero may have a loss that is not finite.
    """

    needs_phi: bool = False
    drop: bool = False

    @abstractmethod
    def weights(self, grads: Params, theta: Theta, out: TaskOutput) -> Tensor:
        """`[B]` from the tasks' outer gradients, leaves `[B, *shape]`; constants of the outer step."""

    def reports(self, weights: Tensor) -> dict[str, float]:
        """What a log line says of the weights."""
        return {}


class Agreement(Combine):
    """Gradient Agreement: w_i = s_i / sum_k |s_k| with s_i = sum_j g_i^T g_j (Eshratifar et al. 2018, eq. 9 to 11).

    A task whose vector opposes the sum of all gets a negative weight: its update is inverted, not ignored. The weights
    are not differentiated. Where the vectors cancel (sum |s| below 1e-12 of sum |g|^2) there is no direction to agree
    on: all weights are zero, and the meta-step updates nothing.

    Args:
        vector: g_i is `displacement`, theta - phi_i of the parameters that the inner loop moves (line 7 of the paper's
            Algorithm 1), or `meta_grad`, the task's outer gradient. For Reptile both are the same.
        clip: bound on |g_i| as a multiple of the median of the batch, before the weights are computed; None for none
            (the paper). Weights grow with the squared norm, so that one diverging task takes the whole step.
        drop: leave out tasks whose vector or gradient is not finite, instead of stopping with `Diverged`.
    """

    def __init__(
        self,
        *,
        vector: Literal["displacement", "meta_grad"] = "displacement",
        clip: float | None = None,
        drop: bool = False,
    ):
        self.vector, self.clip, self.drop = vector, clip, drop
        self.needs_phi = vector == "displacement"

    def weights(self, grads: Params, theta: Theta, out: TaskOutput) -> Tensor:
        vectors = grads
        if self.vector == "displacement":
            vectors = {k: theta["net"][k] - p for k, p in out.phi.items() if k in theta["net"]}
        g = torch.cat([v.flatten(1) for v in vectors.values()], 1)
        finite = torch.stack([v.flatten(1).isfinite().all(1) for v in (*vectors.values(), *grads.values())]).all(0)
        kept = finite & out.loss.isfinite() if self.drop else torch.ones_like(finite)
        return agreement(torch.where(kept[:, None], g, 0.0), self.clip)

    def reports(self, weights: Tensor) -> dict[str, float]:
        """Share of negative weights, entropy of |w| in nats (log B: all tasks weigh the same), and their sum."""
        share = weights.abs()
        return {
            "agreement_negative": float((weights < 0).double().mean()),
            "agreement_entropy": float(-torch.special.xlogy(share, share).sum()),
            "agreement_sum": float(weights.sum()),
            "agreement_zero": float((weights == 0).double().mean()),
        }


def agreement(g: Tensor, clip: float | None = None) -> Tensor:
    """w = s / sum |s| with s = G G^T 1, in O(B P) (Eshratifar et al. 2018, eq. 9 to 11).

    Args:
        g: `[B, P]`, one vector per task.
        clip: bound on the vectors' norms in multiples of the median of those that are not zero; None for none.

    Returns:
        `[B]` with sum |w| = 1, or zeros where the vectors cancel.
    """
    if clip is not None:
        norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        typical = torch.where(norm > 0, norm, torch.nan).nanmedian().nan_to_num()
        g = g * torch.where(norm > clip * typical, clip * typical / norm, 1.0)
    s = g @ g.sum(0)
    total = s.abs().sum()
    return torch.where(total < TINY * g.square().sum(), torch.zeros_like(s), s / (total + TINY * (total == 0)))


def outer_rule(outer: str, vector: Any, clip: float | None, drop: bool) -> Combine | None:
    """The rule that `algorithm.outer` and its keys `outer_*` describe; None for the mean."""
    return {"mean": lambda: None, "agreement": lambda: Agreement(vector=vector, clip=clip, drop=drop)}[outer]()
