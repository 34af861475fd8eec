"""Four convolutional blocks (Vinyals et al. 2016; Finn et al. 2017) in the variants that papers use."""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from metalearn.backbones.base import Backbone, Kernel, Linear, Stage
from metalearn.episode import Params
from metalearn.ops import Normalization, conv2d, max_pool, norm_relu_pool, stem
from metalearn.schema import BadInput


class _Affine(nn.Module):
    """Holds gamma and beta of a batch-norm layer, as far as they are learned."""

    def __init__(self, width: int, affine: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine == "full" else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine in ("full", "beta") else None


class _Filters(nn.Module):
    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None


class Block(Stage):
    """3x3 convolution, batch norm, ReLU, and halving by 2x2 max-pooling or by stride 2, or none.

    Zero padding is one pixel on each side. (TensorFlow's "same" padding with stride 2 pads even sizes on one side
    only; the output sizes are equal.)
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        width: int,
        *,
        downsample: str,
        bn: bool,
        bias: bool,
        affine: str,
        eps: float,
    ):
        super().__init__()
        self.name, self.eps = name, eps
        self.stride, self.pool = {"stride": (2, 1), "maxpool": (1, 2), "none": (1, 1)}[downsample]
        self.conv = _Filters(shape[0], width, bias)
        self.kernel = Kernel(f"{name}.conv.weight", f"{name}.conv.bias" if bias else None)
        if bn:
            self.norm = _Affine(width, affine)
        self.normalizes = bn
        self.affine = (
            (f"{name}.norm.weight", f"{name}.norm.bias") if bn else (f"{name}.conv.weight", f"{name}.conv.bias")
        )
        sides = ((side + self.stride - 1) // self.stride // self.pool for side in shape[1:])
        self.shape = (width, *sides)

    @property
    def width(self) -> int:
        """The convolution's output, before pooling."""
        return math.prod(self.shape) * self.pool**2

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        def get(name: str) -> Tensor | None:
            return params.get(f"{self.name}.{name}")

        filters, bias, pool = params[f"{self.name}.conv.weight"], get("conv.bias"), self.pool
        gamma, beta, layer = get("norm.weight"), get("norm.bias"), f"{self.name}.norm"
        if stem.fits(h, filters, self.stride, pool):
            own = norm if self.normalizes else None
            return stem.stem(h, filters, bias, gamma, beta, layer=layer, eps=self.eps, norm=own)
        h = conv2d(h, filters, stride=self.stride, padding=1)
        if self.normalizes:
            return norm_relu_pool(h, gamma, beta, bias, pool=pool, layer=layer, eps=self.eps, norm=norm)
        if bias is not None:
            h = h + (bias[:, None, :, None, None] if bias.dim() == 2 else bias[:, None, None])
        h = torch.relu(h)
        return h if pool == 1 else max_pool(h)


class _Readout(Stage):
    name = "feat"

    def __init__(self, shape: tuple[int, ...], kind: str):
        super().__init__()
        self.kind = kind
        self.shape = (shape[0],) if kind == "mean" else (int(torch.Size(shape).numel()),)

    def apply_stage(self, params: Params, h: Tensor, norm: Normalization) -> Tensor:
        return h.mean((3, 4)) if self.kind == "mean" else h.flatten(2)


class Conv4(Backbone):
    """Blocks of 3x3 convolution, batch norm and ReLU: sites `input, block1, ..., block4, feat, head`.

    Args:
        input_shape: (channels, height, width) of a picture.
        outputs: width of the prediction; 0 leaves the head off.
        width: filters of the first block.
        growth: factor by which their number grows from block to block.
        blocks: number of blocks.
        pooled_blocks: how many of them, from the first, halve the picture; None for all.
        downsample: `maxpool` (2x2, floor) or `stride` (2).
        readout: `flatten`, or `mean` over the remaining pixels.
        bn: whether the blocks have batch norm.
        bn_affine: `full` (gamma and beta), `beta`, or `none`.
        bn_affine_inner: whether inner loops adapt them.
        bn_eps: added to the variance.
        conv_bias: whether convolutions have a bias (of no effect before batch norm with batch statistics).
        head_init: `xavier`, or `normal` (N(0, 1), as the code of Finn et al. for Omniglot).
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        outputs: int,
        width: int = 64,
        growth: int = 1,
        blocks: int = 4,
        pooled_blocks: int | None = None,
        downsample: Literal["maxpool", "stride"] = "maxpool",
        readout: Literal["flatten", "mean"] = "flatten",
        bn: bool = True,
        bn_affine: Literal["full", "beta", "none"] = "full",
        bn_affine_inner: bool = True,
        bn_eps: float = 1e-5,
        conv_bias: bool = True,
        head_init: Literal["xavier", "normal"] = "xavier",
    ):
        if len(input_shape) != 3:
            raise BadInput(f"backbone=conv4: needs pictures, and examples have the shape {tuple(input_shape)}")
        stages: list[Stage] = []
        shape: tuple[int, ...] = input_shape
        block = partial(Block, bn=bn, bias=conv_bias, affine=bn_affine, eps=bn_eps)
        for i in range(blocks):
            halves = downsample if pooled_blocks is None or i < pooled_blocks else "none"
            stages.append(block(f"block{i + 1}", shape, width * growth**i, downsample=halves))
            shape = stages[-1].shape
        if 0 in shape:
            raise ValueError(
                f"backbone.blocks = {blocks} leaves no pixel of a {input_shape[1]}x{input_shape[2]} picture"
            )
        stages.append(_Readout(shape, readout))
        if outputs:
            stages.append(Linear("head", stages[-1].shape[0], outputs))
        super().__init__(stages, input_shape=input_shape, bn_affine_inner=bn_affine_inner)
        self.head_init = head_init

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name == "head.weight" and self.head_init == "normal":
            parameter.normal_(generator=generator)
        else:
            super().initialize(name, parameter, generator)
