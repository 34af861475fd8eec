"""Outer optimizers and their schedules: the learning rate is a pure function of the meta-step."""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn


class OuterOptimizer(ABC):
    """How theta is updated from its gradient.

    Args:
        lr: outer learning rate (beta; Reptile's epsilon) at the start.
        schedule: `constant`; `cosine` or `linear` from `lr` to `final_lr` over all meta-steps; `step`: times
            `decay_factor` after every `decay_every` meta-steps.
        final_lr, decay_every, decay_factor: see `schedule`.
        clip_norm: bound on the global gradient norm; None for none.
        clip_value: bound on each gradient entry; None for none.
    """

    def __init__(
        self,
        *,
        lr: float,
        schedule: Literal["constant", "cosine", "linear", "step"] = "constant",
        final_lr: float = 0.0,
        decay_every: int = 2000,
        decay_factor: float = 0.5,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ):
        self.lr, self.schedule, self.final_lr = lr, schedule, final_lr
        self.decay_every, self.decay_factor = decay_every, decay_factor
        self.clip_norm, self.clip_value = clip_norm, clip_value

    def rate(self, step: int, total: int) -> float:
        """The learning rate of meta-step `step` (0-based) of `total`."""
        progress = step / max(1, total)
        if self.schedule == "cosine":
            return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "linear":
            return self.lr + (self.final_lr - self.lr) * progress
        if self.schedule == "step":
            return self.lr * self.decay_factor ** (step // self.decay_every)
        return self.lr

    @abstractmethod
    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The library's optimizer over these parameters."""


class Adam(OuterOptimizer):
    """Adam (Kingma & Ba 2015), with decay added to the gradient."""

    def __init__(
        self, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, **common
    ):
        super().__init__(**common)
        self.betas, self.eps, self.weight_decay = (float(betas[0]), float(betas[1])), eps, weight_decay

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return _FusedAdam(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


class _FusedAdam(torch.optim.Adam):
    """The library's fused Adam without what its `step` does around the kernel (most of its time for small networks)."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        with torch.no_grad():
            for group in self.param_groups:
                params: list[Tensor] = []
                grads: list[Tensor] = []
                first: list[Tensor] = []
                second: list[Tensor] = []
                steps: list[Tensor] = []
                self._init_group(group, params, grads, first, second, [], steps)
                if not params:
                    continue
                torch._foreach_add_(steps, 1)
                torch._fused_adam_(
                    params, grads, first, second, [], steps, lr=group["lr"], beta1=group["betas"][0],
                    beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                    maximize=False,
                )  # fmt: skip

    step.hooked = True  # type: ignore[attr-defined]  # or the library wraps it once more


class SGD(OuterOptimizer):
    """Stochastic gradient descent; with `lr` = epsilon it is Reptile's outer update."""

    def __init__(self, *, momentum: float = 0.0, weight_decay: float = 0.0, **common):
        super().__init__(**common)
        self.momentum, self.weight_decay = momentum, weight_decay

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def clipped(grads: list[Tensor], optimizer: OuterOptimizer) -> list[Tensor]:
    """The gradients with each entry clipped, and then their global norm."""
    if optimizer.clip_value is not None:
        grads = [grad.clamp(-optimizer.clip_value, optimizer.clip_value) for grad in grads]
    if optimizer.clip_norm is not None:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
        scale = (optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [grad * scale for grad in grads]
    return grads
