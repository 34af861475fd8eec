"""The convolution peak of the machine: what oneDNN or cuDNN reaches on large, ordinary float32 convolutions."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((640, 64, 14), (160, 64, 28), (160, 32, 42))
"""(pictures, channels in and out, height and width) of 3x3 convolutions: those of the workloads' large layers."""


class Subject:
    """Repeats the fastest of a few channels-last forward convolutions; `flop` are the operations of one."""

    def __init__(self, device: str, shapes: tuple[tuple[int, int, int], ...] = SHAPES):
        self.device = device
        best, fastest = 0.0, None
        for n, channels, size in shapes:
            x, w = torch.randn(n, channels, size, size), torch.randn(channels, channels, 3, 3)
            tensors = tuple(t.to(device, memory_format=torch.channels_last) for t in (x, w))
            flop = 2.0 * 9 * channels**2 * size**2 * n
            rate = flop / self._seconds(tensors)
            if rate > best:
                best, self.flop, fastest = rate, flop, tensors
        assert fastest is not None
        self.tensors = fastest

    def _seconds(self, tensors: tuple[Tensor, ...]) -> float:
        self.tensors = tensors
        seconds = []
        for _ in range(6):
            self.sync()
            began = time.perf_counter()
            self.step()
            self.sync()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    @torch.no_grad()
    def step(self) -> None:
        """One convolution."""
        x, w = self.tensors
        self.y = F.conv2d(x, w, padding=1)

    def sync(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """Not of interest here."""
        return 0

    def loss(self) -> float:
        """Not of interest here."""
        return 0.0

    def gradient(self) -> dict[str, np.ndarray]:
        """Not of interest here."""
        return {}


def build(workload: dict[str, Any], arrays: dict[str, np.ndarray], device: str, variant: str) -> Subject:
    """For the worker."""
    return Subject(device)
