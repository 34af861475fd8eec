"""Hydra's multirun over our cells: they come from `metalearn.cells.expand`, not from Hydra's plain product.

Hydra composes one configuration for the sweep itself and refuses keys that this one does not have, so it is given none
of the sweep's keys (but output_dir) and finds the cells in `PENDING`.
"""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from metalearn.cells import Cell
from metalearn.ledger import CellDir

PENDING: list[Cell] = []
"""The cells that the next sweep runs."""


class CellSweeper(Sweeper):
    """Hands the pending cells to the launcher."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch; failures are read from the cells' files, so none stops the others."""
        assert self.launcher is not None
        self.launcher.launch([list(cell.overrides) for cell in PENDING], initial_job_idx=0)


def unfinished(cells: list[Cell]) -> list[Cell]:
    """The cells without a result, and those to be run again."""
    return [c for c in cells if c.config["rerun"] or CellDir(c.config["output_dir"], c.cell_id).result is None]


def register() -> None:
    """Make the sweeper known to Hydra (its configuration is registered with the schemas).

    Hydra instantiates plugins of the package `hydra_plugins` alone; the exception spares a second package.
    """
    plugins, name = Plugins.instance(), f"{CellSweeper.__module__}.{CellSweeper.__name__}"
    allowed = Plugins.is_in_toplevel_plugins_module
    plugins.register(CellSweeper)
    plugins.is_in_toplevel_plugins_module = lambda clazz: clazz == name or allowed(clazz)  # type: ignore[method-assign]
