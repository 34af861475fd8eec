"""torch.func: the MAML example of PyTorch's documentation, vmap(grad) over functional_call, at once or in chunks.

VARIANT is the number of tasks in a chunk, 0 for all at once.

Batch norm is written out, because the gradient of F.batch_norm in its scale, taken under vmap, has a wrong derivative
in the input (torch 2.13: the outer gradient of W1 is 2.5 % off, in float64 too; without vmap it is exact). It is also
a tenth faster than F.batch_norm here.
"""

# ruff: noqa: D101, D102, D103

from __future__ import annotations

import types
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from peers.networks import Subject, build_by_form


def normalize(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    scale = torch.rsqrt(var + layer.eps) * layer.weight[:, None, None]
    return x * scale + (layer.bias[:, None, None] - mean * scale)


class Vmapped(Subject):
    """Mean over `vmap(task loss)`, differentiated chunk by chunk."""

    def prepare(self) -> None:
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.forward = types.MethodType(normalize, module)

    @abstractmethod
    def task_loss(self, params: dict[str, Tensor], xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        """The outer loss of one task."""

    def outer(self) -> Tensor:
        params = dict(self.net.named_parameters())
        size = int(self.variant) or self.tasks
        total = 0.0
        for part in zip(*(t.split(size) for t in (self.xs, self.ys, self.xq, self.yq)), strict=True):
            loss = vmap(self.task_loss, in_dims=(None, 0, 0, 0, 0))(params, *part).sum() / self.tasks
            loss.backward()
            total += loss.detach()
        return total


class MAML(Vmapped):
    def task_loss(self, params: dict[str, Tensor], xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        def support_loss(phi: dict[str, Tensor]) -> Tensor:
            return self.criterion(functional_call(self.net, phi, (xs,)), ys)

        phi = params
        for _ in range(self.steps):
            grads = grad(support_loss)(phi)
            if self.workload["form"] == "fomaml":
                grads = {k: g.detach() for k, g in grads.items()}
            phi = {k: p - self.alpha * grads[k] for k, p in phi.items()}
        return self.criterion(functional_call(self.net, phi, (xq,)), yq)


class ANIL(Vmapped):
    def task_loss(self, params: dict[str, Tensor], xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        head = {k: p for k, p in params.items() if k.startswith("head.")}
        body = {k: p for k, p in params.items() if k not in head}
        features = lambda x: functional_call(self.body, body, (x,))  # noqa: E731
        zs = features(xs)

        def support_loss(phi: dict[str, Tensor]) -> Tensor:
            return self.criterion(F.linear(zs, phi["head.weight"], phi["head.bias"]), ys)

        for _ in range(self.steps):
            grads = grad(support_loss)(head)
            head = {k: p - self.alpha * grads[k] for k, p in head.items()}
        return self.criterion(F.linear(features(xq), head["head.weight"], head["head.bias"]), yq)

    def prepare(self) -> None:
        super().prepare()
        self.body = nn.Sequential()
        for name, child in list(self.net.named_children())[:-1]:
            self.body.add_module(name, child)


class ProtoNet(Vmapped):
    def task_loss(self, params: dict[str, Tensor], xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        z = functional_call(self.net, params, (torch.cat([xs, xq]),))
        prototypes = z[: len(xs)].reshape(self.workload["way"], -1, z.shape[1]).mean(1)
        distances = (z[len(xs) :, None] - prototypes).square().sum(-1)
        return F.cross_entropy(-distances, yq)


def build(workload: dict, arrays: dict, device: str, variant: str) -> Subject:
    forms = {"maml": MAML, "fomaml": MAML, "anil": ANIL, "protonet": ProtoNet}
    return build_by_form(forms, workload, arrays, device, variant)
