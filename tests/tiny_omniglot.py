"""A few characters that pass for Omniglot."""

from pathlib import Path

import pytest
from test_omniglot import ALPHABETS, pack, pictures, unpack

from metalearn.datasets import omniglot_files
from metalearn.datasets.archives import Remote
from metalearn.datasets.omniglot import Omniglot
from metalearn.datasets.omniglot_files import Part


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Let the few characters of `test_omniglot` be complete."""
    parts = tuple(Part(name, alphabets, Remote("", 0, "")) for name, alphabets in ALPHABETS.items())
    patch.setattr(Omniglot, "parts", parts)
    patch.setattr(omniglot_files.data_hash, "__defaults__", (parts,))
    patch.setattr(omniglot_files.prepare, "__kwdefaults__", {"parts": parts})


def archives(folder: Path) -> Path:
    return pack(folder, {part: pictures(part) for part in ALPHABETS})


def tree(folder: Path, *, changed: bool = False) -> Path:
    """The same, unpacked; `changed` in one byte of one file."""
    contents = {part: pictures(part) for part in ALPHABETS}
    if changed:
        name = min(contents["images_background"])
        contents["images_background"][name] += b"\0"
    return unpack(folder, contents)
