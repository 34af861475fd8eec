"""learn2learn's MAML wrapper (clone, adapt), task by task, as in its examples."""

# ruff: noqa: D101, D102, D103

from __future__ import annotations

from torch import Tensor, nn

from peers.networks import Subject, build_by_form
from peers.parts import open_packages
from peers.plain import ProtoNet, Reptile

open_packages("learn2learn", "algorithms")  # its other packages want gym and Lightning
from learn2learn.algorithms.maml import MAML as Wrapper  # noqa: E402


class MAML(Subject):
    def prepare(self) -> None:
        self.maml = Wrapper(self.net, lr=self.alpha, first_order=self.workload["form"] == "fomaml")

    def outer(self) -> Tensor:
        total = 0.0
        for xs, ys, xq, yq in self.each_task():
            learner = self.maml.clone()
            for _ in range(self.steps):
                learner.adapt(self.criterion(learner(xs), ys))
            loss = self.criterion(learner(xq), yq) / self.tasks
            loss.backward()
            total += loss.detach()
        return total


class ANIL(Subject):
    """The head alone is wrapped; the body's features pass through it."""

    def prepare(self) -> None:
        self.body = nn.Sequential(*list(self.net.children())[:-1])
        self.maml = Wrapper(self.net.head, lr=self.alpha)

    def outer(self) -> Tensor:
        total = 0.0
        for xs, ys, xq, yq in self.each_task():
            learner = self.maml.clone()
            features = self.body(xs)
            for _ in range(self.steps):
                learner.adapt(self.criterion(learner(features), ys))
            loss = self.criterion(learner(self.body(xq)), yq) / self.tasks
            loss.backward()
            total += loss.detach()
        return total


def build(workload: dict, arrays: dict, device: str, variant: str) -> Subject:
    forms = {"maml": MAML, "fomaml": MAML, "anil": ANIL, "reptile": Reptile, "protonet": ProtoNet}
    return build_by_form(forms, workload, arrays, device, variant)
