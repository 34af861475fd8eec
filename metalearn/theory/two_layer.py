"""Tangent features of a two-layer ReLU network at its initialisation, in closed form.

f(x) = sum_j a_j relu(w_j . x + b_j) + c has d = (p + 2) h + 1 parameters (p inputs, h hidden units), and the features

    psi(x) = grad f(x) = (relu(w_j . x + b_j), a_j 1[w_j . x + b_j > 0], a_j 1[w_j . x + b_j > 0] x, 1)

in which f is linear to first order around where it starts. They grow with h: psi(x) . psi(x) is of the order of h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.random import Key


class TwoLayer(NamedTuple):
    """The parameters that features depend on, float64: `hidden` w `[h, p]`, `bias` b `[h]`, `out` a `[h]`."""

    hidden: Tensor
    bias: Tensor
    out: Tensor

    @classmethod
    def drawn(cls, key: Key, inputs: int, width: int, init: str) -> TwoLayer:
        """A network by `INITIALISATIONS`.

        Raises:
            KeyError: for another initialisation.
        """
        draw = INITIALISATIONS[init]
        hidden = draw(key.sub("hidden"), width * inputs, inputs).view(width, inputs)
        return cls(hidden, draw(key.sub("bias"), width, inputs), draw(key.sub("out"), width, width))

    def features(self, x: Tensor) -> Tensor:
        """psi(x), `[..., d]` for x `[..., p]`."""
        value, slope = self._units(x)
        moved = (slope.unsqueeze(-2) * x.unsqueeze(-1)).flatten(-2)
        return torch.cat([value, slope, moved, torch.ones_like(value[..., :1])], -1)

    def kernel(self, x: Tensor, other: Tensor) -> Tensor:
        """psi(x) . psi(x') of all pairs, `[..., n, m]` for x `[..., n, p]` and x' `[..., m, p]`, without features."""
        (value, slope), (values, slopes) = self._units(x), self._units(other)
        return 1 + value @ values.mT + (1 + x @ other.mT) * (slope @ slopes.mT)

    def _units(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """relu and a 1[> 0] of each hidden unit, `[..., h]`."""
        before = x @ self.hidden.mT + self.bias
        return before.relu(), (before > 0) * self.out


def _uniform(key: Key, n: int, fan_in: int) -> Tensor:
    return key.uniform(n, low=-(fan_in**-0.5), high=fan_in**-0.5).double()


def _normal(key: Key, n: int, fan_in: int) -> Tensor:
    return key.normal(n).double()


INITIALISATIONS: dict[str, Callable[[Key, int, int], Tensor]] = {"uniform": _uniform, "normal": _normal}
"""Draws by number and fan-in: uniform in +-1/sqrt(fan-in), as PyTorch's linear layers; N(0, 1), in no way scaled."""
