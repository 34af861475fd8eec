"""Small data of somebody's own: a folder of pictures."""

import io
from pathlib import Path

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
