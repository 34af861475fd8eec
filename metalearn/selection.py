"""What a command line asks for and what there is of it: cells with their results, or results of a folder.

Imports no torch. `metalearn figure` and `metalearn report` start from `select`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metalearn import results
from metalearn.cells import Cell, chosen, expand
from metalearn.ledger import CellDir
from metalearn.results import Result
from metalearn.schema import BadInput, nearest
from metalearn.schema.keys import show
from metalearn.sweep.standing import Standing, standings

Config = dict[str, Any]
NOT_NAMED = ("experiment", "dataset_algorithm", "output_dir")


class Entry(NamedTuple):
    """One cell that was asked for, or one result that was found.

    state: one of `metalearn.sweep.standing.STATES`. result: of a done or diverged one. error: why it failed, diverged
    or cannot be run here. overrides: the cell's, in Hydra's syntax; none for a result that was only found. name: what
    tells it apart in a list: its overrides without those that all cells share, or its folder.
    """

    config: Config
    cell_id: str
    state: str
    result: Result | None
    error: str | None
    overrides: tuple[str, ...]
    name: str = ""


def select(overrides: Sequence[str], config_dirs: Sequence[str] = (), place: str | Path | None = None) -> list[Entry]:
    """The cells that a command line means, each with its result or the reason why there is none.

    Args:
        overrides: as after `metalearn -m`.
        config_dirs: further folders with groups.
        place: where results lie; None for each cell's `output_dir`. With a place, and without `experiment=`, the
            overrides only choose among the results there (several values of one key mean any of them).

    Raises:
        BadInput: for what cannot be, and if nothing in `place` has the wanted values.
    """
    if place is not None and not any(o.startswith("experiment=") for o in overrides):
        return _filtered(results.find(place), chosen(overrides), place)
    cells = expand(overrides, config_dirs, tolerant=True)
    found = _Found(place)
    own = [found.of(cell) for cell in cells]
    unfinished = [cell for cell, result in zip(cells, own, strict=True) if result is None]
    standing = iter(standings(unfinished) if place is None else [Standing(cell, "missing") for cell in unfinished])
    return _with_names(
        [
            _unfinished(next(standing)) if result is None else _finished(result, cell.overrides)
            for cell, result in zip(cells, own, strict=True)
        ]
    )


class _Found:
    """The results of cells: by their ids, or by equal configurations where an id is not known (the data are not here).

    Args:
        place: the folder to look in; None for each cell's own.
    """

    def __init__(self, place: str | Path | None):
        self.place = place
        self.read: dict[str, list[Result]] = {} if place is None else {str(place): results.find(place)}

    def of(self, cell: Cell) -> Result | None:
        if self.place is None and cell.problem is None:
            directory = CellDir(cell.config["output_dir"], cell.cell_id)
            return None if (data := directory.result) is None else Result(directory.path, data)
        folder = str(self.place or cell.config["output_dir"])
        if folder not in self.read:
            self.read[folder] = results.find(folder) if Path(folder).is_dir() else []
        named = (r for r in self.read[folder] if cell.problem is None and r.data["cell_id"] == cell.cell_id)
        return next(named, None) or next((r for r in self.read[folder] if equal(r.config, cell.config)), None)


def experiments_of(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The entries of each experiment that they are cells of, by its name."""
    out: dict[str, list[Entry]] = {}
    for e in entries:
        for override in (o for o in e.overrides if o.startswith("experiment=")):
            out.setdefault(override.partition("=")[2], []).append(e)
    return out


def _with_names(entries: list[Entry]) -> list[Entry]:
    shared = set.intersection(*(set(e.overrides) for e in entries)) if len(entries) > 1 else set()
    keys = ("seed", *dimensions(entries)) if len(entries) > 1 else None  # others only follow these
    own = [[o for o in e.overrides if o not in shared and _names(o, keys)] for e in entries]
    return [e._replace(name=" ".join(words) or e.cell_id) for e, words in zip(entries, own, strict=True)]


def _names(override: str, keys: Sequence[str] | None) -> bool:
    key = override.partition("=")[0]
    return key not in NOT_NAMED and (keys is None or key in keys)


def _filtered(found: list[Result], wanted: Mapping[str, list[Any]], place: str | Path) -> list[Entry]:
    for key in wanted:
        if found and all(results.value(r.config, key) is None for r in found):
            keys = dict.fromkeys(k for r in found for k in (*results.flat(r.config), *r.config))
            raise BadInput(f"{key}: no result in {place} has this key{nearest(key, keys)}")
    kept = [r for r in found if all(_any(results.value(r.config, k), vs) for k, vs in wanted.items())]
    if not kept:
        says = " ".join(f"{k}={','.join(map(show, vs))}" for k, vs in wanted.items())
        raise BadInput(f"{place}: {f'none of its {len(found)} results has {says}' if found else 'no results there'}")
    return [_finished(r, ()) for r in kept]


def _any(value: Any, wanted: Sequence[Any]) -> bool:
    return any(results.same(value, w) for w in wanted)


def _finished(result: Result, overrides: tuple[str, ...]) -> Entry:
    data = result.data
    name = str(result.folder)
    return Entry(result.config, data["cell_id"], data["status"], result, data.get("error"), overrides, name)


def _unfinished(standing: Standing) -> Entry:
    cell = standing.cell
    return Entry(cell.config, cell.cell_id, standing.state, None, standing.why or None, cell.overrides)


def equal(one: Config, other: Config) -> bool:
    """Whether two configurations mean the same numbers, as far as both have a key; where data lie does not count."""
    if one["seed"] != other["seed"]:
        return False
    a, b = results.flat(one), results.flat(other)
    return all(results.same(a[k], b[k]) for k in a.keys() & b.keys() if not results.idle(k))


def telling(found: Sequence[results.Configured]) -> list[str]:
    """What tells configurations apart, besides the seed: groups whose members differ, then keys of the others."""
    keys = [k for k in results.differing(found) if k != "seed"]
    groups = dict.fromkeys(k.partition(".")[0] for k in keys if "." in k)
    groups = dict.fromkeys(g for g in groups if len({_member(r.config, g) for r in found}) > 1)
    return [*groups, *(k for k in keys if k.partition(".")[0] not in groups)]


def _member(config: Config, group: str) -> str | None:
    name = results.value(config, group)
    return name if isinstance(name, str) else None  # a group with one schema has no name


def dimensions(entries: Sequence[Entry]) -> list[str]:
    """Keys that tell all settings apart, besides the seed: the algorithm, what was swept on purpose, then the rest."""
    named = {o.partition("=")[0] for e in entries for o in e.overrides}
    kept: list[str] = []
    while True:
        left = [k for own in settings_of(entries, kept).values() for k in telling(own) if k not in kept]
        if not left:
            return kept
        kept.append(min(left, key=lambda k: (k != "algorithm", k not in named)))


def settings_of(entries: Sequence[Entry], keys: Sequence[str]) -> dict[tuple[str, ...], list[Entry]]:
    """The entries by their values of these keys, as they are written on the command line."""
    out: dict[tuple[str, ...], list[Entry]] = {}
    for e in entries:
        out.setdefault(tuple(show(results.value(e.config, k)) for k in keys), []).append(e)
    return out
