"""What a run says at its end beyond scores: `analysis.json`, pictures, and numbers of its result."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metalearn.evaluation.metrics import TaskMean
from metalearn.ledger import write_atomically, write_json

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Analysis(NamedTuple):
    """What an algorithm found out about its trained parameters.

    metrics: entries of `result.json` in the contract's form. data: for `analysis.json`; no NaN. figures: by file name
    without its ending.
    """

    metrics: dict[str, dict[str, Any]]
    data: dict[str, Any]
    figures: dict[str, Figure]


def write(analysis: Analysis, folder: Path) -> None:
    """`analysis.json` and `figures/<name>.png` in a cell's folder."""
    for name, figure in analysis.figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        write_atomically(folder / "figures" / f"{name}.png", buffer.getvalue())
    write_json(folder / "analysis.json", analysis.data)


def adaptation(episodes: pd.DataFrame) -> list[dict[str, Any]]:
    """Mean metric and loss, each with the half-width of its 95 % interval over tasks, after every number of steps.

    None stands for what is not finite.

    Args:
        episodes: rows of `episodes.parquet`.

    Returns:
        One record for each batch-norm mode, step and group; group None is all tasks.
    """
    records = []
    parts = [(None, episodes)]
    if episodes["group"].notna().any():
        parts += list(episodes.groupby("group", sort=True))
    for group, rows in parts:
        for (bn, step), found in rows.groupby(["bn", "step"], sort=True):
            record: dict[str, Any] = {"bn": bn, "step": int(step), "group": group, "n": len(found)}
            for name, values in (("metric", found["value"]), ("loss", found["loss"])):
                summary = TaskMean(values).compute("")
                record |= {name: summary["mean"], f"{name}_ci95": summary["ci95"]}
            records.append(record)
    return records


def adaptation_figure(records: Sequence[dict[str, Any]], metric: str) -> Figure:
    """Loss and metric over adaptation steps; one line for each batch-norm mode that has several, and for each group.

    A metric that is the loss is drawn once.
    """
    from matplotlib.figure import Figure

    panels = {"loss": "query loss", "metric": metric}
    if all(r["loss"] == r["metric"] for r in records):
        del panels["loss"]
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    lines = list(dict.fromkeys((r["bn"], r["group"]) for r in records))
    for axis, (what, label) in zip(axes, panels.items(), strict=True):
        for bn, group in lines:
            own = [r for r in records if (r["bn"], r["group"]) == (bn, group) and r[what] is not None]
            if len(own) < 2:
                continue
            steps, mean = [r["step"] for r in own], [r[what] for r in own]
            half = [r[f"{what}_ci95"] or 0.0 for r in own]
            name = " ".join([group or "all tasks", *([f"({bn})"] if bn != "none" else [])])
            (line,) = axis.plot(steps, mean, "o-" if group is None else "--", markersize=3, label=name)
            if group is None:
                low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
                axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axis.set(xlabel="adaptation steps", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def table_figure(counts: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """Counts as a matrix, each row coloured and labelled by its shares."""
    from matplotlib.figure import Figure

    size = (1.6 + 0.9 * len(columns), 1.5 + 0.55 * len(rows))
    figure = Figure(figsize=(max(size[0], 4.2), size[1]), layout="constrained")
    axis = figure.subplots()
    shares = [[c / max(1, sum(row)) for c in row] for row in counts]
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            text = f"{share:.2f}\n({counts[i][j]})"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if share > 0.6 else "black")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, label="share of the row")
    return figure
