"""`metalearn wandb push`: a sweep's W&B runs, rebuilt from the files of its cells. Imports no torch."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metalearn import results, wandb_run
from metalearn.evaluation.metrics import qualifiers_of
from metalearn.ledger import CellDir, read_result, read_status
from metalearn.options import Parser, read_cells, whole
from metalearn.schema import BadInput
from metalearn.schema.keys import nearest
from metalearn.sweep.standing import STALE_SECONDS, age

Config = dict[str, Any]
DONE, SOME_FAILED = 0, 1
QUIET = {
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "disable_git": True,
    "disable_code": True,
}
"""W&B's settings that keep what is true of this machine, not of the run's, out of the run."""
DESCRIPTION = """\
Rebuild the W&B runs of a sweep from the local files alone: metrics.jsonl, result.json, status.json and config.yaml.

Each cell is one run whose id is the cell's, so that a second push continues what the first has made: W&B keeps the
history that it has, takes the meta-steps after it, and replaces configuration, tags, group and summary. Cells that were
killed, failed or diverged are pushed with their state; running ones are left out.

WANDB_API_KEY and WANDB_BASE_URL are honoured. With --offline or WANDB_MODE=offline nothing is sent: the runs are
written for `wandb sync FOLDER/wandb`, which uploads several at once.

  metalearn wandb push experiment=overview/speed
  metalearn wandb push --from outputs --dry-run
  metalearn wandb push algorithm=maml,anil seed=0,1 --project paper --group rebuttal

Exit codes: 0 all pushed, 1 some not (listed at the end), 2 bad input or no key."""


class Stored(NamedTuple):
    """A cell's files, read.

    state: done, diverged, failed or killed. group: its group in W&B. log: rows of the training log by meta-step.
    about: its summary in W&B.
    """

    folder: Path
    cell_id: str
    state: str
    config: Config
    group: str | None
    log: list[dict[str, Any]]
    about: dict[str, Any]


class Target(NamedTuple):
    """Where runs go: W&B's mode, the folder of its files, and what the command line sets; see `DESCRIPTION`."""

    mode: str
    folder: Path
    project: str | None
    entity: str | None
    seconds: float


def usage() -> str:
    """What the verb can do."""
    return "usage: metalearn wandb push [options] [group=member] [key=value] ...; see metalearn wandb push --help"


def main(arguments: Sequence[str]) -> int:
    """Run `metalearn wandb` and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return DONE
    if arguments[0] != "push":
        raise BadInput(f"wandb: {arguments[0]}: must be push{nearest(arguments[0], ['push'])}")
    options = _parser().parse_intermixed_args(list(arguments[1:]))
    folders, notes = _chosen(options)
    stored, failed = [], []
    for folder, group in folders:
        try:
            cell = read(folder, options.group or group)
        except (OSError, ValueError, KeyError) as error:
            failed.append(f"{folder}: cannot be read: {wandb_run.words(error)}")
            continue
        if cell.state == "running":
            notes.append(f"{cell.cell_id}: running, left out")
        else:
            stored.append(cell)
    if not stored:
        notes.append("no cell to push")
    elif options.dry_run:
        print(table(stored, options.project))
    else:
        failed += _push_all(stored, options)
    for line in (*notes, *failed):
        print(f"metalearn: {line}", file=sys.stderr)
    return SOME_FAILED if failed else DONE


def _parser() -> Parser:
    parser = Parser("wandb push", DESCRIPTION)
    parser.take_cells()
    parser.add_argument(
        "--from", dest="place", metavar="FOLDER", help="push all cells below a folder, or look for those named there"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be pushed; needs neither key nor W&B")
    parser.add_argument("--offline", metavar="FOLDER", help="write offline runs to FOLDER/wandb instead of uploading")
    parser.add_argument("--project", help="W&B project instead of the cells' logger.project")
    parser.add_argument("--entity", help="W&B user or team; default: WANDB_ENTITY, or the key's default")
    parser.add_argument("--group", help="W&B group instead of the cells' logger.group")
    parser.add_argument(
        "--timeout", type=whole(1), default=60, metavar="SECONDS", help="how long one run may take to begin or to end"
    )
    return parser


# ---- reading cells -----------------------------------------------------------------------------------------------


def _chosen(options: Any) -> tuple[list[tuple[Path, str | None]], list[str]]:
    """Folders of cells with the group that the command line gives them, and remarks on cells without one."""
    place = options.place
    if place is not None and not Path(place).is_dir():
        raise BadInput(f"--from {place}: no such folder")
    if not options.overrides:
        here = place or "outputs"
        found = {_id(f): f for f in sorted(_cells_below(Path(here)), reverse=True)}
        if not found:
            raise BadInput(f"--from {here}: no cells there")
        return [(f, None) for f in sorted(found.values())], []
    below = None if place is None else {_id(f): f for f in sorted(_cells_below(Path(place)), reverse=True)}
    folders, notes = [], []
    for cell in read_cells(options):
        directory = CellDir(cell.config["output_dir"], cell.cell_id).path
        folder = below.get(cell.cell_id) if below is not None else directory if _is_cell(directory) else None
        if cell.problem:
            notes.append(f"{' '.join(cell.overrides)}: cannot be named here: {cell.problem}")
        elif folder is None:
            notes.append(f"{cell.cell_id}: not started ({' '.join(cell.overrides)})")
        else:
            folders.append((folder, cell.config["logger"]["group"]))
    return folders, notes


def _cells_below(place: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(place):
        names[:] = [n for n in names if n not in results.NOT_RESULTS]
        if {"result.json", "status.json"} & set(files):
            names.clear()
            yield Path(folder)


def _is_cell(folder: Path) -> bool:
    return (folder / "result.json").is_file() or (folder / "status.json").is_file()


def _id(folder: Path) -> str:
    found: str = (read_result(folder / "result.json") or read_status(folder / "status.json")).get(
        "cell_id", folder.name
    )
    return found


def read(folder: Path, group: str | None = None) -> Stored:
    """A cell's files.

    Args:
        folder: the cell's.
        group: in W&B; None for the configuration's.

    Raises:
        OSError, ValueError, KeyError: if what there must be is not there.
    """
    result, status = read_result(folder / "result.json"), read_status(folder / "status.json")
    path = folder / "metrics.jsonl"
    log = results.read_log(path).to_dict("records") if path.is_file() else []
    rows = [{str(k): v for k, v in row.items()} for row in log]
    if result is not None:
        config, state, about = result["config"], result["status"], wandb_run.summary(result)
    else:
        config, state = _config(folder), _state(status)
        about = {k: status[k] for k in ("cell_id", "train_id")} | {"status": state}
        about["steps"] = max((row["step"] for row in rows), default=0)
    error = (result or status).get("error")
    about |= {"error": error}  # also none: a run that is continued keeps what nobody replaces
    return Stored(folder, about["cell_id"], state, config, group or config["logger"]["group"], rows, about)


def _config(folder: Path) -> Config:
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text())
    if not isinstance(config, dict):
        raise ValueError("config.yaml holds no configuration")
    return config


def _state(status: Mapping[str, Any]) -> str:
    """How far a cell without a result is: running, failed or killed."""
    if status["state"] == "failed":
        return "failed"
    return "running" if status["state"] == "running" and age(status["heartbeat"]) < STALE_SECONDS else "killed"


# ---- telling -----------------------------------------------------------------------------------------------------


def table(cells: Sequence[Stored], project: str | None = None) -> str:
    """What would be pushed, one line a cell."""
    rows = [("id", "state", "rows", "last step", "project", "group", "tags", "headline")]
    for c in cells:
        last = str(c.log[-1]["step"]) if c.log else "-"
        where = (project or c.config["logger"]["project"], c.group or "-", ",".join(wandb_run.tags(c.config)))
        rows.append((c.cell_id, c.state, str(len(c.log)), last, *where, _headline(c)))
    aligned = [str.ljust, str.ljust, str.rjust, str.rjust, *[str.ljust] * 4]
    columns = [
        [align(value, max(map(len, column))) for value in column]
        for align, column in zip(aligned, zip(*rows, strict=True), strict=True)
    ]
    lines = ["  ".join(row) for row in zip(*columns, strict=True)]
    many = "run" if len(cells) == 1 else "runs"
    return "\n".join(line.rstrip() for line in lines) + f"\n{len(cells)} {many}"


def _headline(cell: Stored) -> str:
    if cell.state != "done":
        return str(cell.about["error"] or "-").splitlines()[0][:60]
    metrics = (read_result(cell.folder / "result.json") or {})["metrics"]
    name = next((n for n in metrics if not qualifiers_of(n)), None)
    return "-" if name is None or metrics[name]["mean"] is None else f"{name} {metrics[name]['mean']:.4f}"


# ---- pushing -----------------------------------------------------------------------------------------------------


def _push_all(cells: Sequence[Stored], options: Any) -> list[str]:
    """Push cell by cell; returns what failed. A server that has gone ends it."""
    mode = _mode(options.offline)
    online = mode not in wandb_run.OFFLINE
    if online and (problem := _no_server(options.timeout)):
        return [f"{problem}; nothing was pushed"]
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="metalearn-wandb-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary if online else options.offline or os.environ.get("WANDB_DIR", "."))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--offline {folder}: {error.strerror}; name a folder that can be written to") from None
        target = Target(mode, folder, options.project, options.entity, options.timeout)
        for i, cell in enumerate(cells, 1):
            try:
                where = push(cell, target)
            except Exception as error:  # one run that cannot be pushed must not stop the others
                failed.append(f"{cell.cell_id}: not pushed: {wandb_run.words(error)}")
                print(f"[{i}/{len(cells)}] {cell.cell_id}  {cell.state}: FAILED", flush=True)
                if online and i < len(cells) and (problem := _no_server(options.timeout)):
                    return [*failed, f"{problem}; {len(cells) - i} more not tried"]
            else:
                print(f"[{i}/{len(cells)}] {cell.cell_id}  {cell.state}  {where}", flush=True)
    many = len(cells) - len(failed)
    print(f"{many} of {len(cells)} runs " + ("pushed" if online else f"written; upload: wandb sync {folder / 'wandb'}"))
    return failed


def push(cell: Stored, target: Target) -> str:
    """Make or continue the W&B run of a cell; returns its address, or its folder if it was written offline.

    Raises:
        Exception: whatever W&B raises, and OSError if it has not taken everything.
    """
    section = cell.config["logger"] | {"group": cell.group}
    section |= {"project": target.project} if target.project else {}
    online = target.mode not in wandb_run.OFFLINE
    run = wandb_run.start(
        cell.config | {"logger": section},
        cell.cell_id,
        target.folder,
        target.mode,
        entity=target.entity,
        resume=online,
        init_timeout=target.seconds,
        finish_timeout=target.seconds,
        finish_timeout_raises=True,
        **QUIET,
    )
    try:
        for row in cell.log:
            if row["step"] >= run.starting_step:  # W&B would warn of each that it has
                values = {k: v for k, v in row.items() if k != "step"}
                run.log(wandb_run.history_row(values), step=row["step"])
    finally:
        wandb_run.finish(run, cell.about, wandb_run.EXIT_CODES[cell.state], target.seconds + 10)
    if errors := wandb_run.upload_errors(run):
        raise OSError(errors[-1])
    return str(run.url if online else Path(run.settings.sync_dir))


def _mode(offline: str | None) -> str:
    mode = os.environ.get("WANDB_MODE", "online")
    if offline is not None or mode in wandb_run.OFFLINE:
        return "offline"
    if mode not in ("online", "run", "shared"):
        raise BadInput(f"WANDB_MODE={mode}: nothing can be pushed; use online or offline")
    return "online"


def _no_server(seconds: float) -> str | None:
    """Why nothing can be uploaded, if so.

    Raises:
        BadInput: if no key is known.
    """
    try:
        known = wandb_run.known_key()
    except Exception as error:
        raise BadInput(f"wandb push: {wandb_run.words(error)}") from None
    if not known:
        raise BadInput("wandb push: no API key is known; set WANDB_API_KEY, run wandb login, or use --offline FOLDER")
    try:
        wandb_run.check_server(seconds)
    except Exception as error:
        return f"W&B's server cannot be used: {wandb_run.words(error)}"
    return None
