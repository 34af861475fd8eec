"""Functions of the user's own, named `module:function`: where their source lies, and how they are imported."""

from __future__ import annotations

import hashlib
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from operator import attrgetter
from pathlib import Path
from typing import Any

from metalearn.schema.keys import BadInput, nearest


def parts(key: str, factory: str) -> tuple[str, str]:
    """Module and function of `module:function`.

    Raises:
        BadInput: if it is not of that form.
    """
    module, _, function = factory.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *function.split("."))):
        raise BadInput(f"{key}={factory}: must be module:function, as my_package.nets:make_net")
    return module, function


def content(key: str, factory: str) -> str:
    """Names what a function is by its file's bytes (what the file imports does not enter); imports nothing."""
    module, function = parts(key, factory)
    path = _source(key, factory, module)
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}:{function}"


def load(key: str, factory: str) -> Callable[..., Any]:
    """The function itself; its module may lie in the working directory.

    Raises:
        BadInput: if it cannot be imported or called.
    """
    module, function = parts(key, factory)
    _source(key, factory, module)
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        namespace = importlib.import_module(module)
    except Exception as error:
        raise BadInput(f"{key}={factory}: importing {module} failed: {describe(error)}") from error
    try:
        found = attrgetter(function)(namespace)
    except AttributeError:
        raise BadInput(f"{key}={factory}: no '{function}' in {module}{nearest(function, vars(namespace))}") from None
    if not callable(found):
        raise BadInput(f"{key}={factory}: must be callable, and {function} is of type {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def describe(error: Exception) -> str:
    """One line: the error and the place in the user's code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{place}"


def _source(key: str, factory: str, module: str) -> Path:
    """The file that a module would be imported from; unlike `importlib.util.find_spec` this imports no package."""
    importlib.invalidate_caches()
    where: list[str] | None = None
    names = module.split(".")
    for i in range(len(names)):
        name = ".".join(names[: i + 1])
        spec = _find(name, where)
        if spec is None:
            known = [m.name for m in pkgutil.iter_modules(where or [os.getcwd()])]
            hint = nearest(names[i], known)
            raise BadInput(f"{key}={factory}: no module '{name}'{hint}")
        where = list(spec.submodule_search_locations or [])
    if spec is None or not spec.has_location or spec.origin is None:
        raise BadInput(f"{key}={factory}: module '{module}' has no file")
    return Path(spec.origin)


def _find(name: str, where: Sequence[str] | None) -> ModuleSpec | None:
    for places in (where, [os.getcwd()]) if where is None else (where,):
        for finder in sys.meta_path:
            spec = finder.find_spec(name, places)
            if spec is not None:
                return spec
    return None
