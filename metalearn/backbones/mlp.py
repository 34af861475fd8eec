"""Multi-layer perceptron (Finn et al. 2017 use 1-40-40-1 with ReLU for the sinusoid)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from metalearn.backbones.base import Backbone, Linear, Stage
from metalearn.episode import Params
from metalearn.ops import Normalization

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh, "none": lambda h: h}


class Hidden(Linear):
    """Affine map of the flattened input, and a non-linearity (a key of `ACTIVATIONS`)."""

    def __init__(self, name: str, inputs: int, outputs: int, activation: str):
        super().__init__(name, inputs, outputs)
        self.activation = ACTIVATIONS[activation]

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        return self.activation(super().apply_stage(params, h.flatten(2), norm))


class _Features(Stage):
    name = "feat"

    def __init__(self, width: int):
        super().__init__()
        self.shape = (width,)

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        return h


class MLP(Backbone):
    """Fully connected network: sites `input, h1, h2, ..., feat, head`.

    Args:
        input_shape: shape of one example; flattened first.
        outputs: width of the prediction; 0 leaves the head off.
        hidden: widths of the hidden layers.
        activation: `relu` or `tanh`.
        init: `torch` (uniform in +-1/sqrt(fan-in), PyTorch's default for linear layers), or `truncated_normal`
            (standard deviation 0.01 cut at two deviations, zero biases: the code of Finn et al.).
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        outputs: int,
        hidden: list[int],
        activation: Literal["relu", "tanh"] = "relu",
        init: Literal["torch", "truncated_normal"] = "torch",
    ):
        widths = [int(torch.Size(input_shape).numel()), *hidden]
        stages: list[Stage] = [Hidden(f"h{i + 1}", widths[i], widths[i + 1], activation) for i in range(len(hidden))]
        stages.append(_Features(widths[-1]))
        if outputs:
            stages.append(Linear("head", widths[-1], outputs))
        super().__init__(stages, input_shape=input_shape)
        self.init = init

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if self.init == "torch":
            fan_in = getattr(self, name.split(".", 1)[0]).weight.shape[1]
            parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        elif parameter.dim() < 2:
            parameter.zero_()
        else:
            nn.init.trunc_normal_(parameter, std=0.01, a=-0.02, b=0.02, generator=generator)
