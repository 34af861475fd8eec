"""Batch-norm modes: which statistics normalise a prediction (contract: batch norm)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metalearn.backbones import Backbone
from metalearn.ops import Normalization, Statistics
from metalearn.ops.norm import Moments

Forward = Callable[[Tensor, Normalization], Tensor]

MODES = ("batch", "support_plus_one", "support_only", "running")


def predict(
    forward: Forward,
    x: Tensor,
    support: Tensor,
    bn: str,
    running: Statistics,
    record: Normalization | None = None,
) -> Tensor:
    """Forward the queries x `[B, Q, *input]` under one of the modes.

    - `batch`: statistics of the query batch itself (transductive);
    - `support_plus_one`: for each query the statistics of the support set and that query;
    - `support_only`: statistics of the support set;
    - `running`: averages collected while training;
    - `none`: for networks without batch norm.

    Args:
        forward: the network, a function of inputs `[B, n, *input]` and of how to normalise.
        x: queries.
        support: support inputs `[B, S, *input]`.
        bn: the mode.
        running: averages for mode `running`.
        record: used as the normalisation of mode `batch`, to collect its statistics.

    Returns:
        `[B, Q, ...]`.
    """
    if bn == "support_plus_one":
        sets = sets_with_support(x, support)
        out = forward(sets, Normalization(sets=x.shape[1]))
        return out.unflatten(1, (x.shape[1], -1))[:, :, -1]
    return forward(x, normalization(forward, support, bn, running, record))


def normalization(
    forward: Forward, support: Tensor, bn: str, running: Statistics, record: Normalization | None = None
) -> Normalization:
    """How to normalise any input under a mode other than `support_plus_one`."""
    if bn in ("batch", "none"):
        return record or Normalization()
    if bn == "running":
        return Normalization(given=running)
    if bn == "support_only":
        norm = Normalization(record=True)
        forward(support, norm)
        return Normalization(given=norm.seen)
    raise ValueError(f"unknown batch-norm mode '{bn}'; one of {', '.join(MODES)}")


def sets_with_support(x: Tensor, support: Tensor) -> Tensor:
    """One set S and x for each query x: `[B, Q, *input]` and `[B, S, *input]` to `[B, Q (S + 1), *input]`."""
    shared = support.unsqueeze(1).expand(-1, x.shape[1], *support.shape[1:])
    return torch.cat([shared, x.unsqueeze(2)], dim=2).flatten(1, 2)


def task_mean(seen: Statistics) -> Statistics:
    """Statistics averaged over the task axis, `[B, C]` to `[C]`."""
    return {k: Moments(m.mean.mean(0), m.var.mean(0), m.size) for k, m in seen.items()}


class RunningStatistics(nn.Module):
    """Averages of the batch statistics seen on training queries, updated outside the task map.

    Exponential, with PyTorch's momentum 0.1 and its unbiased variance; the first step sets them.
    """

    momentum = 0.1

    def __init__(self, net: Backbone):
        super().__init__()
        stages = [net.stage(name) for name in net.stages]
        self.layers = {f"{stage.name}.norm": stage.shape[0] for stage in stages if stage.normalizes}
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for layer, width in self.layers.items():
            self.register_buffer(_buffer(layer, "mean"), torch.zeros(width))
            self.register_buffer(_buffer(layer, "var"), torch.ones(width))

    def statistics(self) -> Statistics:
        """The averages, by layer."""
        return {k: Moments(self._get(k, "mean"), self._get(k, "var"), 0) for k in self.layers}

    def absorb(self, seen: Statistics) -> None:
        """Move the averages towards the statistics of one meta-step (means over its tasks, `[C]`)."""
        if not seen:
            return
        weight = self.momentum if int(self.get_buffer("steps")) else 1.0
        self.get_buffer("steps").add_(1)
        for layer, moments in seen.items():
            unbiased = moments.var * (moments.size / max(1, moments.size - 1))
            self._get(layer, "mean").lerp_(moments.mean, weight)
            self._get(layer, "var").lerp_(unbiased, weight)

    def _get(self, layer: str, what: str) -> Tensor:
        return self.get_buffer(_buffer(layer, what))


def _buffer(layer: str, what: str) -> str:
    return f"{layer.replace('.', '_')}_{what}"
