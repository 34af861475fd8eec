"""higher's innerloop_ctx, task by task, as in its MAML example."""

# ruff: noqa: D101, D102, D103

from __future__ import annotations

import higher
import torch
from torch import Tensor

from peers.networks import Subject, build_by_form


class MAML(Subject):
    def prepare(self) -> None:
        self.inner = torch.optim.SGD(self.net.parameters(), lr=self.alpha)

    def outer(self) -> Tensor:
        total = 0.0
        for xs, ys, xq, yq in self.each_task():
            with higher.innerloop_ctx(self.net, self.inner, copy_initial_weights=False) as (fnet, diffopt):
                for _ in range(self.steps):
                    diffopt.step(self.criterion(fnet(xs), ys))
                loss = self.criterion(fnet(xq), yq) / self.tasks
                loss.backward()
            total += loss.detach()
        return total


class FOMAML(MAML):
    """Without a graph of the inner loop; the gradient at the adapted parameters is that of the initial ones."""

    def outer(self) -> Tensor:
        total = 0.0
        for p in self.net.parameters():
            p.grad = torch.zeros_like(p)
        for xs, ys, xq, yq in self.each_task():
            with higher.innerloop_ctx(self.net, self.inner, track_higher_grads=False) as (fnet, diffopt):
                for _ in range(self.steps):
                    diffopt.step(self.criterion(fnet(xs), ys))
                loss = self.criterion(fnet(xq), yq) / self.tasks
                grads = torch.autograd.grad(loss, list(fnet.parameters()))
            torch._foreach_add_([p.grad for p in self.net.parameters()], grads)
            total += loss.detach()
        return total


def build(workload: dict, arrays: dict, device: str, variant: str) -> Subject:
    return build_by_form({"maml": MAML, "fomaml": FOMAML}, workload, arrays, device, variant)
