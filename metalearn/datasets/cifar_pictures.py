"""The pictures of CIFAR-100 from each of the containers in which they are published, in one order."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from metalearn.datasets import cifar_files
from metalearn.datasets.archives import Members, read_pickle, select, verify_counts
from metalearn.datasets.cifar_files import CLASSES, SIDE, SUPERCLASS, SUPERCLASSES, Found, classes_of

SPLITS = ("train", "val", "test")
ByClass = dict[str, np.ndarray]
"""Class -> its pictures, uint8 `[n, 3, 32, 32]`, in any order."""


def decode(found: Found, source: Members) -> tuple[np.ndarray, dict[str, str]]:
    """All pictures of a container.

    Returns:
        uint8 `[100, 600, 3, 32, 32]`, classes by name and their pictures in canonical order; and for each class what
        names its pictures.

    Raises:
        ValueError: if pictures or classes are missing, or a file is not what it should be.
    """
    by_class = READERS[found.container.name](source)
    count = sum(cifar_files.PER_CLASS)
    _verify(found.path, {name: len(x) for name, x in by_class.items()}, count)
    images = np.empty((len(CLASSES), count, 3, SIDE, SIDE), np.uint8)
    digests = {}
    for row, name in zip(images, CLASSES, strict=True):
        row[:], digests[name] = canonical(by_class.pop(name))
    return images, digests


def canonical(pictures: np.ndarray) -> tuple[np.ndarray, str]:
    """Pictures in an order that depends on nothing but the pictures, and sixteen hex digits that name them all.

    Containers differ in order, and some keep no names of files, so pictures are sorted by the hash of their bytes.

    Args:
        pictures: uint8 `[n, 3, 32, 32]`.
    """
    names = [hashlib.blake2b(p.tobytes(), digest_size=16).digest() for p in pictures]
    order = sorted(range(len(names)), key=names.__getitem__)
    return pictures[order], hashlib.blake2b(b"".join(names[i] for i in order), digest_size=8).hexdigest()


def write(file: BinaryIO, images: np.ndarray) -> None:
    """Write an .npy file."""
    np.save(file, images)


def _verify(path: Path | str, found: dict[str, int], count: int) -> None:
    verify_counts(Path(path), found, CLASSES, count, classes="classes of CIFAR-100", items="pictures")


def _require(condition: bool, where: object, what: str) -> None:
    if not condition:
        raise ValueError(f"{where} {what}")


def _official(source: Members) -> ByClass:
    """`train`, `test` and `meta`: rows of 3072 bytes in colour planes, with numbers of classes and superclasses."""
    files = select(source, re.compile(r"(?:^|/)(train|test|meta)$"))
    for name in {"train", "test", "meta"} - files.keys():
        raise ValueError(f"{source.path} holds no file {name!r}")
    content = {name: read_pickle(source.read(m.name), f"{source.path}: {m.name}") for name, m in files.items()}
    known = content["meta"].get("fine_label_names"), content["meta"].get("coarse_label_names")
    _require(known == (list(CLASSES), list(SUPERCLASSES)), f"{source.path}: meta", "has other names than CIFAR-100's")
    superclass = np.array([SUPERCLASSES.index(SUPERCLASS[c]) for c in CLASSES])
    parts = []
    for name, count in zip(("train", "test"), cifar_files.PER_CLASS, strict=True):
        where = f"{source.path}: {name}"
        x, y = _array(content[name], "data", (3 * SIDE**2,), where), _labels(content[name], "fine_labels", where)
        coarse = _labels(content[name], "coarse_labels", where)
        _require(len(x) == len(y) == len(coarse), where, "has another number of labels than pictures")
        _require(bool(((0 <= y) & (y < len(CLASSES))).all()), where, "has labels outside 0..99")
        _require(bool((superclass[y] == coarse).all()), where, "has classes with other superclasses than CIFAR-100's")
        _verify(where, Counter(CLASSES[i] for i in y), count)
        parts.append([x[y == i].reshape(-1, 3, SIDE, SIDE) for i in range(len(CLASSES))])
    return {c: np.concatenate(both) for c, *both in zip(CLASSES, *parts, strict=True)}


def _array(content: dict[str, Any], key: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    try:
        x = np.asarray(content[key])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where} has no array {key!r}: {error}") from None
    _require(x.dtype == np.uint8 and x.shape[1:] == shape, f"{where}: {key}", f"is {x.dtype} of shape {x.shape}")
    return x


def _labels(content: dict[str, Any], key: str, where: str) -> np.ndarray:
    y = np.asarray(content.get(key))
    _require(y.ndim == 1 and np.issubdtype(y.dtype, np.integer), f"{where}: {key}", "must be a list of whole numbers")
    return y


def _repacked(source: Members) -> ByClass:
    """A sheet of tiles for each class, losslessly compressed, and `index.json` with the lay-out."""
    files = select(source, re.compile(r"(?:^|/)(index\.json|[^/]+\.webp)$"))
    try:
        index = json.loads(source.read(files["index.json"].name))
        columns, count, superclass = index["columns"], index["per_class"], index["coarse_of_fine"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source.path}: index.json is not complete: {type(error).__name__}: {error}") from None
    where = f"{source.path}: index.json"
    _require(superclass == SUPERCLASS, where, "has other classes or superclasses than CIFAR-100's")
    _require(count % columns == 0, where, f"has {count} tiles in {columns} columns")
    rows = count // columns
    by_class = {}
    for name in CLASSES:
        if f"{name}.webp" in files:  # a missing one is counted by `decode`
            member = files[f"{name}.webp"].name
            sheet = _picture(source.read(member), (columns * SIDE, rows * SIDE), f"{source.path}: {member}")
            by_class[name] = (
                sheet.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)
            )
    return by_class


def _picture(data: bytes, size: tuple[int, int], where: str) -> np.ndarray:
    """uint8 `[height, width, 3]`."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            _require(picture.size == size, where, f"has {picture.size} pixels; expected {size}")
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{where} cannot be decoded: {error}") from None


def _tree(source: Members) -> ByClass:
    """`data/<class>/*.png`, and the lists `splits/bertinetto/*.txt`, which must be those of this package."""
    for split, member in select(source, re.compile(r"(?:^|/)splits/bertinetto/(train|val|test)\.txt$")).items():
        listed = sorted(source.read(member.name).decode("utf-8", "replace").split())
        other = ", ".join(sorted(set(listed) ^ set(classes_of("cifar_fs")[split]))[:5])
        _require(
            listed == classes_of("cifar_fs")[split], f"{source.path}: {member.name}", f"is another split ({other})"
        )
    found = select(source, re.compile(r"(?:^|/)data/([^/]+/[^/.][^/]*\.png)$"))
    by_class: dict[str, list[np.ndarray]] = {}
    for name, member in found.items():
        x = _picture(source.read(member.name), (SIDE, SIDE), f"{source.path}: {member.name}")
        by_class.setdefault(name.partition("/")[0], []).append(x.transpose(2, 0, 1))
    return {name: np.stack(x) for name, x in by_class.items()}


def _pickles(prefix: str, name: str) -> Callable[[Members], ByClass]:
    """A reader of `<prefix>_{train,val,test}.pickle`: arrays `data` `[n, 32, 32, 3]` and `labels`, no names."""

    def read(source: Members) -> ByClass:
        files = select(source, re.compile(rf"(?:^|/){prefix}_(train|val|test)\.pickle$"))
        by_class: ByClass = {}
        for split in SPLITS:
            _require(split in files, source.path, f"holds no file {prefix}_{split}.pickle")
            where = f"{source.path}: {files[split].name}"
            content = read_pickle(source.read(files[split].name), where)
            x, y = _array(content, "data", (SIDE, SIDE, 3), where), _labels(content, "labels", where)
            _require(len(x) == len(y), where, "has another number of labels than pictures")
            by_class |= dict(_named(x.transpose(0, 3, 1, 2), y, classes_of(name)[split], where))
        return by_class

    return read


def _named(x: np.ndarray, y: np.ndarray, classes: list[str], where: str) -> Iterator[tuple[str, np.ndarray]]:
    """The classes of a split: by their published numbers if these are the labels, else by their pictures."""
    numbers = {CLASSES.index(c): c for c in classes}
    by_content = {digest: c for c, digest in cifar_files.DIGESTS.items() if c in classes}
    labels = np.unique(y).tolist()
    for label in labels:
        pictures = x[y == label]
        name = numbers[label] if labels == sorted(numbers) else by_content.get(canonical(pictures)[1])
        if name is None:
            raise ValueError(
                f"{where}: labels are not the numbers of this split's classes in CIFAR-100, and the {len(pictures)} "
                f"pictures of label {label} are none of these classes"
            )
        yield name, pictures


READERS: dict[str, Callable[[Members], ByClass]] = {
    "official": _official,
    "repacked": _repacked,
    "tree": _tree,
    "fc100": _pickles("FC100", "fc100"),
    "cifar_fs": _pickles("CIFAR_FS", "cifar_fs"),
}
"""How to read each container, by its name in `cifar_files.CONTAINERS`."""
