"""Small files that pass for the published data sets until pictures are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_cifar
import tiny_omniglot


@contextmanager
def small_files(folder: Path) -> Iterator[dict[str, str]]:
    """The roots of data sets that are otherwise downloaded, made under a folder; they pass while the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_omniglot.pretend(patch)
        tiny_cifar.pretend(patch)
        patch.setenv("METALEARN_CACHE", str(folder / "cache"))
        cifar = str(tiny_cifar.pack(folder / "cifar", "FC100.zip"))
        omniglot = str(tiny_omniglot.archives(folder / "omniglot"))
        yield {"omniglot": omniglot, "group_omniglot": omniglot, "cifar_fs": cifar, "fc100": cifar}
