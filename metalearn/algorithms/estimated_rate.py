"""An inner learning rate that is estimated once, before training: `algorithm.alpha=auto`."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


class EstimatedRate(nn.Module):
    """The estimate alpha* at the initial parameters, with its error: part of the learner's state, in full precision.

    Plain numbers instead of tensors, so that no cast of the learner changes them.

    Attributes:
        found: value, standard error, ends of the 95 % interval over tasks, number of tasks and of probes; empty before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, float] = {}

    @property
    def value(self) -> float:
        """Alpha; NaN before it is estimated."""
        return self.found.get("value", math.nan)

    def metric(self) -> dict[str, Any]:
        """As a metric of a result: the deviation is that of one task's influence on the estimate."""
        f, n = self.found, int(self.found["tasks"])
        return {
            "mean": f["value"],
            "std": f["se"] * math.sqrt(n),
            "ci95": 1.96 * f["se"],
            "n": n,
            "interval": "tasks",
            "unit": "1",
        }

    def get_extra_state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return dict(self.found)

    def set_extra_state(self, state: dict[str, float]) -> None:
        """What `get_extra_state` gave."""
        self.found = dict(state)
