"""Compare methods over seeds, paired on the same test episodes.

usage: python scripts/compare.py docs/runs/<experiment> [--baseline maml] [--scale 100] [--digits 2] [--group line]

The folder holds <method>/seed<k>/ with result.json and episodes.parquet (scripts/curate.py). For each batch-norm mode:
mean over seeds of the runs' means, its 95 % interval over seeds (Student's t), and the difference from the baseline,
seed by seed and episode by episode, with two intervals: over tasks (each episode's difference, averaged over seeds:
1.96 standard errors) and over seeds (Student's t of the per-seed differences). Only runs on equal test episodes
(protocol.episodes_id) are paired.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from metalearn.results import Result, find
from metalearn.statistics import Paired, over_seeds, paired

Runs = Mapping[int, Result]


def load(folder: Path) -> dict[str, dict[int, Result]]:
    """Results by method and seed, as their folders are called."""
    found: dict[str, dict[int, Result]] = {}
    for result in find(folder):
        if result.folder.name.startswith("seed"):
            found.setdefault(result.folder.parent.name, {})[int(result.folder.name.removeprefix("seed"))] = result
    return found


def values(runs: Runs, bn: str, group: str | None) -> dict[int, np.ndarray]:
    """The per-episode metric of one mode by seed, diverged runs and those without the mode left out."""
    every = {s: r.values(bn=bn, group=group) for s, r in runs.items()}
    return {s: v for s, v in every.items() if len(v)}


def modes(runs: Runs) -> set[str]:
    """The batch-norm modes that runs were tested in."""
    return {name for r in runs.values() for name in r.every_episode()["bn"].unique()}


def line(
    method: str, bn: str, runs: Runs, own: dict[int, np.ndarray], pair: Paired | None, scale: float, d: int
) -> str:
    """One line of the table."""
    means = over_seeds([scale * v.mean() for v in own.values()])
    cells = [f"{means.mean:.{d}f}", f"+- {means.half:.{d}f}" if means.n > 1 else "-"]
    if pair:
        cells += [f"{scale * pair.mean:+.{d}f}", *(f"+- {scale * x:.{d}f}" for x in (pair.over_tasks, pair.over_seeds))]
    else:
        cells += ["-"] * 3
    diverged = sum(r.diverged for r in runs.values())
    note = f"{len(own)}" + (f" ({diverged} diverged)" if diverged else "")
    steps = "/".join(map(str, sorted({r.data["steps"] for r in runs.values()})))
    seconds = np.median([r.data["seconds"] for r in runs.values()])
    return f"| {method} | {bn} | {note} | " + " | ".join(cells) + f" | {steps} | {seconds:.0f} |"


def table(folder: Path, baseline: str, scale: float, digits: int, group: str | None) -> list[str]:
    """Markdown lines."""
    found = load(folder)
    if baseline not in found:
        sys.exit(f"--baseline {baseline}: must be one of {', '.join(found)}")
    lines = [
        f"| method | bn | seeds | mean | 95 % over seeds | minus {baseline} | over tasks | over seeds "
        "| meta-steps | seconds |",
        "| --- " * 10 + "|",
    ]
    for bn in sorted(set.union(*map(modes, found.values()))):
        for method, runs in found.items():
            if not (own := values(runs, bn, group)):
                continue
            ids = {r.data["protocol"]["episodes_id"] for r in (*runs.values(), *found[baseline].values())}
            alone = method == baseline or len(ids) > 1
            pair = None if alone else paired(own, values(found[baseline], bn, group))
            lines.append(line(method, bn, runs, own, pair, scale, digits))
    return lines


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--baseline", default="maml")
    p.add_argument("--scale", type=float, default=1.0, help="100 for accuracies in percent")
    p.add_argument("--digits", type=int, default=3)
    p.add_argument("--group", help="only the test episodes of this ground-truth group")
    options = p.parse_args()
    print("\n".join(table(options.folder, options.baseline, options.scale, options.digits, options.group)))
