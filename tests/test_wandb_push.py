"""`metalearn wandb push`: what reaches W&B's file and W&B's server is what the local files say."""

import json
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import wandb
import wandb_file
import yaml
from runs import cell_of
from wandb_server import WandbServer

from metalearn import wandb_push
from metalearn.schema import BadInput

KEY = "0123456789" * 4
METRICS = {
    "mse": {"mean": 0.25, "std": 0.5, "ci95": 0.04, "n": 600, "interval": "tasks", "unit": "target^2"},
    "mse@step=0": {"mean": 3.5, "std": 0.5, "ci95": 0.04, "n": 600, "interval": "tasks", "unit": "target^2"},
    "mse@group=line": {"mean": 0.125, "std": None, "ci95": None, "n": 1, "interval": "tasks", "unit": "target^2"},
}
LOG = [  # the second attempt goes on from meta-step 10
    {"attempt": 1, "step": 10, "loss": 4.0, "lr": 0.001, "seconds": 1.5},
    {"attempt": 1, "step": 10, "val_mse": 2.0, "val_loss": 2.0, "seconds": 1.75},
    {"attempt": 1, "step": 20, "loss": 3.0, "lr": 0.001, "seconds": 2.5},
    {"attempt": 2, "step": 20, "loss": 3.25, "lr": 0.001, "seconds": 2.75},
    {"attempt": 2, "step": 30, "loss": None, "lr": 0.001, "seconds": 3.5},
]
HISTORY = {
    10: {"attempt": 1, "loss": 4.0, "lr": 0.001, "val_mse": 2.0, "val_loss": 2.0, "seconds": 1.75},
    20: {"attempt": 2, "loss": 3.25, "lr": 0.001, "seconds": 2.75},
    30: {"attempt": 2, "lr": 0.001, "seconds": 3.5},
}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """No key, server or settings but the test's own; W&B reads them when it is set up."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_DIR", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch):
    with WandbServer() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield found
        wandb.teardown()


def stored(output: Path, state: str, *overrides: str, silent: float = 3600, log=LOG, **more) -> str:
    """The files of a cell in some state; returns its id."""
    cell = cell_of(output, *overrides)
    folder = output / "runs" / cell.cell_id
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log) + '{"attempt": 2, "st')
    (folder / "config.yaml").write_text(yaml.safe_dump(cell.config, sort_keys=False))
    beat = datetime.now(timezone.utc) - timedelta(seconds=silent)
    about = {"cell_id": cell.cell_id, "train_id": cell.train_id}
    status = about | {"state": state, "attempt": 2, "heartbeat": beat.isoformat(timespec="seconds"), "error": None}
    (folder / "status.json").write_text(json.dumps(status | more))
    if state in ("done", "diverged"):
        result = about | {
            "config": cell.config,
            "status": state,
            "steps": 30,
            "seconds": 3.75,
            "seed": 0,
            "protocol": {},
        }
        result |= {"git_commit": "abc", "metrics": METRICS if state == "done" else {}}
        (folder / "result.json").write_text(json.dumps(result | more))
    return cell.cell_id


def sweep(output: Path) -> dict[str, str]:
    """One cell of each state, by state."""
    return {
        "done": stored(output, "done", "logger.group=g", "logger.tags=[extra]"),
        "diverged": stored(output, "diverged", "seed=1", error="loss is nan at meta-step 31"),
        "failed": stored(output, "failed", "seed=2", error="OSError: disk full"),
        "killed": stored(output, "running", "seed=3", log=LOG[:3]),
    }


SUMMARY = {
    "test_mse": 0.25, "test_mse_ci95": 0.04, "test_mse_n": 600,
    "test_mse_step_0": 3.5, "test_mse_step_0_ci95": 0.04, "test_mse_step_0_n": 600,
    "test_mse_group_line": 0.125, "test_mse_group_line_n": 1,
    "status": "done", "steps": 30, "total_seconds": 3.75, "git_commit": "abc",
}  # fmt: skip


def about(summary: dict) -> dict:
    """The summary without the last values of the history, which W&B puts in, and without what is null."""
    history = {name for row in HISTORY.values() for name in row}
    return {k: v for k, v in summary.items() if k[0] != "_" and k not in history and k != "train_id" and v is not None}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    stored(tmp_path / "out", "done")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--offline .*file: .*; name a folder that can be written to"):
        wandb_push.main(["push", "--from", str(tmp_path / "out"), "--offline", str(tmp_path / "file")])


def test_offline_runs_say_what_the_files_say(tmp_path, capsys):
    ids = sweep(tmp_path / "out")
    assert wandb_push.main(["push", "--from", str(tmp_path / "out"), "--offline", str(tmp_path / "w")]) == 0
    assert f"4 of 4 runs written; upload: wandb sync {tmp_path / 'w' / 'wandb'}" in capsys.readouterr().out
    found = {}
    for path in tmp_path.glob("w/wandb/offline-run-*/*.wandb"):
        run = wandb_file.read_ended(path)
        found[run.run.run_id] = run
    assert set(found) == set(ids.values())
    for state, cell_id in ids.items():
        run, folder = found[cell_id], tmp_path / "out" / "runs" / cell_id
        steps = [10, 20] if state == "killed" else [10, 20, 30]
        rows = {step: {k: v for k, v in row.items() if k[0] != "_"} for step, row in run.history.items()}
        if state == "killed":
            assert rows == {10: HISTORY[10], 20: {"attempt": 1, "loss": 3.0, "lr": 0.001, "seconds": 2.5}}
        else:
            assert rows == {step: HISTORY[step] for step in steps}
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert run.config == config and run.run.project == "metalearn" and run.run.job_type == "train"
        assert run.run.run_group == ("g" if state == "done" else "")
        assert list(run.run.tags) == ["maml", "sinusoid", *(["extra"] if state == "done" else [])]
        assert run.summary["status"] == state and run.summary["cell_id"] == cell_id
        assert run.exit_code == {"done": 0, "diverged": 3, "failed": 1, "killed": 255}[state]
    assert about(found[ids["done"]].summary) == SUMMARY | {"cell_id": ids["done"]}
    assert found[ids["failed"]].summary["error"] == "OSError: disk full"
    assert found[ids["diverged"]].summary["error"] == "loss is nan at meta-step 31"
    assert found[ids["killed"]].summary["steps"] == 20


def test_wandb_sync_lists_what_was_written(tmp_path):
    """The command that the message names finds the runs."""
    stored(tmp_path / "out", "done")
    assert wandb_push.main(["push", "--from", str(tmp_path / "out"), "--offline", str(tmp_path / "w")]) == 0
    (run,) = tmp_path.glob("w/wandb/offline-run-*/*.wandb")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(tmp_path / "w" / "wandb")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "Would sync 1 run" in done.stdout + done.stderr
    assert run.name in done.stdout + done.stderr


def test_online_runs_say_what_the_files_say(tmp_path, server, capsys):
    out = tmp_path / "out"
    ids = {"done": stored(out, "done"), "failed": stored(out, "failed", "seed=2", error="OSError: disk full")}
    arguments = ["push", "--from", str(tmp_path / "out"), "--project", "paper", "--group", "all", "--entity", "team"]
    assert wandb_push.main(arguments) == 0, capsys.readouterr().err
    assert set(server.runs) == set(ids.values())
    for state, cell_id in ids.items():
        run = server.runs[cell_id]
        config = yaml.safe_load((tmp_path / "out" / "runs" / cell_id / "config.yaml").read_text())
        assert run.config == config | {"logger": config["logger"] | {"project": "paper", "group": "all"}}
        assert run.history == HISTORY
        assert run.summary["status"] == state and run.summary["cell_id"] == cell_id
        assert run.exit_code == {"done": 0, "failed": 1}[state]
        assert (run.fields["groupName"], run.fields["jobType"], run.fields["project"]) == ("all", "train", "paper")
        assert run.fields["tags"][:2] == ["maml", "sinusoid"]
    assert server.runs[ids["failed"]].summary["error"] == "OSError: disk full"
    assert about(server.runs[ids["done"]].summary) == SUMMARY | {"cell_id": ids["done"]}
    assert f"/runs/{ids['done']}" in capsys.readouterr().out  # the run's address


def test_a_second_push_goes_on_with_the_first(tmp_path, server):
    """A killed cell is pushed, finishes later, and is pushed again: one run, each meta-step once, nothing stale."""
    out = tmp_path / "out"
    cell_id = stored(out, "killed", log=LOG[:3], error="USR1: saved at meta-step 20")
    arguments = ["push", "--from", str(out)]
    assert wandb_push.main(arguments) == 0
    first = server.runs[cell_id]
    assert list(first.history) == [10, 20] and first.summary["error"] and first.exit_code == 255
    for path in sorted((out / "runs" / cell_id).iterdir()):
        path.unlink()
    (out / "runs" / cell_id).rmdir()
    assert stored(out, "done", "logger.tags=[later]") == cell_id
    assert wandb_push.main(arguments) == 0
    assert list(server.runs) == [cell_id]
    run = server.runs[cell_id]
    assert list(run.history) == [10, 20, 30] and run.history[30] == HISTORY[30]
    assert run.history[20]["attempt"] == 1  # W&B keeps what it has
    assert about(run.summary) == SUMMARY | {"cell_id": cell_id} and "error" not in run.summary
    assert run.config["logger"]["tags"] == ["later"] and "later" in run.fields["tags"] and run.exit_code == 0
    before = dict(run.lines["wandb-history.jsonl"])
    assert wandb_push.main(arguments) == 0  # nothing new
    assert run.lines["wandb-history.jsonl"] == before


def test_one_run_that_fails_does_not_stop_the_others(tmp_path, server, capsys):
    """Rejected history ends no run by itself: W&B's client only notes it."""
    bad, good = sorted((stored(tmp_path / "out", "done"), stored(tmp_path / "out", "done", "seed=1")))
    server.trouble = lambda path, run: 400 if path.endswith("file_stream") and run == bad else None
    assert wandb_push.main(["push", "--from", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert f"{bad}: not pushed: " in err and "400" in err and "1 of 2 runs pushed" in out
    assert server.runs[good].history == HISTORY


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 0])
def test_a_server_that_answers_nothing_ends_it_soon(tmp_path, server, capsys, status):
    sweep(tmp_path / "out")
    server.trouble = lambda path, run: status
    began = time.monotonic()
    assert wandb_push.main(["push", "--from", str(tmp_path / "out"), "--timeout", "5"]) == 1
    assert time.monotonic() - began < 60
    err = capsys.readouterr().err
    assert "W&B's server cannot be used" in err and "nothing was pushed" in err and "Traceback" not in err
    assert not server.runs


@pytest.mark.slow
def test_a_server_that_goes_away_ends_it_soon(tmp_path, server, capsys):
    """After the first run, every request fails: the second run fails, and the others are not tried."""
    ids = sorted(sweep(tmp_path / "out").values())
    gone = []
    server.trouble = lambda path, run: 500 if gone or (run == ids[1] and not gone.append(run)) else None
    began = time.monotonic()
    assert wandb_push.main(["push", "--from", str(tmp_path / "out"), "--timeout", "5"]) == 1
    assert time.monotonic() - began < 90
    err = capsys.readouterr().err
    assert f"{ids[1]}: not pushed" in err and "2 more not tried" in err


@pytest.mark.slow
def test_the_console_asks_for_no_key(tmp_path):
    """Without a key: one line, exit code 2, and no question, also on a terminal."""
    import os
    import pty

    stored(tmp_path / "out", "done")
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "metalearn", "wandb", "push", "--from", str(tmp_path / "out")],
        stdin=follower, stdout=follower, stderr=subprocess.PIPE, text=True, timeout=100,
    )  # fmt: skip
    os.close(follower), os.close(leader)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "metalearn: wandb push: no API key is known; set WANDB_API_KEY, run wandb login, or use --offline FOLDER"
    ]


def test_a_key_that_cannot_be_one(tmp_path, monkeypatch):
    stored(tmp_path / "out", "done")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(BadInput, match="WANDB_API_KEY invalid"):
        wandb_push.main(["push", "--from", str(tmp_path / "out")])


def test_dry_run_shows_the_cells_of_a_command_line(tmp_path, capsys):
    """Chosen by keys: those that were started, with their group; running ones and missing ones are told."""
    out = tmp_path / "out"
    done, killed = stored(out, "done", "logger.group=own"), stored(out, "killed", "seed=1", error="USR1: saved")
    running = stored(out, "running", "seed=2", silent=1)
    stored(out, "done", "seed=9")
    missing = cell_of(out, "seed=3").cell_id
    tiny = cell_of(out).overrides
    given = [o for o in tiny if not o.startswith("seed=")]
    assert wandb_push.main(["push", *given, "seed=0,1,2,3", "--dry-run", "--group", "G"]) == 0
    shown, told = capsys.readouterr()
    rows = [line.split() for line in shown.splitlines()]
    assert [row[:2] for row in rows[1:-1]] == [[done, "done"], [killed, "killed"]] and rows[-1] == ["2", "runs"]
    assert rows[1][2:] == ["3", "30", "metalearn", "G", "maml,sinusoid", "mse", "0.2500"]
    assert f"{running}: running, left out" in told and f"{missing}: not started" in told
    assert wandb_push.main(["push", *given, "--from", str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[5] == "own"


def test_cells_of_an_experiment_get_its_name_as_group(tmp_path, capsys):
    conf, out = tmp_path / "conf", tmp_path / "out"
    (conf / "experiment" / "p").mkdir(parents=True)
    (conf / "experiment" / "p" / "x.yaml").write_text("# @package _global_\ngrid: [{seed: [0, 1]}]\n")
    stored(out, "done"), stored(out, "done", "seed=1")
    tiny = [o for o in cell_of(out).overrides if not o.startswith("seed=")]
    assert wandb_push.main(["push", "--dry-run", "-cd", str(conf), *tiny, "experiment=p/x"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[5] for row in rows[1:-1]] == ["p/x", "p/x"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["push", "--from", "nowhere"], "--from nowhere: no such folder"),
        (["push", "--from", "."], "no cells there"),
        (["pull"], "wandb: pull: must be push"),
        (["push", "--timeout", "0"], "must be a whole number >= 1"),
    ],
)
def test_bad_input(arguments, says):
    with pytest.raises(BadInput, match=says):
        wandb_push.main(arguments)


def test_an_unreadable_cell_is_listed(tmp_path, capsys):
    good, bad = stored(tmp_path, "killed"), stored(tmp_path, "killed", "seed=1")
    (tmp_path / "runs" / bad / "config.yaml").unlink()
    assert wandb_push.main(["push", "--from", str(tmp_path), "--dry-run"]) == 1
    shown, told = capsys.readouterr()
    assert good in shown and bad not in shown and f"{bad}: cannot be read" in told


def test_written_runs_are_uploaded_by_wandb_sync(tmp_path, server):
    """The two steps of a machine without network end where an upload ends."""
    cell_id = stored(tmp_path / "out", "done", "logger.group=g")
    assert wandb_push.main(["push", "--from", str(tmp_path / "out"), "--offline", str(tmp_path / "w")]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(tmp_path / "w" / "wandb")],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = server.runs[cell_id]
    assert run.history == HISTORY and about(run.summary) == SUMMARY | {"cell_id": cell_id}
    assert run.fields["groupName"] == "g" and run.exit_code == 0
    assert run.config == yaml.safe_load((tmp_path / "out" / "runs" / cell_id / "config.yaml").read_text())
