"""CIFAR-100 with six random pictures a class instead of 600, in every published container."""

import io
import json
import pickle
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metalearn.datasets import cifar_files
from metalearn.datasets.archives import Remote, checksum
from metalearn.datasets.cifar_files import CLASSES, SUPERCLASS, SUPERCLASSES, classes_of
from metalearn.datasets.cifar_pictures import canonical

PER_CLASS = (4, 2)
SPLITS = ("train", "val", "test")


@cache
def pictures() -> np.ndarray:
    """uint8 `[100, 6, 3, 32, 32]`, the four of the training part first; each has a patch of its own on grey."""
    draw = np.random.default_rng(0)
    x = np.full((100, sum(PER_CLASS), 3, 32, 32), 128, np.uint8)
    x[..., 4:14, 6:20] = draw.integers(0, 256, (100, sum(PER_CLASS), 3, 10, 14))
    return x


@cache
def digests() -> dict[str, str]:
    return {name: canonical(x)[1] for name, x in zip(CLASSES, pictures(), strict=True)}


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Let six pictures a class be complete."""
    patch.setattr(cifar_files, "PER_CLASS", PER_CLASS)
    patch.setattr(cifar_files, "DIGESTS", digests())


def python2(value: object) -> bytes:
    """A pickle as Python 2 writes it at protocol 2: texts and bytes are one type, read back as Latin-1."""

    class Writer(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)

        def save_text(self, text: str | bytes) -> None:
            data = text.encode("latin1") if isinstance(text, str) else text
            short = len(data) < 256
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) if short else _long(data))
            self.write(data)
            self.memoize(text)

        def save_switch(self, value: bool) -> None:
            self.save(int(value))

        dispatch[str] = dispatch[bytes] = save_text
        dispatch[bool] = save_switch  # numpy wrote numbers then

    file = io.BytesIO()
    Writer(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def _long(data: bytes) -> bytes:
    return pickle.BINSTRING + len(data).to_bytes(4, "little")


def part(first: int, last: int, seed: int) -> dict:
    """`train` or `test` of the official archive: pictures first..last-1 of each class, in random order."""
    x, draw = pictures()[:, first:last], np.random.default_rng(seed)
    order = draw.permutation(x.shape[0] * x.shape[1])
    fine = np.arange(100).repeat(last - first)[order]
    return {
        "filenames": [f"{CLASSES[c]}_s_{i:06d}.png" for i, c in enumerate(fine)],
        "batch_label": "part 1 of 1",
        "fine_labels": fine.tolist(),
        "coarse_labels": [SUPERCLASSES.index(SUPERCLASS[CLASSES[c]]) for c in fine],
        "data": np.ascontiguousarray(x.reshape(-1, 3072)[order]),
    }


@cache
def official() -> dict[str, bytes]:
    train, total = PER_CLASS[0], sum(PER_CLASS)
    meta = {"fine_label_names": list(CLASSES), "coarse_label_names": list(SUPERCLASSES)}
    members = {"meta": meta, "test": part(train, total, 2), "train": part(0, train, 1)}
    return {f"cifar-100-python/{name}": python2(value) for name, value in members.items()} | {
        "cifar-100-python/file.txt~": b""
    }


@cache
def repacked() -> dict[str, bytes]:
    index = {"tile": [32, 32], "columns": 3, "per_class": 6, "fine": list(CLASSES), "coarse_of_fine": SUPERCLASS}
    members = {"index.json": json.dumps(index).encode()}
    for name, x in zip(CLASSES, pictures(), strict=True):
        sheet = x.reshape(2, 3, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(64, 96, 3)
        members[f"{name}.webp"] = encoded(sheet, "webp", lossless=True)
    return members


@cache
def tree() -> dict[str, bytes]:
    members = {
        f"cifar100/splits/bertinetto/{split}.txt": "\n".join(reversed(classes_of("cifar_fs")[split])).encode() + b"\n"
        for split in SPLITS
    }
    for name, x in zip(CLASSES, pictures(), strict=True):
        for i in (3, 0, 5, 1, 4, 2):
            png = encoded(x[i].transpose(1, 2, 0), "png", compress_level=1)
            members[f"cifar100/data/{name}/{name}_s_{i:06d}.png"] = png
    return members


@cache
def pickles(prefix: str, published_numbers: bool) -> dict[str, bytes]:
    """`<prefix>_{train,val,test}.pickle` with CIFAR-100's numbers as labels, or with 0, 1, ... in another order."""
    members = {}
    for number, split in enumerate(SPLITS):
        classes = classes_of("fc100" if prefix == "FC100" else "cifar_fs")[split]
        ids = np.array([CLASSES.index(name) for name in classes])
        if not published_numbers:
            ids = np.random.default_rng(number).permutation(ids)
        labels = ids if published_numbers else np.arange(len(ids))
        x = pictures()[ids][:, ::-1].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        value = {"data": np.ascontiguousarray(x), "labels": labels.repeat(sum(PER_CLASS)).tolist()}
        members[f"{prefix}_{split}.pickle"] = python2(value)
    return members


def encoded(x: np.ndarray, form: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(x)).save(file, form, **options)
    return file.getvalue()


CONTENTS = {
    "cifar-100-python.tar.gz": official,
    "cifar100_600.zip": repacked,
    "cifar100.zip": tree,
    "FC100.zip": lambda: pickles("FC100", True),
    "CIFAR-FS.zip": lambda: pickles("CIFAR_FS", False),
}
"""Archive -> its members."""

FOLDER = {"cifar100_600.zip": "cifar100_600", "FC100.zip": "FC100", "CIFAR-FS.zip": "CIFAR-FS"}
"""Into which folder archives without one of their own are unpacked."""


def pack(folder: Path, archive: str, contents: dict[str, bytes] | None = None) -> Path:
    """Write an archive; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    members = CONTENTS[archive]() if contents is None else contents
    if archive.endswith(".zip"):
        with zipfile.ZipFile(folder / archive, "w") as packed:
            for name, data in members.items():
                packed.writestr(name, data)
    else:
        with tarfile.open(folder / archive, "w:gz", compresslevel=1) as packed:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                packed.addfile(info, io.BytesIO(data))
    return folder


def unpack(folder: Path, archive: str, contents: dict[str, bytes] | None = None) -> Path:
    """Write an archive's unpacked tree; returns `folder`."""
    for name, data in (CONTENTS[archive]() if contents is None else contents).items():
        path = folder / FOLDER.get(archive, "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def publish(patch: pytest.MonkeyPatch, archive: Path, url: str = "http://127.0.0.1:9/x") -> None:
    """Let an archive, and the files in it, be the official ones."""
    import hashlib

    md5 = checksum(archive, "md5")
    patch.setattr(cifar_files, "OFFICIAL", Remote(url, archive.stat().st_size, md5=md5))
    patch.setattr(cifar_files, "OFFICIAL_MD5", md5)
    members = {name.partition("/")[2]: hashlib.md5(data).hexdigest() for name, data in official().items()}
    patch.setattr(cifar_files, "OFFICIAL_MEMBERS", {name: members[name] for name in ("train", "test", "meta")})
