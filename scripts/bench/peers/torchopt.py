"""TorchOpt's differentiable MetaSGD, task by task, as in its MAML example."""

# ruff: noqa: D101, D102, D103

from __future__ import annotations

import torchopt
from torch import Tensor

from peers.networks import Subject, build_by_form


class MAML(Subject):
    def prepare(self) -> None:
        self.inner = torchopt.MetaSGD(self.net, lr=self.alpha)

    def outer(self) -> Tensor:
        total = 0.0
        net = torchopt.extract_state_dict(self.net, by="reference", detach_buffers=True)
        inner = torchopt.extract_state_dict(self.inner, by="reference")
        for xs, ys, xq, yq in self.each_task():
            for _ in range(self.steps):
                self.inner.step(self.criterion(self.net(xs), ys))
            loss = self.criterion(self.net(xq), yq) / self.tasks
            loss.backward()
            total += loss.detach()
            torchopt.recover_state_dict(self.net, net)
            torchopt.recover_state_dict(self.inner, inner)
        return total


def build(workload: dict, arrays: dict, device: str, variant: str) -> Subject:
    return build_by_form({"maml": MAML}, workload, arrays, device, variant)
