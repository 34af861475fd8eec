"""Import a part of a library whose package imports more than is installed."""

# ruff: noqa: D103

from __future__ import annotations

import importlib.util
import sys
import types


def open_packages(name: str, *subpackages: str) -> None:
    """Let modules of `name` and `name.subpackage` be imported without running the packages' `__init__`."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named '{name}'")
    (root,) = spec.submodule_search_locations
    for package, folder in [(name, root), *((f"{name}.{s}", f"{root}/{s}") for s in subpackages)]:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [folder]
