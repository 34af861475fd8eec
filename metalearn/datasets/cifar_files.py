"""Where the files of CIFAR-100 are, what they should hold, and where they come from; imports no torch.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009: 100 classes in 20 superclasses, 500 pictures
for training and 100 for testing each. CIFAR-FS and FC100 are the same 60,000 pictures with other splits of the classes,
so each of the containers below serves both.
"""

import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from metalearn.datasets.archives import (
    Checksum,
    Members,
    Remote,
    cached_file,
    class_lists,
    differs,
    digest,
    download,
    is_tar,
    open_members,
    remembered,
    verify_md5,
)

SUPERCLASS: dict[str, str] = {c: s for pairs in class_lists("fc100")["splits"].values() for s, c in sorted(pairs)}
"""Superclass of each of the 100 classes."""

CLASSES = tuple(sorted(SUPERCLASS))
SUPERCLASSES = tuple(sorted(set(SUPERCLASS.values())))
"""Both in the order of their names, which is that of the published numbers."""

SIDE = 32
"""Height and width of the pictures in pixels."""

PER_CLASS = (500, 100)
"""Pictures of a class in the published training and test parts; few-shot learning does not distinguish these."""

DIGESTS: dict[str, str] = class_lists("cifar100")["pictures"]
"""What names the 600 pictures of each class, whatever their order: see `cifar_pictures.canonical`."""

LICENCE = "none stated; the authors ask for a citation of Krizhevsky 2009"

OFFICIAL_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
OFFICIAL = Remote("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", 169_001_437, md5=OFFICIAL_MD5)
OFFICIAL_MEMBERS = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
"""md5 of the files in the archive."""


class Container(NamedTuple):
    """One way in which the pictures are published.

    name: `official`, `repacked`, `tree` (CIFAR-FS), `fc100` or `cifar_fs` (pickles).
    archives: names of its archive; folders: names of its unpacked tree (`.` for the place itself).
    marks: files of the tree that show that it is one; entries: regular expression for all of its own entries.
    """

    name: str
    archives: tuple[str, ...]
    folders: tuple[str, ...]
    marks: tuple[str, ...]
    entries: str


def _pickles(name: str, prefix: str, archives: tuple[str, ...], folders: tuple[str, ...]) -> Container:
    files = tuple(f"{prefix}_{split}.pickle" for split in ("train", "val", "test"))
    return Container(name, archives, (*folders, "."), files, rf"{prefix}_\w+\.pickle")


CONTAINERS = (
    Container(
        "official",
        ("cifar-100-python.tar.gz",),
        ("cifar-100-python", "."),
        ("train", "test", "meta"),
        "train|test|meta",
    ),
    Container("repacked", ("cifar100_600.zip",), ("cifar100_600", "."), ("index.json",), r"index\.json|.*\.webp"),
    Container("tree", ("cifar100.zip", "cifarfs.zip"), ("cifar100", "cifarfs", "."), ("data/apple",), "data|splits"),
    _pickles("fc100", "FC100", ("FC100.zip", "fc100.zip"), ("FC100", "fc100")),
    _pickles("cifar_fs", "CIFAR_FS", ("CIFAR-FS.zip", "cifar-fs.zip"), ("CIFAR-FS", "cifar-fs", "CIFAR_FS")),
)
"""In the order in which they are looked for."""


class Found(NamedTuple):
    """A container, the path of its archive or tree, and the folder in which that was found."""

    container: Container
    path: Path
    place: Path

    def open(self) -> Members:
        """Its files."""
        return open_members(self.path, self.container.entries)


def locate(root: str | Path) -> Found | None:
    """The first container in `root` or `root/cifar100`; None if there is none."""
    for place in (Path(root).expanduser(), Path(root).expanduser() / "cifar100"):
        for container in CONTAINERS:
            for path in (place / name for name in container.archives):
                if zipfile.is_zipfile(path) or is_tar(path):
                    return Found(container, path, place)
            for tree in (place / name for name in container.folders):
                if tree.is_dir() and all((tree / mark).exists() for mark in container.marks):
                    return Found(container, tree, place)
    return None


def check(root: str | Path) -> Found:
    """The container.

    Raises:
        FileNotFoundError: says what was expected, its address, size and licence, and the keys that help.
    """
    found = locate(root)
    if found is None:
        archive, tree = (Path(root).expanduser() / name for name in ("cifar-100-python.tar.gz", "cifar-100-python"))
        state = f" (there is a file of {archive.stat().st_size} bytes, not an archive)" if archive.is_file() else ""
        others = ", ".join(" or ".join(c.archives) for c in CONTAINERS[1:])
        raise FileNotFoundError(
            f"CIFAR-100 is not there: expected {archive} or the folder {tree}{state}, from {OFFICIAL.url} "
            f"({OFFICIAL.size} bytes); or {others}, or one of these unpacked. Licence: {LICENCE}. "
            "Set dataset.root to the folder that holds it, or dataset.download=true to fetch the first"
        )
    return found


def prepare(root: str | Path, *, download: bool, checksum: Checksum) -> None:
    """Make sure that the files are there (fetched first if `download`) and are those that `checksum` asks for.

    Raises:
        FileNotFoundError, ValueError, DownloadError: as `check`, `verify` and `archives.download`.
    """
    if download:
        fetch(root)
    verify(check(root), checksum)


def fetch(root: str | Path) -> None:
    """Download the official archive into `root` unless there is a container."""
    if locate(root) is None:
        download(
            OFFICIAL.url, Path(root).expanduser() / CONTAINERS[0].archives[0], size=OFFICIAL.size, md5=OFFICIAL.md5
        )


def verify(found: Found, policy: Checksum) -> None:
    """Compare the files with the published ones by md5, and pictures in other containers with the published pictures.

    Raises:
        ValueError: if `policy` is `error` and they differ; whatever the policy, if pictures are not complete.
    """
    if policy == "off":
        return
    if found.container.name != "official":
        if (value := content(found)) != content_of(DIGESTS):
            differs(f"{found.path} does not hold the pictures of CIFAR-100 as published, bit by bit ({value})", policy)
    elif found.path.is_file():
        verify_md5("the official CIFAR-100 archive", {found.path: OFFICIAL_MD5}, policy)
    else:
        official = {found.path / name: md5 for name, md5 in OFFICIAL_MEMBERS.items()}
        verify_md5("the official CIFAR-100 files", official, policy)


def content_of(digests: dict[str, str]) -> str:
    """Sixteen hex digits that name all pictures, from those of the classes."""
    return digest(["cifar100", sorted(digests.items())])


def content(found: Found) -> str:
    """Sixteen hex digits that name the pictures and their classes, equal for all containers and orders.

    The first call for a container decodes it (seconds) and keeps both the digits and the decoded pictures.

    Raises:
        ValueError: if pictures or classes are missing, or a file cannot be read.
    """
    with found.open() as source:

        def compute() -> str:
            from metalearn.datasets.cifar_pictures import decode, write

            decoded, digests = decode(found, source)
            value = content_of(digests)
            cached_file(file_name(value), found.place, lambda file: write(file, decoded))
            return value

        return remembered(["cifar100", found.container.name, source.stamp()], compute)


def data_hash(root: str | Path) -> str:
    """As `content`, for what `check` finds."""
    return content(check(root))


def pictures(root: str | Path) -> Path:
    """The file with all pictures, uint8 `[100, 600, 3, 32, 32]` in .npy format, decoded at the first need.

    Classes are in the order of their names, the pictures of a class as `cifar_pictures.canonical` has them. The file
    lies beside the data, or in `cache_dir()` if that folder cannot be written.
    """
    found = check(root)
    value = content(found)
    with found.open() as source:

        def build(file: BinaryIO) -> None:
            from metalearn.datasets.cifar_pictures import decode, write

            write(file, decode(found, source)[0])

        return cached_file(file_name(value), found.place, build)


def file_name(content: str) -> str:
    """Name of the file with the decoded pictures."""
    return f"cifar100_{content}.npy"


def classes_of(name: str) -> dict[str, list[str]]:
    """The classes of each split of `cifar_fs` or `fc100`, sorted by name."""
    return {split: sorted(c for _, c in pairs) for split, pairs in class_lists(name)["splits"].items()}
