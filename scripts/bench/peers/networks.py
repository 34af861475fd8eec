"""What the peers on PyTorch share: the networks as their users write them, the data, the outer Adam."""

# ruff: noqa: D101, D102, D103

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)


class Body(nn.Sequential):
    """Four blocks, flattened."""

    def __init__(self, channels: int, filters: int):
        super().__init__()
        for i in range(4):
            self.add_module(f"block{i + 1}", Block(filters if i else channels, filters))
        self.add_module("flatten", nn.Flatten())


class Conv4(Body):
    def __init__(self, channels: int, filters: int, features: int, way: int):
        super().__init__(channels, filters)
        self.head = nn.Linear(features, way)


class MLP(nn.Sequential):
    def __init__(self, hidden: list[int]):
        super().__init__()
        inputs = 1
        for i, width in enumerate(hidden):
            self.add_module(f"h{i + 1}", nn.Linear(inputs, width))
            self.add_module(f"relu{i + 1}", nn.ReLU())
            inputs = width
        self.head = nn.Linear(inputs, 1)


def network(w: dict) -> nn.Module:
    if w["net"] == "mlp":
        return MLP(w["hidden"])
    if w["form"] == "protonet":
        return Body(w["image"][0], w["filters"])
    return Conv4(w["image"][0], w["filters"], w["features"], w["way"])


class Subject(ABC):
    """A meta-step on one meta-batch; subclasses implement `outer`, which leaves the outer gradient in `.grad`."""

    def __init__(self, workload: dict, arrays: dict[str, np.ndarray], device: str, variant: str):
        self.workload, self.device, self.variant = workload, device, variant
        data = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}
        self.net = self.network().to(device, data["support.x"].dtype)
        self.load({k[6:]: v for k, v in data.items() if k.startswith("param.")})
        self.alpha, self.steps, self.tasks = workload["alpha"], workload["steps"], workload["tasks"]
        self.xs, self.ys, self.xq, self.yq = (data[k] for k in ("support.x", "support.y", "query.x", "query.y"))
        self.rows = data.get("rows")
        self.criterion = F.mse_loss if workload["kind"] == "regression" else F.cross_entropy
        self.prepare()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=workload["outer_lr"])

    def network(self) -> nn.Module:
        return network(self.workload)

    def load(self, params: dict[str, Tensor]) -> None:
        self.net.load_state_dict(params)

    def prepare(self) -> None:  # noqa: B027  (a hook, not a duty)
        pass

    @abstractmethod
    def outer(self) -> Tensor:
        """The outer loss of all tasks; leaves its gradient in the parameters."""

    def each_task(self):
        return zip(self.xs, self.ys, self.xq, self.yq, strict=True)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.value = self.outer()
        self.optimizer.step()

    def sync(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def loss(self) -> float:
        return float(self.value)

    def gradient(self) -> dict[str, np.ndarray]:
        return {k: p.grad.cpu().numpy() for k, p in self.net.named_parameters()}


def build_by_form(forms: dict, workload: dict, arrays: dict, device: str, variant: str) -> Subject:
    return forms[workload["form"]](workload, arrays, device, variant)
