"""Results on disk without training: what a cell would have left, with numbers that the test knows."""

import json

from metalearn.ledger import CellDir, now, write_json

PROTOCOL = {
    "label_assignment": None, "way": None, "shot": 10, "queries": 10, "bn": "none", "inner_loss_reduction": "mean",
    "test_split": "test", "episodes": 50, "episodes_id": "0123456789ab", "transductive": False,
}  # fmt: skip


def score(mean, ci95=0.01, unit="target units squared", n=50):
    return {"mean": mean, "std": 0.1, "ci95": ci95, "n": n, "interval": "tasks", "unit": unit}


def store(cell, mean, *, metric="mse", steps=(), validation=None, error=None, log=(), place=None, **rest):
    """`result.json` of a cell; `steps` are means before the last step, `error` makes it diverged."""
    unit = {"mse": "target units squared", "accuracy": "fraction"}.get(metric, "1")
    metrics = {metric: score(mean, unit=unit)}
    metrics |= {f"{metric}@step={i}": score(v, unit=unit) for i, v in enumerate(steps)}
    selection = {"checkpoint": "last", "step": 10}
    if validation is not None:
        by = f"mean {metric} of 20 episodes of the val split, bn=none"
        selection = {"checkpoint": "best", "step": 10, "by": by, "value": validation}
    data = {
        "cell_id": cell.cell_id, "train_id": cell.train_id, "config": cell.config, "config_hash": "0" * 64,
        "git_commit": "a" * 40, "git_dirty": False, "seed": cell.config["seed"], "versions": {"torch": "2.13.0"},
        "data_hash": cell.data_hash, "protocol": PROTOCOL | {"test_steps": len(steps) or 1, "selection": selection},
        "status": "done", "steps": 10, "seconds": 2.0, "metrics": metrics,
    }  # fmt: skip
    if error is not None:
        data |= {"status": "diverged", "error": error, "metrics": {}}
    data |= rest
    folder = _folder(cell) if place is None else place / cell.cell_id
    write_json(folder / "result.json", data)
    if log:
        lines = [json.dumps({"attempt": 1, "step": s, f"val_{metric}": v}) for s, v in log]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def fail(cell, error, state="failed"):
    """`status.json` of a cell that has no result."""
    write_json(
        _folder(cell) / "status.json",
        {"state": state, "attempt": 1, "error": error, "heartbeat": now(), "started": now()},
    )


def _folder(cell):
    return CellDir(cell.config["output_dir"], cell.cell_id).path
