"""What stands beside a number: how it was obtained, where not as in the paper, and from what code and data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metalearn.results import Result, has, same, value
from metalearn.schema.keys import show
from metalearn.tables.definition import Column, Row, Table

BN = {
    "batch": "bn=batch: the queries of a task are normalised together (transductive)",
    "support_plus_one": "bn=support_plus_one: normalised with the support set and one query at a time",
    "support_only": "bn=support_only: normalised with the support set alone",
    "running": "bn=running: normalised with averages from training",
    "none": "no batch norm",
}


def of_cell(table: Table, row: Row, column: Column, results: Sequence[Result]) -> list[str]:
    """The footnotes of one cell's results."""
    wanted = {**table.protocol, **column.protocol, **row.protocol}
    modes = dict.fromkeys(mode_of(r, column) for r in results)
    return [
        *_differences(wanted, results),
        *(BN.get(mode, f"bn={mode}") for mode in modes),
        *dict.fromkeys(text for r in results for text in _selection(r)),
        *(["made from a checkout with uncommitted changes"] if any(r.data["git_dirty"] for r in results) else []),
        *(["its seeds were tested on different episodes"] if len(episode_ids(results)) > 1 else []),
    ]


def mode_of(result: Result, column: Column) -> str:
    """The batch-norm mode of the number that a column shows."""
    headline: str = result.data["protocol"]["bn"]
    return headline if column.bn is None or headline == "none" else column.bn


def episode_ids(results: Iterable[Result]) -> set[str]:
    """The names of the frozen test episodes."""
    return {r.data["protocol"]["episodes_id"] for r in results}


def _differences(wanted: Mapping[str, Any], results: Sequence[Result]) -> list[str]:
    """One text for each key whose value is not the paper's; keys that a method does not have are passed over."""
    texts = []
    for key, theirs in wanted.items():
        found = [value(r.config, key) for r in results if has(r.config, key)]
        if other := list(dict.fromkeys(show(v) for v in found if not same(v, theirs))):
            texts.append(f"{key}: {', '.join(other)}; the paper: {show(theirs)}")
    return texts


def _selection(result: Result) -> list[str]:
    """Which checkpoint was tested; a study has none."""
    chosen = result.data["protocol"]["selection"]
    if chosen is None:
        return []
    by = chosen.get("by")
    return [f"the {chosen['checkpoint']} checkpoint was tested" + (f", by {by}" if by else "")]


def provenance(results: Sequence[Result]) -> list[str]:
    """What holds for all results together: several commits, versions, or data are said."""
    commits = Counter((r.data["git_commit"] or "no checkout")[:12] for r in results)
    texts = [f"results of several commits: {_counted(commits)}"] if len(commits) > 1 else []
    packages = dict.fromkeys(p for r in results for p in r.data["versions"])
    for package in packages:
        versions = Counter(r.data["versions"].get(package, "none") for r in results)
        if len(versions) > 1:
            texts.append(f"results of several versions of {package}: {_counted(versions)}")
    for dataset in dict.fromkeys(value(r.config, "dataset") for r in results):
        hashes = Counter(r.data["data_hash"] for r in results if value(r.config, "dataset") == dataset)
        if len(hashes) > 1:
            texts.append(f"results on several contents of {dataset}: data hashes {_counted(hashes)}")
    return texts


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{what} ({n})" for what, n in found.most_common())
