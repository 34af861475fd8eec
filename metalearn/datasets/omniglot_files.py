"""Where the files of Omniglot are, what they should hold, and where they come from; imports no torch.

Lake, Salakhutdinov & Tenenbaum, "Human-level concept learning through probabilistic program induction", Science 2015;
https://github.com/brendenlake/omniglot. 1623 characters of 50 alphabets, 20 drawings each.
"""

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metalearn.datasets import archives
from metalearn.datasets.archives import Checksum, Remote, class_lists, content_hash, download, verify_md5

PICTURE = re.compile(r"(?:^|/)([^/]+/character\d\d/\d{4}_\d\d\.png)$")
"""A picture in an archive or tree, at any depth; the group is `Alphabet/characterNN/MMMM_DD.png`."""

DRAWINGS = 20
LICENCE = "MIT, Copyright (c) 2015 Brenden Lake"
_ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"


def split_list(name: str) -> dict[str, Any]:
    """A split that ships with the package: `lake`, `meta_dataset` or `vinyals` (source and commit in the file)."""
    return class_lists(f"omniglot_{name}")


class Part(NamedTuple):
    """One of the archives: its folder, how many characters each alphabet has, and where it is published."""

    name: str
    alphabets: dict[str, int]
    remote: Remote

    def characters(self) -> list[str]:
        """Names of the characters, `Alphabet/characterNN`, sorted."""
        return sorted(f"{a}/character{i:02d}" for a, n in self.alphabets.items() for i in range(1, n + 1))


PARTS = (
    Part(
        "images_background",
        split_list("lake")["background"],
        Remote(
            f"{_ADDRESS}/images_background.zip",
            9_464_212,
            sha256="ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
            md5="68d2efa1b9178cc56df9314c21c6e718",
        ),
    ),
    Part(
        "images_evaluation",
        split_list("lake")["evaluation"],
        Remote(
            f"{_ADDRESS}/images_evaluation.zip",
            6_462_886,
            sha256="1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
            md5="6b91aef0f799c5bb55b94e3f2daec811",
        ),
    ),
)


def locate(root: str | Path, part: Part) -> Path | None:
    """The archive of a part, or its unpacked tree, in `root` or `root/omniglot`; None if there is neither."""
    for folder in (Path(root).expanduser(), Path(root).expanduser() / "omniglot"):
        if zipfile.is_zipfile(folder / f"{part.name}.zip"):
            return folder / f"{part.name}.zip"
        if (folder / part.name).is_dir():
            return folder / part.name
    return None


def check(root: str | Path, parts: Sequence[Part] = PARTS) -> list[Path]:
    """The archives or trees of all parts.

    Raises:
        FileNotFoundError: one message for all that is missing: expected paths, addresses, sizes, licence, and the keys
            that help.
    """
    found = [locate(root, part) for part in parts]
    missing = [part for part, path in zip(parts, found, strict=True) if path is None]
    if missing:
        raise FileNotFoundError(_missing(Path(root).expanduser(), missing))
    return [path for path in found if path is not None]


def _missing(root: Path, parts: Sequence[Part]) -> str:
    lines = []
    for part in parts:
        archive = root / f"{part.name}.zip"
        state = f" (there is a file of {archive.stat().st_size} bytes, not a complete zip)" if archive.is_file() else ""
        origin = f"from {part.remote.url} ({part.remote.size} bytes)"
        lines.append(f"{archive} or the folder {root / part.name}{state}, {origin}")
    return (
        f"Omniglot is not complete: expected {'; and '.join(lines)}. Licence: {LICENCE}. "
        "Set dataset.root to the folder that holds these files, or dataset.download=true to fetch them there"
    )


def fetch(root: str | Path, parts: Sequence[Part] = PARTS) -> None:
    """Download the archives that are neither there nor unpacked (see `archives.download` for what it raises)."""
    for part in parts:
        if locate(root, part) is None:
            remote = part.remote
            target = Path(root).expanduser() / f"{part.name}.zip"
            download(remote.url, target, size=remote.size, sha256=remote.sha256, md5=remote.md5)


def verify_archives(paths: Iterable[Path], policy: Checksum, parts: Sequence[Part] = PARTS) -> None:
    """Compare the zip archives among `paths` with the official ones; unpacked trees have nothing to compare.

    Raises:
        ValueError: if `policy` is `error` and an archive is another one (`warn` gives one warning for all of them).
    """
    md5 = {f"{part.name}.zip": part.remote.md5 for part in parts}
    official = {path: known for path in paths if path.is_file() and (known := md5[path.name])}
    verify_md5("the official Omniglot archives", official, policy)


def verify_counts(pictures: dict[Path, list[str]], parts: Sequence[Part] = PARTS) -> None:
    """Check that each part has all its characters with 20 drawings each.

    Args:
        pictures: for each archive or tree, in the order of `parts`, its pictures `Alphabet/characterNN/MMMM_DD.png`.
        parts: what is expected.

    Raises:
        ValueError: names what is missing, incomplete or not expected.
    """
    for (path, names), part in zip(pictures.items(), parts, strict=True):
        found = Counter(name.rpartition("/")[0] for name in names)
        classes = f"characters of {part.name}"
        archives.verify_counts(path, found, part.characters(), DRAWINGS, classes=classes, items="drawings")


def data_hash(root: str | Path, parts: Sequence[Part] = PARTS) -> str:
    """Sixteen hex digits that name the pictures, whether packed or unpacked and wherever they are.

    Raises:
        FileNotFoundError: as `check`.
        ValueError: if the pictures are not complete (see `verify_counts`).
    """
    return content_hash(check(root, parts), PICTURE, lambda pictures: verify_counts(pictures, parts))


def prepare(root: str | Path, *, download: bool, checksum: Checksum, parts: Sequence[Part] = PARTS) -> None:
    """Make sure that the files are there (fetched first if `download`) and are those that `checksum` asks for.

    Raises:
        FileNotFoundError, ValueError, DownloadError: as `check`, `verify_archives` and `fetch`.
    """
    if download:
        fetch(root, parts)
    verify_archives(check(root, parts), checksum, parts)
