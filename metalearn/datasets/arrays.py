"""Few-shot tasks from arrays of one's own in an .npz file: classification, or regression with named tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metalearn.datasets.array_files import Found, Kind, Request, find, headers, input_shape, read
from metalearn.datasets.base import ClassImages, Dataset, Draw, ImageDataset, Split
from metalearn.episode import Episode, Examples
from metalearn.random import Key


class _File:
    """The arrays of one file, as tensors."""

    def __init__(self, root: str | Path, kind: Kind, channels_last: bool, fractions: Sequence[float], seed: int):
        self.request, self.channels_last = Request(str(root), kind, tuple(fractions), seed), channels_last
        self.input_shape = input_shape(headers(self.request)["x"].shape, channels_last)

    @property
    def found(self) -> Found:
        """The division of classes or tasks."""
        return find(self.request)

    def inputs(self, rows: np.ndarray) -> Tensor:
        """Of some rows, `[n, *input_shape]`: uint8 as they are, everything else float32."""
        x = read(self.request, "x")[rows]
        if self.channels_last and x.ndim == 4:
            x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        kept = torch.from_numpy(x if x.dtype == np.uint8 else x.astype(np.float32))
        return kept.reshape(len(rows), *self.input_shape)


def _ranges(classes: dict[str, np.ndarray]) -> tuple[np.ndarray, Tensor, Tensor]:
    """All rows, class by class (or task by task), and where each begins and how many it has."""
    sizes = torch.tensor([len(rows) for rows in classes.values()])
    return np.concatenate(list(classes.values())), sizes.cumsum(0) - sizes, sizes


class Arrays(ImageDataset):
    """Classes of an .npz file with the arrays `x` and `y`, as few-shot classes.

    Classes are divided by `fractions`, or by an array `split` (`train`, `val` or `test` for each row, the same for all
    rows of a class). 8-bit inputs are divided by 255, all others are taken as they are, in float32.

    Args:
        root: the file. `x` is `[n, C, H, W]`, grey pictures `[n, H, W]`, vectors `[n, D]`, or `[n]`; `y` is `[n]`,
            whole numbers or texts.
        channels_last: whether pictures are `[n, H, W, C]`.
        fractions: shares of the classes in train, val and test, in an order that `seed` and their names decide.
        **episodes: see `ImageDataset`.

    Raises:
        BadInput: if the arrays cannot be used.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        channels_last: bool = False,
        fractions: Sequence[float] = (0.64, 0.16, 0.2),
        **episodes: Any,
    ):
        super().__init__(**episodes)
        self.file = _File(root, "classification", channels_last, fractions, self.seed)
        self.input_shape = self.file.input_shape

    def data_hash(self) -> str:
        """Sixteen hex digits that name the arrays and the division of the classes."""
        return self.file.found.data_hash

    def load(self, split: Split) -> ClassImages:
        """The examples of a split, class by class."""
        classes = self.file.found.rows[split]
        rows, first, sizes = _ranges(classes)
        return ClassImages(self.file.inputs(rows), first, sizes, tuple(classes))


class TaskRows(NamedTuple):
    """The examples of one split, sorted by task.

    x: `[M, *input]`; y: float32 `[M, outputs]`; first, sizes: int64 `[tasks]`, where each task begins and how many rows
    it has; names: one a task, in that order.
    """

    x: Tensor
    y: Tensor
    first: Tensor
    sizes: Tensor
    names: tuple[str, ...]


class ArraysRegression(Dataset):
    """Tasks of an .npz file with the arrays `x`, `y` and `task`, as few-shot regression.

    A task of a meta-batch is one of the file's, and its support and query points are rows of it, drawn without
    repetition. Tasks are divided by `fractions`, or by an array `split` (`train`, `val` or `test` for each row, the
    same for all rows of a task). 8-bit inputs are divided by 255; other inputs and all targets are taken as they are,
    in float32 and in their own units.

    Args:
        root: the file. `x` as in `Arrays`; `y` is `[n]` or `[n, outputs]`; `task` is `[n]`, whole numbers or
            texts that say which rows belong together.
        channels_last: whether pictures are `[n, H, W, C]`.
        fractions: shares of the tasks in train, val and test, in an order that `seed` and their names decide.
        shot, queries: support and query points in training.
        test_shot, test_queries: the same in validation and test; None means as in training.
        seed: of the division.

    Raises:
        BadInput: if the arrays cannot be used.
    """

    kind = "regression"
    label_space = "shared"

    def __init__(
        self,
        *,
        root: str | Path,
        channels_last: bool = False,
        fractions: Sequence[float] = (0.64, 0.16, 0.2),
        shot: int = 5,
        queries: int = 5,
        test_shot: int | None = None,
        test_queries: int | None = None,
        seed: int = 0,
    ):
        self.file = _File(root, "regression", channels_last, fractions, seed)
        self.input_shape = self.file.input_shape
        self._outputs = int(np.prod(headers(self.file.request)["y"].shape[1:]))
        test = (test_shot or shot, test_queries or queries)
        self._sizes = {"train": (shot, queries), "val": test, "test": test}
        self.device = torch.device("cpu")
        self._splits: dict[str, TaskRows] = {}

    def outputs(self, split: Split) -> int:
        return self._outputs

    def data_hash(self) -> str:
        """Sixteen hex digits that name the arrays and the division of the tasks."""
        return self.file.found.data_hash

    def to(self, device: torch.device | str) -> "ArraysRegression":
        self.device = torch.device(device)
        self._splits = {s: t._replace(x=t.x.to(device), y=t.y.to(device)) for s, t in self._splits.items()}
        return self

    def split(self, split: Split) -> TaskRows:
        """The tasks of a split, read at the first call; inputs and targets lie on the data set's device."""
        if split not in self._splits:
            tasks = self.file.found.rows[split]
            rows, first, sizes = _ranges(tasks)
            x = self.file.inputs(rows).to(self.device)
            y = torch.from_numpy(read(self.file.request, "y")[rows].astype(np.float32)).reshape(len(rows), -1)
            self._splits[split] = TaskRows(x, y.to(self.device), first, sizes, tuple(tasks))
        return self._splits[split]

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        tasks = self.split(split)
        which = key.sub("tasks").integers(1, step, task, size=len(tasks.names))[..., 0]
        rows = key.sub("rows").choice(sum(self._sizes[split]), step, task, size=tasks.sizes[which])
        return {"task_ids": which, "rows": rows + tasks.first[which][..., None]}

    def fetch(self, split: Split, draw: Draw) -> Episode:
        shot, tasks, rows = self._sizes[split][0], self.split(split), draw["rows"].to(self.device)

        def examples(part: Tensor) -> Examples:
            x = tasks.x[part]
            return Examples(x.float().div_(255) if x.dtype == torch.uint8 else x, tasks.y[part])

        return Episode(examples(rows[:, :shot]), examples(rows[:, shot:]), {"task_ids": draw["task_ids"]})
