"""The process that measures how fast a cell is: `python -m metalearn.sweep.trial SPEC`, where SPEC is a file of JSON.

It runs the cell shortened, again and again with more of every part, until its time is used up or the parts are all
there. The last run that ended counts, with what the first took longer: a cell has a process of its own. Nothing is
written outside the SPEC's folder.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from metalearn import sweeper
from metalearn.bench.process import busy_seconds
from metalearn.cells import Cell, expand, from_composed
from metalearn.ledger import CellDir, note_trained, read_json, write_json
from metalearn.results import Result
from metalearn.schema import register
from metalearn.sweep.speed import STARTED, Speed, compiles, prepared_key, prepared_tasks

Config = dict[str, Any]
STACK = 32
"""Episodes beyond which their number is a multiple of what the engine takes at once."""
GROWTH = 1.5
"""How many times as much of some part a further run must have."""
SHARES = {"half": 0.4, "validation": 0.2, "test": 0.2, "tasks": 0.2}
"""What the parts get of the time that is left."""


class Counts(NamedTuple):
    """How much of each part a shortened run has.

    half: meta-steps to each of its two validations. validation, test: episodes. tasks: gone through beforehand.
    """

    half: int
    validation: int
    test: int
    tasks: int


class Seconds(NamedTuple):
    """How long these parts took: one half of the meta-steps, one validation, the test, the tasks beforehand."""

    half: float
    validation: float
    test: float
    tasks: float


def most(config: Config) -> Counts:
    """The counts of the whole run."""
    t = config["trainer"]
    return Counts(-(-t["max_steps"] // 2), t["val_episodes"], t["test_episodes"], prepared_tasks(config))


def least(config: Config) -> Counts:
    """The counts of the first run, which shows how long everything takes about."""
    episodes, whole = max(2, config["trainer"]["devices"]), most(config)
    tasks = max(16, 4 * config["algorithm"].get("m", 1))
    return Counts(*map(min, (1, episodes, episodes, tasks), whole))


def more(counts: Counts, seconds: Seconds, config: Config, left: float) -> Counts | None:
    """The counts of the next run; None if it would show nothing new.

    Args:
        counts: of the run before.
        seconds: how long its parts took.
        config: the cell's.
        left: seconds that there are.
    """
    found = []
    for name, n, took, whole in zip(Counts._fields, counts, seconds, most(config), strict=True):
        fits = int(n * SHARES[name] * left / max(took, 1e-6))
        step = config["trainer"]["log_every"] if name == "half" else STACK
        if fits > step and fits < whole:
            fits -= fits % step
        found.append(max(n, min(whole, fits)))
    grows = any(b > a and (b >= GROWTH * a or b == w) for a, b, w in zip(counts, found, most(config), strict=True))
    return Counts(*found) if grows else None


def shortened(config: Config, counts: Counts, output: Path) -> Config:
    """The configuration of a run with these counts; validations as the cell has them, or none."""
    t = config["trainer"]
    steps = {
        "max_steps": 2 * counts.half,
        "val_every": counts.half if t["val_every"] else 0,
        "val_episodes": counts.validation,
        "test_episodes": counts.test,
        "log_every": next((n for n in range(t["log_every"], 1, -1) if counts.half % n == 0), 1) if counts.half else 1,
    }
    key = prepared_key(config)
    algorithm = config["algorithm"] | ({key: counts.tasks} if key else {})
    logger = config["logger"] | {"name": "none"}
    rest = {"algorithm": algorithm, "logger": logger, "output_dir": str(output), "rerun": False}
    return config | {"trainer": t | steps} | rest


def cell_of(config: Config) -> Cell:
    """The cell of a whole configuration."""
    return from_composed(OmegaConf.create(config))


def provide(cell: Cell, kept: dict[int, str]) -> None:
    """Give a shortened cell what its training starts from: trainings of a meta-step or two under the right names.

    Args:
        cell: the shortened cell.
        kept: ids of cells that hold such trainings, by their place among the needs; added to.
    """
    from metalearn.run import run

    output = cell.config["output_dir"]
    for place, need in enumerate(cell.needs):
        if not isinstance(need, Cell):
            continue  # a checkpoint that is there
        if place not in kept:
            few = cell_of(shortened(need.config, least(need.config), Path(output)))
            provide(few, {})
            run(few)
            kept[place] = few.cell_id
        note_trained(output, need.train_id, kept[place])


def measure(cell: Cell, counts: Counts) -> tuple[dict[str, Any], Seconds]:
    """Run a shortened cell; returns the fields of its `Speed` but `start` and `once`, and the seconds of its parts.

    Raises:
        RuntimeError: if it diverged.
    """
    from metalearn.run import run

    gc.collect()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    began, busy = time.monotonic(), busy_seconds()
    run(cell)
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    folder = CellDir(cell.config["output_dir"], cell.cell_id).path
    result = Result(folder, read_json(folder / "result.json") or {})
    if result.diverged:
        raise RuntimeError(f"diverged after {result.data['steps']} meta-steps: {result.data['error']}")
    parts, rest = _parts(folder, counts, result.data["seconds"])
    devices = cell.config["trainer"]["devices"]
    speed = {
        "setup": wall - result.data["seconds"] + rest,
        "prepared": parts.tasks / max(1, counts.tasks),
        "step": parts.half / max(1, counts.half),
        "validation": parts.validation / counts.validation,
        "test": parts.test / counts.test,
        "cores": devices * cpu / wall,
        "memory": devices * after.ru_maxrss * 1024,
        "gpu": _gpu_memory(),
        **_bytes(folder, counts),
    }
    values = result.episodes()
    about = {
        "counts": counts._asdict(),
        "others": max(0.0, (busy_seconds() - busy - devices * cpu) / wall),
        "metric": values["metric"].iloc[0],
        "values": values["value"].round(9).tolist(),
    }
    return {"speed": speed, "about": about}, parts


def _parts(folder: Path, counts: Counts, total: float) -> tuple[Seconds, float]:
    """Seconds of the parts, and of what training does once.

    The second half of the meta-steps and its validation count: the first contains what is done once.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    at = {step: [r["seconds"] for r in rows if r["step"] == step] for step in (0, counts.half, 2 * counts.half)}
    prepared = max(at[0], default=0.0)
    if not counts.half:
        return Seconds(0.0, 0.0, total - prepared, prepared), 0.0
    first, middle = at[counts.half][0], at[counts.half][-1]
    trained, end = at[2 * counts.half][0], at[2 * counts.half][-1]
    half = trained - middle
    return Seconds(half, end - trained, total - end, prepared), max(0.0, first - prepared - half)


def _bytes(folder: Path, counts: Counts) -> dict[str, float]:
    """Sizes of what the run left."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    checkpoints = [n for path, n in sizes.items() if path.suffix == ".ckpt" and path.parent.name == "checkpoints"]
    kept = sum(n for path, n in sizes.items() if path.parent.name == "phases")
    log, rows = folder / "metrics.jsonl", folder / "episodes.parquet"
    import pandas as pd

    pd.read_parquet(rows).head(0).to_parquet(empty := folder / "empty.parquet", index=False)
    head = min(empty.stat().st_size, sizes[rows])
    counted = sum(checkpoints) + kept + sizes[log] + sizes[rows] - head
    return {
        "checkpoint": max(checkpoints, default=0),
        "line": sizes[log] / max(1, len(log.read_text().splitlines())),
        "row": (sizes[rows] - head) / counts.test,
        "kept": kept / max(1, counts.tasks),
        "other": sum(sizes.values()) - counted,
    }


def _gpu_memory() -> int | None:
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)


def main(arguments: list[str]) -> None:
    """Measure what the SPEC says; after each run its file `speed.json` has what is known so far."""
    register()
    sweeper.register()
    spec = json.loads(Path(arguments[0]).read_text())
    place, config = Path(arguments[0]).parent, spec["config"]
    if spec["overrides"]:
        for _ in range(2):  # as the command does, and then Hydra
            expand(spec["overrides"], spec["config_dirs"])
    import metalearn.run  # noqa: F401  torch and all that

    start = time.time() - spec["began"]
    if compiles(config):  # a shortened run compiles where the whole one does
        import metalearn.compiled

        metalearn.compiled.LONG_RUN = 0
    if "counts" in spec:  # a further process of one run
        metalearn.run.run(cell_of(shortened(config, Counts(*spec["counts"]), place)))
        return
    (place / STARTED).touch()
    counts: Counts | None = least(config)
    kept: dict[int, str] = {}
    end = slow = None
    while counts is not None:
        again = place / f"counts-{'-'.join(map(str, counts))}.json"
        write_json(again, spec | {"counts": list(counts)})
        sys.argv[1:] = [str(again)]  # what further processes are started with
        cell = cell_of(shortened(config, counts, place))
        provide(cell, kept)
        found, seconds = measure(cell, counts)
        slow = found["speed"]["setup"] if slow is None else slow
        once = max(0.0, slow - found["speed"]["setup"])
        speed = Speed(start=start, once=once, **found["speed"])
        write_json(place / "speed.json", found["about"] | {"device": _device(), "speed": dataclasses.asdict(speed)})
        end = end or time.monotonic() + spec["seconds"]  # the first run is slow, and not to be avoided
        counts = more(counts, seconds, config, end - time.monotonic())


if __name__ == "__main__":
    main(sys.argv[1:])
