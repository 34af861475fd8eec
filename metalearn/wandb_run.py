"""A cell as a W&B run: its names, group, tags, configuration and summary, whoever writes it. Imports no torch."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalearn.schema import subject

if TYPE_CHECKING:
    import wandb

Config = dict[str, Any]
JOB_TYPE = "train"
OFFLINE = ("offline", "dryrun")
"""The values of WANDB_MODE that write to the disk alone."""
EXIT_CODES = {"done": 0, "diverged": 3, "failed": 1, "killed": 255}
"""How a W&B run ends for each state of a cell; W&B shows 0 as finished, 255 as killed, and others as failed."""


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names of letters, digits and underscores, as W&B's queries want them; different names stay different."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        base = plain = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "_"
        number = 1
        while plain in taken:
            number += 1
            plain = f"{base}_{number}"
        taken.add(plain)
        found[name] = plain
    return found


def history_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the training log under W&B's names, without what is missing or not finite."""
    values = {k: v for k, v in row.items() if v is not None and not (isinstance(v, float) and not math.isfinite(v))}
    names = plain_names(values)
    return {names[k]: v for k, v in values.items()}


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished cell shows in W&B's table of runs: `test_<metric>` with `_ci95` and `_n`, status, and names."""
    metrics = result["metrics"]
    names = plain_names(metrics)
    shown: dict[str, Any] = {}
    for name, metric in metrics.items():
        plain = f"test_{names[name]}"
        shown |= {plain: metric["mean"], f"{plain}_ci95": metric["ci95"], f"{plain}_n": metric["n"]}
    about = {k: result[k] for k in ("cell_id", "train_id", "status", "steps", "git_commit", "error") if k in result}
    about["total_seconds"] = result["seconds"]  # of the log's columns W&B shows the last value under their own names
    return {k: v for k, v in (about | shown).items() if v is not None}


def tags(config: Config) -> list[str]:
    """Algorithm and data set, or the study, and the user's own."""
    return list(dict.fromkeys([*subject(config), *config["logger"]["tags"]]))


def start(
    config: Config,
    run_id: str,
    folder: Path,
    mode: str,
    *,
    entity: str | None = None,
    resume: bool = False,
    **settings: Any,
) -> wandb.Run:
    """Begin a run; W&B asks and prints nothing.

    Args:
        config: the cell's, whose section `logger` names project, group and further tags.
        run_id: W&B's name of the run; `resume` continues one of that name.
        folder: where W&B makes its own folder `wandb/`.
        mode: as WANDB_MODE.
        entity: W&B's user or team; None for the environment's, or the default of the key.
        resume: see above.
        settings: W&B's, over ours.

    Raises:
        PermissionError: if an upload is asked for and no key is known.
        Exception: whatever W&B raises.
    """
    import wandb

    ours: dict[str, Any] = {"silent": True, "console": "off"}
    if mode not in (*OFFLINE, "disabled") and not known_key():
        raise PermissionError("no API key is known; set WANDB_API_KEY, or run wandb login")
    section = config["logger"]
    return wandb.init(
        project=section["project"],
        entity=entity,
        dir=str(folder),
        id=run_id,
        name="_".join([*subject(config), str(config["seed"])]),
        group=section["group"],
        job_type=JOB_TYPE,
        tags=tags(config),
        config=config,
        mode=mode,  # type: ignore[arg-type]
        resume="allow" if resume else None,
        reinit="create_new",  # otherwise a run that a failed cell left open would get this cell's numbers
        settings=wandb.Settings(**(ours | settings)),
    )


def known_key() -> bool:
    """Whether W&B's server will be given a key (environment, settings or netrc); asks nobody, sends nothing.

    Raises:
        wandb.errors.AuthenticationError: if there is one that cannot be a key.
    """
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    return bool(wandb.login(prompt=False, verify=False))


def check_server(seconds: float) -> None:
    """Have W&B's server accept the key.

    Args:
        seconds: how long to wait for it.

    Raises:
        wandb.errors.AuthenticationError: if it does not, or does not answer.
    """
    import wandb

    wandb.Api(timeout=max(1, int(seconds)))  # verifies; wandb.login does so only once in a process


def finish(run: wandb.Run, shown: Mapping[str, Any], exit_code: int, seconds: float) -> None:
    """Give a run its summary and end it.

    Args:
        run: see above.
        shown: the summary's new values.
        exit_code: see `EXIT_CODES`.
        seconds: how long that may take; more than the run's `finish_timeout`, within which W&B's process gives up by
            itself.

    Raises:
        TimeoutError: if it takes longer.
        Exception: whatever W&B raises; its process has been given up then, and the next run starts another.
    """
    raised: list[Exception] = []

    def work() -> None:
        try:
            run.summary.update(dict(shown))
            run.finish(exit_code=exit_code)
        except TimeoutError as error:  # the process lives, its server does not
            raised.append(error)
        except Exception as error:
            raised.append(error)
            _forget_process()

    thread = threading.Thread(target=work, daemon=True, name="end of W&B run")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _forget_process(kill=True)
        raise TimeoutError(f"no answer within {seconds:g} s")
    if raised:
        raise raised[0]


def _forget_process(kill: bool = False) -> None:
    """Let the next run start a new W&B process: this one is lost, and would hold up our exit."""
    import wandb

    with suppress(Exception):
        if kill:  # there is no public way
            wandb.setup()._connection._proc._process.kill()  # type: ignore[union-attr]
    with suppress(Exception, SystemExit):  # teardown ends *us* if its process ended badly
        wandb.teardown()


def upload_errors(run: wandb.Run) -> list[str]:
    """What W&B's process could not upload of a finished run, by its own log; `finish` does not tell."""
    found = []
    with suppress(FileNotFoundError):
        for line in Path(run.settings.log_internal).read_text(errors="replace").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if str(entry.get("level", "")).startswith("ERROR"):
                    found.append(str(entry.get("msg")))
    return found


def words(error: Exception) -> str:
    """An exception as one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
