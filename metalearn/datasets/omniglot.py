"""Omniglot: handwritten characters of 50 alphabets (Lake, Salakhutdinov & Tenenbaum, Science 2015)."""

import io
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from PIL import Image

from metalearn.datasets import omniglot_files
from metalearn.datasets.archives import cached_file, open_members, select
from metalearn.datasets.base import ClassImages, ImageDataset, Split, one_of
from metalearn.datasets.omniglot_files import DRAWINGS, PARTS, PICTURE, Checksum, Part
from metalearn.random import Key
from metalearn.schema.datasets import OMNIGLOT_CHARACTERS

Variant = Literal["vinyals", "meta_dataset", "lake", "random1200"]
Resize = Literal["area", "nearest"]

SIDE = 105
"""Pixels of the published pictures, in both directions."""


class Omniglot(ImageDataset):
    """Omniglot characters as few-shot classes, 20 drawings each, in grey levels of `[1, size, size]`.

    Nothing is fetched unless `download` is set. Pictures are decoded once and kept as an .npy file beside the data, or
    in `metalearn.datasets.archives.cache_dir()` if that folder cannot be written.

    Args:
        root: folder of `images_background.zip` and `images_evaluation.zip` or of their unpacked trees; they may also
            be in its folder `omniglot`.
        variant: which characters are in which split. `vinyals`: 1028/172/423 for training/validation/test (Vinyals et
            al. 2016, in the lists of Snell et al. 2017), alphabets shared between splits. `meta_dataset`: 883/81/659,
            25/5/20 alphabets (Triantafillou et al. 2020). `lake`: the published background and evaluation sets, with
            the validation alphabets of `meta_dataset` taken from the background; the same three splits as it turns
            out. `random1200`: 1100/100/423 drawn with `seed`; MAML and Reptile shuffle a directory listing for theirs,
            which cannot be repeated.
        rotations: whether the pictures turned by 90, 180 and 270 degrees are three further classes of each character
            (Vinyals et al.; Snell et al.); `vinyals` then has 4112/688/1692 classes.
        resize: `area`: mean over each target pixel's area, hence grey. `nearest`: one source pixel each, hence black
            and white, as MAML and Reptile have it (they ask for other filters, but Pillow ignores these on 1-bit
            pictures).
        invert: ink 255 on paper 0; otherwise paper 255 as published (Reptile).
        size: side of the pictures in pixels.
        download: whether to fetch missing archives into `root` (15 MB).
        checksum: what to do about archives that are not byte for byte the published ones. Their contents are counted
            in any case.
        **episodes: see `ImageDataset`.

    Raises:
        FileNotFoundError: if files are missing; the message says where to get them.
        ValueError: for values out of range, other archives (`checksum="error"`), or, at the first use, incomplete ones.
        metalearn.datasets.archives.DownloadError: if the download fails.
    """

    parts: Sequence[Part] = PARTS

    def __init__(
        self,
        *,
        root: str | Path,
        variant: Variant = "vinyals",
        rotations: bool = True,
        resize: Resize = "area",
        invert: bool = True,
        size: int = 28,
        download: bool = False,
        checksum: Checksum = "warn",
        **episodes: Any,
    ):
        super().__init__(**episodes)
        one_of("variant", variant, Variant)
        one_of("resize", resize, Resize)
        one_of("checksum", checksum, Checksum)
        if size < 1:
            raise ValueError(f"dataset.size = {size} must be at least 1")
        self.root, self.variant, self.rotations = root, variant, rotations
        self.resize, self.invert, self.size = resize, invert, size
        self.input_shape = (1, size, size)
        omniglot_files.prepare(root, download=download, checksum=checksum, parts=self.parts)

    def data_hash(self) -> str:
        """Sixteen hex digits that name the published pictures, whatever is made of them here."""
        return omniglot_files.data_hash(self.root, self.parts)

    def classes(self, split: Split) -> int:
        characters = dict(zip(get_args(Split), OMNIGLOT_CHARACTERS[self.variant], strict=True))
        return characters[split] * (4 if self.rotations else 1)

    def load(self, split: Split) -> ClassImages:
        """The pictures of a split, classes in the order of their names."""
        images, names = self._decoded()
        chosen = sorted(split_characters(self.variant, names, self.seed)[split])
        row = {name: i for i, name in enumerate(names)}
        by_class = images.reshape(len(names), DRAWINGS, 1, self.size, self.size)
        x = torch.from_numpy(by_class[[row[name] for name in chosen]])
        if not self.invert:
            x = 255 - x
        if self.rotations:  # of small pictures: both ways to resize commute with turning
            x = torch.stack([x.rot90(k, (-2, -1)) for k in range(4)], dim=1)
            chosen = [f"{name}/rot{90 * k:03d}" for name in chosen for k in range(4)]
        count = torch.full((len(chosen),), DRAWINGS)
        return ClassImages(x.reshape(-1, *self.input_shape), count.cumsum(0) - count, count, tuple(chosen))

    def _decoded(self) -> tuple[np.ndarray, list[str]]:
        """All pictures `[characters * 20, 1, size, size]`, mapped from a file, and the names of the characters."""
        paths = omniglot_files.check(self.root, self.parts)
        content, beside = self.data_hash(), paths[0].parent
        index = cached_file(f"omniglot_{content}.json", beside, lambda file: _write_index(file, paths))
        images = cached_file(
            f"omniglot_{content}_{self.resize}{self.size}.npy",
            beside,
            lambda file: np.save(file, decode(paths, RESIZE[self.resize], self.size)),
        )
        return np.load(images, mmap_mode="r"), json.loads(index.read_text(encoding="utf-8"))


def split_characters(variant: Variant, names: Sequence[str], seed: int) -> dict[Split, list[str]]:
    """The characters of each split; see `Omniglot` for the variants.

    Args:
        variant: name of the split.
        names: all characters, `Alphabet/characterNN`.
        seed: of `random1200`; the others do not depend on it.
    """
    if variant == "random1200":
        ordered = sorted(names)
        shuffled = [ordered[i] for i in Key(seed, "omniglot random1200").permutation(len(ordered)).tolist()]
        return {"train": shuffled[:1100], "val": shuffled[1100:1200], "test": shuffled[1200:]}
    if variant == "vinyals":
        lists = omniglot_files.split_list("vinyals")
        return {
            s: [f"{a}/character{i:02d}" for a, numbers in lists[s].items() for i in numbers] for s in get_args(Split)
        }
    alphabets = _split_alphabets(variant)
    return {s: [name for name in names if name.partition("/")[0] in alphabets[s]] for s in get_args(Split)}


def _split_alphabets(variant: Variant) -> dict[Split, set[str]]:
    lists = omniglot_files.split_list("meta_dataset")
    if variant == "meta_dataset":
        return {s: set(lists[s]) for s in get_args(Split)}
    lake, val = omniglot_files.split_list("lake"), set(lists["val"])
    return {"train": set(lake["background"]) - val, "val": val, "test": set(lake["evaluation"])}


def area(ink: np.ndarray, size: int) -> np.ndarray:
    """Share of ink in the area of each target pixel, in whole numbers, so the same on every machine.

    Args:
        ink: bool `[n, 105, 105]`.
        size: side of the result.

    Returns:
        uint8 `[n, size, size]`, 255 where all is ink.
    """
    target, source = np.arange(size + 1) * SIDE, np.arange(SIDE + 1) * size  # edges, in 1/(105 size) of the side
    right = np.minimum(target[1:, None], source[None, 1:])
    left = np.maximum(target[:-1, None], source[None, :-1])
    overlap = np.maximum(right - left, 0).astype(np.float32)  # rows sum to 105; every sum below is exact in float32
    share = (overlap @ ink.astype(np.float32) @ overlap.T).astype(np.int32)
    return ((510 * share + SIDE**2) // (2 * SIDE**2)).astype(np.uint8)


def nearest(ink: np.ndarray, size: int) -> np.ndarray:
    """The source pixel at the centre of each target pixel, as Pillow takes it.

    Args:
        ink: bool `[n, 105, 105]`.
        size: side of the result.

    Returns:
        uint8 `[n, size, size]` of 0 and 255 (ink).
    """
    rows = (2 * np.arange(size) + 1) * SIDE // (2 * size)
    return ink[:, rows[:, None], rows].astype(np.uint8) * 255


RESIZE: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"area": area, "nearest": nearest}


def decode(paths: Sequence[Path], resize: Callable[[np.ndarray, int], np.ndarray], size: int) -> np.ndarray:
    """Decode all pictures of archives or trees, sorted by character and drawer.

    Args:
        paths: archives or folders with complete characters.
        resize: `area` or `nearest`.
        size: side of the result.

    Returns:
        uint8 `[characters * 20, 1, size, size]`, ink 255.

    Raises:
        ValueError: if a picture is not 105x105 with 1 bit.
    """
    with ExitStack() as stack:
        sources = [stack.enter_context(open_members(path)) for path in paths]
        found = sorted(
            (name, s, m.name) for s, source in enumerate(sources) for name, m in select(source, PICTURE).items()
        )
        images = np.empty((len(found), 1, size, size), np.uint8)
        for start in range(0, len(found), DRAWINGS):
            character = found[start : start + DRAWINGS]
            ink = np.stack([_ink(sources[s].read(member), name) for name, s, member in character])
            images[start : start + DRAWINGS, 0] = resize(ink, size)
    return images


def _ink(png: bytes, name: str) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        if picture.size != (SIDE, SIDE) or picture.mode != "1":
            raise ValueError(
                f"{name} has {picture.size} pixels of mode {picture.mode}; expected {SIDE}x{SIDE} of mode 1"
            )
        return ~np.asarray(picture)


def _write_index(file: BinaryIO, paths: Sequence[Path]) -> None:
    names: set[str] = set()
    for path in paths:
        with open_members(path) as source:
            names |= {picture.rpartition("/")[0] for picture in select(source, PICTURE)}
    file.write(json.dumps(sorted(names)).encode())
