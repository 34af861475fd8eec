"""Keys of the data sets, and what is known of them without loading anything."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from zipfile import BadZipFile

from metalearn.schema.keys import BadInput, key, show

Config = dict[str, Any]


@dataclass
class Dataset:
    """What all data sets share."""

    target: ClassVar[str]
    epoch: ClassVar[int] = 1
    kind: ClassVar[str]
    training_only: ClassVar[tuple[str, ...]] = ()
    """Keys that change no validation or test episode."""

    name: str = key("", "name in tables and logs", touches="none")
    seed: int = key(0, "seed of what the data set itself draws: splits, label groups, renderings", ge=0, lt=2**31)

    @classmethod
    def composed(cls, dataset: Config, compose: Callable[[str, str], Config]) -> Config:
        """The section with what other yaml files hold for it; `compose` reads the section of a data set (`Mixture`)."""
        return dataset

    @classmethod
    def is_known(cls, dataset: Config) -> bool:
        """Whether enough is given to tell what it is; only a run that is not to be started may lack it."""
        return True

    @classmethod
    def kind_of(cls, dataset: Config) -> str:
        """Classification or regression."""
        return cls.kind

    @classmethod
    def problems(cls, dataset: Config) -> Iterator[str]:
        """Combinations of keys that cannot be."""
        yield from ()

    @classmethod
    def side(cls, dataset: Config) -> int | None:
        """Height and width of its pictures in pixels; None if it has none."""
        return None

    @classmethod
    def side_known(cls, dataset: Config) -> bool:
        """Whether `side` can be told now; data sets that look into their files may not be able to."""
        return True

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        """Names the contents, wherever they lie."""
        raise TypeError(f"{cls.__name__} declares no data_hash")

    @classmethod
    def versions(cls, dataset: Config) -> dict[str, str]:
        """What a result says of its contents besides `data_hash`."""
        return {}


@dataclass
class ImageDataset(Dataset):
    """N-way K-shot classification of pictures; see `metalearn.datasets.base.ImageDataset`."""

    kind: ClassVar[str] = "classification"
    training_only: ClassVar[tuple[str, ...]] = ("label_assignment",)

    way: int = key(5, "classes of a training task (N)", ge=2)
    shot: int = key(1, "support pictures a class in training (K)", ge=1)
    queries: int = key(5, "query pictures a class in training", ge=1)
    test_way: int | None = key(None, "classes of a validation or test task; null means as in training", ge=2)
    test_shot: int | None = key(
        None, "support pictures a class in validation and test; null means as in training", ge=1
    )
    test_queries: int | None = key(15, "query pictures a class in validation and test; null means as in training", ge=1)
    label_assignment: str = key(
        "mutually_exclusive",
        "labels of a training task's classes: a random order, or fixed for each class (test is always random)",
        choices=("mutually_exclusive", "fixed_label"),
    )

    @classmethod
    def capacity(cls, dataset: Config) -> dict[str, tuple[int, int]] | None:
        """Classes and pictures per class of each split, where they are known beforehand."""
        return None

    @classmethod
    def problems(cls, dataset: Config) -> Iterator[str]:
        known = cls.capacity(dataset) or {}
        for split, (classes, pictures) in known.items():
            names = size_keys(dataset, split)
            way, shot, queries = (dataset[name] for name in names.values())
            if way > classes:
                yield f"dataset.{names['way']}={way}: must be <= {classes}, the classes of split '{split}'"
            if shot + queries > pictures:
                yield (
                    f"dataset.{names['shot']} + dataset.{names['queries']} = {shot + queries}: must be <= {pictures}, "
                    f"the pictures of a class in split '{split}'; lower dataset.{names['queries']}"
                )


def size_keys(dataset: Config, split: str) -> dict[str, str]:
    """Which keys set way (if it has one), shot and queries of a split."""
    prefix = "" if split == "train" else "test_"
    sizes = [k for k in ("way", "shot", "queries") if k in dataset]
    return {k: f"{prefix}{k}" if dataset[prefix + k] is not None else k for k in sizes}


@dataclass
class Glyphs(ImageDataset):
    """metalearn.datasets.glyphs.Glyphs."""

    target: ClassVar[str] = "metalearn.datasets.glyphs.Glyphs"

    drawings: int = key(20, "distorted drawings of each character", ge=2)

    @classmethod
    def capacity(cls, dataset: Config) -> dict[str, tuple[int, int]] | None:
        return {
            split: (classes, dataset["drawings"]) for split, classes in (("train", 847), ("val", 141), ("test", 292))
        }

    @classmethod
    def side(cls, dataset: Config) -> int | None:
        return 28

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        from metalearn.datasets.glyph_inventory import data_hash

        return data_hash(dataset["drawings"], dataset["seed"])

    @classmethod
    def versions(cls, dataset: Config) -> dict[str, str]:
        from metalearn.datasets.glyph_inventory import class_list_hash

        return {"class_list_hash": class_list_hash()}


OMNIGLOT_CHARACTERS = {
    "vinyals": (1028, 172, 423),
    "meta_dataset": (883, 81, 659),
    "lake": (883, 81, 659),
    "random1200": (1100, 100, 423),
}


@dataclass
class Omniglot(ImageDataset):
    """metalearn.datasets.omniglot.Omniglot."""

    target: ClassVar[str] = "metalearn.datasets.omniglot.Omniglot"

    root: str = key(..., "folder with images_background(.zip) and images_evaluation(.zip)")
    variant: str = key("vinyals", "split of the characters", choices=tuple(OMNIGLOT_CHARACTERS))
    rotations: bool = key(True, "turns by 90, 180 and 270 degrees are further classes")
    resize: str = key(
        "area",
        "antialiased grey, or nearest neighbour (0/1 pictures, as in MAML's and Reptile's code)",
        choices=("area", "nearest"),
    )
    invert: bool = key(True, "ink is 1 and paper 0")
    size: int = key(28, "height and width in pixels", ge=8, le=105)
    download: bool = key(False, "fetch missing archives from their public address", touches="none")
    checksum: str = key(
        "warn", "what a differing checksum of an archive means", choices=("warn", "error", "off"), touches="none"
    )

    @classmethod
    def capacity(cls, dataset: Config) -> dict[str, tuple[int, int]] | None:
        times = 4 if dataset["rotations"] else 1
        characters = OMNIGLOT_CHARACTERS[dataset["variant"]]
        return {split: (times * n, 20) for split, n in zip(("train", "val", "test"), characters, strict=True)}

    @classmethod
    def side(cls, dataset: Config) -> int | None:
        return dataset["size"]

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        from metalearn.datasets.archives import DownloadError
        from metalearn.datasets.omniglot_files import data_hash, prepare

        try:
            prepare(dataset["root"], download=dataset["download"], checksum=dataset["checksum"])
            return data_hash(dataset["root"])
        except (FileNotFoundError, ValueError, DownloadError, BadZipFile) as error:
            raise BadInput(str(error)) from None


@dataclass
class Appearances(ImageDataset):
    """metalearn.datasets.group_pictures.Appearances, put before another picture set."""

    groups: list[str] = key(
        ["plain", "blurred", "outlined"],
        "appearances of a task's pictures, each a group",
        choices=("plain", "blurred", "outlined"),
    )

    @classmethod
    def problems(cls, dataset: Config) -> Iterator[str]:
        yield from super().problems(dataset)
        yield from not_a_set("dataset.groups", dataset["groups"], "appearance")
        if not dataset.get("invert", True):
            yield "dataset.invert=false: must be true, because appearances are made of bright ink"

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        from metalearn.datasets.appearances import RECIPE
        from metalearn.datasets.archives import combined_hash

        return combined_hash(RECIPE, super().data_hash(dataset))


@dataclass
class GroupGlyphs(Appearances, Glyphs):
    """metalearn.datasets.group_pictures.GroupGlyphs."""

    target: ClassVar[str] = "metalearn.datasets.group_pictures.GroupGlyphs"


@dataclass
class GroupOmniglot(Appearances, Omniglot):
    """metalearn.datasets.group_pictures.GroupOmniglot."""

    target: ClassVar[str] = "metalearn.datasets.group_pictures.GroupOmniglot"


@dataclass
class CIFAR100(ImageDataset):
    """metalearn.datasets.cifar.CIFAR100, which the sets of its classes below share."""

    training_only: ClassVar[tuple[str, ...]] = (*ImageDataset.training_only, "flip")
    classes: ClassVar[tuple[int, int, int]]
    """Of training, validation and test."""
    largest: ClassVar[tuple[int, int, int]]
    """Classes that one superclass has at most in each of them."""

    root: str = key(..., "folder with cifar-100-python(.tar.gz) or another published form of the pictures")
    groups: str = key(
        "none",
        "what a task's classes are drawn from: all of the split, or one superclass",
        choices=("none", "superclass"),
    )
    flip: bool = key(False, "mirror support pictures of training tasks with probability 1/2")
    test_flip: bool = key(False, "the same for validation and test tasks (TSA-MAML's code has both)")
    normalize: bool = key(False, "subtract the channels' means and divide by their deviations over all pictures")
    download: bool = key(False, "fetch the official archive (169 MB) if nothing is there", touches="none")
    checksum: str = key(
        "warn", "what it means if files are not the published ones", choices=("warn", "error", "off"), touches="none"
    )

    @classmethod
    def capacity(cls, dataset: Config) -> dict[str, tuple[int, int]] | None:
        return {split: (n, 600) for split, n in zip(("train", "val", "test"), cls.classes, strict=True)}

    @classmethod
    def problems(cls, dataset: Config) -> Iterator[str]:
        yield from super().problems(dataset)
        if dataset["groups"] == "none":
            return
        if dataset["label_assignment"] == "fixed_label":
            yield "dataset.groups=superclass: needs dataset.label_assignment=mutually_exclusive"
        test = "way" if dataset["test_way"] is None else "test_way"
        for name, split, most in zip(("way", test, test), ("train", "val", "test"), cls.largest, strict=True):
            if dataset[name] > most:
                yield (
                    f"dataset.{name}={dataset[name]}: must be <= {most} with dataset.groups=superclass, the most "
                    f"classes that a superclass has in split '{split}'"
                )

    @classmethod
    def side(cls, dataset: Config) -> int | None:
        return 32

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        from metalearn.datasets.archives import DownloadError
        from metalearn.datasets.cifar_files import data_hash, prepare

        try:
            prepare(dataset["root"], download=dataset["download"], checksum=dataset["checksum"])
            return data_hash(dataset["root"])
        except (FileNotFoundError, ValueError, DownloadError, BadZipFile) as error:
            raise BadInput(str(error)) from None


@dataclass
class CIFARFS(CIFAR100):
    """metalearn.datasets.cifar.CIFARFS."""

    target: ClassVar[str] = "metalearn.datasets.cifar.CIFARFS"
    classes: ClassVar[tuple[int, int, int]] = (64, 16, 20)
    largest: ClassVar[tuple[int, int, int]] = (5, 2, 3)


@dataclass
class FC100(CIFAR100):
    """metalearn.datasets.cifar.FC100."""

    target: ClassVar[str] = "metalearn.datasets.cifar.FC100"
    classes: ClassVar[tuple[int, int, int]] = (60, 20, 20)
    largest: ClassVar[tuple[int, int, int]] = (5, 5, 5)


@dataclass
class Sinusoid(Dataset):
    """metalearn.datasets.sinusoid.Sinusoid."""

    target: ClassVar[str] = "metalearn.datasets.sinusoid.Sinusoid"
    kind: ClassVar[str] = "regression"

    variant: str = key(
        "finn",
        "law of the curves and noise",
        choices=("finn", "reptile", "unravel", "trlearner_offset", "trlearner_phase"),
    )
    shot: int = key(10, "support points in training", ge=1)
    queries: int = key(10, "query points in training", ge=1)
    test_shot: int | None = key(None, "support points in validation and test; null means as in training", ge=1)
    test_queries: int | None = key(100, "query points in validation and test; null means as in training", ge=1)

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        return "formula"


@dataclass
class Harmonic(Dataset):
    """metalearn.datasets.harmonic.Harmonic."""

    target: ClassVar[str] = "metalearn.datasets.harmonic.Harmonic"
    kind: ClassVar[str] = "regression"

    shot: int = key(10, "support points in training", ge=1)
    queries: int = key(10, "query points in training", ge=1)
    test_shot: int | None = key(None, "support points in validation and test; null means as in training", ge=1)
    test_queries: int | None = key(100, "query points in validation and test; null means as in training", ge=1)
    tasks: int | None = key(480, "fixed training tasks; null for fresh ones at each meta-step", ge=1, lt=2**31)
    noise_std: float = key(
        0.1,
        "standard deviation of the noise on training targets and on all support sets (test queries are clean)",
        ge=0,
    )

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        return "formula"


@dataclass
class Quadratic(Dataset):
    """metalearn.datasets.quadratic.Quadratic."""

    target: ClassVar[str] = "metalearn.datasets.quadratic.Quadratic"
    kind: ClassVar[str] = "regression"

    p: int = key(1, "dimension of the inputs", ge=1)
    sigma: float = key(0.2, "standard deviation of the noise, which is on all targets (target's units)", ge=0)
    nu: float = key(0.2, "root of p times the standard deviation of every entry of w", ge=0)
    w0: float = key(0.0, "mean of every entry of w")
    shot: int = key(10, "support points in training", ge=1)
    queries: int = key(10, "query points in training", ge=1)
    test_shot: int | None = key(None, "support points in validation and test; null means as in training", ge=1)
    test_queries: int | None = key(100, "query points in validation and test; null means as in training", ge=1)

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        return "formula"


@dataclass
class GroupRegression(Dataset):
    """metalearn.datasets.group_regression.GroupRegression."""

    target: ClassVar[str] = "metalearn.datasets.group_regression.GroupRegression"
    kind: ClassVar[str] = "regression"

    families: list[str] = key(
        ["sine", "line", "quadratic"],
        "families of curves, each a group",
        choices=("sine", "line", "quadratic", "cubic"),
    )
    noise_std: float = key(
        0.0, "standard deviation of the noise on training targets and support sets (target's units)", ge=0
    )
    shot: int = key(10, "support points in training", ge=1)
    queries: int = key(10, "query points in training", ge=1)
    test_shot: int | None = key(None, "support points in validation and test; null means as in training", ge=1)
    test_queries: int | None = key(None, "query points in validation and test; null means as in training", ge=1)

    @classmethod
    def problems(cls, dataset: Config) -> Iterator[str]:
        yield from not_a_set("dataset.families", dataset["families"], "family")

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        return "formula"


def not_a_set(path: str, names: list[str], what: str) -> Iterator[str]:
    """Why these are no choice of groups."""
    if not names or len(set(names)) < len(names):
        yield f"{path}={show(names)}: must name at least one {what}, and none twice"


CURVES = (Sinusoid, Harmonic, Quadratic, GroupRegression)
DATASETS = (Glyphs, GroupGlyphs, Omniglot, GroupOmniglot, CIFARFS, FC100, *CURVES)
