"""The command line: bad input and help are dealt with before Hydra runs anything and before torch is imported."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from metalearn import cells, launchers, shown, sweeper
from metalearn.help import usage
from metalearn.ledger import Busy, CellDir, leads
from metalearn.options import refuse_place
from metalearn.paths import conf_dir
from metalearn.results import Result
from metalearn.schema import BadInput
from metalearn.schema import register as register_schemas

DONE, OTHER, BAD_INPUT, DIVERGED = 0, 1, 2, 3
VERBS = {
    "alpha": "metalearn.alpha.command",
    "bench": "metalearn.bench.command",
    "check": "metalearn.check.command",
    "figure": "metalearn.figures.command",
    "report": "metalearn.reports",
    "results": "metalearn.listing",
    "sweep": "metalearn.sweep",
    "table": "metalearn.tables.command",
    "wandb": "metalearn.wandb_push",
}
"""The module of each verb; its `main(arguments)` returns the exit code."""
FAILED: list[str] = []
"""Ids of cells that raised in this process."""
REFUSED: list[str] = []
"""Ids of cells that asked for what this machine does not have."""
FLAGS: list[str] = []
"""Options and Hydra's own overrides of this command line, for every cell."""


def main() -> None:
    """Run what the command line asks for and exit: 0 done, 2 bad input, 3 diverged, 1 anything else."""
    _set_up()
    try:
        code = _main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # whoever read our output has enough of it (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except BadInput as error:
        print(f"metalearn: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _set_up() -> None:
    # before torch is imported: idle OpenMP threads spin for long by default, which makes everything several times
    # slower where cores are shared; spinning briefly keeps nearly all of the speed of idle cores
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    register_schemas()
    sweeper.register()
    launchers.register()
    warnings.formatwarning = lambda message, category, *_: f"metalearn: {category.__name__}: {message}\n"
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning's own
    warnings.filterwarnings("ignore", message="The `srun` command is available.*")  # a sweep on a login node is fine


def work(commands: Sequence[Sequence[str]], flags: Sequence[str]) -> int:
    """Run cells in a launcher's job, one after another; those finished by then are passed over.

    Args:
        commands: the overrides of each cell.
        flags: options and Hydra's own overrides of the command that chose them.
    """
    _set_up()
    parsed, rest = get_args_parser().parse_known_args(list(flags))
    places = [parsed.config_dir] if parsed.config_dir else []
    own = [a for a in (*parsed.overrides, *rest) if cells.is_hydra(a)]
    found = [cell for command in commands for cell in cells.expand([*command, *own], places, grid=False)]
    FLAGS[:] = list(flags)
    pending = sweeper.PENDING[:] = sweeper.unfinished(found)
    if pending:
        place = [o for o in found[0].overrides if o.startswith("output_dir=")]
        _hydra(["--multirun", *flags, *place])
    return _exit_code(found)


def _main(arguments: list[str]) -> int:
    if arguments and arguments[0] in VERBS:
        return importlib.import_module(VERBS[arguments[0]]).main(arguments[1:])
    parsed, unknown = get_args_parser().parse_known_args(arguments)
    if parsed.help:
        print(usage([a for a in parsed.overrides if "=" not in a]))
        return DONE
    for argument in (a for a in unknown if a.startswith("-")):
        raise BadInput(f"{argument}: no such option; see metalearn --help")
    if parsed.hydra_help or parsed.shell_completion or parsed.info:
        return _hydra(arguments)
    overrides = [*parsed.overrides, *unknown]  # argparse leaves what follows an option in the middle
    if not parsed.multirun:
        _only_experiments_sweep(overrides)
    folders = [parsed.config_dir] if parsed.config_dir else []
    found = cells.expand(overrides, folders, to_run=not parsed.cfg)
    many = parsed.multirun or len(found) > 1
    flags = [a for a in arguments if a not in (*overrides, "-m", "--multirun") or cells.is_hydra(a)]
    flags = FLAGS[:] = sorted(flags, key=cells.is_hydra)  # argparse wants all overrides in one place, after the options
    if parsed.cfg:
        return _hydra([*flags, *found[0].overrides])
    pending = sweeper.PENDING[:] = sweeper.unfinished(found)
    for cell in found:
        if cell not in pending and not many:
            _show(cell, "already finished; rerun=true runs it again")
    if many:
        print(f"{len(found)} cells, {len(found) - len(pending)} of them finished", file=sys.stderr)
    for cell in pending:
        refuse_place(cell.config["output_dir"])
    launcher = launchers.settings(overrides, folders) if many else launchers.BASIC
    if pending and launchers.executor(launcher) is not None:
        _queue(pending, flags, launcher)
    elif pending:
        place = [o for o in found[0].overrides if o.startswith("output_dir=")]
        _hydra(["--multirun", *flags, *place] if many else [*flags, *found[0].overrides])
    if many:
        _summary(found)
    _show_experiments(found, folders)
    return _exit_code(found)


def _show_experiments(found: list[cells.Cell], folders: list[str]) -> None:
    """Draw and judge what experiments say that they show."""
    own: dict[str, list[cells.Cell]] = {}
    for cell in found:
        for override in (o for o in cell.overrides if o.startswith("experiment=")):
            own.setdefault(override.partition("=")[2], []).append(cell)
    for experiment, group in own.items():
        if (module := shown.module_of(experiment, folders)) is None:
            continue
        directories = [CellDir(c.config["output_dir"], c.cell_id) for c in group]
        results = [Result(d.path, data) for d in directories if (data := d.result) is not None]
        if results:
            content = shown.show(experiment, module, results)
            files = shown.write(content, Path(group[0].config["output_dir"]) / "figures" / Path(experiment).parent)
            print(shown.text(experiment, content, files, len(group) - len(results)))


def _queue(pending: list[cells.Cell], flags: list[str], launcher: dict[str, Any]) -> None:
    """Submit cells and wait for their files; interrupting the wait leaves the jobs alone."""
    from metalearn.sweep import launch
    from metalearn.sweep.standing import standings

    with launch.submitting(pending[0].config["output_dir"]):
        free = [s.cell for s in standings(pending) if not s.under_way]
        found = launch.submit(free, flags, launcher) if free else []
    for job in found:
        print(f"metalearn: job {job.job}: {len(job.cells)} cells, log {job.log}", file=sys.stderr)
    try:
        launch.wait(pending, lambda text: print(f"metalearn: {text}", file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("metalearn: the jobs go on; metalearn sweep status tells where they stand", file=sys.stderr)
        raise


def _only_experiments_sweep(overrides: list[str]) -> None:
    if not any(o.startswith("experiment=") for o in overrides):
        for swept in cells.swept(overrides):
            raise BadInput(f"{swept}: several values need -m (a sweep); a text with commas needs quotes within quotes")


def _hydra(arguments: list[str]) -> int:
    sys.argv[1:] = arguments
    try:
        hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")(_task)()
    finally:
        for handler in [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]:
            logging.getLogger().removeHandler(handler)  # Hydra leaves its log open, and a process may call it often
            handler.close()
    return DONE


def _task(config: DictConfig) -> str | None:
    """Hydra's task function: run the cell that a composed configuration means."""
    runtime = HydraConfig.get().runtime
    folders = [s.path for s in runtime.config_sources if s.schema == "file" and s.provider != "main"]
    cell = cells.from_composed(config, folders, runtime.choices.get("experiment"))
    sys.argv[1:] = [*FLAGS, *HydraConfig.get().overrides.task]  # Lightning's further processes repeat the command
    directory = CellDir(cell.config["output_dir"], cell.cell_id)
    leader = leads()
    try:
        if leader:
            directory.acquire()
    except Busy as busy:
        print(f"metalearn: {busy}", file=sys.stderr)
        return None
    try:
        if leader and directory.result is not None:
            if not cell.config["rerun"]:
                return "done"
            directory.archive()
        from metalearn.run import run

        state = run(cell)
        if leader:
            _show(cell)
        return state
    except BadInput as error:  # what only torch could know
        print(f"metalearn: {error}", file=sys.stderr)
        REFUSED.append(cell.cell_id)
        return None
    except Exception as error:  # one failed cell must not stop the others; status.json says why it failed
        traceback.print_exc()
        FAILED.append(cell.cell_id)
        print(f"metalearn: cell {cell.cell_id} failed: {error}", file=sys.stderr)
        return None
    finally:
        if leader:
            directory.release()


def _show(cell: cells.Cell, note: str = "") -> None:
    from metalearn.record import table

    directory = CellDir(cell.config["output_dir"], cell.cell_id)
    result = directory.result
    if result is not None:
        print(table(result, directory) + (f"\n{note}" if note else ""), flush=True)


def _states(found: list[cells.Cell]) -> list[str]:
    states = []
    for cell in found:
        directory = CellDir(cell.config["output_dir"], cell.cell_id)
        result: dict[str, Any] | None = directory.result
        states.append(result["status"] if result else directory.status.get("state", "not started"))
    return states


def _summary(found: list[cells.Cell]) -> None:
    from metalearn.record import number

    for cell, state in zip(found, _states(found), strict=True):
        directory = CellDir(cell.config["output_dir"], cell.cell_id)
        headline = ""
        if state == "done":
            metrics = (directory.result or {})["metrics"]
            name = next(n for n in metrics if "@" not in n)
            headline = f"{name} {number(metrics[name]['mean'])} +- {number(metrics[name]['ci95'])}"
        else:
            headline = directory.status.get("error") or ""
        print(f"{cell.cell_id}  {state:<11}  {headline:<28}  {' '.join(cell.overrides)}")


def _exit_code(found: list[cells.Cell]) -> int:
    if not leads():  # rank 0 has yet to write the result
        return OTHER if FAILED else DONE
    if len(found) == 1 and found[0].cell_id in REFUSED:
        return BAD_INPUT
    states = set(_states(found))
    if states - {"done", "diverged"}:
        return OTHER
    return DIVERGED if "diverged" in states else DONE
