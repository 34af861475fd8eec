"""What the mathematics is compared with: closed forms, finite differences, and plain loops of primitive operations.

Everything here is float64. `ROUNDING` is the tolerance for two ways of summing the same numbers.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalearn.backbones import MLP, Backbone, Conv4, Stage
from metalearn.backbones.conv4 import Block
from metalearn.episode import Episode, Examples, MetaBatch
from metalearn.learner import MetaLearner
from metalearn.meta_gradient import meta_gradient
from metalearn.ops import Normalization
from metalearn.optim import SGD
from metalearn.random import Key, TaskKey

VALUES: dict[str, Any] = json.loads((Path(__file__).parent / "oracle_values.json").read_text())
ROUNDING = 1e-12

Tree = dict[str, Tensor]


# ---- comparing ---------------------------------------------------------------------------------------------------


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|actual - expected| / |expected|, both as one long vector."""
    a, b = (torch.cat([t.detach().flatten() for t in part]) for part in (actual, expected))
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


def assert_close(actual: Any, expected: Any, rtol: float = ROUNDING) -> None:
    """Equal entry by entry up to `rtol` (and, around zero, `rtol` times the usual size 1)."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def finite_differences(f: Callable[[], Tensor], leaves: Sequence[Tensor], h: float = 6e-6) -> list[Tensor]:
    """Central differences of the scalar f() in every entry of `leaves`, which are changed in place and restored.

    The error is about h^2 = 4e-11 from the third derivative, and 1e-16 / h from rounding: 1e-6 is ample.
    """
    slopes = []
    with torch.no_grad():
        for leaf in leaves:
            slope = torch.zeros_like(leaf)
            for i in range(leaf.numel()):
                entry, values = leaf.view(-1)[i], []
                kept = entry.item()
                for step in (h, -h):
                    entry.fill_(kept + step)
                    values.append(float(f().detach()))
                entry.fill_(kept)
                slope.view(-1)[i] = (values[0] - values[1]) / (2 * h)
            slopes.append(slope)
    return slopes


def slopes_along(
    f: Callable[[], Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor], directions: int = 3
) -> tuple[Tensor, Tensor]:
    """What `grads` say of random directions in each leaf, and the central differences of f() along them.

    Where `finite_differences` would take long: a wrong entry of a gradient shows in every direction.
    """
    actual, expected = [], []
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        kept = leaf.detach().clone()
        for v in normal(directions, *leaf.shape, seed=900 + i):
            values = []
            for step in (6e-6, -6e-6):
                with torch.no_grad():
                    leaf.copy_(kept + step * v)
                values.append(f().detach())
            expected.append((values[0] - values[1]) / 12e-6)
            actual.append((grad * v).sum())
        with torch.no_grad():
            leaf.copy_(kept)
    return torch.stack(actual), torch.stack(expected)


# ---- tasks -------------------------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def pictures(tasks: int = 4, *, way: int = 3, shot: int = 2, queries: int = 2, side: int = 6, seed: int = 0) -> Episode:
    """Classification of noise, with two channels, of seven classes (or as many as there are labels)."""

    def part(each: int, seed: int) -> Examples:
        y = torch.arange(way).repeat_interleave(each).expand(tasks, -1)
        return Examples(normal(tasks, way * each, 2, side, side, seed=seed), y)

    ids = normal(tasks, max(7, way), seed=2 * seed + 1000).argsort(1)[:, :way]
    return Episode(part(shot, 2 * seed), part(queries, 2 * seed + 1), {"class_ids": ids})


def curves(tasks: int = 4, *, shot: int = 5, queries: int = 7, inputs: int = 2, seed: int = 0) -> Episode:
    """Regression of noise, with one output."""
    x, y = normal(tasks, shot + queries, inputs, seed=2 * seed), normal(tasks, shot + queries, 1, seed=2 * seed + 1)
    return Episode(Examples(x[:, :shot], y[:, :shot]), Examples(x[:, shot:], y[:, shot:]), {})


def meta_batch(episodes: Episode, step: int = 0) -> MetaBatch:
    """All episodes as one meta-batch; task i has the coordinates (step, i)."""
    task = torch.arange(episodes.tasks)
    return MetaBatch(step, episodes.tasks, episodes, TaskKey(Key(0, "algorithm"), torch.full_like(task, step), task))


# ---- learners ----------------------------------------------------------------------------------------------------


class Slope(Stage):
    """x -> x w."""

    name = "head"

    def __init__(self, inputs: int):
        super().__init__()
        self.shape = (1,)
        self.weight = nn.Parameter(torch.zeros(1, inputs))

    def apply_stage(self, params: Tree, h: Tensor, norm: Normalization) -> Tensor:
        return h @ params["head.weight"].mT


class LinearForm(Backbone):
    """Linear regression without an offset. With the examples of `quadratic` its loss is any quadratic form."""

    def __init__(self, inputs: int):
        super().__init__([Slope(inputs)])


def quadratic(a: Tensor, c: Tensor) -> Examples:
    """Examples on which the mean squared error of the linear form w is 1/2 (w - c)^T A (w - c).

    The d rows of x are the square root R of (d / 2) A, A = 2/d R^T R, and y = R c. Leading axes are tasks.
    """
    x = torch.linalg.cholesky(a * a.shape[-1] / 2).mT
    return Examples(x, x @ c.unsqueeze(-1))


def build(cls: type[MetaLearner], net: Backbone, kind: str, **arguments: Any) -> MetaLearner:
    """A float64 learner with N(0, 1/4) parameters (scales of both signs), whose outer update is SGD of rate 1."""
    learner = cls(net=net, kind=kind, **arguments).double()
    with torch.no_grad():
        for i, parameter in enumerate(learner.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 + i) / 2)
    learner.attach(SGD(lr=1.0), 10)
    return learner


def conv_net(outputs: int = 3, **arguments: Any) -> Conv4:
    """Two narrow blocks for `pictures`."""
    return Conv4(**{"input_shape": (2, 6, 6), "outputs": outputs, "width": 3, "blocks": 2, **arguments})


def mlp(outputs: int = 1, hidden: Sequence[int] = (4, 3)) -> MLP:
    """A smooth network for `curves`."""
    return MLP(input_shape=(2,), outputs=outputs, hidden=list(hidden), activation="tanh")


def outer_gradient(learner: MetaLearner, episodes: Episode) -> Tree:
    """The gradient that the outer optimizer receives, by the parameters' names."""
    names = [name for name, _ in learner.named_parameters()]
    return dict(zip(names, meta_gradient(learner, meta_batch(episodes)).grads, strict=True))


def outer_value(learner: MetaLearner, episodes: Episode) -> Tensor:
    """The outer objective at the learner's present parameters."""
    theta = learner.theta()
    return learner.outer(theta, episodes, learner.task_loss(theta, episodes, meta_batch(episodes).key))


# ---- quadratic tasks ------------------------------------------------------------------------------------------------

QUADRATIC = VALUES["quadratic_two_dim"]
INPUTS = {k: torch.tensor(v, dtype=torch.float64) for k, v in QUADRATIC["inputs"].items() if k != "loss"}


def linear_form(cls: type[MetaLearner], w: Tensor, **arguments: Any) -> MetaLearner:
    """A learner of `w -> x w`, at w."""
    learner = build(cls, LinearForm(len(w)), "regression", **arguments)
    with torch.no_grad():
        learner.net.head.weight.copy_(w[None])
    return learner


def slope(learner: MetaLearner, episodes: Episode) -> Tensor:
    """The outer gradient of a linear form."""
    return outer_gradient(learner, episodes)["net.head.weight"][0]


def forms(tasks: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positive definite matrices `[tasks, d, d]` with eigenvalues in about 0.5..2, and minima `[tasks, d]`."""
    root = normal(tasks, d, d, seed=seed) / 2
    return root @ root.mT + 0.5 * torch.eye(d, dtype=torch.float64), normal(tasks, d, seed=seed + 1)


# ---- plain loops -------------------------------------------------------------------------------------------------


def forward(net: Backbone, params: Tree, x: Tensor, given: Any = None, seen: Any = None) -> Tensor:
    """Outputs `[n, outputs]` of one task, batch norm written out.

    Args:
        net: says which stages there are; its own forward pass is not used.
        params: without task axis; a T-net's transform of a stage is `<stage>.transform`.
        x: `[n, *input]`.
        given: (mean, variance) by layer, instead of those of x.
        seen: filled with the (mean, variance) of each layer.
    """
    for name in net.stages:
        stage = net.stage(name)
        own = {k.removeprefix(f"{name}."): v for k, v in params.items() if k.startswith(f"{name}.")}
        if isinstance(stage, Block):
            x = F.conv2d(x, own["conv.weight"], own.get("conv.bias"), stage.stride, padding=1)
            x = torch.einsum("oc,nchw->nohw", own["transform"], x) if "transform" in own else x
            if stage.normalizes:
                layer = f"{name}.norm"
                mean, var = given[layer] if given else (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
                if seen is not None:
                    seen[layer] = (mean, var)
                x = (x - mean[:, None, None]) / (var + stage.eps).sqrt()[:, None, None]
                gamma, beta = own.get("norm.weight", torch.ones_like(mean)), own.get("norm.bias", 0 * mean)
                x = gamma[:, None, None] * x + beta[:, None, None]
            x = F.relu(x)
            x = x if stage.pool == 1 else F.max_pool2d(x, 2)
        elif name == "feat":
            x = x.mean((2, 3)) if getattr(stage, "kind", "") == "mean" else x.flatten(1)
        else:
            x = F.linear(x.flatten(1), own["weight"], own.get("bias"))
            x = x @ own["transform"].mT if "transform" in own else x
            x = x if name == "head" else torch.tanh(x)
    return x


def loss(prediction: Tensor, y: Tensor) -> Tensor:
    """Of one task: mean cross-entropy for integer targets, else mean squared error."""
    return F.mse_loss(prediction, y) if y.is_floating_point() else F.cross_entropy(prediction, y)


def descend(
    net: Backbone,
    theta: Tree,
    task: Examples,
    alpha: float,
    steps: int,
    moving: Sequence[str],
    first_order: bool = False,
) -> Tree:
    """Gradient steps of one task on the parameters named `moving`."""
    phi = dict(theta)
    for _ in range(steps):
        value = loss(forward(net, phi, task.x), task.y)
        grads = torch.autograd.grad(value, [phi[k] for k in moving], create_graph=not first_order)
        phi |= {k: phi[k] - alpha * g for k, g in zip(moving, grads, strict=True)}
    return phi


def plain_maml(learner: Any, episodes: Episode) -> tuple[Tensor, list[Tensor]]:
    """Query losses `[B]` and the outer gradient of a MAML learner, one task after the other."""
    net, theta = learner.net, {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
    moving = [k for k in theta if k.startswith(learner.adapted) and learner.net.adapts(k)]
    losses = []
    for i in range(episodes.tasks):
        support, query = (Examples(part.x[i], part.y[i]) for part in episodes[:2])
        phi = descend(net, theta, support, learner.alpha, learner.inner_steps, moving, learner.first_order)
        losses.append(loss(forward(net, phi, query.x), query.y))
    value = torch.stack(losses)
    return value.detach(), list(torch.autograd.grad(value.mean(), list(theta.values()), materialize_grads=True))
