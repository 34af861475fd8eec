"""Small data of somebody's own: a folder of pictures, and arrays."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(value: int, side: int) -> bytes:
    """A PNG of one grey level."""
    file = io.BytesIO()
    Image.new("L", (side, side), value % 256).save(file, "png")
    return file.getvalue()


def pictures(folder: Path, *, classes: int, count: int, side: int) -> Path:
    """`count` pictures in each of some class folders."""
    for i in range(classes):
        place = folder / f"class{i:02d}"
        place.mkdir(parents=True)
        for j in range(count):
            (place / f"{j}.png").write_bytes(picture(10 * i + j, side))
    return folder


def classes(file: Path, *, classes: int, count: int, shape: tuple[int, ...]) -> Path:
    """An npz file of `classes` classes, `count` examples each in mixed order: all entries are class + example / 100."""
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), count))
    number = np.array([(y[:i] == label).sum() for i, label in enumerate(y)])
    x = np.broadcast_to((y + number / 100).reshape(-1, *(1 for _ in shape)), (len(y), *shape))
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, x=x.astype(np.float32), y=y)
    return file


def lines(file: Path, *, tasks: int, count: int) -> Path:
    """An npz file of regression tasks y = task x, `count` rows each in mixed order."""
    rng = np.random.default_rng(0)
    task = rng.permutation(np.repeat(np.arange(tasks), count))
    x = rng.uniform(-1, 1, len(task))
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, x=x[:, None], y=task * x, task=task)
    return file
