"""What is measured: shapes, steps and operation counts of every workload, and the data all implementations share."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Arrays = dict[str, np.ndarray]
Form = Literal["maml", "fomaml", "anil", "reptile", "protonet"]

OUTER_LR = 1e-4
"""Of the outer Adam: small, so that parameters hardly move however many steps are timed."""


@dataclass(frozen=True)
class Workload:
    """One meta-step: its tasks, network and algorithm.

    Attributes:
        name: as in tables and on the command line.
        title: one line for people.
        net: `conv4` (3x3 convolutions without bias, batch norm on batch statistics, ReLU, 2x2 max-pooling; flattened)
            or `mlp` (1-40-40-1, ReLU).
        form: the algorithm. Reptile descends `steps` minibatches of the pooled support and query set; its outer
            gradient is the mean of theta - U(theta). ProtoNet embeds support and query set together.
        tasks, way, shot, queries: of the meta-batch; queries per class. The sinusoid has way 1.
        steps: inner steps K.
        alpha: inner learning rate.
        image: (channels, height, width).
        filters: of each convolution.
    """

    name: str
    title: str
    net: Literal["conv4", "mlp"] = "conv4"
    form: Form = "maml"
    tasks: int = 32
    way: int = 5
    shot: int = 1
    queries: int = 1
    steps: int = 1
    alpha: float = 0.4
    image: tuple[int, int, int] = (1, 28, 28)
    filters: int = 64
    hidden: tuple[int, ...] = ()

    @property
    def support(self) -> int:
        """Support examples S of a task."""
        return self.way * self.shot

    @property
    def query(self) -> int:
        """Query examples of a task."""
        return self.way * self.queries

    @property
    def minibatch(self) -> int:
        """Examples of one of Reptile's minibatches: together they are the pool."""
        return (self.support + self.query) // self.steps

    @property
    def kind(self) -> str:
        """`classification` or `regression`."""
        return "regression" if self.net == "mlp" else "classification"

    def as_dict(self) -> dict[str, Any]:
        """For a worker: plain values, derived ones included."""
        derived = ("support", "query", "minibatch", "kind", "features")
        return asdict(self) | {name: getattr(self, name) for name in derived} | {"outer_lr": OUTER_LR}

    @property
    def features(self) -> int:
        """Width of the flattened features of `conv4`."""
        return self.filters * (self.image[1] // 16) * (self.image[2] // 16)

    def layers(self) -> list[int]:
        """Multiply-adds of one example in each layer with a dense product, first to last."""
        if self.net == "mlp":
            widths = (1, *self.hidden, 1)
            return [a * b for a, b in zip(widths, widths[1:], strict=False)]
        channels, height, width = self.image
        counts = []
        for _ in range(4):
            counts.append(9 * channels * self.filters * height * width)
            channels, height, width = self.filters, height // 2, width // 2
        return counts if self.form == "protonet" else [*counts, self.features * self.way]

    def flop(self) -> float:
        """Dense floating-point operations that the exact meta-gradient needs at least (two a multiply-add).

        A gradient of n examples is a forward pass, a weight gradient and a data gradient, which layer 1 does not need.
        A Hessian-vector product is the tangent of that: every product has two, but those of layer 1, whose input has
        no tangent, one. Second order pays it once an inner step. ANIL's head gradients are as nothing beside the body,
        which sees every example once.
        """
        total, first = 2 * sum(self.layers()), 2 * self.layers()[0]
        gradient = 3 * total - first
        hessian = 6 * total - 4 * first if self.form == "maml" else 0
        support, query = self.tasks * self.support, self.tasks * self.query
        if self.form in ("anil", "reptile", "protonet"):
            return float((support + query) * gradient)
        return float(self.steps * support * (gradient + hessian) + query * gradient)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by the name that it has in all implementations."""
        if self.net == "mlp":
            widths = (1, *self.hidden, 1)
            names = [*(f"h{i + 1}" for i in range(len(self.hidden))), "head"]
            pairs = list(zip(names, widths, widths[1:], strict=False))
            return {f"{n}.{k}": s for n, a, b in pairs for k, s in (("weight", (b, a)), ("bias", (b,)))}
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(4):
            shapes[f"block{i + 1}.conv.weight"] = (self.filters, self.filters if i else self.image[0], 3, 3)
            shapes[f"block{i + 1}.norm.weight"] = shapes[f"block{i + 1}.norm.bias"] = (self.filters,)
        if self.form != "protonet":
            shapes |= {"head.weight": (self.way, self.features), "head.bias": (self.way,)}
        return shapes


def _forms() -> list[Workload]:
    names = {"fomaml": "FOMAML", "anil": "ANIL", "reptile": "Reptile", "protonet": "ProtoNet"}
    steps = {"reptile": 5}
    return [
        Workload(f"W1q-{form}", f"W1q, {title}", form=form, queries=15, steps=steps.get(form, 1))  # type: ignore[arg-type]
        for form, title in names.items()
    ]


_SINE = dict[str, Any](net="mlp", tasks=25, way=1, shot=10, queries=10, alpha=0.01, hidden=(40, 40))
_LARGE = dict[str, Any](tasks=4, shot=5, queries=15, steps=5, image=(3, 84, 84), filters=32)

WORKLOADS = {
    w.name: w
    for w in (
        Workload("W1", "Omniglot-style 5-way 1-shot, 32 tasks, 1 query a class, 1 inner step, second order"),
        Workload("W4", "sinusoid, 25 tasks, 10 shots, 1 inner step, second order", **_SINE),
        Workload("W1q", "W1 with 15 queries a class", queries=15),
        Workload("W1k5", "W1 with 5 inner steps", steps=5),
        Workload("W2", "20-way 1-shot, 16 tasks, 5 inner steps", way=20, tasks=16, steps=5),
        Workload("W3", "84x84x3, 32 filters, 5-way 5-shot, 15 queries, 4 tasks, 5 inner steps", **_LARGE),
        Workload("W4k5", "W4 with 5 inner steps", steps=5, **_SINE),
        *_forms(),
    )
}
"""By name, in the order in which they are measured."""


def make_arrays(workload: Workload, dtype: type = np.float32) -> Arrays:
    """Initial parameters and one meta-batch, the same for all implementations; made of the workload alone.

    Returns:
        `param.<name>`; `support.x` `[B, S, *input]`, `support.y` (`[B, S]` labels in order, or `[B, S, 1]` numbers) and
        `query.*` alike; for Reptile `rows` `[B, K, minibatch]` of the pool that is the support set, then the query set.
    """
    rng = np.random.default_rng(zlib.crc32(workload.name.encode()))
    arrays = {f"param.{k}": _initial(rng, k, shape) for k, shape in workload.shapes().items()}
    b = workload.tasks
    if workload.net == "mlp":
        amplitude, phase = rng.uniform(0.1, 5, (b, 1, 1)), rng.uniform(0, np.pi, (b, 1, 1))
        for part, n in (("support", workload.support), ("query", workload.query)):
            x = rng.uniform(-5, 5, (b, n, 1))
            arrays[f"{part}.x"], arrays[f"{part}.y"] = x, amplitude * np.sin(x + phase)
    else:
        for part, n in (("support", workload.shot), ("query", workload.queries)):
            arrays[f"{part}.x"] = rng.standard_normal((b, workload.way * n, *workload.image))
            arrays[f"{part}.y"] = np.tile(np.repeat(np.arange(workload.way), n), (b, 1))
    if workload.form == "reptile":
        orders = rng.permuted(np.tile(np.arange(workload.support + workload.query), (b, 1)), axis=1)
        arrays["rows"] = orders.reshape(b, workload.steps, workload.minibatch)
    return {k: v.astype(dtype) if v.dtype == np.float64 else v for k, v in arrays.items()}


def _initial(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Xavier's weights (PyTorch's for linear layers); scales and offsets away from 1 and 0, so that misuse shows."""
    if name.endswith("norm.weight"):
        return rng.uniform(0.8, 1.2, shape)
    if len(shape) == 1:
        return 0.1 * rng.standard_normal(shape)
    if len(shape) == 2:
        return rng.uniform(-1, 1, shape) / np.sqrt(shape[1])
    return rng.standard_normal(shape) * np.sqrt(2 / (9 * (shape[0] + shape[1])))
