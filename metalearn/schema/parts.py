"""Keys of backbones, regularizers, samplers and outer optimizers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from metalearn.schema.keys import key

Config = dict[str, Any]


@dataclass
class MLP:
    """metalearn.backbones.MLP."""

    target: ClassVar[str] = "metalearn.backbones.MLP"
    epoch: ClassVar[int] = 1

    name: str = key("", "name in tables and logs", touches="none")
    hidden: list[int] = key([40, 40], "widths of the hidden layers", ge=1)
    activation: str = key("relu", "non-linearity", choices=("relu", "tanh"))
    init: str = key(
        "torch",
        "uniform as in PyTorch's linear layers, or N(0, 0.01) cut at two deviations",
        choices=("torch", "truncated_normal"),
    )

    @classmethod
    def layers(cls, backbone: Config) -> list[str]:
        """Names that begin parameters' names, in order."""
        return [*(f"h{i + 1}" for i in range(len(backbone["hidden"]))), "head"]

    @classmethod
    def problems(cls, backbone: Config, side: int | None) -> Iterator[str]:
        """Why this network cannot take pictures of `side` pixels (None: no pictures)."""
        yield from ()

    @classmethod
    def enlarged(cls, backbone: Config, width: int) -> Config:
        """7/4 as many hidden layers (rounded up), all of one width: what MAML-L's step from 4 to 7 blocks is here."""
        return backbone | {"hidden": [width] * -(-7 * len(backbone["hidden"]) // 4)}


@dataclass
class Conv4:
    """metalearn.backbones.Conv4."""

    target: ClassVar[str] = "metalearn.backbones.Conv4"
    epoch: ClassVar[int] = 1

    name: str = key("", "name in tables and logs", touches="none")
    width: int = key(64, "filters of the first block", ge=1)
    growth: int = key(1, "factor by which the number of filters grows from block to block", ge=1, le=4)
    blocks: int = key(4, "number of blocks", ge=1)
    pooled_blocks: int | None = key(None, "how many blocks, from the first, halve the picture; null for all", ge=1)
    downsample: str = key("maxpool", "how a block halves the picture", choices=("maxpool", "stride"))
    readout: str = key(
        "flatten", "features from the last block: all pixels, or their mean", choices=("flatten", "mean")
    )
    bn: bool = key(True, "batch norm in every block")
    bn_affine: str = key(
        "full", "learned batch-norm parameters: scale and offset, offset, or none", choices=("full", "beta", "none")
    )
    bn_affine_inner: bool = key(True, "whether inner loops adapt them")
    bn_eps: float = key(1e-5, "added to the variance", gt=0)
    conv_bias: bool = key(True, "bias of the convolutions (of no effect before batch norm by batch statistics)")
    head_init: str = key(
        "xavier", "initial weights of the head: Xavier uniform, or N(0, 1)", choices=("xavier", "normal")
    )

    @classmethod
    def layers(cls, backbone: Config) -> list[str]:
        """Names that begin parameters' names, in order."""
        return [*(f"block{i + 1}" for i in range(backbone["blocks"])), "head"]

    @classmethod
    def problems(cls, backbone: Config, side: int | None) -> Iterator[str]:
        """Why this network cannot take pictures of `side` pixels (None: no pictures)."""
        if side is None:
            yield f"backbone={backbone['name']}: needs pictures, and this data set has none; use mlp_sine"
            return
        blocks, pooled = backbone["blocks"], backbone["pooled_blocks"]
        name, halving = ("blocks", blocks) if pooled is None else ("pooled_blocks", pooled)
        if halving > blocks:
            yield f"backbone.pooled_blocks={pooled}: must be <= backbone.blocks={blocks}"
        elif backbone["downsample"] == "maxpool" and side >> halving == 0:
            most = side.bit_length() - 1
            yield f"backbone.{name}={halving}: must be <= {most} for pictures of {side}x{side} pixels"

    @classmethod
    def enlarged(cls, backbone: Config, width: int) -> Config:
        """Three more blocks, which keep the size of the picture, and as many filters in all (MAML-L)."""
        halving = backbone["pooled_blocks"] or backbone["blocks"]
        changes = {"blocks": backbone["blocks"] + 3, "pooled_blocks": halving, "width": width, "growth": 1}
        return backbone | changes


@dataclass
class Module:
    """metalearn.backbones.Module."""

    target: ClassVar[str] = "metalearn.backbones.Module"
    epoch: ClassVar[int] = 1

    name: str = key("", "name in tables and logs", touches="none")
    factory: str = key(
        ..., "module:function that makes the network from input_shape and outputs, as my_package.nets:make_net"
    )
    arguments: dict = key({}, "further arguments of the factory, as backbone.arguments.width=32")  # type: ignore[type-arg]
    init: str = key(
        "keep",
        "initial parameters: the factory's own draws (keyed by the seed), or Xavier uniform and zero",
        choices=("keep", "xavier"),
    )

    @classmethod
    def layers(cls, backbone: Config) -> list[str]:
        """None are known before the module is made."""
        return []

    @classmethod
    def content(cls, backbone: Config) -> str:
        """Names the factory's source file by its contents."""
        from metalearn.factories import content

        return content("backbone.factory", backbone["factory"])

    @classmethod
    def problems(cls, backbone: Config, side: int | None) -> Iterator[str]:
        """Why this network cannot take pictures of `side` pixels (None: no pictures)."""
        for name in {"input_shape", "outputs"} & backbone["arguments"].keys():
            yield f"backbone.arguments.{name}={backbone['arguments'][name]}: the data set says so; leave it out"


@dataclass
class NoRegularizer:
    """metalearn.regularizers.Regularizer."""

    target: ClassVar[str] = "metalearn.regularizers.Regularizer"
    epoch: ClassVar[int] = 1

    name: str = key("none", "name in tables and logs", touches="none")


@dataclass
class Uniform:
    """metalearn.samplers.Uniform."""

    target: ClassVar[str] = "metalearn.samplers.Uniform"
    epoch: ClassVar[int] = 1

    name: str = key("uniform", "name in tables and logs", touches="none")
    corrupted: float = key(0.0, "share of each meta-batch's training tasks whose targets are shuffled", ge=0, le=1)


@dataclass
class Optimizer:
    """What all outer optimizers share."""

    epoch: ClassVar[int] = 1

    name: str = key("", "name in tables and logs", touches="none")
    lr: float = key(0.001, "outer learning rate (beta; Reptile's epsilon with sgd)", gt=0)
    schedule: str = key("constant", "course of the learning rate", choices=("constant", "cosine", "linear", "step"))
    final_lr: float = key(0.0, "learning rate at the end (cosine, linear)", ge=0)
    decay_every: int = key(2000, "meta-steps between decays (step)", ge=1)
    decay_factor: float = key(0.5, "factor of each decay (step)", gt=0, le=1)
    clip_norm: float | None = key(None, "bound on the global norm of the outer gradient; null for none", gt=0)
    clip_value: float | None = key(None, "bound on each entry of the outer gradient; null for none", gt=0)
    weight_decay: float = key(0.0, "multiple of theta added to the outer gradient", ge=0)


@dataclass
class Adam(Optimizer):
    """metalearn.optim.Adam."""

    target: ClassVar[str] = "metalearn.optim.Adam"

    betas: list[float] = key([0.9, 0.999], "decay rates of the moments", ge=0, lt=1, length=2)
    eps: float = key(1e-8, "added to the root of the second moment", gt=0)


@dataclass
class SGD(Optimizer):
    """metalearn.optim.SGD."""

    target: ClassVar[str] = "metalearn.optim.SGD"

    momentum: float = key(0.0, "momentum", ge=0, lt=1)


BACKBONES = (MLP, Conv4, Module)
REGULARIZERS = (NoRegularizer,)
SAMPLERS = (Uniform,)
OPTIMIZERS = (Adam, SGD)
