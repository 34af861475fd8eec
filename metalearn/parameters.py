"""Modules that hold meta-parameters: how these are drawn, and those that lie beside the network's."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metalearn.random import Key


class Drawn(nn.Module):
    """A module whose initial parameters are drawn from a key."""

    def reset(self, key: Key) -> None:
        """Draw the initial parameters; each depends on the key and its own name alone."""
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(key.sub(name).integer())
            with torch.no_grad():
                self.initialize(name, parameter, generator)

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Default: Xavier-uniform weights, zero biases and offsets, unit scales."""
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif parameter.dim() < 2:
            parameter.zero_()
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)


class Parameters(nn.Module):
    """Meta-parameters beside those of the network: the same dotted names (`block1.conv.weight`), the same shapes.

    As an attribute of a learner they are checkpointed, moved and optimised with it, and a learner finds them in
    `theta` under the attribute's name: Meta-SGD's rates, TSA-MAML's group initialisations.

    Args:
        values: initial values by name; copied.
    """

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        for name, value in values.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(value.detach().clone()))
