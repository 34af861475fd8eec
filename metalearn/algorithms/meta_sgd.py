"""Meta-SGD: the inner learning rate of every parameter is learned (Li, Zhou, Chen & Li 2017, arXiv:1707.09835)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from metalearn.algorithms.maml import MAML
from metalearn.episode import Params, Theta
from metalearn.parameters import Parameters
from metalearn.random import Key, TaskKey

if TYPE_CHECKING:
    from metalearn.data import Episodes

UNIFORM = (0.005, 0.1)


class MetaSGD(MAML):
    """phi_i = theta - a * grad L(theta; S_i), entry by entry; theta and a descend the mean query loss of phi_i.

    The rates have the names and shapes of the parameters that the inner loop moves (`theta["rates"]`); several steps
    use the same ones. They may become negative, and are not clamped. Log lines report their minimum, median and maximum
    and the share of negative ones.

    Args:
        alpha: initial value of every rate, for the loss that `inner_loss_reduction` defines.
        rate_init: `constant`: every rate begins at alpha; `uniform`: each is drawn from U(0.005, 0.1), and alpha is
            not used.
        learner: arguments of `MAML`.
    """

    def __init__(self, *, alpha: float, rate_init: Literal["constant", "uniform"] = "constant", **learner: Any):
        super().__init__(alpha=alpha, **learner)
        self.rate_init = rate_init
        moving = {k: p for k, p in self.net.named_parameters() if self.moves(k)}
        self.rates = Parameters({k: torch.full_like(p, float(self.alpha)) for k, p in moving.items()})

    def inner_rate(self, theta: Theta, key: TaskKey | None) -> float | Tensor | Params:
        """The learned rates a."""
        return theta["rates"]

    def use_rate(self, alpha: float | None) -> None:
        """Set all rates to alpha."""
        super().use_rate(alpha)
        self._fill()

    def settle(self, data: Episodes) -> dict[str, float]:
        """Estimate alpha, if it is `auto`, and set all rates to it."""
        found = super().settle(data)
        if found:
            self._fill()
        return found

    def _fill(self) -> None:
        with torch.no_grad():
            for rate in self.rates.parameters():
                rate.fill_(float(self.alpha))

    def initialize(self, seed: int) -> None:
        """Draw theta, and set or draw the rates."""
        super().initialize(seed)
        for name, rate in self.rates.named_parameters():
            generator = torch.Generator().manual_seed(Key(seed, "init/rates").sub(name).integer())
            with torch.no_grad():
                if self.rate_init == "constant":
                    rate.fill_(float(self.alpha))
                else:
                    rate.uniform_(*UNIFORM, generator=generator)

    def reports(self) -> dict[str, float]:
        """Adds minimum, median and maximum of the rates, and the share of negative ones."""
        a = torch.cat([rate.detach().flatten() for rate in self.rates.parameters()])
        found = {"min": a.min(), "median": a.median(), "max": a.max(), "negative": (a < 0).double().mean()}
        return super().reports() | {f"rate_{k}": float(v) for k, v in found.items()}
