"""What a data set is: a pure map from (split, key, step, task) to an episode.

Draws (which classes, which pictures, which task parameters) are made for many meta-steps at once, because they are
tiny; `fetch` turns a draw into tensors. Nothing is decoded or rendered after loading.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from metalearn.episode import Episode, Examples
from metalearn.random import Key
from metalearn.schema import BadInput

Split = Literal["train", "val", "test"]
Draw = dict[str, Tensor]
"""What was drawn for each task: tensors whose leading axes are those of the coordinates (step, task)."""


class ClassImages(NamedTuple):
    """The pictures of one split, sorted by class.

    images: uint8 `[M, C, H, W]`, ink or brightness 0..255, divided by 255 when fetched; or float32 `[M, *input_shape]`,
        fetched as they are.
    first: int64 `[classes]`, the row of each class's first picture; sizes: int64 `[classes]`, pictures per class.
    names: one per class, in that order.
    """

    images: Tensor
    first: Tensor
    sizes: Tensor
    names: tuple[str, ...]


class Dataset(ABC):
    """A source of few-shot tasks; see the module's docstring.

    Attributes:
        kind: `classification` or `regression`; fixes the loss and the metrics.
        label_space: `shared` if slot c means the same in all training tasks, else `permuted`.
        input_shape: shape of one example.
        groups: names of the groups that tasks belong to; episodes then have `latent["group"]`, int64 `[B]`, an index
            into these names. Results are split by it, and no algorithm sees it.
    """

    kind: Literal["classification", "regression"]
    label_space: Literal["shared", "permuted"]
    input_shape: tuple[int, ...]
    groups: tuple[str, ...] = ()

    @abstractmethod
    def outputs(self, split: Split) -> int:
        """Width of the prediction: the way of that split, or the number of target values."""

    def classes(self, split: Split) -> int:
        """Number of classes of a split; `latent["class_ids"]` `[B, N]` says which of them a task's labels stand for.

        Raises:
            BadInput: if tasks do not say which classes they are made of.
        """
        raise BadInput(f"algorithm.form=global: tasks of {type(self).__name__} do not say which classes they are of")

    @abstractmethod
    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        """Draw tasks at the coordinates (step, task), int64 tensors that broadcast together."""

    @abstractmethod
    def fetch(self, split: Split, draw: Draw) -> Episode:
        """The episodes of a draw with one leading axis, on the data set's device."""

    @abstractmethod
    def data_hash(self) -> str:
        """Sixteen hex digits that name the contents (files, fonts, formulas), not their place."""

    def to(self, device: torch.device | str) -> "Dataset":
        """Keep the data on `device` from now on."""
        return self


def one_of(key: str, value: str, allowed: Any) -> None:
    """Raise a ValueError unless a key of the data set has a value of the literal type `allowed`."""
    if value not in get_args(allowed):
        raise ValueError(f"dataset.{key} = {value!r} is not one of {', '.join(get_args(allowed))}")


class ImageDataset(Dataset):
    """Few-shot classification over pictures held in memory as uint8.

    Args:
        way, shot, queries: classes a task, support and query pictures a class, in training and validation.
        test_way, test_shot, test_queries: the same for validation and test episodes; None means as in training.
        label_assignment: `mutually_exclusive`: the N classes of a task get labels 0..N-1 in random order;
            `fixed_label`: training classes are cut once into N groups, and a class from group j always has label j
            (validation and test stay mutually exclusive).
        seed: of everything the data set itself draws (splits, groups, renderings).
    """

    kind = "classification"

    def __init__(
        self,
        *,
        way: int,
        shot: int,
        queries: int,
        test_way: int | None = None,
        test_shot: int | None = None,
        test_queries: int | None = None,
        label_assignment: Literal["mutually_exclusive", "fixed_label"] = "mutually_exclusive",
        seed: int = 0,
    ):
        train = (way, shot, queries)
        test = (test_way or way, test_shot or shot, test_queries or queries)
        self._sizes: dict[str, tuple[int, int, int]] = {"train": train, "val": test, "test": test}
        given = {"way": test_way, "shot": test_shot, "queries": test_queries}
        keys = [f"dataset.test_{k}" if v else f"dataset.{k}" for k, v in given.items()]
        self._keys = {"train": [f"dataset.{k}" for k in given], "val": keys, "test": keys}  # what sets those sizes
        self.label_assignment = label_assignment
        self.label_space = "shared" if label_assignment == "fixed_label" else "permuted"
        self.seed = seed
        self.device = torch.device("cpu")
        self._splits: dict[str, ClassImages] = {}

    @abstractmethod
    def load(self, split: Split) -> ClassImages:
        """Read, render or map the pictures of a split; called once per split."""

    def to(self, device: torch.device | str) -> "ImageDataset":
        self.device = torch.device(device)
        self._splits = {s: ClassImages(c.images.to(device), *c[1:]) for s, c in self._splits.items()}
        return self

    def split(self, split: Split) -> ClassImages:
        """The pictures of a split, loaded at the first call and kept on the data set's device."""
        if split not in self._splits:
            pictures = self.load(split)
            way, shot, queries = self._sizes[split]
            smallest = int(pictures.sizes.min())
            way_key, shot_key, queries_key = self._keys[split]
            if len(pictures.names) < way:
                raise ValueError(f"{way_key} = {way} exceeds the {len(pictures.names)} classes of split '{split}'")
            if smallest < shot + queries:
                name = pictures.names[int(pictures.sizes.argmin())]
                raise ValueError(
                    f"{shot_key} + {queries_key} = {shot + queries} exceeds the {smallest} images of class "
                    f"'{name}' in split '{split}'; lower {queries_key}"
                )
            self._splits[split] = ClassImages(pictures.images.to(self.device), *pictures[1:])
        return self._splits[split]

    def outputs(self, split: Split) -> int:
        return self._sizes[split][0]

    def classes(self, split: Split) -> int:
        return len(self.split(split).names)

    def _classes(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Tensor:
        way, total = self._sizes[split][0], len(self.split(split).names)
        if split != "train" or self.label_assignment == "mutually_exclusive":
            return key.sub("classes").choice(way, step, task, size=total)
        order = Key(self.seed, "label groups").permutation(total)
        bounds = torch.arange(way + 1) * total // way  # sizes differ by at most one
        pick = key.sub("classes").integers(way, step, task, size=bounds.diff())
        return order[bounds[:-1] + pick]

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        way, shot, queries = self._sizes[split]
        pictures = self.split(split)
        classes = self._classes(split, key, step, task)
        slot = torch.arange(way)
        rows = key.sub("pictures").choice(
            shot + queries, step[..., None], task[..., None], slot, size=pictures.sizes[classes]
        )
        return {"class_ids": classes, "rows": rows + pictures.first[classes][..., None]}

    def fetch(self, split: Split, draw: Draw) -> Episode:
        way, shot, _ = self._sizes[split]
        rows, images = draw["rows"].to(self.device), self.split(split).images

        def examples(part: Tensor) -> Examples:
            x = images[part.flatten(1)]
            x = x.float().div_(255) if x.dtype == torch.uint8 else x
            y = torch.arange(way, device=self.device).repeat_interleave(part.shape[-1]).expand(len(part), -1)
            return Examples(x, y)

        return Episode(
            examples(rows[..., :shot]), examples(rows[..., shot:]), {"class_ids": draw["class_ids"].to(self.device)}
        )
