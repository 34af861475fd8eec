"""Few-shot classification over a folder of one's own: one subfolder of pictures for each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metalearn.datasets.base import ClassImages, ImageDataset, Split
from metalearn.datasets.folder_files import Color, Found, Request, Resize, find
from metalearn.datasets.folder_files import Split as Division


class Folder(ImageDataset):
    """Pictures (png, jpg, webp, bmp) in class folders, as few-shot classes.

    A class is a folder that holds pictures, named by its path: `<class>/*`, or deeper as `<group>/<class>/*`. A tree
    `train|val|test/<class>/*` brings its own division. Pictures are decoded once and kept as an .npy file beside the
    folder or archive, or in `metalearn.datasets.archives.cache_dir()` if that place cannot be written.

    Args:
        root: the folder, or a zip or tar archive of it.
        size: side in pixels, to which all pictures are resized.
        color: `rgb` or `grey`.
        resize: `stretch` to a square, or `crop` to the largest square in the middle.
        invert: whether 255 - x takes the place of x (dark ink on light paper becomes bright on dark).
        split: `folders` (train, val and test), `fractions` (all classes divided anew), or `auto`: folders if the tree
            has them.
        split_file: json or csv that divides the classes instead, see `partition.from_file`.
        fractions: shares of train, val and test, in an order that `seed` and the names decide.
        **episodes: see `ImageDataset`.

    Raises:
        BadInput: if there is nothing that could be used, or a picture that cannot be read.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        size: int = 84,
        color: Color = "rgb",
        resize: Resize = "stretch",
        invert: bool = False,
        split: Division = "auto",
        split_file: str | Path | None = None,
        fractions: Sequence[float] = (0.64, 0.16, 0.2),
        **episodes: Any,
    ):
        super().__init__(**episodes)
        file = None if split_file is None else str(split_file)
        self.request = Request(str(root), size, color, resize, split, file, tuple(fractions), self.seed)
        self.invert = invert
        self.input_shape = (3 if color == "rgb" else 1, size, size)

    @property
    def found(self) -> Found:
        """The pictures and their division."""
        return find(self.request)

    def data_hash(self) -> str:
        """Sixteen hex digits that name the files and the division of the classes, wherever they lie."""
        return self.found.data_hash

    def load(self, split: Split) -> ClassImages:
        """The pictures of a split, classes in the order of their names."""
        classes = self.found.rows[split]
        rows = [row for name in classes for row in classes[name]]
        x = torch.from_numpy(np.load(self.found.pictures, mmap_mode="r")[rows])
        sizes = torch.tensor([len(classes[name]) for name in classes], dtype=torch.int64)
        return ClassImages(255 - x if self.invert else x, sizes.cumsum(0) - sizes, sizes, tuple(classes))
