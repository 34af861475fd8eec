"""Where the configuration and the cache lie."""

import os
from pathlib import Path


def conf_dir() -> str:
    """The folder of config.yaml: beside the package in a wheel, at the top of the repository in a checkout.

    Raises:
        FileNotFoundError: if there is none.
    """
    here = Path(__file__).resolve().parent
    checkout = (here.parent / "pyproject.toml").is_file()  # an editable install leaves a stale copy in the package
    for folder in (here.parent / "conf", here / "conf") if checkout else (here / "conf",):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise FileNotFoundError("no conf/ in the package or at the repository root")


def cache_dir() -> Path:
    """Folder for files that can be made again: the environment's METALEARN_CACHE, else `~/.cache/metalearn`."""
    return Path(os.environ.get("METALEARN_CACHE") or "~/.cache/metalearn").expanduser()
