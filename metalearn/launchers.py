"""Launchers as Hydra configures them (`hydra/launcher=...`): what is chosen, whether it can be. Imports no torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
from omegaconf import OmegaConf

from metalearn import composing
from metalearn.schema import BadInput
from metalearn.schema.keys import nearest

QUEUES = {"SlurmLauncher": "slurm", "LocalLauncher": "local"}
"""submitit's executor for each of Hydra's launchers that only submit; the others run cells in this process."""


BASIC = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
KNOWN = ("basic", "joblib", "submitit_local")


@dataclass
class SlurmCells(SlurmQueueConf):
    """submitit's SLURM settings, and how many cells one job runs, one after another."""

    cells_per_job: int = 1


@dataclass
class LocalCells(LocalQueueConf):
    """The same for processes of this machine, which run without anyone waiting."""

    cells_per_job: int = 1


def register() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="submitit_slurm_cells", node=SlurmCells(), provider="metalearn")
    store.store(group="hydra/launcher", name="submitit_local", node=LocalCells(), provider="metalearn")


def is_launcher(argument: str) -> bool:
    """Whether an override chooses or sets Hydra's launcher."""
    return argument.lstrip("+").startswith(("hydra/launcher=", "hydra.launcher."))


def settings(arguments: Sequence[str], config_dirs: Sequence[str] = ()) -> dict[str, Any]:
    """The `hydra.launcher` section that a command line's own overrides of Hydra choose.

    Raises:
        BadInput: for a launcher or setting that there is not, or that cannot work.
    """
    chosen = [a for a in arguments if is_launcher(a)]
    if not chosen:
        return dict(BASIC)
    known = [*KNOWN, *(m.removeprefix("launcher/") for m in composing.members("hydra", config_dirs))]
    for name in (a.partition("=")[2] for a in chosen if a.startswith("hydra/launcher=")):
        if name not in known:
            raise BadInput(f"hydra/launcher={name}: must be one of {', '.join(sorted(known))}{nearest(name, known)}")
    try:
        node = composing.hydra_config(chosen, config_dirs).launcher
    except BadInput as error:
        raise BadInput(str(error).replace("Could not override", "no such setting:").split(". To append")[0]) from None
    found = {str(k): v for k, v in (OmegaConf.to_container(node, resolve=False) or {}).items()}  # type: ignore[union-attr]
    if executor(found) is not None:
        _check(found)
    return found


def executor(launcher: dict[str, Any]) -> str | None:
    """submitit's name of the queue that a launcher submits to; None for one that runs cells in this process."""
    return QUEUES.get(str(launcher["_target_"]).rsplit(".", 1)[1])


def _check(launcher: dict[str, Any]) -> None:
    for name, least in (("timeout_min", 1), ("cells_per_job", 1), ("array_parallelism", 1)):
        value = launcher.get(name, least)
        if value < least:
            raise BadInput(f"hydra.launcher.{name}={value}: must be >= {least}")
    if launcher.get("nodes", 1) != 1:
        raise BadInput(f"hydra.launcher.nodes={launcher['nodes']}: must be 1: all ranks of a cell are on one machine")
    if "signal_delay_s" in launcher and launcher["signal_delay_s"] >= 60 * launcher["timeout_min"]:
        limit = 60 * launcher["timeout_min"]
        raise BadInput(
            f"hydra.launcher.signal_delay_s={launcher['signal_delay_s']}: must be < {limit}, the seconds of "
            f"hydra.launcher.timeout_min={launcher['timeout_min']}; jobs would be told to end as they begin"
        )
    if executor(launcher) == "slurm" and shutil.which("sbatch") is None:
        raise BadInput(
            "hydra/launcher=slurm: there is no sbatch here; run this on a SLURM machine, or use basic or joblib"
        )
