"""Chains of layers of the user's own as stages on the engine's task-batched operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metalearn.backbones.base import Kernel, Stage
from metalearn.episode import Params
from metalearn.ops import Normalization, batch_norm, conv2d, linear, max_pool, norm_relu_pool, stem

Shape = tuple[int, ...]
Layer = tuple[str, nn.Module]


class Uncovered(Exception):
    """Why a module is no chain of operations of the engine."""


def _flat(h: Tensor) -> Tensor:
    return h.flatten(2)


def _mean(h: Tensor) -> Tensor:
    return h.mean((3, 4), keepdim=True)


ELEMENTWISE: dict[type, Callable[[Tensor], Tensor]] = {nn.ReLU: torch.relu, nn.Tanh: torch.tanh}


class Link(Stage):
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


class _Linear(Link):
    def __init__(self, prefix: str, layer: nn.Linear):
        super().__init__((layer.out_features,))
        self.affine = self.weight, self.bias = _at(prefix, "weight"), _at(prefix, "bias")
        self.uses = _names(prefix, layer)
        self.kernel = Kernel(self.weight, self.bias if self.bias in self.uses else None)

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        weight = params[self.weight]
        bias = params[self.bias] if self.bias in params else weight.new_zeros(weight.shape[-2])
        return self.then(linear(h, weight, bias))


class _Conv(Link):
    """Convolution, and as far as they follow batch norm, ReLU and 2x2 max-pooling."""

    def __init__(self, prefix: str, layer: nn.Conv2d, before: Shape, rest: list[Layer]):
        kernel, self.stride, self.padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        sides = [(s + 2 * self.padding - kernel) // self.stride + 1 for s in before[1:]]
        super().__init__((layer.out_channels, *sides))
        self.conv, self.norm, self.eps = prefix, "", 0.0
        self.uses = _names(prefix, layer)
        self.kernel = Kernel(_at(prefix, "weight"), _at(prefix, "bias") if layer.bias is not None else None)
        if rest and type(rest[0][1]) is nn.BatchNorm2d and rest[0][1].num_features == layer.out_channels:
            self.norm, normalizer = rest.pop(0)
            self.uses |= _names(self.norm, normalizer)
            self.eps = float(normalizer.eps)  # type: ignore[arg-type]
        self.normalizes = bool(self.norm)
        self.affine = _at(self.norm or prefix, "weight"), _at(self.norm or prefix, "bias")
        self.full = self.shape
        self.relu = bool(rest) and type(rest[0][1]) is nn.ReLU
        if self.relu:
            rest.pop(0)
        self.pool = 2 if rest and _halves(rest[0][1], self.shape) else 1
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


def chain(module: nn.Module, shape: Shape, last: str) -> list[Link]:
    """The module as stages, the last one of this name.

    Raises:
        Uncovered: naming the first layer that stands in the way.
    """
    layers, links = list(_leaves("", module)), list[Link]()
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
            links.append(Link((math.prod(shape),), _flat))
        elif type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1)) and len(shape) == 3:
            links.append(Link((shape[0], 1, 1), _mean))
        elif kind in ELEMENTWISE or _halves(layer, shape):
            if not links:
                links.append(Link(shape))
            links[-1].after.append(ELEMENTWISE.get(kind, max_pool))
            links[-1].shape = shape if kind in ELEMENTWISE else _halved(shape)
        elif kind is not nn.Identity:
            raise Uncovered(f"layer '{prefix}' ({layer})" if prefix else f"a {kind.__name__} as a whole")
    if last == "head" and len(links) == 1:
        links.insert(0, Link(shape))
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
        for name, child in module._modules.items():  # `named_children` leaves out what comes again
            assert child is not None
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


def _halves(layer: nn.Module, shape: Shape) -> bool:
    """Whether it is 2x2 max-pooling that drops odd last rows and columns, and can be of pictures of this shape."""
    if type(layer) is not nn.MaxPool2d or len(shape) != 3 or min(shape[1:]) < 2:
        return False
    sizes = [v if isinstance(v, tuple) else (v, v) for v in (layer.kernel_size, layer.stride)]
    usual = layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1))
    return sizes == [(2, 2), (2, 2)] and usual and not layer.ceil_mode and not layer.return_indices


def _halved(shape: Shape) -> Shape:
    return (shape[0], shape[1] // 2, shape[2] // 2)
