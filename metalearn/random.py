"""Counter-based random draws: a pure function of (seed, component, index), with no state to save.

The generator is Philox-4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), written in 64-bit integer tensor operations, so the words are the same on every device.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit words for each counter (Philox-4x32, 10 rounds).

    Args:
        counter: four int64 tensors of one shape, each holding 32-bit values.
        key: two 32-bit integers.

    Returns:
        Four int64 tensors of that shape, values in 0..2^32-1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64; the masks below undo the sign
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Key:
    """A named stream of random numbers, addressed by integer coordinates (usually meta-step and task index)."""

    seed: int
    name: str = ""

    def sub(self, name: str) -> "Key":
        """An independent stream below this one."""
        return Key(self.seed, f"{self.name}/{name}")

    def _pair(self) -> tuple[int, int]:
        digest = hashlib.blake2b(f"{self.seed}:{self.name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def integer(self) -> int:
        """A 63-bit seed for a library generator that is used once (initialisation of parameters)."""
        low, high = self._pair()
        return low | (high & 0x7FFFFFFF) << 32

    def words(self, n: int, *index: Tensor | int) -> Tensor:
        """`n` words of 32 random bits at each coordinate.

        Args:
            n: words per coordinate.
            index: up to three coordinates in 0..2^32-1, integers or int64 tensors that broadcast together.

        Returns:
            `[*broadcast(index), n]` int64 in 0..2^32-1, on the device of the coordinates.
        """
        if len(index) > 3:
            raise ValueError(f"at most three coordinates, got {len(index)}")
        device = next((i.device for i in index if isinstance(i, Tensor)), None)
        coordinates = [torch.as_tensor(i, dtype=torch.int64, device=device)[..., None] for i in index]
        coordinates += [torch.zeros(1, dtype=torch.int64, device=device)] * (3 - len(coordinates))
        block = torch.arange(math.ceil(n / 4), dtype=torch.int64, device=device)
        c0, c1, c2, c3 = torch.broadcast_tensors(block, *coordinates)
        out = torch.stack(philox((c0, c1, c2, c3), self._pair()), dim=-1)
        return out.flatten(-2)[..., :n]

    def uniform(self, n: int, *index: Tensor | int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """`[*index, n]` float32 draws from U[low, high), 24 random bits each."""
        return (self.words(n, *index) >> 8).float() * (2.0**-24 * (high - low)) + low

    def normal(self, n: int, *index: Tensor | int) -> Tensor:
        """`[*index, n]` float32 draws from N(0, 1) (Box-Muller)."""
        u = (self.words(2 * n, *index).double() + 0.5) * 2.0**-32
        radius, angle = torch.sqrt(-2 * torch.log(u[..., :n])), 2 * math.pi * u[..., n:]
        return (radius * torch.cos(angle)).float()

    def logistic(self, n: int, *index: Tensor | int) -> Tensor:
        """`[*index, n]` float32 draws from the standard logistic law: the difference of two Gumbel variables."""
        u = (self.words(n, *index).double() + 0.5) * 2.0**-32
        return torch.logit(u).float()

    def integers(self, n: int, *index: Tensor | int, size: Tensor | int) -> Tensor:
        """`[*index, n]` int64 draws from 0..size-1; `size` (at most 2^31) broadcasts against the result.

        Scales a 32-bit word, so probabilities are equal to within size / 2^32.
        """
        return self.words(n, *index) * size >> 32

    def choice(self, n: int, *index: Tensor | int, size: Tensor | int) -> Tensor:
        """`n` distinct values from 0..size-1 at each coordinate, in random order (Floyd's sampling, then a shuffle).

        Args:
            n: how many values.
            index: coordinates, as in `words`.
            size: number of values to choose from, an integer or a tensor of the shape of the coordinates.

        Returns:
            `[*index, n]` int64.

        Raises:
            ValueError: if some `size` is smaller than `n`.
        """
        words = self.words(2 * n, *index)
        size = torch.as_tensor(size, dtype=torch.int64, device=words.device).expand(words.shape[:-1])
        if int(size.min()) < n:
            raise ValueError(f"cannot choose {n} distinct values from {int(size.min())}")
        chosen = torch.full((*words.shape[:-1], n), -1, dtype=torch.int64, device=words.device)
        for i in range(n):
            last = size - n + i
            pick = words[..., i] * (last + 1) >> 32
            taken = (chosen[..., :i] == pick[..., None]).any(-1)
            chosen[..., i] = torch.where(taken, last, pick)
        return chosen.gather(-1, words[..., n:].argsort(dim=-1, stable=True))

    def permutation(self, n: int, *index: Tensor | int) -> Tensor:
        """`[*index, n]` int64: a random order of 0..n-1 at each coordinate."""
        return self.words(n, *index).argsort(dim=-1, stable=True)


@dataclass(frozen=True)
class TaskKey:
    """A key together with the coordinates of the tasks at hand, so that algorithms can draw per task.

    Attributes:
        key: the stream.
        step, task: int64 `[B]` coordinates; a chunk of tasks draws what the whole batch would.
    """

    key: Key
    step: Tensor
    task: Tensor

    def select(self, tasks: slice | Tensor) -> "TaskKey":
        """The same for some of the tasks."""
        return TaskKey(self.key, self.step[tasks], self.task[tasks])

    def sub(self, name: str) -> "TaskKey":
        """An independent stream with the same coordinates."""
        return TaskKey(self.key.sub(name), self.step, self.task)

    def uniform(self, n: int, *, low: float = 0.0, high: float = 1.0) -> Tensor:
        """`[B, n]` float32 draws from U[low, high)."""
        return self.key.uniform(n, self.step, self.task, low=low, high=high)

    def logistic(self, n: int) -> Tensor:
        """`[B, n]` float32 draws from the standard logistic law."""
        return self.key.logistic(n, self.step, self.task)

    def permutations(self, n: int, count: int) -> Tensor:
        """`[B, count, n]` int64: `count` independent random orders of 0..n-1 for each task."""
        which = torch.arange(count, device=self.step.device)
        return self.key.permutation(n, self.step[:, None], self.task[:, None], which)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for a block of somebody else's code, and leave them as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        reseed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def reseed(seed: int) -> None:
    """Seed the global generators of torch, NumPy and Python (within `seeded`)."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
