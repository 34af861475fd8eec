"""An inner learning rate that is estimated while training: `algorithm.alpha=online`."""

import torch
from torch import Tensor, nn


class RunningRate(nn.Module):
    """The moving average alpha <- m alpha + (1 - m) alpha* of estimates alpha*, which the first of them begins.

    It is part of the learner's state (one number, NaN before the first estimate) and has no gradient. Zou, Liu & Li,
    "Unraveling Model-Agnostic Meta-Learning via the Adaptation Learning Rate", ICLR 2022, Figure 3: m = 0.9.

    Args:
        momentum: m, at least 0 and below 1.
    """

    value: Tensor

    def __init__(self, *, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.tensor(torch.nan))
        self.before = self.value

    def absorb(self, estimate: Tensor) -> None:
        """Take in the estimate of one more meta-batch, a number."""
        self.before = self.value.clone()
        averaged = self.momentum * self.value + (1 - self.momentum) * estimate
        self.value.copy_(torch.where(self.value.isnan(), estimate, averaged))

    def revert(self) -> None:
        """Give up the last estimate."""
        self.value.copy_(self.before)
