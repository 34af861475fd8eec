"""Means and intervals over tasks, and the names that results give them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd


class TaskMean:
    """Mean, sample deviation and 95 % half-width of one value per task (never per batch)."""

    def __init__(self, values: Iterable[float] = ()):
        self.values = [float(v) for v in values]

    def update(self, values: Iterable[float]) -> None:
        """Add the values of more tasks."""
        self.values += [float(v) for v in values]

    def compute(self, unit: str) -> dict[str, Any]:
        """`mean, std` (n - 1), `ci95` (1.96 std / sqrt(n)), `n`, `interval`, `unit`; None where it is not finite."""
        n = len(self.values)
        mean = _sum(self.values) / n if n else math.nan
        variance = _sum([(v - mean) * (v - mean) for v in self.values]) / (n - 1) if n > 1 else math.nan
        std = math.sqrt(variance) if math.isfinite(variance) else math.nan
        numbers = {"mean": mean, "std": std, "ci95": 1.96 * std / math.sqrt(max(1, n))}
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        return {**finite, "n": n, "interval": "tasks", "unit": unit}


def _sum(values: list[float]) -> float:
    """The exactly rounded sum, in any order; NaN where it is not finite."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.nan


UNITS = {"accuracy": "fraction", "mse": "target units squared"}
HIGHER_IS_BETTER = {"accuracy": True, "mse": False}


def metric_name(metric: str, **qualifiers: Any) -> str:
    """`metric@key=value,...` with the qualifiers in alphabetical order; None values are left out."""
    parts = [f"{k}={v}" for k, v in sorted(qualifiers.items()) if v is not None]
    return f"{metric}@{','.join(parts)}" if parts else metric


def qualifiers_of(name: str) -> dict[str, str]:
    """The qualifiers of a name that `metric_name` made, as text."""
    return dict(q.split("=", 1) for q in name.partition("@")[2].split(",") if q)


def summarize(episodes: pd.DataFrame, headline_bn: str, headline_step: int) -> dict[str, dict[str, Any]]:
    """The `metrics` of a result from its episode rows (contract, section 3).

    The bare name is the headline: mode `headline_bn` after `headline_step` steps. Other modes and steps are qualified,
    the last step of another mode by its mode alone; groups qualify the headline.
    """
    out = {}
    for (metric, bn, step), rows in episodes.groupby(["metric", "bn", "step"], sort=True):
        name = metric_name(
            metric, bn=None if bn == headline_bn else bn, step=None if step == headline_step else int(step)
        )
        out[name] = TaskMean(rows["value"]).compute(UNITS[metric])
        if name == metric and rows["group"].notna().any():
            for group, members in rows.groupby("group", sort=True):
                out[metric_name(metric, group=group)] = TaskMean(members["value"]).compute(UNITS[metric])
    return dict(sorted(out.items()))
