"""What an experiment shows beyond a table: its figures, and whether its paper's claims hold. Imports no torch.

An experiment's file names the module that draws and judges (`shows: metalearn.unravel.fig9`). Such a module defines

    def show(results: Sequence[Result]) -> Shown

a pure function of the results of the experiment's cells, those without a result left out.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metalearn import composing
from metalearn.evaluation.metrics import metric_name, qualifiers_of
from metalearn.ledger import write_atomically
from metalearn.results import Result
from metalearn.schema import BadInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
OURS = " (our claim)"
VERDICTS = {True: "holds", False: "does not hold", None: "undecided"}


class Finding(NamedTuple):
    """A claim of a paper and what was measured of it.

    Attributes:
        claim: what the paper says.
        criterion: what has to be measured for the claim to hold.
        measured: what was, with its numbers.
        holds: None if the results do not decide it; `measured` says why.
        ours: whether it is not the paper's claim: a second reading of it, or the same with other constants.
    """

    claim: str
    criterion: str
    measured: str
    holds: bool | None
    ours: bool = False

    def line(self) -> str:
        """One line for the terminal."""
        return f"{VERDICTS[self.holds]}: {self.claim}{OURS * self.ours} ({self.criterion}): {self.measured}"


class Shown(NamedTuple):
    """What it shows in a few words, figures by file name without its ending, findings, and remarks for the reader."""

    title: str
    figures: dict[str, Figure]
    findings: list[Finding]
    notes: tuple[str, ...] = ()


class Line(NamedTuple):
    """A metric along one of its qualifiers, in ascending order; `ci95` is NaN where there is none."""

    x: np.ndarray
    mean: np.ndarray
    ci95: np.ndarray


def line(result: Result, metric: str, along: str, **where: Any) -> Line:
    """A metric of a study along a numeric qualifier.

    Args:
        result: see above.
        metric: its name without qualifiers.
        along: the qualifier that varies.
        where: the other qualifiers, exactly those that the metric has.

    Raises:
        KeyError: if the result has nothing of the kind.
    """
    wanted = {k: str(v) for k, v in where.items()}
    points = []
    for name, m in result.data["metrics"].items():
        q = qualifiers_of(name)
        if name.partition("@")[0] == metric and along in q and {k: v for k, v in q.items() if k != along} == wanted:
            points.append((float(q[along]), _number(m["mean"]), _number(m["ci95"])))
    if not points:
        raise KeyError(f"{result.folder}: no {metric} along {along} with {wanted}")
    return Line(*np.array(sorted(points)).T)


def scalar(result: Result, name: str) -> tuple[float, float]:
    """Mean and half-width of a number with its whole name; NaN for what is not finite."""
    m = result.data["metrics"][name]
    return _number(m["mean"]), _number(m["ci95"])


def values(result: Result, metric: str, **where: Any) -> np.ndarray:
    """The values behind a mean, one for each task, draw or whatever it is over.

    Args:
        result: see above.
        metric: its name without qualifiers.
        where: all of its qualifiers.

    Raises:
        KeyError: if the result has no such mean.
    """
    rows = result.every_episode()
    point = metric_name(metric, **where).partition("@")[2] or None
    rows = rows[(rows["metric"] == metric) & (rows["group"].isna() if point is None else rows["group"] == point)]
    if rows.empty:
        raise KeyError(f"{result.folder}: no values of {metric_name(metric, **where)}")
    return rows.sort_values("episode")["value"].to_numpy("f8")


def labels(result: Result, metric: str, qualifier: str) -> list[str]:
    """The values that a qualifier of a metric takes, in the order of the result."""
    names = [n for n in result.data["metrics"] if n.partition("@")[0] == metric]
    return list(dict.fromkeys(q[qualifier] for q in map(qualifiers_of, names) if qualifier in q))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


# ---- drawing and judging -----------------------------------------------------------------------------------------


def module_of(experiment: str, config_dirs: Sequence[str] = ()) -> str | None:
    """The module that shows an experiment, if its file names one."""
    name = composing.preset(experiment, "shows", config_dirs)
    return None if name is None else str(name)


def show(experiment: str, module: str, results: Sequence[Result]) -> Shown:
    """What the results of an experiment's cells show.

    Raises:
        BadInput: if there is no such module, or there are no results.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BadInput(f"experiment={experiment}: shows={module}: {error}") from None
    if not results:
        raise BadInput(f"experiment={experiment}: none of its cells has a result yet")
    shown: Shown = found.show(results)
    return shown


def write(shown: Shown, folder: Path) -> list[Path]:
    """Every figure as PNG and SVG.

    Raises:
        BadInput: if the folder cannot be written to.
    """
    files = []
    for name, figure in shown.figures.items():
        for kind in FORMATS:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
            files.append(folder / f"{name}.{kind}")
            try:
                write_atomically(files[-1], buffer.getvalue())
            except OSError as error:
                raise BadInput(f"{folder}: {error.strerror}; name a folder that can be written to") from None
    return files


def text(experiment: str, shown: Shown, files: Sequence[Path], missing: int = 0) -> str:
    """Findings, remarks and files for the terminal."""
    lines = [f"{experiment}: {f.line()}" for f in shown.findings]
    lines += [f"{experiment}: note: {n}" for n in shown.notes]
    if missing:
        lines.append(f"{experiment}: {missing} of its cells have no result and are not in this")
    return "\n".join([*lines, *(f"files: {', '.join(map(str, files))}" for _ in files[:1])])


def finding_record(finding: Finding) -> Mapping[str, Any]:
    """A finding as plain data."""
    return finding._asdict() | {"verdict": VERDICTS[finding.holds]}
