"""Meta-parameters beside those of the network: the same names, the same shapes, a module of their own."""

from collections.abc import Mapping

from torch import Tensor, nn


class Parameters(nn.Module):
    """Parameters by dotted names (`block1.conv.weight`), which `named_parameters` gives back.

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
