"""Our engine on a workload: the learners that runs use, through `meta_step`. Loaded by `scripts/bench/worker.py`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from metalearn.algorithms import MAML, ProtoNet, Reptile
from metalearn.algorithms import reptile as reptile_module
from metalearn.backbones import MLP, Backbone, Conv4
from metalearn.compiled import Compiler
from metalearn.episode import Episode, Examples, MetaBatch
from metalearn.learner import MetaLearner
from metalearn.memory import keep_freed_memory
from metalearn.optim import Adam
from metalearn.random import Key, TaskKey

Spec = dict[str, Any]
STEPS = 10**6
"""Meta-steps of the run that a workload is a piece of: a long one, in which it pays to compile tiny networks."""


def network(w: Spec) -> Backbone:
    """The workload's network, its convolutions without bias (of no effect before batch norm)."""
    if w["net"] == "mlp":
        return MLP(input_shape=(1,), outputs=1, hidden=list(w["hidden"]))
    outputs = 0 if w["form"] == "protonet" else w["way"]
    return Conv4(input_shape=tuple(w["image"]), outputs=outputs, width=w["filters"], conv_bias=False)


def learner_of(w: Spec) -> MetaLearner:
    """The workload's algorithm, with the defaults of a run."""
    common: Spec = {"net": network(w), "kind": w["kind"], "inner_steps": w["steps"]}
    if w["form"] == "protonet":
        return ProtoNet(**common)
    if w["form"] == "reptile":
        return Reptile(alpha=w["alpha"], inner_optimizer="sgd", inner_batch=w["minibatch"], **common)
    adapted = "head" if w["form"] == "anil" else ""
    return MAML(alpha=w["alpha"], first_order=w["form"] == "fomaml", adapted=adapted, **common)


def meta_batch(data: dict[str, Tensor]) -> MetaBatch:
    """The workload's tasks as one meta-batch."""
    tasks = len(data["support.x"])
    support, query = (Examples(data[f"{part}.x"], data[f"{part}.y"]) for part in ("support", "query"))
    where = torch.arange(tasks, device=support.x.device)
    return MetaBatch(0, tasks, Episode(support, query, {}), TaskKey(Key(0), torch.zeros_like(where), where))


class Subject:
    """One meta-step of ours, as a worker runs it."""

    def __init__(self, workload: Spec, arrays: dict[str, np.ndarray], device: str):
        keep_freed_memory()
        data = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}
        self.learner = learner_of(workload).to(device, data["support.x"].dtype)
        self.learner.net.load_state_dict({k[6:]: v for k, v in data.items() if k.startswith("param.")})
        self.learner.attach(Adam(lr=workload["outer_lr"]), max_steps=STEPS)
        self.learner.compiler = Compiler(always=False)  # as runs have it
        self.optimizer, self.batch, self.device = self.learner.configure_optimizers(), meta_batch(data), device
        self.rows = data.get("rows")  # the minibatches that all implementations take

    def step(self) -> None:
        """One meta-step: outer gradient and update."""
        rows = self.rows
        given = (
            nullcontext()
            if rows is None
            else patch.object(reptile_module, "minibatches", lambda key, *_: rows[key.task])
        )
        with given:
            result = self.learner.meta_step(self.batch, self.optimizer)
        assert result is not None
        self.result = result

    def sync(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """On a GPU, the most memory held so far."""
        return torch.cuda.max_memory_allocated()

    def loss(self) -> float:
        """Mean query loss of the last step."""
        return float(self.result.loss.mean())

    def gradient(self) -> dict[str, np.ndarray]:
        """Outer gradient of the last step, by parameter."""
        names = [name.removeprefix("net.") for name, _ in self.learner.named_parameters()]
        return {k: g.cpu().numpy() for k, g in zip(names, self.result.grads, strict=True)}


def build(workload: Spec, arrays: dict[str, np.ndarray], device: str, variant: str) -> Subject:
    """For the worker."""
    return Subject(workload, arrays, device)
