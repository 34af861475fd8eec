"""Any module of the user's own as one stage, evaluated as it is for each task, in one vectorised pass.

Its derivatives are those of ordinary automatic differentiation. It has to be a pure function of its parameters, its
buffers and each single example, which is tried out once.
"""

from __future__ import annotations

import copy
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from metalearn.backbones.chain import Link, Shape
from metalearn.episode import Params
from metalearn.factories import describe
from metalearn.ops import Normalization
from metalearn.random import seeded
from metalearn.schema import BadInput

COUPLED = 1e-3
"""Relative change of an example's outputs with the other examples, above which they are not independent."""
Refusal = Callable[[str], BadInput]

_copies = threading.local()


def own_copy(module: nn.Module) -> nn.Module:
    """This thread's copy of a module: while it is evaluated with given parameters, it holds them."""
    found: weakref.WeakKeyDictionary[nn.Module, nn.Module] | None = getattr(_copies, "found", None)
    if found is None:
        found = _copies.found = weakref.WeakKeyDictionary()
    if module not in found:
        found[module] = copy.deepcopy(module)
    return found[module]


class Plain(Link):
    """A whole module; what it computes for one task is its own affair.

    Attributes:
        loop: why tasks are evaluated one after the other; empty if one vectorised pass evaluates all.
    """

    loop: str = ""

    def __init__(self, name: str, module: nn.Module, shape: Shape, width: int):
        super().__init__(shape)
        self.name, self.shapes, self._width = name, {k: p.shape for k, p in module.named_parameters()}, width
        self.uses = frozenset(self.shapes)
        self.original = (module,)  # no child: its parameters are not this stage's

    @property
    def width(self) -> int:
        """Numbers in the outputs of all layers."""
        return self._width

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        module, buffers = own_copy(self.original[0]), dict(self.original[0].named_buffers())
        own = {k: params[k] for k in self.shapes}
        axes = {k: 0 if p.dim() > len(self.shapes[k]) else None for k, p in own.items()}

        def one(params: Params, x: Tensor) -> Tensor:
            return functional_call(module, (params, buffers), (x,))  # type: ignore[no-any-return]

        if not self.loop:
            return vmap(one, in_dims=(axes, 0))(own, h)  # type: ignore[no-any-return]
        tasks = [{k: p if axes[k] is None else p[i] for k, p in own.items()} for i in range(len(h))]
        return torch.stack([one(task, x) for task, x in zip(tasks, h, strict=True)])


def plain(module: nn.Module, shape: Shape, name: str, uncovered: str, refusal: Refusal) -> Plain:
    """The module as one stage of this name, after trying it out.

    Args:
        module: maps `[n, *shape]` to outputs of any width.
        shape: of one example.
        name: of the stage.
        uncovered: the layer for which it is not on the fast path.
        refusal: the error for a reason.

    Raises:
        BadInput: if it fails, has batch norm, draws random numbers, keeps state, or mixes examples.
    """
    trial, sizes = copy.deepcopy(module), list[int]()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(next(module.parameters()).dtype)
    for layer in trial.modules():
        if not layer._modules:
            layer.register_forward_hook(lambda _, __, y: sizes.append(y.numel()) if torch.is_tensor(y) else None)
    version = x._version
    with seeded(0):
        before = generators()
        y = _forward(trial, x, refusal)
        drew = generators() != before
        width = max(sum(sizes), y.numel()) // 3
        _refuse_norms(module, uncovered, refusal)
        if drew:
            found = [f"'{k}' ({m})" for k, m in module.named_modules() if isinstance(m, _DropoutNd)]
            where = f"; leave out layer {found[0]}" if found else ""
            raise refusal(f"must draw no random numbers in a forward pass, which no seed would name{where}")
        if x._version != version:
            raise refusal("must not change its input in place")
        _refuse_state(module, trial, refusal)
        alone = _forward(trial, x[:1], refusal)
    if float((y[:1] - alone).detach().norm()) > COUPLED * float(alone.detach().norm()):
        raise refusal("must map each example independently of the others in a batch")
    stage = Plain(name, module, tuple(y.shape[1:]), width)
    stage.loop = _unbatchable(stage, x)
    return stage


def _forward(trial: nn.Module, x: Tensor, refusal: Refusal) -> Tensor:
    shown = list(x.shape)
    try:
        y = trial(x)
    except Exception as error:
        raise refusal(f"a forward pass of {shown} raised {describe(error)}") from error
    if not isinstance(y, Tensor):
        raise refusal(f"must map {shown} to a tensor, and gives {type(y).__name__}")
    if y.dim() == 0 or len(y) != len(x):
        raise refusal(f"must map {shown} to [{len(x)}, ...], and gives {list(y.shape)}")
    if not y.requires_grad:
        raise refusal("must give outputs that depend differentiably on its parameters")
    return y


def _refuse_norms(module: nn.Module, uncovered: str, refusal: Refusal) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            raise refusal(
                f"batch norm (layer '{name}') works on the fast path alone, and {uncovered} is not covered there;"
                " use GroupNorm, or layers that are covered"
            )


def _refuse_state(before: nn.Module, after: nn.Module, refusal: Refusal) -> None:
    kept = dict(before.named_buffers())
    for name, buffer in after.named_buffers():
        if name not in kept or not torch.equal(buffer, kept[name]):
            raise refusal(f"must not change in a forward pass, which changes its buffer '{name}'")


def generators() -> Any:
    """The states of all global generators."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2], random.getstate()


def _unbatchable(stage: Plain, x: Tensor) -> str:
    """Why two tasks cannot be evaluated and differentiated twice in one pass; empty if they can."""
    params = {
        k: p.detach().expand(2, *p.shape).clone().requires_grad_() for k, p in stage.original[0].named_parameters()
    }
    leaves = list(params.values())
    try:
        y = stage.apply_stage(params, x.expand(2, *x.shape), Normalization())
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True, materialize_grads=True)
        total = torch.stack([g.square().sum() for g in first]).sum()
        torch.autograd.grad(total, leaves, allow_unused=True)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        return f"one task after the other, which torch cannot vectorise ({why})"
    return ""
