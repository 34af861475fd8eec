"""Choosing results by what their configurations hold, as the command line writes it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from metalearn.cells import given_values
from metalearn.results import Result, has, matches
from metalearn.schema import BadInput, nearest

Wanted = Mapping[str, tuple[Any, ...]]
R = TypeVar("R", bound=Result)


def wanted(arguments: Sequence[str]) -> Wanted:
    """Key or group to the values that are let through: `algorithm=maml,anil` lets both.

    Raises:
        BadInput: for what is not `key=value`.
    """
    return given_values(arguments)


def keep(results: Iterable[R], wanted: Wanted) -> list[R]:
    """The results whose configurations have one of the wanted values of every key.

    Raises:
        BadInput: for a key that no result has, with the nearest that one has.
    """
    found = list(results)
    if found:
        for key in wanted:
            check_key(found, key)
    return [r for r in found if all(_any(r.config, key, values) for key, values in wanted.items())]


def check_key(results: Sequence[Result], key: str) -> None:
    """Refuse a key that the configuration of no result has.

    Raises:
        BadInput: naming the nearest key that one has.
    """
    if not any(has(r.config, key) for r in results):
        known = dict.fromkeys(k for r in results for k in keys_of(r.config))
        whole = [k for k in known if k.rpartition(".")[2] == key]
        raise BadInput(f"{key}: no result has this key" + (nearest(key, whole[:1]) or nearest(key, known)))


def keys_of(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All dotted keys of a configuration, its groups included."""
    found = []
    for k, v in config.items():
        found.append(prefix + k)
        found += keys_of(v, f"{prefix}{k}.") if isinstance(v, Mapping) else []
    return found


def _any(config: Mapping[str, Any], key: str, values: tuple[Any, ...]) -> bool:
    return any(matches(config, {key: v}) for v in values)
