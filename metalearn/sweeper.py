"""Hydra's multirun over our cells: the grid comes from `metalearn.cells.expand`, not from Hydra's plain product."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from metalearn.cells import Cell, expand
from metalearn.ledger import CellDir

CONFIG_DIRS: list[str] = []
"""Folders of --config-dir, which Hydra does not hand to a sweeper."""


class CellSweeper(Sweeper):
    """Hands the unfinished cells of a command line to the launcher."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch; failures are read from the cells' files, so none stops the others."""
        pending = unfinished(expand(arguments, CONFIG_DIRS))
        assert self.launcher is not None
        if pending:
            self.launcher.launch([list(cell.overrides) for cell in pending], initial_job_idx=0)


def unfinished(cells: list[Cell]) -> list[Cell]:
    """The cells without a result, and those to be run again."""
    return [c for c in cells if c.config["rerun"] or CellDir(c.config["output_dir"], c.cell_id).result is None]


def register() -> None:
    """Make the sweeper known to Hydra (its configuration is registered with the schemas)."""
    Plugins.instance().register(CellSweeper)
