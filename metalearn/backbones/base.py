"""A network as a list of named, resumable stages, pure in its parameters.

The module holds the meta-parameters (as ordinary `nn.Parameter`s) but never uses them by itself: every forward pass
is given a dictionary of parameters, shared `[*shape]` or one per task `[B, *shape]`, leaf by leaf.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metalearn.episode import Params
from metalearn.ops import Normalization, linear
from metalearn.parameters import Drawn

OnSite = Callable[[Tensor, str], Tensor]
"""Called with the activations `[B, n, ...]` and the name of each site that is reached."""


class Kernel(NamedTuple):
    """Names of the weight `[O, ...]` and, where there is one, of the bias `[O]` of a linear map or a convolution."""

    weight: str
    bias: str | None


class Stage(nn.Module, ABC):
    """One resumable step of a network; `name` prefixes its parameters' names."""

    name: str
    shape: tuple[int, ...]
    """Shape of one example after this stage."""
    normalizes: bool = False
    """Whether the stage has a batch-norm layer, `<name>.norm`."""
    affine: tuple[str, str] | None = None
    """Names of weight and bias of the affine map, of `shape[0]` channels, that the stage's non-linearity follows: its
    batch norm's scale and offset, or those of its linear map. `apply_stage` uses batch norm's and biases of these names
    whether the module has them or not. None for a stage without such a map."""
    kernel: Kernel | None = None
    """The map W x + b of its inputs that the stage begins with; None if there is none."""

    @cached_property
    def uses(self) -> frozenset[str]:
        """Names of the parameters that it depends on."""
        return frozenset(f"{self.name}.{name}" for name, _ in self.named_parameters())

    @property
    def width(self) -> int:
        """Numbers in the largest activation of one example."""
        return math.prod(self.shape)

    @abstractmethod
    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        """`[B, n, *shape before]` to `[B, n, *shape]`."""


class Linear(Stage):
    """Affine map of flat features."""

    def __init__(self, name: str, inputs: int, outputs: int):
        super().__init__()
        self.name, self.shape = name, (outputs,)
        self.affine = (f"{name}.weight", f"{name}.bias")
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.kernel = Kernel(f"{name}.weight", f"{name}.bias")

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        return linear(h, params[f"{self.name}.weight"], params[f"{self.name}.bias"])


class Backbone(Drawn):
    """A chain of stages; a *site* is the place after a stage (`input` is before the first).

    Args:
        stages: in order; the last one may be called `head`, and the site before it is `feat`.
        input_shape: shape of one example; empty where nobody asks for it.
        bn_affine_inner: whether inner loops adapt the batch-norm scale and offset (they are always meta-learned).
    """

    def __init__(self, stages: list[Stage], *, input_shape: tuple[int, ...] = (), bn_affine_inner: bool = True):
        super().__init__()
        self.input_shape = tuple(input_shape)
        for stage in stages:
            self.add_module(stage.name, stage)
        self.stages = [stage.name for stage in stages]
        self.names = {name for name, _ in self.named_parameters()}
        self.bn_affine_inner = bn_affine_inner

    @property
    def sites(self) -> list[str]:
        """Names of all sites in order."""
        return ["input", *self.stages]

    @property
    def has_norm(self) -> bool:
        """Whether some layer normalises by batch statistics; if not, all batch-norm modes agree."""
        return any(self.stage(name).normalizes for name in self.stages)

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every parameter without a task axis."""
        return {name: p.shape for name, p in self.named_parameters()}

    def adapts(self, name: str) -> bool:
        """Whether an inner loop may move this parameter at all."""
        return name in self.names and (self.bn_affine_inner or ".norm." not in name)

    def stage(self, name: str) -> Stage:
        """The stage that ends at site `name`."""
        stage = getattr(self, name)
        assert isinstance(stage, Stage)
        return stage

    def parameters_of(self, stage: str) -> set[str]:
        """Names of a stage's parameters."""
        return {name for name in self.names if name.startswith(f"{stage}.")}

    def first_site(self, names: list[str]) -> str:
        """The last site that no parameter in `names` influences: features up to there are fixed while they move."""
        before = "input"
        for name in self.stages:
            if not self.stage(name).uses.isdisjoint(names):
                return before
            before = name
        return before

    def between(self, start: str = "input", stop: str | None = None) -> list[str]:
        """Names of the stages from one site to another (None: the last), in order."""
        first, last = self.sites.index(start), len(self.stages) if stop is None else self.sites.index(stop)
        return self.stages[first:last]

    def run(
        self,
        params: Params,
        h: Tensor,
        start: str = "input",
        stop: str | None = None,
        *,
        norm: Normalization | None = None,
        on_site: OnSite | None = None,
    ) -> Tensor:
        """Apply the stages between two sites.

        Args:
            params: by name, each leaf `[*shape]` or `[B, *shape]`.
            h: activations at `start`, `[B, n, *shape]`.
            start: site of `h`.
            stop: site to stop at; None runs to the end.
            norm: how batch norm works in this pass; None means by batch statistics.
            on_site: maps the activations at each site that is reached, `start` excepted unless it is the input (a
                pass that also stops there does nothing, so that a second one from there calls it once).

        Returns:
            Activations at `stop`, `[B, n, *shape]`.
        """
        norm = norm or Normalization()
        stages = self.between(start, stop)
        if on_site is not None and start == "input" and stages:
            h = on_site(h, "input")
        for name in stages:
            h = self.stage(name).apply_stage(params, h, norm)
            if on_site is not None:
                h = on_site(h, name)
        return h

    def activation_bytes(self, n: int) -> int:
        """Bytes of the stages' largest activations for `n` examples of a task: the unit in which tasks are chunked."""
        size = next(self.parameters()).element_size()
        return n * size * sum(self.stage(s).width for s in self.stages)
