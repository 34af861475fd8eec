"""What a finished run says of itself: `result.json` and the small table at the end."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from metalearn.cells import Cell
from metalearn.evaluation.metrics import UNITS, qualifiers_of, summarize
from metalearn.identity import config_hash
from metalearn.ledger import CellDir
from metalearn.schema import fields_of, is_study, member_of

if TYPE_CHECKING:
    from metalearn.learner import MetaLearner
    from metalearn.training import Recorder

Config = dict[str, Any]
PACKAGES = ("metalearn", "torch", "pytorch-lightning", "hydra-core", "omegaconf", "wandb", "numpy", "matplotlib")


def result_of(
    cell: Cell,
    learner: MetaLearner,
    recorder: Recorder,
    episodes: pd.DataFrame,
    source: tuple[str | None, bool | None],
    headline: str,
    step: int,
    seconds: float,
    error: str | None,
) -> Config:
    """The content of result.json (contract, section 3); `source` is `git_state` when the run began.

    `network` is there for a network that is not the configuration's: its section, and both numbers of parameters.
    """
    config = cell.config
    last = int(episodes["step"].max()) if len(episodes) else 0
    result = {
        "cell_id": cell.cell_id,
        "train_id": cell.train_id,
        "config": config,
        "config_hash": config_hash(config),
        "git_commit": source[0],
        "git_dirty": source[1],
        "seed": config["seed"],
        "versions": versions(config["dataset"]),
        "data_hash": cell.data_hash,
        "protocol": protocol(cell, learner, recorder, headline, step, last),
        "status": "done" if error is None else "diverged",
        "steps": learner.meta_steps,
        "seconds": round(seconds, 3),
        "metrics": summarize(episodes, headline, last) | learner.findings() if len(episodes) else {},
    }
    if learner.enlarged is not None:
        result["network"] = learner.enlarged._asdict()
    return result if error is None else result | {"error": error}


def protocol(cell: Cell, learner: MetaLearner, recorder: Recorder, headline: str, step: int, last: int) -> Config:
    """How the numbers were obtained."""
    data, evaluation = cell.config["dataset"], cell.config["evaluation"]
    best = recorder.best if evaluation["checkpoint"] == "best" else None
    rule = {"checkpoint": "last", "step": step}
    if best:
        episodes = cell.config["trainer"]["val_episodes"]
        by = f"mean {learner.metric_name} of {episodes} episodes of the val split, bn={headline}"
        rule = {"checkpoint": "best", "step": best["step"], "by": by, "value": best["value"]}
    return {
        "label_assignment": data.get("label_assignment"),
        **{k: data.get(f"test_{k}") or data.get(k) for k in ("way", "shot", "queries")},
        "bn": headline,
        "test_steps": last,
        "inner_loss_reduction": learner.inner_loss_reduction,
        "selection": rule,
        "test_split": "test",
        "episodes": cell.config["trainer"]["test_episodes"],
        "episodes_id": episodes_id(cell),
        "transductive": headline == "batch",
    }


def episodes_id(cell: Cell) -> str:
    """Names the frozen test episodes: equal ids mean equal episodes, index by index (12 hex digits)."""
    section = cell.config["dataset"]
    sizes = {k: section.get(f"test_{k}") or section.get(k) for k in ("way", "shot", "queries")}
    what = [section["_target_"], cell.data_hash, _drawn_from(section), sizes, cell.config["evaluation"]["seed"], "test"]
    return config_hash(what)[:12]


def _drawn_from(section: Config) -> Config:
    """The keys of a data set that its frozen episodes depend on, besides sizes and contents."""
    schema = member_of("dataset", section)
    skip = ("way", "shot", "queries", "test_way", "test_shot", "test_queries", "root", *schema.training_only)
    kept: Config = {}
    for name, field in fields_of(schema).items():
        if field.key.sections:
            kept[name] = {label: [part["_target_"], _drawn_from(part)] for label, part in section[name].items()}
        elif name not in skip and field.key.touches != "none":
            kept[name] = section[name]
    return kept


def versions(dataset: Config) -> dict[str, str]:
    """Versions of Python, of what the numbers depend on, and of what the data set is made from."""
    return versions_of(member_of("dataset", dataset).versions(dataset))


def versions_of(more: dict[str, str]) -> dict[str, str]:
    """Versions of Python and of what all numbers depend on, and further ones."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    from metalearn.ops import native  # not above: tables are printed without torch

    found["kernels"] = "compiled" if (why := native.reason()) is None else f"PyTorch's operators: {why}"
    return found | more


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package runs from and whether it has changes; None in a wheel."""
    top = Path(__file__).resolve().parent.parent
    if not (top / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(top), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--untracked-files=no").strip())
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None, None


def table(result: Config, directory: CellDir) -> str:
    """The result as a small table for the terminal."""
    if is_study(result["config"]):
        return _study_table(result, directory)
    config, protocol = result["config"], result["protocol"]
    title = f"{config['algorithm']['name']} on {config['dataset']['name']}"
    if protocol["way"]:
        title += f", {protocol['way']}-way {protocol['shot']}-shot"
    elif protocol["shot"]:
        title += f", {protocol['shot']} shots"
    shown = _few_steps(protocol["test_steps"])
    names = [(name.partition("@")[0], qualifiers_of(name)) for name in result["metrics"]]
    grouped = any("group" in q for _, q in names)
    rows = [("metric", "mean", "95% CI (tasks)", "n", "bn", "step", *(["group"] if grouped else []))]
    for (name, q), m in zip(names, result["metrics"].values(), strict=True):
        step = q.get("step", str(protocol["test_steps"]))
        where = (q.get("bn", protocol["bn"]), step, *([q.get("group", "all")] if grouped else []))
        if name not in UNITS:  # about the run, not a score of adapted parameters
            where = ("", "", *([""] if grouped else []))
        if int(step) in shown:
            rows.append((name, number(m["mean"]), "+- " + number(m["ci95"]), str(m["n"]), *where))
    rows[1:] = sorted(rows[1:], key=lambda r: (not r[4], r[4] != protocol["bn"], r[4], int(r[5] or 0)))
    aligned = _padded(rows, left=(0, 4, 6))
    lines = ["  ".join(row) for row in aligned]
    chosen, tested = protocol["selection"], ""
    if result["status"] == "done":
        tested = f"; tested: {chosen['checkpoint']} checkpoint, step {chosen['step']}"
    else:
        lines = [f"DIVERGED: {result['error']}"]
    if network := result.get("network"):
        more = network["parameters"] / network["single"]
        changed = {k: v for k, v in network["backbone"].items() if v != config["backbone"][k]}
        says = ", ".join(f"{k} {v}" for k, v in changed.items())
        lines.append(f"network: {says}; {network['parameters']:,} parameters, {more:.2f} times {network['single']:,}")
    return (
        f"\n{title}, seed {result['seed']}\n" + "\n".join(line.rstrip() for line in lines) + "\n"
        f"{result['steps']} meta-steps in {result['seconds']:.0f} s{tested}\n{directory.path / 'result.json'}"
    )


def _padded(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[list[str]]:
    """Texts made equally wide in each column, to the left in some."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return [
        [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows
    ]


def _study_table(result: Config, directory: CellDir) -> str:
    """The first numbers of a study, which may be thousands."""
    rows = [("", "mean", "95% CI", "n", "")]
    for name, m in list(result["metrics"].items())[:MOST_ROWS]:
        half = "" if m["ci95"] is None else "+- " + brief(m["ci95"])
        rows.append((name, brief(m["mean"]), half, "" if m["interval"] == "exact" else str(m["n"]), m["interval"]))
    lines = ["  ".join(row) for row in _padded(rows, left=(0, 4))]
    if (left := len(result["metrics"]) - MOST_ROWS) > 0:
        lines.append(f"... and {left} more in result.json")
    title = f"{result['config']['study']['name']}, seed {result['seed']}"
    text = "\n".join(line.rstrip() for line in lines)
    return f"\n{title}\n{text}\n{result['seconds']:.1f} s\n{directory.path / 'result.json'}"


MOST_ROWS = 24


def brief(value: float | None) -> str:
    """Four significant digits; `-` where there is no finite value."""
    return "-" if value is None else f"{value:.4g}"


def _few_steps(last: int) -> set[int]:
    """The steps that the table shows: all of a few, else a selection (result.json has all)."""
    return set(range(last + 1)) if last <= 5 else {0, 1, 2, 5, 10, 20, last}


def number(value: float | None) -> str:
    """Four decimals, or four digits of what is too large for that; `-` where there is no finite value."""
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
