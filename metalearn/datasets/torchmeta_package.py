"""Whether torchmeta is installed, and how it is imported without the torchvision that it was written for.

torchmeta 1.8.0 asks for torch below 1.10 and torchvision below 0.11, but runs on later ones. Of torchvision it uses a
few functions on pictures; where no usable torchvision is installed, Pillow does their work. Imports no torch.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from metalearn.datasets.archives import checksum, content_hash
from metalearn.datasets.partition import digest
from metalearn.factories import content
from metalearn.schema.keys import BadInput

INSTALL = "pip install --no-deps torchmeta==1.8.0 h5py ordered-set"
NEEDED = ("torchmeta", "h5py", "ordered_set", "tqdm", "requests")


def version(name: str) -> str:
    """Of the installed torchmeta.

    Args:
        name: of the data set, for the message.

    Raises:
        BadInput: if it or what it needs is not installed.
    """
    missing = [package for package in NEEDED if util.find_spec(package) is None]
    if missing:
        raise BadInput(
            f"dataset={name}: needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}, which make setup "
            f"installs; elsewhere: {INSTALL} (its own pins would bring an old torch)"
        )
    return metadata.version("torchmeta")


def versions(name: str) -> dict[str, str]:
    """What a result says of torchmeta, and of the torchvision that its transforms may use."""
    there = util.find_spec("torchvision") is not None
    return {"torchmeta": version(name), "torchvision": metadata.version("torchvision") if there else "not installed"}


def data_hash(name: str, factory: str, root: str | None) -> str:
    """Sixteen hex digits over torchmeta's version, the file of a function, and the contents of a folder or archive.

    Raises:
        BadInput: if one of them is not there.
    """
    source, contents = content("dataset.factory", factory), None
    if root is not None:
        try:
            contents = content_hash([Path(root).expanduser()], re.compile("^(.*)$"))
        except (FileNotFoundError, ValueError) as error:
            raise BadInput(f"dataset.root={root}: {error}") from None
    return digest(version(name), source, contents)


def load() -> ModuleType:
    """torchmeta with all that asks for torchvision, imported at the first call."""
    if "torchmeta.datasets.helpers" not in sys.modules:
        with _torchvision():
            importlib.import_module("torchmeta.datasets.helpers")
            importlib.import_module("torchmeta.toy.helpers")
    return sys.modules["torchmeta"]


@contextmanager
def _torchvision() -> Iterator[None]:
    """The names that torchmeta imports, for a block: torchvision's own, or ours.

    Ours go again with the block, so that nobody else takes them for torchvision.
    """
    before = _taken_out("torchvision")
    try:
        utils = importlib.import_module("torchvision.datasets.utils")
        for private in ("_get_confirm_token", "_save_response_content"):  # gone since; only downloads would call them
            if not hasattr(utils, private):
                setattr(utils, private, None)
        importlib.import_module("torchvision.transforms.functional")
    except (ImportError, OSError, RuntimeError):  # not there, or built for another torch
        _taken_out("torchvision")
        sys.modules.update(_stand_ins())
        try:
            yield
        finally:
            _taken_out("torchvision")
            sys.modules.update(before)
    else:
        yield


def _taken_out(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}


def _stand_ins() -> dict[str, ModuleType]:
    contents: dict[str, list[Any]] = {
        "torchvision": [],
        "torchvision.transforms": [Compose, Resize, CenterCrop, ToTensor],
        "torchvision.transforms.functional": [hflip, vflip, rotate],
        "torchvision.datasets": [],
        "torchvision.datasets.utils": [check_integrity, list_dir, download_url],
    }
    modules = {name: ModuleType(name, "Stands in for torchvision while torchmeta is imported.") for name in contents}
    for name, found in contents.items():
        vars(modules[name]).update({part.__name__: part for part in found})
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, modules[name])
    for private in ("_get_confirm_token", "_save_response_content"):
        setattr(modules["torchvision.datasets.utils"], private, None)
    return modules


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: list[Callable[[Any], Any]]):
        self.transforms = transforms

    def __call__(self, picture: Any) -> Any:
        for transform in self.transforms:
            picture = transform(picture)
        return picture


class Resize:
    """To (height, width), or the shorter side to a length."""

    def __init__(self, size: int | tuple[int, int], interpolation: int = Image.Resampling.BILINEAR):
        self.size, self.filter = size, Image.Resampling(interpolation)

    def __call__(self, picture: Image.Image) -> Image.Image:
        if isinstance(self.size, int):
            width, height = picture.size
            short = min(width, height)
            size = (int(self.size * width / short), int(self.size * height / short))
        else:
            size = (self.size[1], self.size[0])
        return picture.resize(size, self.filter)


class CenterCrop:
    """The middle square."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        left, top = (round((side - self.size) / 2) for side in picture.size)
        return picture.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    """`[C, H, W]`: 8-bit values divided by 255, in float32."""

    def __call__(self, picture: Any) -> Any:
        import torch

        array = np.array(picture)
        array = array[:, :, None] if array.ndim == 2 else array
        found = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
        return found.float() / 255 if found.dtype == torch.uint8 else found


def hflip(picture: Image.Image) -> Image.Image:
    """Left and right exchanged."""
    return ImageOps.mirror(picture)


def vflip(picture: Image.Image) -> Image.Image:
    """Top and bottom exchanged."""
    return ImageOps.flip(picture)


def rotate(
    picture: Image.Image,
    angle: float,
    resample: Any = False,
    expand: bool = False,
    center: Any = None,
    fill: Any = None,
) -> Image.Image:
    """Turned counter-clockwise by degrees."""
    return picture.rotate(angle, Image.Resampling(int(resample)), expand, center, fillcolor=fill)


def check_integrity(path: str | os.PathLike[str], md5: str | None = None) -> bool:
    """Whether there is a file, with this checksum if there is one."""
    return Path(path).is_file() and (md5 is None or checksum(Path(path), "md5") == md5)


def list_dir(root: str | os.PathLike[str], prefix: bool = False) -> list[str]:
    """Names (or paths) of the folders in a folder."""
    folders = sorted(path for path in Path(root).expanduser().iterdir() if path.is_dir())
    return [str(path) if prefix else path.name for path in folders]


def download_url(url: str, root: str, *_: Any, **__: Any) -> None:
    """Refuse: that is torchvision's.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"downloads need torchvision, which is not installed; fetch {url} to {root} by hand")
