"""Keys of the data sets that read people's own data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from metalearn.schema.datasets import Config, Dataset, ImageDataset, size_keys
from metalearn.schema.keys import BadInput, key, show


def refuse_small(dataset: Config, sizes: dict[str, dict[str, int]], group: str, examples: str) -> None:
    """Refuse data that do not allow the episodes that are asked for.

    Args:
        dataset: the section.
        sizes: split -> name of a class or task -> number of its examples.
        group: `class` or `task`.
        examples: what they are called.

    Raises:
        BadInput: for the first split that is too small.
    """
    groups = {"class": "classes"}.get(group, f"{group}s")
    for split, counts in sizes.items():
        names = size_keys(dataset, split)
        if not counts:
            raise BadInput(f"dataset.root={dataset['root']}: no {groups} for split '{split}'")
        if "way" in names and (way := dataset[names["way"]]) > len(counts):
            all_of_them = "/".join(str(len(found)) for found in sizes.values())
            raise BadInput(
                f"dataset.{names['way']}={way}: must be <= {len(counts)}, the {groups} of split '{split}' "
                f"({all_of_them} in {'/'.join(sizes)})"
            )
        total = dataset[names["shot"]] + dataset[names["queries"]]
        small = sorted((count, name) for name, count in counts.items() if count < total)
        if small:
            more = f" ({len(small)} {groups} have too few)" if len(small) > 1 else ""
            raise BadInput(
                f"dataset.{names['shot']} + dataset.{names['queries']} = {total}: must be <= {small[0][0]}, the "
                f"{examples} of {group} '{small[0][1]}' in split '{split}'{more}; lower dataset.{names['queries']}"
            )


def fractions_key(groups: str) -> Any:
    """The key of a division by shares."""
    doc = f"shares of the {groups} in train, val and test, in an order that dataset.seed and their names decide"
    return key([0.64, 0.16, 0.2], doc, gt=0, lt=1, length=3)


def fractions_problems(dataset: Config) -> Iterator[str]:
    """Shares that are not one in all."""
    if abs(sum(dataset["fractions"]) - 1) > 1e-6:
        yield f"dataset.fractions={show(dataset['fractions'])}: must sum to 1"


@dataclass
class Folder(ImageDataset):
    """metalearn.datasets.folder.Folder."""

    target: ClassVar[str] = "metalearn.datasets.folder.Folder"

    root: str = key(
        ..., "folder with one subfolder of pictures (png, jpg, webp, bmp) a class, or its zip or tar archive"
    )
    size: int = key(84, "height and width in pixels, to which all pictures are resized", ge=8, le=1024)
    color: str = key("rgb", "three channels or one", choices=("rgb", "grey"))
    resize: str = key(
        "stretch", "how pictures become square: stretched, or the middle cropped", choices=("stretch", "crop")
    )
    invert: bool = key(False, "dark becomes bright, as for ink on paper")
    split: str = key(
        "auto",
        "division of the classes: by folders train, val and test, by fractions, or by folders if there are such",
        choices=("auto", "folders", "fractions"),
    )
    split_file: str | None = key(
        None,
        "json {train: [classes], val: ..., test: ...} or csv with columns class and split that divides them instead; "
        "classes that it does not name are left out",
        touches="none",  # data_hash says what it divides
    )
    fractions: list[float] = fractions_key("classes")

    @classmethod
    def problems(cls, dataset: Config) -> Iterator[str]:
        yield from super().problems(dataset)
        yield from fractions_problems(dataset)
        if dataset["split_file"] is not None and dataset["split"] != "auto":
            yield f"dataset.split={dataset['split']}: dataset.split_file divides the classes already; leave out one"

    @classmethod
    def side(cls, dataset: Config) -> int | None:
        return dataset["size"]

    @classmethod
    def _request(cls, dataset: Config) -> Any:
        from metalearn.datasets.folder_files import Request

        given = {name: dataset[name] for name in Request._fields}
        return Request(**given | {"fractions": tuple(dataset["fractions"])})

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        from metalearn.datasets.folder_files import prepare

        found = prepare(cls._request(dataset))
        refuse_small(dataset, found.sizes(), "class", "pictures")
        return found.data_hash

    @classmethod
    def versions(cls, dataset: Config) -> dict[str, str]:
        from metalearn.datasets.folder_files import find

        return find(cls._request(dataset)).versions()


class ArrayFile(Dataset):
    """What both kinds of tasks from an npz file share."""

    group: ClassVar[str]

    @classmethod
    def problems(cls, dataset: Config) -> Iterator[str]:
        yield from super().problems(dataset)
        yield from fractions_problems(dataset)

    @classmethod
    def _request(cls, dataset: Config) -> Any:
        from metalearn.datasets.array_files import Request

        return Request(dataset["root"], cls.kind, tuple(dataset["fractions"]), dataset["seed"])  # type: ignore[arg-type]

    @classmethod
    def side_known(cls, dataset: Config) -> bool:
        from metalearn.datasets.array_files import headers

        try:
            headers(cls._request(dataset))
        except BadInput:  # which `data_hash` will raise, if this is to be run
            return False
        return True

    @classmethod
    def side(cls, dataset: Config) -> int | None:
        from metalearn.datasets.array_files import side

        return side(cls._request(dataset), dataset["channels_last"])

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        from metalearn.datasets.array_files import prepare

        found = prepare(cls._request(dataset))
        refuse_small(dataset, found.sizes(), cls.group, "examples")
        return found.data_hash

    @classmethod
    def versions(cls, dataset: Config) -> dict[str, str]:
        from metalearn.datasets.array_files import find

        return find(cls._request(dataset)).versions()


@dataclass
class Arrays(ArrayFile, ImageDataset):
    """metalearn.datasets.arrays.Arrays."""

    target: ClassVar[str] = "metalearn.datasets.arrays.Arrays"
    group: ClassVar[str] = "class"

    root: str = key(..., "npz file with the arrays x [n, ...] and y [n], and split [n] if it divides the classes")
    channels_last: bool = key(False, "pictures in x are [n, H, W, C] instead of [n, C, H, W]")
    fractions: list[float] = fractions_key("classes")


@dataclass
class ArraysRegression(ArrayFile):
    """metalearn.datasets.arrays.ArraysRegression."""

    target: ClassVar[str] = "metalearn.datasets.arrays.ArraysRegression"
    kind: ClassVar[str] = "regression"
    group: ClassVar[str] = "task"

    root: str = key(
        ..., "npz file with the arrays x [n, ...], y [n] and task [n], and split [n] if it divides the tasks"
    )
    channels_last: bool = key(False, "pictures in x are [n, H, W, C] instead of [n, C, H, W]")
    fractions: list[float] = fractions_key("tasks")
    shot: int = key(5, "support points in training", ge=1)
    queries: int = key(5, "query points in training", ge=1)
    test_shot: int | None = key(None, "support points in validation and test; null means as in training", ge=1)
    test_queries: int | None = key(None, "query points in validation and test; null means as in training", ge=1)


@dataclass
class TorchmetaCurves(Dataset):
    """metalearn.datasets.torchmeta_adapter.TorchmetaCurves."""

    target: ClassVar[str] = "metalearn.datasets.torchmeta_adapter.TorchmetaCurves"
    kind: ClassVar[str] = "regression"

    variant: str = key(
        ..., "class of torchmeta.toy: its law of the curves", choices=("sinusoid", "harmonic", "sinusoid_and_line")
    )
    tasks: int | None = key(
        None, "tasks in each split; null for torchmeta's numbers, 5,000 (harmonic) or a million", ge=1, lt=2**31
    )
    noise_std: float = key(0.0, "standard deviation of the noise on all targets, test queries included", ge=0)
    shot: int = key(10, "support points in training", ge=1)
    queries: int = key(10, "query points in training", ge=1)
    test_shot: int | None = key(None, "support points in validation and test; null means as in training", ge=1)
    test_queries: int | None = key(100, "query points in validation and test; null means as in training", ge=1)

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        from metalearn.datasets.torchmeta_package import version

        return f"torchmeta {version(dataset['name'])}"

    @classmethod
    def versions(cls, dataset: Config) -> dict[str, str]:
        from metalearn.datasets.torchmeta_package import versions

        return versions(dataset["name"])


class TorchmetaFactory(Dataset):
    """What data sets share that a function of the user's makes from torchmeta's classes."""

    @classmethod
    def problems(cls, dataset: Config) -> Iterator[str]:
        yield from super().problems(dataset)
        for name in {"meta_split", "way", "shot", "queries", "root"} & dataset["arguments"].keys():
            value = dataset["arguments"][name]
            yield f"dataset.arguments.{name}={value}: is given anyway; leave it out (or set dataset.{name})"

    @classmethod
    def side_known(cls, dataset: Config) -> bool:
        return False

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        from metalearn.datasets.torchmeta_package import data_hash

        return data_hash(dataset["name"], dataset["factory"], dataset["root"])

    @classmethod
    def versions(cls, dataset: Config) -> dict[str, str]:
        from metalearn.datasets.torchmeta_package import versions

        return versions(dataset["name"])


def factory_key(what: str, given: str) -> Any:
    """The key of a function that makes data sets."""
    return key(..., f"module:function that makes {what}, called with meta_split, {given} and the arguments")


ROOT = "folder or archive of the data, handed on to the factory; its contents name the run"
ARGUMENTS = "further arguments of the factory, as dataset.arguments.noise=0.1"


@dataclass
class TorchmetaRegression(TorchmetaFactory):
    """metalearn.datasets.torchmeta_adapter.TorchmetaRegression."""

    target: ClassVar[str] = "metalearn.datasets.torchmeta_adapter.TorchmetaRegression"
    kind: ClassVar[str] = "regression"

    factory: str = factory_key("a MetaDataset of regression tasks", "shot, queries")
    root: str | None = key(None, ROOT)
    arguments: dict = key({}, ARGUMENTS)  # type: ignore[type-arg]
    shot: int = key(10, "support points in training", ge=1)
    queries: int = key(10, "query points in training", ge=1)
    test_shot: int | None = key(None, "support points in validation and test; null means as in training", ge=1)
    test_queries: int | None = key(None, "query points in validation and test; null means as in training", ge=1)


@dataclass
class TorchmetaTasks(TorchmetaFactory):
    """metalearn.datasets.torchmeta_adapter.TorchmetaTasks."""

    target: ClassVar[str] = "metalearn.datasets.torchmeta_adapter.TorchmetaTasks"
    kind: ClassVar[str] = "classification"

    factory: str = factory_key("a MetaDataset of classification tasks", "way, shot, queries")
    root: str | None = key(None, ROOT)
    arguments: dict = key({}, ARGUMENTS)  # type: ignore[type-arg]
    way: int = key(5, "classes of a training task (N)", ge=2)
    shot: int = key(1, "support examples a class in training (K)", ge=1)
    queries: int = key(5, "query examples a class in training", ge=1)
    test_way: int | None = key(None, "classes of a validation or test task; null means as in training", ge=2)
    test_shot: int | None = key(
        None, "support examples a class in validation and test; null means as in training", ge=1
    )
    test_queries: int | None = key(15, "query examples a class in validation and test; null means as in training", ge=1)


@dataclass
class TorchmetaClasses(TorchmetaFactory, ImageDataset):
    """metalearn.datasets.torchmeta_adapter.TorchmetaClasses."""

    target: ClassVar[str] = "metalearn.datasets.torchmeta_adapter.TorchmetaClasses"

    factory: str = factory_key("a CombinationMetaDataset", "way, shot, queries")
    root: str | None = key(None, ROOT)
    arguments: dict = key({}, ARGUMENTS)  # type: ignore[type-arg]


DATASETS = (
    Folder,
    Arrays,
    ArraysRegression,
    TorchmetaCurves,
    TorchmetaRegression,
    TorchmetaTasks,
    TorchmetaClasses,
)
