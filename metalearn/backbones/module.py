"""Networks of the user's own: any `nn.Module` that a factory makes.

A chain of layers that the engine covers becomes stages on its task-batched operations (the fast path). Anything else is
evaluated as it is, task by task in one vectorised pass (the plain path), with ordinary automatic differentiation.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from metalearn import factories
from metalearn.backbones.base import Backbone, Stage
from metalearn.backbones.chain import Link, Shape, Uncovered, chain
from metalearn.backbones.plain import Plain, own_copy, plain
from metalearn.random import Key, seeded
from metalearn.schema import BadInput

log = logging.getLogger(__name__)

MOMENTUM = 0.1  # of `metalearn.bn.RunningStatistics`
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Module(Backbone):
    """A module of the user's own; its parameters keep their names.

    Sites are `input`, then for a chain `block1, block2, ..., feat, head` (one for each convolution, linear map or
    reshaping, with what follows it), and for any other module `head` alone; without outputs they end with `feat`.

    The state dict is that of the user's module. Batch norm's buffers in it are never used: running averages are the
    learner's.

    Args:
        input_shape: shape of one example.
        outputs: width of the prediction; 0 asks the factory for features of any width.
        factory: `module:function`, called with `input_shape`, `outputs` and the arguments; returns an `nn.Module` that
            maps `[n, *input_shape]` to `[n, outputs]`, one example independently of the others.
        arguments: further arguments of the factory.
        init: `keep` the initial parameters that the factory draws, from global generators seeded by the run's seed; or
            `xavier` uniform weights, zero biases, and unit scales of linear, convolutional and normalising layers.

    Raises:
        BadInput: for a factory or a module that cannot be used.
    """

    def __init__(
        self,
        *,
        input_shape: Shape,
        outputs: int,
        factory: str,
        arguments: dict[str, Any] | None = None,
        init: Literal["keep", "xavier"] = "keep",
    ):
        super().__init__([], input_shape=input_shape)
        self.factory, self.init = factory, init
        self.make = _Factory(factory, {"input_shape": tuple(input_shape), "outputs": outputs, **(arguments or {})})
        module = self.make(0)
        links = self._links(module, tuple(input_shape), "head" if outputs else "feat")
        shape = links[-1].shape
        if shape != (outputs,) and (outputs or len(shape) != 1):
            shapes = (input_shape, (outputs or "features",), shape)
            given, asked, found = (f"[{', '.join(map(str, ('n', *s)))}]" for s in shapes)
            raise self.make.refusal(f"must map {given} to {asked}, and gives {found}")
        self.chain = {link.name: link for link in links}
        self.stages = list(self.chain)
        self._adopt(module)
        self.names = {name for name, _ in self.named_parameters()}

    def _links(self, module: nn.Module, shape: Shape, last: str) -> list[Link]:
        """The stages on the path that fits, which is logged."""
        try:
            links = chain(module, shape, last)
        except Uncovered as reason:
            stage = plain(module, shape, last, str(reason), self.make.refusal)
            loop = f", {stage.loop}" if stage.loop else ""
            why = f"because {reason} is not covered (several times slower){loop}"
            log.warning("backbone.factory=%s: plain path, %s", self.factory, why)
            return [stage]
        log.info("backbone.factory=%s: fast path, %d stages", self.factory, len(links))
        if any(isinstance(m, _BatchNorm) and m.momentum != MOMENTUM for m in module.modules()):
            log.warning("backbone.factory=%s: running averages of batch norm have momentum %s", self.factory, MOMENTUM)
        return links

    def _adopt(self, module: nn.Module) -> None:
        """Hold the very dictionaries of a module: names are the user's, and both always have the same tensors."""
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.user = (module,)  # no child: its parameters are ours already
        for stage in self.chain.values():
            if isinstance(stage, Plain):
                stage.original = (module,)
                own_copy(module)

    def stage(self, name: str) -> Stage:
        """The stage that ends at site `name`."""
        return self.chain[name]

    def parameters_of(self, stage: str) -> set[str]:
        """Names of a stage's parameters."""
        return set(self.chain[stage].uses)

    def first_site(self, names: list[str]) -> str:
        """The last site that no parameter in `names` influences: features up to there are fixed while they move."""
        if not names:
            first = ", ".join(dict.fromkeys(name.split(".", 1)[0] for name, _ in self.named_parameters()))
            raise BadInput(
                f"algorithm.adapted: begins no parameter of backbone.factory={self.factory}; their names begin {first}"
            )
        return super().first_site(names)

    def reset(self, key: Key) -> None:
        """A module that the factory makes from keyed draws, and what `init` says."""
        fresh, now = self.make(key.sub("factory").integer()), next(self.parameters())
        if {k: p.shape for k, p in fresh.named_parameters()} != self.shapes():
            raise BadInput(f"backbone.factory={self.factory}: must make the same module each time it is called")
        self._adopt(fresh.to(now.device, now.dtype))
        if self.init == "xavier":
            super().reset(key)

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Xavier-uniform weights, zero biases, unit scales; other layers' parameters stay as the factory drew them."""
        owner = self.user[0].get_submodule(name.rpartition(".")[0])
        if isinstance(owner, NORMS):
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif isinstance(owner, (nn.Linear, _ConvNd)):
            super().initialize(name, parameter, generator)


class _Factory:
    """Calls the user's function, and refuses what cannot be used."""

    def __init__(self, name: str, arguments: dict[str, Any]):
        self.name, self.arguments = name, arguments
        self.function = factories.load("backbone.factory", name)

    def __call__(self, seed: int) -> nn.Module:
        """A module from draws of this seed, in training mode."""
        try:
            with seeded(seed):
                module = self.function(**self.arguments)
        except Exception as error:
            given = ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())
            raise self.refusal(f"called with {given} it raised {factories.describe(error)}") from error
        if not isinstance(module, nn.Module):
            raise self.refusal(f"must return an nn.Module, and returns {type(module).__name__}")
        parameters = dict(module.named_parameters())
        if not parameters:
            raise self.refusal(f"must have parameters to learn, and {type(module).__name__} has none")
        for name, parameter in parameters.items():
            if is_lazy(parameter):
                raise self.refusal(f"must know its shapes, and '{name}' is lazy")
            if not parameter.requires_grad:
                raise self.refusal(f"must learn all its parameters, and '{name}' needs no gradient; make it a buffer")
            if not parameter.is_floating_point():
                raise self.refusal(f"must have real parameters, and '{name}' is {parameter.dtype}")
        return module.cpu().train()

    def refusal(self, why: str) -> BadInput:
        """The error, with key and value."""
        return BadInput(f"backbone.factory={self.name}: {why}")
