"""Pictures in class folders: finding, dividing and decoding them; imports no torch."""

import io
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from metalearn.datasets.archives import Members, cached_file, content_hash, open_members, select
from metalearn.datasets.partition import SPELLINGS, SPLITS, Names, by_fractions, described, digest, from_file
from metalearn.schema.keys import BadInput

Color = Literal["rgb", "grey"]
Resize = Literal["stretch", "crop"]
Split = Literal["auto", "folders", "fractions"]

ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp")
PICTURE = rf"((?:(?!\.|__MACOSX/)[^/]+/)*(?!\.)[^/]+\.(?i:{'|'.join(ENDINGS)}))$"
"""A picture's path, without hidden files and what macOS adds to archives."""

TOLD = 5000
"""Pictures from which decoding is announced, because it takes a while."""

CHUNK = 32
"""Files held in memory while they are decoded."""


class Request(NamedTuple):
    """Which pictures are asked for, and how; see `Folder` for the keys."""

    root: str
    size: int
    color: Color
    resize: Resize
    split: Split
    split_file: str | None
    fractions: tuple[float, ...]
    seed: int

    def refusal(self, why: object) -> BadInput:
        """The error, with key and value."""
        return BadInput(f"dataset.root={self.root}: {why}")


class Found(NamedTuple):
    """A tree of class folders, checked and decoded.

    pictures: the file of all pictures, uint8 `[M, C, size, size]`; rows: split -> class -> rows of its pictures.
    data_hash: names contents and division; how: where the division comes from.
    """

    pictures: Path
    rows: dict[str, dict[str, list[int]]]
    data_hash: str
    how: str

    def sizes(self) -> dict[str, dict[str, int]]:
        """Pictures of each class of each split."""
        return {split: {name: len(rows) for name, rows in classes.items()} for split, classes in self.rows.items()}

    def versions(self) -> dict[str, str]:
        """What a result says of it."""
        return described(self.rows, self.how)


_found: dict[Request, Found] = {}


def find(request: Request) -> Found:
    """As `prepare`, or what that returned before in this process: a run must not end badly for a folder moved away."""
    return _found[request] if request in _found else prepare(request)


def prepare(request: Request) -> Found:
    """Look through a folder or archive, divide its classes, and decode its pictures once.

    Raises:
        BadInput: if there is nothing that could be used, or a picture that cannot be read.
    """
    path = Path(request.root).expanduser()
    try:
        with open_members(path) as source:
            pattern, names = _pictures(source, request)
        content = content_hash([path], pattern)
    except (FileNotFoundError, ValueError) as error:
        raise request.refusal(error) from None
    classes, division, how = _divided(request, names)
    pictures = cached_file(
        f"folder_{content}_{request.color}{request.size}_{request.resize}.npy",
        path.resolve().parent,
        lambda file: _decode(file, path, pattern, names, request),
    )
    rows = {s: {name: classes[name] for name in division[s]} for s in SPLITS}
    _found[request] = Found(pictures, rows, digest(content, division), how)
    return _found[request]


def _pictures(source: Members, request: Request) -> tuple[re.Pattern[str], list[str]]:
    """Which members are pictures, and their paths below the folder that holds the class folders, by folder and name.

    Leading folders that all pictures share are passed over, because an archive often has one more than the tree.
    """
    paths = [found[1] for m in source.members() if (found := re.match(PICTURE, m.name))]
    if not paths:
        raise request.refusal(f"holds no pictures ({', '.join(ENDINGS)}) in class folders")
    folders = [path.split("/")[:-1] for path in paths]
    shared = 0
    while all(len(f) > shared + 1 for f in folders) and len({f[shared] for f in folders}) == 1:
        if folders[0][shared].lower() in SPELLINGS:
            break
        shared += 1
    prefix = "".join(f"{name}/" for name in folders[0][:shared])
    names = [path[len(prefix) :] for path in paths]
    for name in names:
        if "/" not in name:
            raise request.refusal(f"the picture {name} lies in no class folder")
    return re.compile("^" + re.escape(prefix) + PICTURE), sorted(names, key=lambda n: n.rpartition("/")[::2])


def _divided(request: Request, names: list[str]) -> tuple[dict[str, list[int]], Names, str]:
    """Class -> rows of its pictures, split -> its classes, and how they were divided."""
    outside = [n for n in names if n.count("/") < 2 or n.partition("/")[0].lower() not in SPELLINGS]
    if request.split_file is None and request.split != "fractions" and outside and len(outside) < len(names):
        raise request.refusal(
            f"{outside[0]} lies outside of train/<class>/, val/<class>/ and test/<class>/; move it, or say "
            "dataset.split=fractions (every folder with pictures is a class)"
        )
    if request.split == "folders" and outside:
        raise BadInput(f"dataset.split=folders: {request.root} has no train/<class>/, val/<class>/ and test/<class>/")
    classes: dict[str, list[int]] = {}
    where: dict[str, set[str]] = {s: set() for s in SPLITS}
    for row, name in enumerate(names):
        folder = name.rpartition("/")[0]
        if not outside:
            top, _, folder = folder.partition("/")
            where[SPELLINGS[top.lower()]].add(folder)
        classes.setdefault(folder, []).append(row)
    if request.split_file is not None:
        return classes, from_file("dataset.split_file", request.split_file, classes), "from dataset.split_file"
    if outside or request.split == "fractions":
        how = f"by dataset.fractions and dataset.seed={request.seed}"
        return classes, by_fractions(classes, request.fractions, request.seed), how
    _refuse_mixed(request, where)
    return classes, {s: sorted(found) for s, found in where.items()}, "as the folders have it"


def _refuse_mixed(request: Request, where: dict[str, set[str]]) -> None:
    """Folders of splits must all be there and share no class."""
    advice = "dataset.split=fractions divides all classes anew"
    for split in SPLITS:
        if not where[split]:
            raise request.refusal(f"has no pictures in {split}/<class>/; {advice}")
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        if both := sorted(where[a] & where[b]):
            listed = ", ".join(both[:5]) + (", ..." if len(both) > 5 else "")
            raise request.refusal(
                f"{len(both)} classes are in {a}/ and in {b}/ ({listed}), and few-shot learning needs other classes in "
                f"each; {advice}"
            )


def _decode(file: BinaryIO, path: Path, pattern: re.Pattern[str], names: list[str], request: Request) -> None:
    """Write the pictures of all `names`, in their order, as one array; sources are read in the order they have."""
    if len(names) >= TOLD:
        print(f"metalearn: decoding {len(names)} pictures of {request.root}, once", file=sys.stderr, flush=True)
    row = {name: i for i, name in enumerate(names)}
    shape = (3 if request.color == "rgb" else 1, request.size, request.size)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), *shape)}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
    start = file.tell()

    def decoded(name: str, data: bytes) -> np.ndarray:
        try:
            return pixels(data, request.size, request.color, request.resize)
        except Exception as error:  # whatever a decoder makes of somebody's file
            raise request.refusal(f"cannot read the picture {name}: {' '.join(str(error).split())[:200]}") from None

    with open_members(path) as source, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        members = iter(select(source, pattern).items())
        while chunk := [(name, source.read(m.name)) for name, m in islice(members, CHUNK)]:
            for (name, _), array in zip(chunk, pool.map(decoded, *zip(*chunk, strict=True)), strict=True):
                file.seek(start + row[name] * array.nbytes)
                file.write(array.tobytes())


def pixels(data: bytes, size: int, color: Color, resize: Resize) -> np.ndarray:
    """The picture in a file, uint8 `[C, size, size]`.

    It is turned as its camera noted, laid on white where it is transparent, and resized with Pillow's antialiased
    bilinear filter: `stretch` ignores the proportions, `crop` keeps the largest square in the middle.

    Raises:
        Exception: of many kinds if the file is damaged; ValueError for numbers of which none is known to be white.
    """
    with Image.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its mode {picture.mode} has no known white")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB" if color == "rgb" else "L")
    if resize == "crop":
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    elif picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(picture, np.uint8)
    return np.ascontiguousarray(array.transpose(2, 0, 1) if array.ndim == 3 else array[None])
