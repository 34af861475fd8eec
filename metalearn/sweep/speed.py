"""What a cell costs: which cells are equally fast, and seconds and bytes of each from what was measured on one.

A run is made of parts whose number its keys say: meta-steps, validations, test episodes, tasks that are gone through
before the first meta-step. Everything else that can change its speed is in `signature`. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from metalearn.cells import Cell
from metalearn.identity import config_hash
from metalearn.schema import MEMBERS, fields_of, member_of, sections
from metalearn.schema.groups import LONG_RUN
from metalearn.schema.keys import Field, show

Config = dict[str, Any]
COUNTS = ("trainer.max_steps", "trainer.val_every", "trainer.val_episodes", "trainer.test_episodes")
"""Keys that say how often something is done, not how long it takes once."""
LABELS = ("name", "seed")
STARTED = "started"
"""The file that a measuring process makes when it begins its work."""
GENERATIONS = 2
"""Checkpoints of each kind that a run keeps."""


def prepared_key(config: Config) -> str | None:
    """The algorithm's key that counts the tasks which are gone through before the first meta-step, if it has one."""
    found: str | None = member_of("algorithm", config["algorithm"]).prepares
    return found


def signature(config: Config) -> dict[str, Any]:
    """What sets the speed of a run, by dotted key: two runs with equal signatures are equally fast.

    Members and their whole numbers, texts and switches stay. Of real numbers that change results (learning rates and
    the like) only whether they are there, and zero, does; seeds, names and counts do not.
    """
    counts = {*COUNTS, f"algorithm.{prepared_key(config)}"}
    found: dict[str, Any] = {}
    for path, group, section in sections(config):
        if group == "logger":
            continue
        found[path] = section.get("_target_")
        for name, field in fields_of(member_of(group, section)).items():
            key = f"{path}.{name}"
            if key not in counts and name not in LABELS and not field.key.sections:
                found[key] = _kind(section[name]) if _only_scales(field) else section[name]
    return found | {"compiled": compiles(config)}


def compiles(config: Config) -> bool:
    """Whether the run is long enough for its meta-steps to be compiled where its network is tiny."""
    trainer = config["trainer"]
    return bool(trainer["compile"] == "auto" and trainer["max_steps"] >= LONG_RUN)


def _only_scales(field: Field) -> bool:
    return field.key.touches != "none" and _is_real(field.type)


def _is_real(kind: Any) -> bool:
    return kind is float or any(_is_real(k) for k in typing.get_args(kind))


def _kind(value: Any) -> Any:
    if isinstance(value, list):
        return [_kind(v) for v in value]
    return "a number" if isinstance(value, int | float) and value else value


class Group(NamedTuple):
    """Cells that are equally fast; `key` is the hash of their signature, and `label` tells groups apart."""

    key: str
    signature: dict[str, Any]
    cells: tuple[Cell, ...]
    label: str


def groups(cells: Sequence[Cell]) -> list[Group]:
    """The cells by signature, in the order of their first."""
    found: dict[str, tuple[dict[str, Any], list[Cell]]] = {}
    for cell in cells:
        own = signature(cell.config)
        found.setdefault(config_hash(own), (own, []))[1].append(cell)
    labels = _labels([cells[0].config for _, cells in found.values()])
    return [
        Group(key, own, tuple(cells), label) for (key, (own, cells)), label in zip(found.items(), labels, strict=True)
    ]


def _labels(configs: Sequence[Config]) -> list[str]:
    """What tells configurations apart, members first: as few keys as do it."""
    names = [{g: c[g]["name"] for g in MEMBERS if g in c} for c in configs]
    flat = [n | signature(c) | n for n, c in zip(names, configs, strict=True)]
    chosen = ["algorithm", "dataset"]

    def told() -> int:
        return len({show([f.get(k) for k in chosen]) for f in flat})

    for key in dict.fromkeys(k for f in flat for k in f):
        before = told()
        chosen.append(key)
        if told() == before:
            chosen.pop()
    return [" ".join(f"{k}={show(f[k])}" for k in dict.fromkeys(chosen) if k in f) for f in flat]


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured on one cell of a group: seconds of one of each part, and bytes.

    start: from the command to the run's own work (imports, composing). once: what the first run of a process takes
    longer than later ones. setup: making data set and network, the files at
    the end. prepared: one task gone through before the first meta-step. step, validation, test: one meta-step, one
    validation episode, one test episode. cores: CPU time over wall time. memory, gpu: peak of all processes (gpu: None
    without one). checkpoint, line, row, kept, other: bytes of a checkpoint, of a line of the log, of a test episode in
    episodes.parquet, of what one prepared task leaves, and of everything else.
    """

    start: float
    once: float
    setup: float
    prepared: float
    step: float
    validation: float
    test: float
    cores: float
    memory: int
    gpu: int | None
    checkpoint: float
    line: float
    row: float
    kept: float
    other: float

    def training(self, config: Config, done: int = 0) -> float:
        """Seconds of training with all validations, `done` meta-steps of it behind."""
        trainer = config["trainer"]
        left = max(0, trainer["max_steps"] - done)
        tests = validations(config) - (done // trainer["val_every"] if trainer["val_every"] else 0)
        before = 0.0 if done else self.prepared * prepared_tasks(config)
        return before + left * self.step + max(0, tests) * trainer["val_episodes"] * self.validation

    def testing(self, config: Config) -> float:
        """Seconds of the test."""
        return float(config["trainer"]["test_episodes"] * self.test)

    def disk(self, config: Config) -> float:
        """Bytes of the cell's folder when it is finished, without those of W&B."""
        trainer, looks = config["trainer"], validations(config)
        checkpoints = min(GENERATIONS, looks) + min(GENERATIONS, max(looks, 1))  # best, last
        every = 1 if config["algorithm"].get("alpha") == "online" else trainer["log_every"]
        lines = -(-trainer["max_steps"] // every) + looks
        rows = trainer["test_episodes"] * self.row + prepared_tasks(config) * self.kept
        return checkpoints * self.checkpoint + lines * self.line + rows + self.other


def validations(config: Config) -> int:
    """How many validations a run does: after every `val_every` meta-steps and after the last."""
    trainer = config["trainer"]
    return -(-trainer["max_steps"] // trainer["val_every"]) if trainer["val_every"] else 0


def prepared_tasks(config: Config) -> int:
    """Tasks that are gone through before the first meta-step."""
    key = prepared_key(config)
    return 0 if key is None else int(config["algorithm"][key])
