"""Compare methods over seeds, paired on the same test episodes.

usage: python scripts/compare.py docs/runs/<experiment> [--baseline maml] [--scale 100] [--digits 2] [--group line]

The folder holds <method>/seed<k>/ with result.json and episodes.parquet (scripts/curate.py). For each batch-norm mode:
mean over seeds of the runs' means, its 95 % interval over seeds (Student's t), and the difference from the baseline,
seed by seed and episode by episode, with two intervals: over tasks (each episode's difference, averaged over seeds:
1.96 standard errors) and over seeds (Student's t of the per-seed differences). Only runs on equal test episodes
(protocol.episodes_id) are paired.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student


def load(folder: Path) -> dict[str, dict[int, tuple[dict[str, Any], pd.DataFrame]]]:
    """Results and episodes by method and seed."""
    found: dict[str, dict[int, tuple[dict[str, Any], pd.DataFrame]]] = {}
    for path in sorted(folder.glob("*/seed*/result.json")):
        seed = int(path.parent.name.removeprefix("seed"))
        episodes = pd.read_parquet(path.parent / "episodes.parquet")
        found.setdefault(path.parent.parent.name, {})[seed] = (json.loads(path.read_text()), episodes)
    return found


def values(run: tuple[dict[str, Any], pd.DataFrame], bn: str, group: str | None) -> np.ndarray | None:
    """The per-episode metric of one mode, by episode; None where the run does not have it."""
    rows = run[1][run[1]["bn"] == bn].sort_values("episode")
    rows = rows if group is None else rows[rows["group"] == group]
    return rows["value"].to_numpy("f8") if len(rows) else None


def interval(x: np.ndarray) -> float:
    """95 % half-width of a mean over seeds; NaN for one."""
    return float(student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")


def paired(ours: dict[int, np.ndarray], base: dict[int, np.ndarray]) -> tuple[float, float, float] | None:
    """Mean difference, and its half-widths over tasks and over seeds."""
    seeds = sorted(ours.keys() & base.keys())
    if not seeds:
        return None
    difference = np.stack([ours[s] - base[s] for s in seeds])
    by_task = difference.mean(0)
    over_tasks = 1.96 * by_task.std(ddof=1) / np.sqrt(len(by_task))
    return float(difference.mean()), float(over_tasks), interval(difference.mean(1))


def table(folder: Path, baseline: str, scale: float, digits: int, group: str | None) -> list[str]:
    """Markdown lines."""
    found = load(folder)
    if baseline not in found:
        sys.exit(f"--baseline {baseline}: must be one of {', '.join(found)}")
    modes = sorted({bn for runs in found.values() for _, e in runs.values() for bn in e["bn"].unique()})
    number = f"{{:.{digits}f}}".format
    lines = [
        f"| method | bn | seeds | mean | 95 % over seeds | minus {baseline} | over tasks | over seeds "
        "| meta-steps | seconds |",
        "| --- " * 10 + "|",
    ]
    for bn in modes:
        for method, runs in found.items():
            diverged = [s for s, r in runs.items() if r[0]["status"] == "diverged"]
            own = {s: v for s, r in runs.items() if s not in diverged and (v := values(r, bn, group)) is not None}
            if not own:
                continue
            ids = {r[0]["protocol"]["episodes_id"] for r in (*runs.values(), *found[baseline].values())}
            base = {
                s: v
                for s, r in found[baseline].items()
                if r[0]["status"] == "done" and (v := values(r, bn, group)) is not None
            }
            means = scale * np.array([v.mean() for v in own.values()])
            cells = [number(means.mean()), "+- " + number(interval(means)) if len(means) > 1 else "-"]
            pair = paired(own, base) if method != baseline and len(ids) == 1 else None
            if pair:
                cells += [f"{scale * pair[0]:+.{digits}f}", *(f"+- {number(scale * x)}" for x in pair[1:])]
            else:
                cells += ["-"] * 3
            steps = sorted({r[0]["steps"] for r in runs.values()})
            seconds = np.median([r[0]["seconds"] for r in runs.values()])
            note = f"{len(own)}" + (f" ({len(diverged)} diverged)" if diverged else "")
            lines.append(
                f"| {method} | {bn} | {note} | "
                + " | ".join(cells)
                + f" | {'/'.join(map(str, steps))} | {seconds:.0f} |"
            )
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
