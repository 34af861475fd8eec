"""Which results belong to which cell of a table: never more than one of a seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from metalearn.results import Result, differing, flat, idle, matches, same, value
from metalearn.schema import BadInput
from metalearn.schema.keys import show
from metalearn.selection import Entry as Candidate
from metalearn.tables.definition import Column, Row, Table, unavailable

MOST_KEYS = 4
OF_THE_TEST = ("evaluation.seed", "evaluation.steps", "trainer.test_episodes")
"""Keys in which the seeds of one cell may differ: on which and how many episodes the same thing is measured."""


class Chosen(NamedTuple):
    """What there is for one cell of a table.

    results: by seed, diverged ones included. missing: planned runs without a result. reason: why there can be none.
    """

    results: dict[int, Result]
    missing: list[Candidate]
    reason: str | None = None

    @property
    def planned(self) -> int:
        """How many seeds there are to be."""
        return len(self.results) + len(self.missing)


def select(table: Table, candidates: Iterable[Candidate]) -> dict[tuple[int, int], Chosen]:
    """What there is for each cell of a table, by the numbers of its row and column.

    Raises:
        BadInput: if a cell has several candidates of one seed, or seeds that differ in more than the seed, naming the
            keys in which they differ.
    """
    everything = list(candidates)
    by_row = [[c for c in everything if matches(c.config, row.where)] for row in table.rows]
    return {
        (i, j): _chosen(table, row, column, [c for c in by_row[i] if matches(c.config, column.where)])
        for i, row in enumerate(table.rows)
        for j, column in enumerate(table.columns)
    }


def filled_cells(table: Table, results: Sequence[Result]) -> int:
    """How many cells of a table have at least one of the results, were they several of one seed."""
    by_row = [[r for r in results if matches(r.config, row.where)] for row in table.rows]
    return sum(any(matches(r.config, column.where) for r in mine) for mine in by_row for column in table.columns)


def _chosen(table: Table, row: Row, column: Column, candidates: list[Candidate]) -> Chosen:
    by_seed: dict[int, Candidate] = {}
    for c in candidates:
        seed = c.config["seed"]
        if seed in by_seed:
            same_seed = [o for o in candidates if o.config["seed"] == seed]
            raise BadInput(_ambiguous(f"{table.name}: {row.label}, {column.label}, seed {seed}", same_seed))
        by_seed[seed] = c
    if mixed := _mixed(candidates):
        what = f"{table.name}: {row.label}, {column.label}: its seeds"
        raise BadInput(f"{what} differ in {_choices(candidates, mixed)}")
    results = {seed: c.result for seed, c in sorted(by_seed.items()) if c.result is not None}
    missing = [c for c in candidates if c.result is None]
    if not results and missing and all(c.state == "impossible" for c in missing):
        return Chosen(results, missing, f"cannot be run here: {missing[0].error}")
    return Chosen(results, missing, None if results or missing else why_none(row, column))


def why_none(row: Row, column: Column) -> str | None:
    """The members of a cell that do not exist, as `key=value`; None if all do."""
    wanted = {**column.where, **row.where}
    lacking = [f"{k}={show(v)}" for k, v in wanted.items() if unavailable(k, v)]
    return ", ".join(lacking) or None


def _mixed(candidates: Sequence[Candidate]) -> list[str]:
    """Keys besides the seed in which the seeds of one cell differ, as far as all of them have these."""
    if len(candidates) < 2:
        return []
    first = candidates[0].config
    shared = set.intersection(*(set(flat(c.config)) for c in candidates)) - {"seed", *OF_THE_TEST}
    return [
        k
        for k in flat(first)
        if k in shared and not idle(k) and not all(same(value(c.config, k), value(first, k)) for c in candidates)
    ]


def _ambiguous(what: str, candidates: Sequence[Candidate]) -> str:
    """One line: the keys in which candidates differ, and how to choose."""
    keys = differing(candidates)
    if not keys:
        places = " and ".join(c.name for c in candidates[:2])
        return f"{what}: {len(candidates)} runs that differ in no key, {places}; name one folder with --from"
    return f"{what}: {len(candidates)} runs, which differ in {_choices(candidates, keys)}"


def _choices(candidates: Sequence[Candidate], keys: Sequence[str]) -> str:
    """Keys with the values that candidates have, and how to choose one."""
    texts = [f"{k} ({', '.join(_values(candidates, k))})" for k in keys[:MOST_KEYS]]
    more = f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else ""
    example = f"{keys[0]}={_values(candidates, keys[0])[0]}"
    return f"{', '.join(texts)}{more}; choose one, as {example}"


def _values(candidates: Sequence[Candidate], key: str) -> list[str]:
    return list(dict.fromkeys(show(value(c.config, key)) for c in candidates))
