"""A larger network of the same kind: the baseline MAML-L (Zhou et al., UAI 2021, appendix).

The paper goes from 4 to 7 blocks and then widens them until the network is "about 3x larger than TSA-MAML". That is
read as three times one network, which is what TSA-MAML with three groups has, or as three times all three
(`metalearn.schema.algorithms.SIZES`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from metalearn.objects import build
from metalearn.schema import member_of

Config = dict[str, Any]


class Enlarged(NamedTuple):
    """A network's section of the configuration, its number of parameters, and that of the network it replaces."""

    backbone: Config
    parameters: int
    single: int


def enlarged(backbone: Config, times: int, *, input_shape: tuple[int, ...], outputs: int) -> Enlarged:
    """The deeper network whose number of parameters is nearest to `times` that of the chosen one.

    Widths are whole, so that the number is missed by up to 1 / width of it.

    Args:
        backbone: section of the chosen network.
        times: how many times larger.
        input_shape: shape of one example.
        outputs: width of the prediction.
    """
    schema = member_of("backbone", backbone)

    def count(section: Config) -> int:
        with torch.device("meta"):
            net = build("backbone", section, input_shape=input_shape, outputs=outputs)
        return sum(math.prod(shape) for shape in net.shapes().values())

    def of(width: int) -> Enlarged:
        section = schema.enlarged(backbone, width)
        return Enlarged(section, count(section), single)

    single, high = count(backbone), 1
    while of(high).parameters < times * single:
        high *= 2
    low = high // 2
    while high - low > 1:  # the number grows with the width
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle).parameters < times * single else (low, middle)
    return min((of(w) for w in (low, high) if w), key=lambda e: abs(e.parameters - times * single))
