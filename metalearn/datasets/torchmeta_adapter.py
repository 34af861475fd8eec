"""Data sets of torchmeta (Deleu et al. 2019, https://arxiv.org/abs/1909.06576): its curves, and anything of the user's.

The only file that uses torchmeta (`torchmeta_package` imports it). Its data sets draw from generators that they carry
along, so that a task depends on all that was asked for before. Here it is a pure function of (split, key, step, task):

- which task (an index into the data set) and a seed are drawn by the key;
- tables of task parameters, which torchmeta makes when they are first looked at, are made at once, from `seed`;
- before a task is taken out, `MetaDataset.seed` (and all global generators, for the user's) gets the task's own seed;
- which examples are support and which are queries is drawn by the key too, in place of torchmeta's `ClassSplitter`.

That a data set of the user's is pure in this sense is tested on a few tasks before it is used.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metalearn import factories
from metalearn.datasets import torchmeta_package
from metalearn.datasets.base import ClassImages, Dataset, Draw, ImageDataset, Split
from metalearn.datasets.torchmeta_package import data_hash
from metalearn.episode import Episode, Examples
from metalearn.random import Key, reseed, seeded
from metalearn.schema import BadInput

Pair = tuple[np.ndarray, np.ndarray]
"""Inputs and targets of some examples."""

CHECKED = 4
"""Tasks on which a data set is tested."""


class _Tasks(Dataset):
    """Tasks that are items of a torchmeta `MetaDataset`; see the module's docstring."""

    def __init__(self, sizes: dict[str, tuple[int, ...]], seed: int):
        self._sizes, self.seed = sizes, seed
        self.device = torch.device("cpu")
        self._sources: dict[str, Any] = {}

    @abstractmethod
    def make(self, split: Split) -> Any:
        """The `MetaDataset` of a split, with all tables made; called once per split."""

    def to(self, device: torch.device | str) -> _Tasks:
        self.device = torch.device(device)
        return self

    def source(self, split: Split) -> Any:
        """The `MetaDataset` of a split."""
        if split not in self._sources:
            self._sources[split] = self.make(split)
        return self._sources[split]

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        which = key.sub("tasks").integers(1, step, task, size=len(self.source(split)))[..., 0]
        return {"task_ids": which, "seeds": key.sub("seeds").words(2, step, task)}

    def fetch(self, split: Split, draw: Draw) -> Episode:
        source, parts = self.source(split), []
        with seeded(0):
            for index, (own, rows) in zip(draw["task_ids"].tolist(), draw["seeds"].tolist(), strict=True):
                task = self.take(source, index, own)
                parts.append(self.divide(split, task, np.random.RandomState(rows)))
        sx, sy, qx, qy = (torch.from_numpy(np.stack(part)).to(self.device) for part in zip(*parts, strict=True))
        return Episode(Examples(sx, sy), Examples(qx, qy), {"task_ids": draw["task_ids"]})

    def take(self, source: Any, index: int, seed: int) -> Any:
        """A task, when what it draws begins at `seed`."""
        source.seed(seed)
        return source[index]

    @abstractmethod
    def divide(self, split: Split, task: Any, rng: np.random.RandomState) -> tuple[np.ndarray, ...]:
        """Support inputs and targets, query inputs and targets of a task."""


class _Regression(_Tasks):
    """Tasks whose targets are numbers; support and queries are examples of them in random order."""

    kind = "regression"
    label_space = "shared"

    def __init__(self, shot: int, queries: int, test_shot: int | None, test_queries: int | None, seed: int):
        test = (test_shot or shot, test_queries or queries)
        super().__init__({"train": (shot, queries), "val": test, "test": test}, seed)

    def divide(self, split: Split, task: Any, rng: np.random.RandomState) -> tuple[np.ndarray, ...]:
        shot, queries = self._sizes[split]
        rows = rng.permutation(len(task))[: shot + queries]
        x, y = examples(task, rows.tolist())
        y = y.astype(np.float32).reshape(len(y), -1)
        return x[:shot], y[:shot], x[shot:], y[shot:]


def examples(task: Any, rows: Iterable[int]) -> Pair:
    """Inputs and targets of some examples: 8-bit inputs divided by 255, others as they are, in float32."""
    pairs = [task[row] for row in rows]
    return np.stack([_array(pair[0]) for pair in pairs]), np.stack([np.asarray(pair[-1]) for pair in pairs])


def _array(x: Any) -> np.ndarray:
    array = np.asarray(x)
    if hasattr(x, "getbands"):  # a picture of Pillow's
        array = array.transpose(2, 0, 1) if array.ndim == 3 else array[None]
    return (array.astype(np.float32) / np.float32(255)) if array.dtype == np.uint8 else array.astype(np.float32)


# ---- torchmeta's curves ------------------------------------------------------------------------------------------

Variant = Literal["sinusoid", "harmonic", "sinusoid_and_line"]
CURVES = {  # class, and its tables in the order in which they are drawn
    "sinusoid": ("Sinusoid", ("amplitudes", "phases")),
    "harmonic": ("Harmonic", ("domains", "frequencies", "phases", "amplitudes")),
    "sinusoid_and_line": ("SinusoidAndLine", ("is_sinusoid", "amplitudes", "phases", "slopes", "intercepts")),
}


class TorchmetaCurves(_Regression):
    """The regression tasks of `torchmeta.toy`, inputs and targets `[n, 1]`.

    Training, validation and test have tables of tasks of their own, drawn once from `seed`. Noise is on all targets,
    test queries included, as torchmeta has it (the data sets `sinusoid` and `harmonic` keep test queries clean).

    Args:
        variant: `sinusoid` (y = A sin(x - b)), `harmonic` (see `metalearn.datasets.harmonic`), or `sinusoid_and_line`
            (half of the tasks y = A sin(x - b), half y = a x + c; results are also given for each half).
        tasks: in each split; None for torchmeta's numbers: 5,000 for `harmonic`, else a million.
        noise_std: standard deviation of the noise.
        shot, queries: support and query points in training.
        test_shot, test_queries: the same in validation and test; None means as in training.
        seed: of the tables.
    """

    input_shape = (1,)

    def __init__(
        self,
        *,
        variant: Variant,
        tasks: int | None = None,
        noise_std: float = 0.0,
        shot: int = 10,
        queries: int = 10,
        test_shot: int | None = None,
        test_queries: int | None = 100,
        seed: int = 0,
    ):
        super().__init__(shot, queries, test_shot, test_queries, seed)
        self.variant, self.tasks, self.noise_std = variant, tasks, noise_std
        self.groups = ("sinusoid", "line") if variant == "sinusoid_and_line" else ()

    def outputs(self, split: Split) -> int:
        return 1

    def data_hash(self) -> str:
        return f"torchmeta {torchmeta_package.version(f'torchmeta_{self.variant}')}"

    def make(self, split: Split) -> Any:
        torchmeta_package.version(f"torchmeta_{self.variant}")
        name, tables = CURVES[self.variant]
        number = {} if self.tasks is None else {"num_tasks": self.tasks}
        curves = getattr(torchmeta_package.load().toy, name)(
            sum(self._sizes[split]), noise_std=self.noise_std or None, **number
        )
        curves.seed(Key(self.seed, f"torchmeta/{split}").integer() % 2**32)
        for table in tables:
            getattr(curves, table)
        return curves

    def fetch(self, split: Split, draw: Draw) -> Episode:
        episodes = super().fetch(split, draw)
        if self.groups:
            is_sinusoid = torch.from_numpy(self.source(split).is_sinusoid)
            episodes.latent["group"] = 1 - is_sinusoid[draw["task_ids"]].long()
        return episodes


# ---- data sets of the user's -------------------------------------------------------------------------------------


class _Factory:
    """Makes the data sets of the splits by a function of the user's, and refuses what cannot be used.

    Args:
        name: `module:function`, called with `meta_split`, the sizes of its episodes, `root` if it is not None, and the
            arguments; returns a data set of torchmeta's.
        root: folder of the data.
        arguments: further arguments.
        seed: of whatever the function draws.
    """

    def __init__(self, name: str, root: str | None, arguments: dict[str, Any] | None, seed: int):
        torchmeta_package.version("torchmeta")
        self.package = torchmeta_package.load()
        self.name, self.root, self.seed = name, root, seed
        self.arguments = (arguments or {}) | ({} if root is None else {"root": root})
        self.function = factories.load("dataset.factory", name)

    def __call__(self, split: Split, combination: bool, **sizes: int) -> Any:
        """The data set of a split; episodes are divided here, so its `ClassSplitter` is taken off."""
        seed = Key(self.seed, f"torchmeta/{split}").integer() % 2**32
        with seeded(seed):
            try:
                made = self.function(meta_split=split, **sizes, **self.arguments)
            except Exception as error:
                raise self.refusal(f"called for split '{split}' it raised {factories.describe(error)}") from error
            data = self.package.utils.data
            if not isinstance(made, data.MetaDataset):
                raise self.refusal(f"must return a MetaDataset of torchmeta's, and returns {type(made).__name__}")
            if isinstance(made, data.CombinationMetaDataset) != combination:
                better = "torchmeta_classes" if not combination else "torchmeta_tasks or torchmeta_regression"
                raise self.refusal(f"returns {type(made).__name__}, which is for dataset={better}")
            splitter = made.dataset_transform
            if splitter is not None and not isinstance(splitter, self.package.transforms.splitters.ClassSplitter_):
                raise self.refusal(
                    f"must have no dataset_transform but ClassSplitter, and has {type(splitter).__name__}; support and "
                    "queries are divided by dataset.shot and dataset.queries"
                )
            made.dataset_transform = None
            made.seed(seed)
            self._make_tables(made)
        return made

    def _make_tables(self, made: Any) -> None:
        """Look at all properties of the user's class, by name: what they draw at first sight comes from one seed."""
        base = self.package.utils.data.MetaDataset
        own = {name for cls in type(made).__mro__ if cls not in base.__mro__ for name, v in vars(cls).items()
               if isinstance(v, property)}  # fmt: skip
        for name in sorted(own):
            try:
                getattr(made, name)
            except Exception:  # a property that raises has no table
                continue

    def refusal(self, why: str) -> BadInput:
        """The error, with key and value."""
        return BadInput(f"dataset.factory={self.name}: {why}")

    def pure(self, one: Any, other: Any, split: Split, take: Callable[[Any, int, int], Any]) -> Any:
        """`one`, if some tasks that `take` takes out are the same when asked of `other` in another order.

        Raises:
            BadInput: if they are not, or cannot be had.
        """
        if not len(one):
            raise self.refusal(f"returns no tasks for split '{split}'")
        indices = sorted({i * (len(one) - 1) // (CHECKED - 1) for i in range(CHECKED)})
        with seeded(0):
            try:
                first = {i: examples(t := take(one, i, i + 1), range(len(t))) for i in indices}
                again = {i: examples(t := take(other, i, i + 1), range(len(t))) for i in reversed(indices)}
            except Exception as error:
                raise self.refusal(f"taking out tasks of split '{split}' raised {factories.describe(error)}") from error
        for i in indices:
            if not all(np.array_equal(a, b) for a, b in zip(first[i], again[i], strict=True)):
                raise self.refusal(
                    f"task {i} of split '{split}' is another when asked for in another order; make tables of task "
                    "parameters in __init__, and draw everything else from self.np_random or global generators"
                )
        return one


class _Own(_Tasks):
    """What both kinds of tasks of the user's share."""

    factory: _Factory

    def data_hash(self) -> str:
        """Names torchmeta's version, the function's file, and the contents of `root`."""
        return data_hash("torchmeta", self.factory.name, self.factory.root)

    def sizes_for_factory(self, split: Split) -> dict[str, int]:
        """What the function is told of a split's episodes."""
        names = ("way", "shot", "queries") if self.kind == "classification" else ("shot", "queries")
        return dict(zip(names, self._sizes[split], strict=True))

    def make(self, split: Split) -> Any:
        one, other = (self.factory(split, False, **self.sizes_for_factory(split)) for _ in range(2))
        return self.factory.pure(one, other, split, self.take)

    def take(self, source: Any, index: int, seed: int) -> Any:
        """A task, when what it draws, from global generators too, begins at `seed`."""
        reseed(seed)
        return super().take(source, index, seed)

    def _first(self) -> Pair:
        """The first example of the first task."""
        with seeded(0):
            x, y = examples(self.take(self.source("train"), 0, 0), [0])
        return x[0], y[0]


class TorchmetaRegression(_Own, _Regression):
    """Regression tasks of a `MetaDataset` that a function of the user's makes.

    Support and query points of a task are drawn without repetition from its examples, which the task may draw afresh
    each time (as `torchmeta.toy` does) or read from files. 8-bit inputs are divided by 255.

    Args:
        factory: `module:function`, called with `meta_split`, `shot`, `queries`, `root` if given, and the arguments.
        root: folder or archive of the data; its contents name the run, and it is handed on to the function.
        arguments: further arguments of the function.
        shot, queries: support and query points in training.
        test_shot, test_queries: the same in validation and test; None means as in training.
        seed: of what the function draws, such as tables of tasks.

    Raises:
        BadInput: for a function or data that cannot be used.
    """

    def __init__(
        self,
        *,
        factory: str,
        root: str | None = None,
        arguments: dict[str, Any] | None = None,
        shot: int = 10,
        queries: int = 10,
        test_shot: int | None = None,
        test_queries: int | None = None,
        seed: int = 0,
    ):
        super().__init__(shot, queries, test_shot, test_queries, seed)
        self.factory = _Factory(factory, root, arguments, seed)
        x, y = self._first()
        self.input_shape, self._outputs = x.shape, y.size

    def outputs(self, split: Split) -> int:
        return self._outputs

    def divide(self, split: Split, task: Any, rng: np.random.RandomState) -> tuple[np.ndarray, ...]:
        if getattr(task, "num_classes", None) is not None:
            raise self.factory.refusal("its tasks have classes; use dataset=torchmeta_tasks")
        if len(task) < sum(self._sizes[split]):
            raise self.factory.refusal(
                f"a task of split '{split}' has {len(task)} examples; must have at least shot + queries = "
                f"{sum(self._sizes[split])}"
            )
        return super().divide(split, task, rng)


class TorchmetaTasks(_Own):
    """Classification tasks of a `MetaDataset` that a function of the user's makes, with classes of their own each.

    All examples of a task are read to see their classes. These get labels in random order, and support and queries are
    drawn without repetition from the examples of each.

    Args:
        factory, root, arguments, seed: as in `TorchmetaRegression`; the function is also called with `way`.
        way, shot, queries: classes a task, support and query examples a class, in training.
        test_way, test_shot, test_queries: the same in validation and test; None means as in training.

    Raises:
        BadInput: for a function or data that cannot be used.
    """

    kind = "classification"
    label_space = "permuted"

    def __init__(
        self,
        *,
        factory: str,
        root: str | None = None,
        arguments: dict[str, Any] | None = None,
        way: int = 5,
        shot: int = 1,
        queries: int = 5,
        test_way: int | None = None,
        test_shot: int | None = None,
        test_queries: int | None = 15,
        seed: int = 0,
    ):
        test = (test_way or way, test_shot or shot, test_queries or queries)
        super().__init__({"train": (way, shot, queries), "val": test, "test": test}, seed)
        self.factory = _Factory(factory, root, arguments, seed)
        self.input_shape = self._first()[0].shape

    def outputs(self, split: Split) -> int:
        return self._sizes[split][0]

    def divide(self, split: Split, task: Any, rng: np.random.RandomState) -> tuple[np.ndarray, ...]:
        way, shot, queries = self._sizes[split]
        x, y = examples(task, range(len(task)))
        names, label, counts = np.unique(y.reshape(len(y), -1), axis=0, return_inverse=True, return_counts=True)
        if len(names) != way or counts.min() < shot + queries:
            raise self.factory.refusal(
                f"a task of split '{split}' has {len(names)} classes of at least {counts.min()} examples; must have "
                f"way = {way} classes of at least shot + queries = {shot + queries}"
            )
        label = label.reshape(-1)
        rows = np.stack([rng.permutation(np.flatnonzero(label == c))[: shot + queries] for c in rng.permutation(way)])
        labels = np.arange(way)
        support, query = rows[:, :shot].reshape(-1), rows[:, shot:].reshape(-1)
        return x[support], labels.repeat(shot), x[query], labels.repeat(queries)


class TorchmetaClasses(ImageDataset):
    """Few-shot classification over the classes of a `CombinationMetaDataset` that a function of the user's makes.

    The examples of all classes of a split are read once, when it is first used, and kept in memory: as 8-bit numbers if
    they are multiples of 1/255 (pictures after `ToTensor`), else in float32. So transforms that draw at random draw
    once for each example. Classes and examples of a task are chosen here.

    Args:
        factory, root, arguments: as in `TorchmetaTasks`.
        **episodes: see `ImageDataset`; `seed` is also that of what the function draws.

    Raises:
        BadInput: for a function or data that cannot be used.
    """

    def __init__(
        self, *, factory: str, root: str | None = None, arguments: dict[str, Any] | None = None, **episodes: Any
    ):
        super().__init__(**episodes)
        self.factory = _Factory(factory, root, arguments, self.seed)
        self.input_shape = tuple(self.split("train").images.shape[1:])

    def data_hash(self) -> str:
        """Names torchmeta's version, the function's file, and the contents of `root`."""
        return data_hash("torchmeta", self.factory.name, self.factory.root)

    def load(self, split: Split) -> ClassImages:
        """Read all examples of a split, class by class."""
        way, shot, queries = self._sizes[split]
        made = self.factory(split, True, way=way, shot=shot, queries=queries)
        if made.num_classes_per_task != way:
            raise self.factory.refusal(
                f"has num_classes_per_task={made.num_classes_per_task} for split '{split}'; must be its way, {way}"
            )
        classes, found = made.dataset, []
        with seeded(Key(self.seed, f"torchmeta/{split}/examples").integer() % 2**32):
            for index in range(len(classes)):
                try:
                    own = classes[index]
                    found.append(_compact(np.stack([_array(own[row][0]) for row in range(len(own))])))
                except Exception as error:
                    why = f"reading class {index} of split '{split}' raised {factories.describe(error)}"
                    raise self.factory.refusal(why) from error
        smallest = min(map(len, found), default=0)
        if len(found) < way or smallest < shot + queries:
            raise self.factory.refusal(
                f"has {len(found)} classes of at least {smallest} examples in split '{split}'; must have at least "
                f"way = {way} classes of shot + queries = {shot + queries}"
            )
        if any(x.is_floating_point() for x in found):
            found = [x if x.is_floating_point() else x.float() / 255 for x in found]
        sizes = torch.tensor([len(x) for x in found])
        names = tuple(str(index) for index in range(len(found)))
        return ClassImages(torch.cat(found), sizes.cumsum(0) - sizes, sizes, names)


def _compact(x: np.ndarray) -> Tensor:
    """In 8 bits, if nothing is lost."""
    if x.min() < 0 or x.max() > 1:
        return torch.from_numpy(x)
    eight = (x * np.float32(255)).round().astype(np.uint8)
    same = np.array_equal(eight.astype(np.float32) / np.float32(255), x)
    return torch.from_numpy(eight if same else x)
