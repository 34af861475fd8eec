"""Small runs for tests: a cell from overrides, run in this process or in another."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from metalearn.cells import Cell, expand

TINY = (
    "dataset=sinusoid",
    "algorithm=maml",
    "logger=none",
    "trainer.val_episodes=7",
    "trainer.test_episodes=9",
    "trainer.meta_batch_size=4",
    "trainer.threads=1",
    "trainer.meta_steps_per_call=1",
)


def cell_of(output: Path, *overrides: str) -> Cell:
    """The one cell of the tiny run with these overrides."""
    (cell,) = expand([*TINY, f"output_dir={output}", *overrides])
    return cell


def folder(output: Path, cell: Cell) -> Path:
    return output / "runs" / cell.cell_id


def result(output: Path, cell: Cell) -> dict:
    return json.loads((folder(output, cell) / "result.json").read_text())


def command(output: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "metalearn", *TINY, f"output_dir={output}", *overrides]


def console(output: Path, *overrides: str, **options) -> subprocess.CompletedProcess:
    """`python -m metalearn` on the tiny run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run(
        command(output, *overrides), capture_output=True, text=True, timeout=100, env=environment, **options
    )


def checkpoint(output: Path, cell: Cell, kind: str = "last") -> dict:
    """The newest generation of a kind."""
    entry = json.loads((folder(output, cell) / "checkpoints" / f"{kind}.json").read_text())[0]
    return torch.load(folder(output, cell) / "checkpoints" / entry["file"], weights_only=True)


def assert_same_bits(a, b) -> None:
    """Two nested checkpoint states hold the same values, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    else:
        assert a == b


def killed_and_run_again(output: Path, *overrides: str) -> Cell:
    """Runs a cell undisturbed (`twin`), and once killed at its first checkpoint and run again (`killed`)."""
    cell = cell_of(output, *overrides)
    assert console(output / "twin", *overrides).returncode == 0
    process = subprocess.Popen(command(output / "killed", *overrides), stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(output.glob("killed/runs/*/checkpoints/*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder(output / "killed", cell) / "result.json").exists()
    assert console(output / "killed", *overrides).returncode == 0
    return cell


def assert_twins(one: Path, other: Path, cell: Cell) -> None:
    """Two runs of a cell left the same parameters, optimizer state, selection, episodes and metrics."""
    for kind in ("last", "best"):
        a, b = checkpoint(one, cell, kind), checkpoint(other, cell, kind)
        assert_same_bits({**a, "seconds": 0}, {**b, "seconds": 0})
    assert (folder(one, cell) / "episodes.parquet").read_bytes() == (
        folder(other, cell) / "episodes.parquet"
    ).read_bytes()
    assert result(one, cell)["metrics"] == result(other, cell)["metrics"]
