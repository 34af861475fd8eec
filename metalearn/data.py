"""Episodes for training and evaluation, as Lightning's data module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch

from metalearn.datasets.base import Dataset, Split
from metalearn.episode import Episode, Examples, MetaBatch
from metalearn.random import Key, TaskKey
from metalearn.samplers import Uniform

BLOCK = 128  # meta-steps whose draws are made together; changes no draw
FETCH_BYTES = 2**20  # inputs of meta-steps whose tasks are made together; changes no task
MOST_PER_CALL = 256
CALL_SECONDS = 0.1  # of one call of Lightning's training_step, so that its overhead is paid rarely


class Episodes(pl.LightningDataModule):
    """Training meta-batches that start at the learner's own counter, and frozen evaluation episodes.

    Args:
        dataset: source of tasks.
        sampler: which tasks form a meta-batch.
        meta_batch_size: tasks of a meta-step over all ranks.
        max_steps: meta-steps of the run.
        val_every: meta-steps between validations; 0 for none.
        val_episodes, test_episodes: numbers of frozen episodes.
        seed: of training draws; evaluation_seed: of frozen episodes.
        per_call: meta-steps in one batch for Lightning; 0 for as many as take a tenth of a second (one, with several
            ranks). None lies on both sides of a multiple of `log_every`.
        log_every: meta-steps between log lines.
        dtype: of inputs and real targets.
        eval_batch: frozen episodes fetched at once.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Uniform,
        *,
        meta_batch_size: int,
        max_steps: int,
        val_every: int,
        val_episodes: int,
        test_episodes: int,
        seed: int,
        evaluation_seed: int,
        per_call: int = 0,
        log_every: int = 10,
        dtype: torch.dtype = torch.float32,
        eval_batch: int = 32,
    ):
        super().__init__()
        self.dataset, self.sampler, self.dtype = dataset, sampler, dtype
        self.meta_batch_size, self.max_steps, self.val_every = meta_batch_size, max_steps, val_every
        self.frozen = {"val": val_episodes, "test": test_episodes}
        self.train_key, self.evaluation_key = Key(seed, "train"), Key(evaluation_seed, "evaluation")
        self.per_call, self.log_every, self.eval_batch = per_call, log_every, eval_batch
        self.start = 0
        self.step_seconds = CALL_SECONDS  # of the meta-steps of the last call

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Episodes are fetched on the data set's device already."""
        return batch

    def train_dataloader(self) -> TrainStream:
        """The meta-batches up to the next validation, each time it is iterated."""
        return TrainStream(self)

    def val_dataloader(self) -> FrozenStream:
        return FrozenStream(self, "val")

    def test_dataloader(self) -> FrozenStream:
        return FrozenStream(self, "test")

    def training(self, first: int, last: int, rank: int = 0, world: int = 1) -> Iterator[MetaBatch]:
        """The meta-batches of meta-steps first..last-1 on one rank."""
        tasks, own, count = self.sampler.tasks(self.meta_batch_size, rank, world), self.train_key.sub("learner"), 0
        for low in range(first - first % BLOCK, last, BLOCK):  # always the same blocks and groups: the same bits
            steps = torch.arange(low, low + BLOCK)
            draws = self.dataset.draw("train", self.train_key, steps[:, None], tasks[None, :])
            if not count:
                alone = self.dataset.fetch("train", {k: v[0] for k, v in draws.items()})
                count = max(1, FETCH_BYTES // max(1, alone.support.x.nbytes + alone.query.x.nbytes))
            for group in steps.split(count):
                if group[-1] < first or group[0] >= last:
                    continue
                part = slice(int(group[0]) - low, int(group[-1]) - low + 1)
                together = self.dataset.fetch("train", {k: v[part].flatten(0, 1) for k, v in draws.items()})
                keys = group[:, None].expand(-1, len(tasks)).unbind(0)
                if self.sampler.corrupted:
                    coordinates = group.repeat_interleave(len(tasks)), tasks.repeat(len(group))
                    together = self.sampler.corrupt(together, self.train_key.sub("corrupted"), *coordinates)
                for step, key, episodes in zip(
                    group.tolist(), keys, _unstack(together.to(self.dtype), len(group)), strict=True
                ):
                    if first <= step < last:
                        yield MetaBatch(step, self.meta_batch_size, episodes, TaskKey(own, key, tasks))

    def stream(self, name: str, first: int, last: int) -> MetaBatch:
        """Training tasks first..last-1 of a stream of its own, which no meta-step draws from."""
        key, task = self.train_key.sub(name), torch.arange(first, last)
        step = torch.zeros_like(task)
        episodes = self.dataset.fetch("train", self.dataset.draw("train", key, step, task))
        if self.sampler.corrupted:
            episodes = self.sampler.corrupt(episodes, key.sub("corrupted"), step, task)
        return MetaBatch(0, last - first, episodes.to(self.dtype), TaskKey(key.sub("learner"), step, task))

    def evaluation(self, split: Split, rank: int = 0, world: int = 1) -> Iterator[MetaBatch]:
        """The frozen episodes of a split on one rank (every world-th), in stacks of `eval_batch`."""
        key = self.evaluation_key.sub(split)
        every = torch.arange(rank, self.frozen[split], world)
        for index in every.split(self.eval_batch) if len(every) else ():
            zero = torch.zeros_like(index)
            episodes = self.dataset.fetch(split, self.dataset.draw(split, key, index, zero)).to(self.dtype)
            yield MetaBatch(0, self.frozen[split], episodes, TaskKey(key.sub("learner"), index, zero))


def _unstack(together: Episode, count: int) -> Iterator[Episode]:
    """`count` stacks of equally many tasks from one, as views."""
    names = list(together.latent)
    leaves = (*together.support, *together.query, *together.latent.values())
    for sx, sy, qx, qy, *latent in zip(*(t.unflatten(0, (count, -1)).unbind(0) for t in leaves), strict=True):
        yield Episode(Examples(sx, sy), Examples(qx, qy), dict(zip(names, latent, strict=True)))


class TrainStream:
    """Batches for Lightning from the learner's meta-step to the next validation (one Lightning epoch)."""

    def __init__(self, data: Episodes):
        self.data = data

    def __iter__(self) -> Iterator[list[MetaBatch]]:
        data = self.data
        first = data.start
        last = min(data.max_steps, (first // data.val_every + 1) * data.val_every if data.val_every else data.max_steps)
        data.start = last
        rank, world = data._ranks()
        pending: list[MetaBatch] = []
        for batch in data.training(first, last, rank, world):
            pending.append(batch)
            size = data.per_call
            if not size:  # other ranks would come to other sizes
                size = max(1, min(MOST_PER_CALL, int(CALL_SECONDS / data.step_seconds))) if world == 1 else 1
            if len(pending) >= size or (batch.step + 1) % data.log_every == 0 or batch.step == last - 1:
                yield pending
                pending = []


class FrozenStream:
    """Frozen episodes for Lightning."""

    def __init__(self, data: Episodes, split: Split):
        self.data, self.split = data, split

    def __len__(self) -> int:
        rank, world = self.data._ranks()
        mine = len(range(rank, self.data.frozen[self.split], world))
        return -(-mine // self.data.eval_batch)

    def __iter__(self) -> Iterator[MetaBatch]:
        return self.data.evaluation(self.split, *self.data._ranks())
