"""Networks of the user's own: any `nn.Module` that a factory makes.

A chain of layers that the engine covers becomes stages on its task-batched operations (the fast path). Anything else is
evaluated as it is, task by task in one vectorised pass (the plain path), with ordinary automatic differentiation.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from metalearn import factories
from metalearn.backbones.base import Backbone, Stage
from metalearn.episode import Params
from metalearn.ops import Normalization, batch_norm, conv2d, linear, max_pool, norm_relu_pool, stem
from metalearn.random import Key
from metalearn.schema import BadInput

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
COUPLED = 1e-3
"""Relative change of an example's outputs with the other examples, above which they are not independent."""


class Uncovered(Exception):
    """Why a module is no chain of operations of the engine."""


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
        super().__init__([])
        self.factory, self.init = factory, init
        self.make = _Factory(factory, {"input_shape": tuple(input_shape), "outputs": outputs, **(arguments or {})})
        module = self.make(0)
        last = "head" if outputs else "feat"
        try:
            chain = _chain(module, tuple(input_shape), last)
            log.info("backbone.factory=%s: fast path, %d stages", factory, len(chain))
        except Uncovered as reason:
            plain = _plain(self.make, module, tuple(input_shape), last, str(reason))
            log.warning(
                "backbone.factory=%s: plain path%s, because %s is not covered (several times slower)",
                factory, f", {plain.loop}" if plain.loop else "", reason,
            )  # fmt: skip
            chain = [plain]
        if outputs and chain[-1].shape != (outputs,):
            raise self.make.refusal(f"must map [n, {_show(input_shape)}] to [n, {outputs}], and gives", chain[-1].shape)
        if not outputs and len(chain[-1].shape) != 1:
            raise self.make.refusal("must end with flat features [n, D], and gives", chain[-1].shape)
        self.chain = {stage.name: stage for stage in chain}
        self.stages = list(self.chain)
        self._adopt(module)
        self.names = {name for name, _ in self.named_parameters()}

    def _adopt(self, module: nn.Module) -> None:
        """Hold the very dictionaries of a module: names are the user's, and both always have the same tensors."""
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.user = (module,)  # no child: its parameters are ours already
        for stage in self.chain.values():
            if isinstance(stage, _Plain):
                stage.original = (module,)

    def stage(self, name: str) -> Stage:
        """The stage that ends at site `name`."""
        return self.chain[name]

    def first_site(self, names: list[str]) -> str:
        """The last site that no parameter in `names` influences: features up to there are fixed while they move."""
        if not names:
            first = ", ".join(dict.fromkeys(name.split(".", 1)[0] for name, _ in self.named_parameters()))
            raise BadInput(
                f"algorithm.adapted: begins no parameter of backbone.factory={self.factory}; their names begin {first}"
            )
        before = "input"
        for name in self.stages:
            if not self.chain[name].uses.isdisjoint(names):
                return before
            before = name
        return before

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


NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class _Factory:
    """Calls the user's function, and refuses what cannot be used."""

    def __init__(self, name: str, arguments: dict[str, Any]):
        self.name, self.arguments = name, arguments
        self.function = factories.load("backbone.factory", name)

    def __call__(self, seed: int) -> nn.Module:
        given = ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())
        try:
            with seeded(seed):
                module = self.function(**self.arguments)
        except Exception as error:
            raise self.refusal(f"called with {given} it raised", factories.describe(error)) from error
        if not isinstance(module, nn.Module):
            raise self.refusal("must return an nn.Module, and returns", type(module).__name__)
        parameters = dict(module.named_parameters())
        if not parameters:
            raise self.refusal("its module has no parameters to learn", type(module).__name__)
        for name, parameter in parameters.items():
            if is_lazy(parameter):
                raise self.refusal("lazy layers have no shapes yet; give the sizes of", name)
            if not parameter.requires_grad:
                raise self.refusal("a constant must be a buffer, not a parameter that requires no gradient:", name)
            if not parameter.is_floating_point():
                raise self.refusal("parameters must be real numbers, not", f"{name} of {parameter.dtype}")
        return module.cpu().train()

    def refusal(self, why: str, what: object) -> BadInput:
        """In one line."""
        shown = f"[n, {_show(what)}]" if isinstance(what, tuple) else what
        return BadInput(f"backbone.factory={self.name}: {why} {shown}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python for a block, and leave them as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _show(shape: Shape) -> str:
    return ", ".join(map(str, shape))


# ---- the fast path -----------------------------------------------------------------------------------------------

Layer = tuple[str, nn.Module]
ELEMENTWISE: dict[type, Callable[[Tensor], Tensor]] = {nn.ReLU: torch.relu, nn.Tanh: torch.tanh}


class _Link(Stage):
    """A stage whose parameters are those of the user's layers: `uses` are their names."""

    uses: frozenset[str] = frozenset()

    def __init__(self, shape: Shape, *after: Callable[[Tensor], Tensor]):
        super().__init__()
        self.name, self.shape, self.after = "", shape, list(after)

    def then(self, h: Tensor) -> Tensor:
        """What follows without parameters."""
        for function in self.after:
            h = function(h)
        return h

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        return self.then(h)


class _Linear(_Link):
    def __init__(self, prefix: str, layer: nn.Linear):
        super().__init__((layer.out_features,))
        self.weight, self.bias = _at(prefix, "weight"), _at(prefix, "bias")
        self.uses = _names(prefix, layer)

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        weight = params[self.weight]
        bias = params[self.bias] if self.bias in self.uses else weight.new_zeros(weight.shape[-2])
        return self.then(linear(h, weight, bias))


class _Conv(_Link):
    """Convolution, and as far as they follow batch norm, ReLU and 2x2 max-pooling."""

    def __init__(self, prefix: str, layer: nn.Conv2d, before: Shape, rest: list[Layer]):
        kernel, self.stride, self.padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        sides = [(s + 2 * self.padding - kernel) // self.stride + 1 for s in before[1:]]
        super().__init__((layer.out_channels, *sides))
        self.conv, self.norm, self.eps = prefix, "", 0.0
        self.uses = _names(prefix, layer)
        if rest and type(rest[0][1]) is nn.BatchNorm2d:
            self.norm, normalizer = rest.pop(0)
            self.uses |= _names(self.norm, normalizer)
            self.eps = float(normalizer.eps)  # type: ignore[arg-type]
        self.normalizes = bool(self.norm)
        self.full = self.shape
        self.relu = bool(rest) and type(rest[0][1]) is nn.ReLU
        if self.relu:
            rest.pop(0)
        self.pool = 2 if rest and _halves(rest[0][1]) else 1
        if self.pool == 2:
            rest.pop(0)
            self.shape = _halved(self.shape)

    @property
    def width(self) -> int:
        """The convolution's output, before pooling."""
        return math.prod(self.full)

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        filters, bias = params[_at(self.conv, "weight")], params.get(_at(self.conv, "bias"))
        gamma, beta = params.get(f"{self.norm}.weight"), params.get(f"{self.norm}.bias")
        layer = f"{self.name}.norm"
        if self.relu and self.padding == 1 and stem.fits(h, filters, self.stride, self.pool):
            own = norm if self.normalizes else None
            return self.then(stem.stem(h, filters, bias, gamma, beta, layer=layer, eps=self.eps, norm=own))
        h = conv2d(h, filters, stride=self.stride, padding=self.padding)
        if self.normalizes and self.relu:
            options: dict[str, Any] = {"pool": self.pool, "layer": layer, "eps": self.eps, "norm": norm}
            return self.then(norm_relu_pool(h, gamma, beta, bias, **options))
        if self.normalizes:
            h = batch_norm(h, gamma, beta, bias, layer=layer, eps=self.eps, norm=norm)
        elif bias is not None:
            h = h + (bias[:, None, :, None, None] if bias.dim() == 2 else bias[:, None, None])
        h = torch.relu(h) if self.relu else h
        return self.then(h if self.pool == 1 else max_pool(h))


def _chain(module: nn.Module, shape: Shape, last: str) -> list[_Link]:
    """The module as stages, the last one of this name.

    Raises:
        Uncovered: naming the first layer that stands in the way.
    """
    layers, links = list(_leaves("", module)), list[_Link]()
    if sum(len(_names(*layer)) for layer in layers) > len(list(module.parameters())):
        raise Uncovered("a parameter that several layers share")
    while layers:
        prefix, layer = layers.pop(0)
        shape = links[-1].shape if links else shape
        kind = type(layer)
        if type(layer) is nn.Conv2d and _plain_conv(layer, shape):
            links.append(_Conv(prefix, layer, shape, layers))
        elif type(layer) is nn.Linear and shape == (layer.in_features,):
            links.append(_Linear(prefix, layer))
        elif type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
            links.append(_Link((math.prod(shape),), lambda h: h.flatten(2)))
        elif type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1)) and len(shape) == 3:
            links.append(_Link((shape[0], 1, 1), lambda h: h.mean((3, 4), keepdim=True)))
        elif kind in ELEMENTWISE or (_halves(layer) and len(shape) == 3):
            if not links:
                links.append(_Link(shape))
            links[-1].after.append(ELEMENTWISE.get(kind, max_pool))
            links[-1].shape = shape if kind in ELEMENTWISE else _halved(shape)
        elif kind is not nn.Identity:
            raise Uncovered(f"layer '{prefix}' ({layer})" if prefix else f"a {kind.__name__} as a whole")
    if last == "head" and len(links) == 1:
        links.insert(0, _Link(shape))
    ends = ["feat", "head"] if last == "head" else ["feat"]
    names = [*(f"block{i + 1}" for i in range(len(links) - len(ends))), *ends]
    for link, name in zip(links, names, strict=True):
        link.name = name
    return links


def _leaves(prefix: str, module: nn.Module) -> Iterator[Layer]:
    """The layers of nested `nn.Sequential`s in order."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise Uncovered(f"layer '{prefix}' ({type(module).__name__}) with hooks")
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for name, child in module.named_children():
            yield from _leaves(_at(prefix, name), child)
    else:
        yield prefix, module


def _names(prefix: str, layer: nn.Module) -> frozenset[str]:
    return frozenset(_at(prefix, name) for name, _ in layer.named_parameters())


def _at(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _plain_conv(layer: nn.Conv2d, shape: Shape) -> bool:
    """Whether a convolution is square, ungrouped, undilated, zero-padded, and fits inputs of this shape."""
    (kernel, other), stride, padding = layer.kernel_size, layer.stride, layer.padding
    if isinstance(padding, str) or kernel != other or stride[0] != stride[1] or padding[0] != padding[1]:
        return False
    usual = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    fits = len(shape) == 3 and shape[0] == layer.in_channels and min(shape[1:]) + 2 * padding[0] >= kernel
    return usual and fits


def _halves(layer: nn.Module) -> bool:
    """Whether it is 2x2 max-pooling that drops odd last rows and columns."""
    if type(layer) is not nn.MaxPool2d:
        return False
    sizes = [v if isinstance(v, tuple) else (v, v) for v in (layer.kernel_size, layer.stride)]
    usual = layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1))
    return sizes == [(2, 2), (2, 2)] and usual and not layer.ceil_mode and not layer.return_indices


def _halved(shape: Shape) -> Shape:
    return (shape[0], shape[1] // 2, shape[2] // 2)


# ---- the plain path ----------------------------------------------------------------------------------------------

_copies = threading.local()


def _own_copy(module: nn.Module) -> nn.Module:
    """This thread's copy of a module: while it is evaluated with given parameters, it holds them."""
    found: weakref.WeakKeyDictionary[nn.Module, nn.Module] | None = getattr(_copies, "found", None)
    if found is None:
        found = _copies.found = weakref.WeakKeyDictionary()
    if module not in found:
        found[module] = copy.deepcopy(module)
    return found[module]


class _Plain(_Link):
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
        module, buffers = _own_copy(self.original[0]), dict(self.original[0].named_buffers())
        own = {k: params[k] for k in self.shapes}
        axes = {k: 0 if p.dim() > len(self.shapes[k]) else None for k, p in own.items()}

        def one(params: Params, x: Tensor) -> Tensor:
            return functional_call(module, (params, buffers), (x,))  # type: ignore[no-any-return]

        if not self.loop:
            return vmap(one, in_dims=(axes, 0))(own, h)  # type: ignore[no-any-return]
        tasks = [{k: p if axes[k] is None else p[i] for k, p in own.items()} for i in range(len(h))]
        return torch.stack([one(task, x) for task, x in zip(tasks, h, strict=True)])


def _plain(make: _Factory, module: nn.Module, shape: Shape, name: str, reason: str) -> _Plain:
    """The module as one stage, after trying it out.

    Raises:
        BadInput: if it fails, draws random numbers, has batch norm, keeps state, or mixes examples.
    """
    for layer, child in module.named_modules():
        if isinstance(child, _BatchNorm):
            raise make.refusal(
                f"{reason} is not covered by the fast path, and the plain path has no batch norm: use GroupNorm in"
                " place of", f"'{layer}' ({type(child).__name__})",
            )  # fmt: skip
    trial = copy.deepcopy(module)
    dtype = next(module.parameters()).dtype
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    sizes: list[int] = []
    for child in trial.modules():
        if not list(child.children()):
            child.register_forward_hook(lambda _, __, out: sizes.append(out.numel()) if torch.is_tensor(out) else None)
    try:
        with seeded(0):
            before, version = _generators(), x._version
            y = trial(x)
            drew = _generators() != before
            width = sum(sizes) // 3
            alone = trial(x[:1])
    except Exception as error:
        raise make.refusal(
            f"a pass of 3 pictures or points [{_show(shape)}] raised", factories.describe(error)
        ) from error
    if not isinstance(y, Tensor) or y.dim() < 1 or len(y) != 3 or not y.requires_grad:
        what = f"{type(y).__name__} {list(y.shape) if isinstance(y, Tensor) else ''}"
        raise make.refusal("must give a tensor with one row an example that depends on its parameters, and gives", what)
    if drew:
        found = [f"'{k}' ({m})" for k, m in module.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        raise make.refusal(
            "its forward pass draws random numbers, which cannot be reproduced; leave out", *found[:1] or ["them"]
        )
    if x._version != version:
        raise make.refusal("its forward pass changes its input in place;", "use operations that do not (inplace=False)")
    kept = dict(module.named_buffers())
    for k, b in trial.named_buffers():
        if not torch.equal(b, kept[k]):
            raise make.refusal("its forward pass must not change the module, and changes buffer", k)
    if float((y[:1] - alone).detach().norm()) > COUPLED * float(alone.detach().norm()):
        raise make.refusal("must map each example independently of the others, and mixes", f"the {len(y)} of a batch")
    stage = _Plain(name, module, tuple(y.shape[1:]), max(width, y[0].numel()))
    stage.loop = _unbatchable(stage, x)
    return stage


def _generators() -> Any:
    """The states of all global generators."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2], random.getstate()


def _unbatchable(stage: _Plain, x: Tensor) -> str:
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
