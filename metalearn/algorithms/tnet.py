"""T-net and MT-net: gradient steps in a learned metric, and on a learned subspace, of every layer.

Lee & Choi, ICML 2018, https://arxiv.org/abs/1801.05558. T is for transformation; the map T of a layer is meta-learned
and never adapted.
"""

from typing import Any

import torch
from torch import Size, Tensor

from metalearn.algorithms.maml import MAML
from metalearn.backbones import Backbone, Kernel
from metalearn.episode import Params, Theta
from metalearn.parameters import Parameters
from metalearn.random import TaskKey
from metalearn.schema import BadInput

OWN = "transforms."  # prefix of the transforms among what a pass through the network depends on


class TNet(MAML):
    """MAML on a network whose every affine map W x + b is followed by a square T that only the outer loop moves.

    T (W x + b) stands before batch norm and non-linearity; after a convolution T is a 1x1 convolution, and the last
    layer has one too. T begins as the identity. As T (W * x + b) = (T W) * x + T b, T is multiplied into W and b, and
    the network runs as it is. What the inner loop moves besides W and b is, as in MAML, batch norm's scale and offset
    if `backbone.bn_affine_inner` says so (the authors' code has no scale and does not adapt the offset).

    Args:
        maml: arguments of `MAML`.

    Raises:
        BadInput: if the network has parameters in another place than after an affine map.
    """

    def __init__(self, **maml: Any):
        super().__init__(**maml)
        self.kernels = kernels(self.net)
        rows = {k.weight: self.shapes[k.weight][0] for k in self.kernels.values()}
        self.transforms = Parameters({k: torch.eye(n) for k, n in rows.items()})

    def network(self, theta: Theta) -> Params:
        """Adds the transforms to what a pass through the network depends on."""
        return super().network(theta) | {OWN + k: t for k, t in theta["transforms"].items()}

    def run_net(
        self, params: Params, h: Tensor, *, start: str = "input", stop: str | None = None, **how: Any
    ) -> Tensor:
        """The network between two sites with T W and T b in place of W and b."""
        folded = dict(params)
        for stage in self.net.between(start, stop):
            if stage in self.kernels:
                for name in filter(None, self.kernels[stage]):
                    t = params[OWN + self.kernels[stage].weight]
                    folded[name] = transformed(t, params[name], self.shapes[name])
        return super().run_net(folded, h, start=start, stop=stop, **how)

    def initialize(self, seed: int) -> None:
        """Draw theta; every T is the identity."""
        super().initialize(seed)
        with torch.no_grad():
            for t in self.transforms.parameters():
                t.copy_(torch.eye(len(t)))


class MTNet(TNet):
    """T-net that adapts, in each task, a random subset of the rows of every W: phi = theta - alpha m * grad L.

    Row j of a layer, with its entry of b (and of batch norm's parameters), is adapted if m_j = 1, which has probability
    sigmoid(zeta_j). The mask is one sample for each task and all its steps, in training and in evaluation alike, as in
    the authors' code: the hard Gumbel-softmax of (zeta_j, 0) at temperature 1, whose gradient in zeta is that of the
    soft one (straight-through). The logits zeta begin at 0. Log lines report the mean share of adapted rows.
    """

    def __init__(self, **maml: Any):
        super().__init__(**maml)
        self.zeta = Parameters({k: torch.zeros(len(t)) for k, t in self.transforms.named_parameters()})

    def inner_rate(self, theta: Theta, key: TaskKey | None) -> float | Tensor | Params:
        """Alpha times each task's mask."""
        return {name: self.alpha * m for name, m in self.multipliers(theta, key).items()}

    def multipliers(self, theta: Theta, key: TaskKey | None) -> Params:
        """Each task's mask, shared by all parameters of a layer."""
        if key is None:
            raise ValueError("MT-net draws a mask for each task: adapt needs the tasks' key")
        masks: Params = {}
        for stage, (weight, _) in self.kernels.items():
            moving = [name for name in self.net.stage(stage).uses if self.moves(name)]
            if moving:
                m = mask(theta["zeta"][weight], key.sub(f"mask/{weight}"))
                masks |= {name: m.view(*m.shape, *[1] * (len(self.shapes[name]) - 1)) for name in moving}
        return masks

    @property
    def exact(self) -> bool:
        """Straight-through gradients of zeta are not the slope of the outer objective."""
        return self.inner_steps == 0

    def reports(self) -> dict[str, float]:
        """Adds the probability that a row is adapted, averaged over rows."""
        zeta = torch.cat([z.detach() for z in self.zeta.parameters()])
        return super().reports() | {"adapted_rows": float(zeta.sigmoid().double().mean())}


def kernels(net: Backbone) -> dict[str, Kernel]:
    """The maps W x + b of a network, by the stage that begins with them."""
    found = {}
    for name in net.stages:
        stage = net.stage(name)
        if stage.kernel is not None:
            found[name] = stage.kernel
        elif stage.uses:
            raise BadInput(
                "algorithm=tnet, mtnet: every stage of the network must be one convolution or linear map with what "
                f"follows it, and stage '{name}' is something else"
            )
    return found


def transformed(t: Tensor, w: Tensor, shape: Size) -> Tensor:
    """T W, the rows of W mixed by T.

    Args:
        t: `[O, O]`; or `[B, O, O]` one per task, if w has a task axis too.
        w: weight or bias `[O, ...]`, or `[B, O, ...]` one per task.
        shape: that of w without a task axis.

    Returns:
        `[(B,) O, ...]`, in the memory order in which convolution kernels read filters: rows innermost.
    """
    axes, first = list(range(w.dim())), w.dim() - len(shape)
    inputs = axes[first + 1 :]
    order = [*axes[:first], *inputs[1:], *inputs[:1], first]
    rows_last = w.permute(order)
    mixed = rows_last.reshape(*w.shape[:first], -1, shape[0]) @ t.mT
    return mixed.view(rows_last.shape).permute([order.index(axis) for axis in axes])


def mask(zeta: Tensor, key: TaskKey) -> Tensor:
    """`[B, O]` of 0 and 1, with the gradient in zeta `[(B,) O]` of the sigmoid that decides it (straight-through)."""
    noisy = zeta + key.logistic(zeta.shape[-1]).to(zeta)
    soft = torch.sigmoid(noisy)
    return (noisy > 0).to(zeta) + (soft - soft.detach())
