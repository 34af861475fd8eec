"""`metalearn sweep run`: submit what is missing, and return at once. Imports no torch."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from metalearn import cells, launchers
from metalearn.options import Parser, config_dirs, read_cells, refuse_place
from metalearn.schema import BadInput
from metalearn.sweep import jobs, launch
from metalearn.sweep.standing import Standing, standings

TITLE = "submit the cells that have no result and that nobody runs, and return at once"
DESCRIPTION = f"""{TITLE}.

  metalearn sweep run experiment=<paper>/<id> hydra/launcher=slurm hydra.launcher.partition=gpu [key=value ...]

hydra/launcher=slurm submits one job array (hydra.launcher.array_parallelism jobs at a time, each of
hydra.launcher.cells_per_job cells); basic (the default) and joblib start one process of this machine that runs them
all. Nothing has to stay alive here. Killed cells go on from their last checkpoint; failed ones are left to
`metalearn sweep repair`."""


def main(arguments: Sequence[str]) -> int:
    """Submit missing and killed cells."""
    p = parser("sweep run", DESCRIPTION)
    left = {"failed": "metalearn sweep repair runs them again"}
    return submit(p, arguments, lambda s: s.state in ("missing", "killed") or s.cell.config["rerun"], left)


def parser(verb: str, description: str) -> Parser:
    """The options of both actions that submit."""
    p = Parser(verb, description)
    p.take_cells()
    p.add_argument("--dry-run", action="store_true", help="only list what would be submitted")
    return p


def submit(
    p: Parser, arguments: Sequence[str], wanted: Callable[[Standing], bool], left_alone: Mapping[str, str]
) -> int:
    """Submit the cells that are wanted and that nobody has in hand.

    Args:
        p: of the action.
        arguments: of the action.
        wanted: whether a cell that nobody has in hand is to be submitted.
        left_alone: what to say of cells that are not, by their state.

    Returns:
        The exit code: 2 if a cell cannot be run here, else 0.
    """
    options = p.parse_intermixed_args(list(arguments))
    launcher = launchers.settings(options.overrides, config_dirs(options))
    found = read_cells(options)
    for problem in dict.fromkeys(c.problem for c in found if c.problem):
        raise BadInput(problem)
    if launchers.executor(launcher) == "slurm" and not jobs.has_accounting():
        print("metalearn: sacct does not answer here: how a job that dies without a word ended will stay unknown",
              file=sys.stderr)  # fmt: skip
    output = found[0].config["output_dir"]
    if not options.dry_run:
        refuse_place(output)
    with nullcontext() if options.dry_run else launch.submitting(output):
        now = standings(found)
        chosen = [s.cell for s in now if wanted(s) and not s.under_way]
        left = [s for s in now if not s.finished and not s.under_way and s.cell not in chosen]
        print(launch.counts(now))
        if options.dry_run or not chosen:
            print(f"{'would submit' if options.dry_run else 'submitted'}: {len(chosen)} cells")
            for cell in chosen:
                print(f"  {shlex.join(cell.overrides)}")
        else:
            _submit(chosen, options, launcher, output)
    for state in dict.fromkeys(s.state for s in left):
        number = sum(s.state == state for s in left)
        print(f"left alone: {number} {state}{f'; {left_alone[state]}' if state in left_alone else ''}")
    return 0


def _submit(chosen: list[cells.Cell], options: argparse.Namespace, launcher: dict[str, Any], output: str) -> None:
    flags = [f"--config-dir={options.config_dir}"] if options.config_dir else []
    flags += [a for a in options.overrides if cells.is_hydra(a)]
    if launchers.executor(launcher) is None:
        pid, log = launch.in_background(chosen, flags, output)
        print(f"submitted: {len(chosen)} cells to process {pid} of this machine, log {log}")
        return
    found = launch.submit(chosen, flags, launcher)
    first, last = found[0].job, found[-1].job
    print(f"submitted: {len(chosen)} cells in {len(found)} jobs, {first}{'' if first == last else f' to {last}'}, "
          f"logs {found[0].log}{'' if first == last else ', ...'}")  # fmt: skip
