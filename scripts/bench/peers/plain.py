"""Plain PyTorch, task by task: the form that Reptile and ProtoNet have in every library's examples."""

# ruff: noqa: D101, D102, D103

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from peers.networks import Subject, build_by_form


class Loop(Subject):
    """MAML by functional_call and autograd.grad(create_graph)."""

    def outer(self) -> Tensor:
        total, second_order = 0.0, self.workload["form"] == "maml"
        for xs, ys, xq, yq in self.each_task():
            phi = dict(self.net.named_parameters())
            for _ in range(self.steps):
                loss = self.criterion(functional_call(self.net, phi, (xs,)), ys)
                grads = torch.autograd.grad(loss, list(phi.values()), create_graph=second_order)
                phi = {k: p - self.alpha * g for (k, p), g in zip(phi.items(), grads, strict=True)}
            loss = self.criterion(functional_call(self.net, phi, (xq,)), yq) / self.tasks
            loss.backward()
            total += loss.detach()
        return total


class Reptile(Subject):
    """A deep copy for each task, trained by SGD; its distance to the start is the outer gradient."""

    def outer(self) -> Tensor:
        total = 0.0
        for p in self.net.parameters():
            p.grad = torch.zeros_like(p)
        for xs, ys, xq, yq, rows in zip(self.xs, self.ys, self.xq, self.yq, self.rows, strict=True):
            x, y = torch.cat([xs, xq]), torch.cat([ys, yq])
            learner = copy.deepcopy(self.net)
            optimizer = torch.optim.SGD(learner.parameters(), lr=self.alpha)
            for batch in rows:
                optimizer.zero_grad()
                loss = self.criterion(learner(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                for p, q in zip(self.net.parameters(), learner.parameters(), strict=True):
                    p.grad.add_(p - q, alpha=1 / self.tasks)
            total += loss.detach() / self.tasks
        return total


class ProtoNet(Subject):
    """Support and query set embedded in one pass; logits are minus the squared distances to the class means."""

    def outer(self) -> Tensor:
        total, way = 0.0, self.workload["way"]
        for xs, xq, yq in zip(self.xs, self.xq, self.yq, strict=True):
            z = self.net(torch.cat([xs, xq]))
            prototypes = z[: len(xs)].reshape(way, -1, z.shape[1]).mean(1)
            loss = F.cross_entropy(-torch.cdist(z[len(xs) :], prototypes).square(), yq) / self.tasks
            loss.backward()
            total += loss.detach()
        return total


def build(workload: dict, arrays: dict, device: str, variant: str) -> Subject:
    forms = {"maml": Loop, "fomaml": Loop, "reptile": Reptile, "protonet": ProtoNet}
    return build_by_form(forms, workload, arrays, device, variant)
