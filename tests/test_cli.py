"""The command line: exit codes, messages, help, sweeps, and that bad input and help need no torch."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from runs import TINY

from metalearn import cells, cli, composing
from metalearn.ledger import CellDir
from metalearn.schema import GROUPS, MEMBERS, fields_of, groups_of
from metalearn.schema.groups import Trainer

SHORT = (*TINY, "trainer.max_steps=2", "trainer.val_every=0")


def ran(output, *arguments: str) -> list[str]:
    """The arguments of a short run with its results in `output`."""
    return [*SHORT, f"output_dir='{output}'", *arguments]


@pytest.fixture
def call(monkeypatch, capsys):
    """`call(*arguments)` is the console in this process: the exit code, standard output and standard error."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["metalearn", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        for handler in set(root.handlers) - set(before[0]):  # Hydra's own; its streams end with this test
            handler.close()
        root.handlers[:], root.level = before
        return (end.value.code, *capsys.readouterr())

    return run


def results(output: Path) -> dict[str, dict]:
    return {p.parent.name: json.loads(p.read_text()) for p in output.glob("runs/*/result.json")}


# ---- without torch -----------------------------------------------------------------------------------------------

DRIVER = """
import contextlib, io, json, sys
from metalearn.cli import main
found = []
for arguments in json.load(sys.stdin):
    sys.argv = ["metalearn", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""

USER = {
    "algorithm/mine.yaml": "defaults: [/schema/algorithm/maml@_here_, _self_]\nname: mine\nalpha: 0.125\n",
    "dataset_algorithm/sinusoid_mine.yaml": "# @package _global_\ndefaults: [override /backbone: mlp]\n",
    "experiment/p/single.yaml": "# @package _global_\ngrid: [{algorithm: mine, seed: 3}]\n",
    "experiment/p/several.yaml": "# @package _global_\ngrid: [{algorithm: [mine], seed: 4}, {seed: [5]}]\n",
}

QUIET = {
    "misspelt key": ["algorithm.alpa=1"],
    "misspelt name": ["algorithm=reptle"],
    "no option": ["--nope"],
    "reports": ["report", "--help"],
    "options of a report": ["report", "bounds", "--help"],
    "no report": ["report", "taylr"],
    "bad option of a report": ["report", "taylor", "--tasks", "3"],
    "several values": ["seed=1,2"],
    "a range": ["trainer.threads=range(3)"],
    "no group": ["--help", "nope"],
    "help": ["--help"],
    "help later": ["algorithm=maml", "-h"],
    "help trainer": ["--help", "trainer"],
    "help algorithm": ["--help", "algorithm"],
    "alpha": ["alpha", "--help"],
    "no alpha": ["alpha", "dataset=sinusoid", "algorithm=protonet"],
    "push": ["wandb", "push", "--help"],
    "push of nothing": ["wandb", "push", "--dry-run", "dataset=sinusoid", "output_dir=nowhere"],
    "no verb of wandb": ["wandb", "pusj"],
    "cfg": ["--cfg", "job", "+algorithm=reptile", "dataset=sinusoid", "seed=1", "++seed=3"],
    "cfg without data": ["--cfg", "job", "dataset=omniglot", "algorithm=protonet"],
    "cfg with bad input": ["--cfg", "job", "dataset=omniglot", "dataset.size=7"],
    "cfg of a sweep": ["-m", "dataset=sinusoid", "algorithm=maml,reptile", "algorithm.inner_batch=5,6", "--cfg", "job"],
}


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory):
    """The environment of a process in which importing torch or Lightning fails."""
    folder = tmp_path_factory.mktemp("fakes")
    for name in ("torch", "pytorch_lightning"):
        (folder / f"{name}.py").write_text("raise AssertionError('imported')\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def drive(calls, environment, cwd) -> list[list]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(calls),
        env=environment,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quiet(no_torch, tmp_path_factory):
    """What calls say that must not import torch, by name; they leave nothing behind."""
    folder = tmp_path_factory.mktemp("quiet")
    found = dict(zip(QUIET, drive(list(QUIET.values()), no_torch, folder), strict=True))
    assert not list(folder.iterdir())
    return found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("misspelt key", "algorithm.alpa: no such key for algorithm=maml; did you mean 'algorithm.alpha'?"),
        ("misspelt name", "algorithm=reptle: no such algorithm; did you mean 'reptile'?"),
        ("no option", "--nope: no such option"),
        ("no report", "report: taylr: must be one of"),
        ("bad option of a report", "--tasks: 3: must be a whole number >= 100"),
        ("no alpha", "alpha: algorithm=protonet: trains without plain gradient steps"),
        ("no verb of wandb", "wandb: pusj: must be push; did you mean 'push'?"),
        ("several values", "seed=1,2: several values need -m"),
        ("a range", "trainer.threads=range(3): several values need -m"),
        ("no group", "nope: no such group"),
        ("cfg with bad input", "dataset.size=7: must be >= 8"),
    ],
)
def test_bad_input_is_two_and_a_short_message(quiet, name, said):
    code, out, err = quiet[name]
    assert (code, out) == (2, "") and err.startswith("metalearn: ") and said in err and err.count("\n") <= 3


def test_reports_are_listed_and_described(quiet):
    for name, said in (("reports", "outputs/theory/NAME"), ("options of a report", "--sets")):
        code, out, err = quiet[name]
        assert (code, err) == (0, "") and said in out and "Corollary 1" in out


def test_alpha_is_described_without_torch(quiet):
    code, out, err = quiet["alpha"]
    assert (code, err) == (0, "") and "--tasks" in out and "2 / lambda_max" in out


def test_pushing_to_wandb_needs_no_torch(quiet):
    code, out, err = quiet["push"]
    assert (code, err) == (0, "") and "--offline FOLDER" in out and "WANDB_API_KEY" in out
    code, out, err = quiet["push of nothing"]
    assert (code, out) == (0, "") and "not started (dataset=sinusoid" in err and "no cell to push" in err


def test_help_names_every_group_member_and_key(quiet):
    for name in ("help", "help later"):
        code, out, err = quiet[name]
        assert (code, err) == (0, "")
        for group in (*GROUPS, "experiment"):
            assert group in out and all(member in out for member in composing.members(group))
        assert all(word in out for word in ("seed", "rerun", "output_dir", "exit codes"))
    code, out, _ = quiet["help trainer"]
    assert code == 0 and all(f"trainer.{name}" in out for name in fields_of(Trainer))
    assert "default 600" in out and "one of 32, 64" in out
    code, out, _ = quiet["help algorithm"]
    for target, schema in MEMBERS["algorithm"].items():
        assert code == 0 and target in out and all(f"algorithm.{name}" in out for name in fields_of(schema))


def test_cfg_shows_the_whole_run(quiet):
    """What is printed is the run itself, with a pair's departures and later arguments in force."""
    code, out, _ = quiet["cfg"]
    shown = yaml.safe_load(out)
    (cell,) = cells.expand(["algorithm=reptile", "dataset=sinusoid", "seed=3"])
    assert code == 0 and set(shown) == set(cell.config)
    groups = groups_of(cell.config)
    assert {group: set(shown[group]) for group in groups} == {group: set(cell.config[group]) for group in groups}
    assert cells.from_composed(OmegaConf.create(shown)).cell_id == cell.cell_id
    code, out, _ = quiet["cfg without data"]
    assert (code, yaml.safe_load(out)["dataset"]["root"], yaml.safe_load(out)["dataset"]["way"]) == (0, "???", 60)
    code, out, _ = quiet["cfg of a sweep"]
    assert code == 0 and yaml.safe_load(out)["algorithm"]["name"] == "maml"


def test_the_console(no_torch, tmp_path):
    """`python -m metalearn`: exit code and streams of the process."""
    done = subprocess.run(
        [sys.executable, "-m", "metalearn", "dataset=omniglot"],
        env=no_torch,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("metalearn: dataset.root is required") and done.stderr.count("\n") == 1


# ---- runs --------------------------------------------------------------------------------------------------------


def test_a_finished_cell_is_not_run_again(call, no_torch, tmp_path):
    """The second call shows the table and says so, without torch; `rerun=true` archives the old result."""
    arguments = ran(tmp_path)
    code, out, _ = call(*arguments)
    assert code == 0 and "maml on sinusoid" in out and "95% CI (tasks)" in out and "already finished" not in out
    ((cell_id, first),) = results(tmp_path).items()
    folder = tmp_path / "runs" / cell_id
    assert str(folder / "result.json") in out
    files = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    ((code, out, _),) = drive([arguments], no_torch, tmp_path)
    assert code == 0 and "maml on sinusoid" in out and "already finished; rerun=true runs it again" in out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == files
    assert call(*arguments, "rerun=true")[0] == 0
    assert json.loads((folder / "old/1/result.json").read_text()) == first
    again = results(tmp_path)[cell_id]
    assert again["metrics"] == first["metrics"] and again["config"]["rerun"]


@pytest.mark.parametrize("more", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
@pytest.mark.parametrize("below", ["", "/a/b"])
def test_output_under_a_file_is_refused(call, tmp_path, more, below):
    (tmp_path / "file").touch()
    code, out, err = call(*more, *ran(tmp_path / f"file{below}"))
    said = [line for line in err.splitlines() if line.startswith("metalearn: ")]
    assert (code, out) == (2, "") and "Traceback" not in err
    assert said == [f"metalearn: output_dir={tmp_path}/file{below}: {tmp_path}/file is a file; name a folder"]


def test_a_diverged_run_is_three_and_a_result(call, tmp_path):
    for _ in range(2):  # the second time it is finished
        code, out, _ = call(*ran(tmp_path, "algorithm.alpha=1e30"))
        assert code == 3 and "DIVERGED" in out and "meta-step 0" in out and "algorithm.alpha = 1e+30" in out
    ((cell_id, result),) = results(tmp_path).items()
    text = (tmp_path / "runs" / cell_id / "result.json").read_text()
    assert result["status"] == "diverged" and "NaN" not in text and "Infinity" not in text
    assert result["metrics"] == {} and result["steps"] == 0


def test_a_sweep_goes_on_after_failures(call, tmp_path):
    """One cell cannot make its folder, one diverges: 1, then 3 when the first can; finished ones are left alone."""
    arguments = ["-m", *ran(tmp_path, "algorithm.alpha=0.01,1e30", "seed=0,1")]
    found = cells.expand(arguments[1:])
    blocked = next(c for c in found if (c.config["algorithm"]["alpha"], c.config["seed"]) == (0.01, 0))
    obstacle = tmp_path / "runs" / blocked.cell_id
    obstacle.parent.mkdir()
    obstacle.write_text("in the way")
    code, out, err = call(*arguments)
    assert code == 1 and f"cell {blocked.cell_id} failed" in err and "4 cells, 0 of them finished" in err
    states = {i: r["status"] for i, r in results(tmp_path).items()}
    assert states == {
        c.cell_id: "done" if c.config["algorithm"]["alpha"] < 1 else "diverged" for c in found if c != blocked
    }
    assert all(c.cell_id in out for c in found)
    obstacle.unlink()
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/result.json")}
    code, out, err = call(*arguments)
    assert code == 3 and "4 cells, 3 of them finished" in err and len(results(tmp_path)) == 4
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert call(*ran(tmp_path, "seed=1"))[0] == 0 and len(results(tmp_path)) == 4


def test_a_sweep_over_members_with_different_keys(call, tmp_path):
    """Keys of one member alone, with one value or several."""
    only = ["algorithm.inner_batch=5", "algorithm.inner_state=carry,reset"]
    code, out, _ = call("--multirun", *ran(tmp_path, "algorithm=maml,reptile", *only))
    found = [r["config"]["algorithm"] for r in results(tmp_path).values()]
    assert code == 0 and out.count(" done ") == 3
    assert sorted((a["name"], a.get("inner_batch", 0), a.get("inner_state", "")) for a in found) == [
        ("maml", 0, ""),
        ("reptile", 5, "carry"),
        ("reptile", 5, "reset"),
    ]


def test_a_users_own_folder(call, tmp_path):
    """Members, departures and experiments; an experiment is a sweep without -m, and may have one cell."""
    for name, text in USER.items():
        file = tmp_path / "my conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    folder = ["--config-dir", str(tmp_path / "my conf")]
    plain = [a for a in SHORT if not a.startswith("algorithm=")]

    def settings(place):
        return sorted(
            (r["seed"], *(r["config"][g]["name"] for g in ("algorithm", "backbone")), r["config"]["logger"]["group"])
            for r in results(place).values()
        )

    for i, (arguments, expected) in enumerate({
        ("algorithm=mine", "+seed=2"): [(2, "mine", "mlp", None)],
        ("experiment=p/single",): [(3, "mine", "mlp", "p/single")],
        ("experiment=p/several",): [
            (4, "mine", "mlp", "p/several"),
            (5, "maml", "mlp_sine", "p/several"),
        ],
    }.items()):  # fmt: skip
        assert call(*folder, *plain, f"output_dir='{tmp_path / str(i)}'", *arguments)[0] == 0
        assert settings(tmp_path / str(i)) == expected


def test_options_and_hydras_own_overrides_in_any_order(call, tmp_path):
    """In a sweep of a mixture, whose members come from several files, one of them in a folder of one's own."""
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "conf" / "dataset" / "mine.yaml").write_text("defaults: [/schema/dataset/sinusoid@_here_, _self_]\n")
    given = ["hydra.verbose=false", "--config-dir", str(tmp_path / "conf"), "hydra.job.name=x"]
    members = ["dataset=mixture", "dataset.members=[mine,sinusoid]", "backbone=mlp_sine"]
    code, _, err = call("-m", *given, *ran(tmp_path, *members))
    assert code == 0, err
    (found,) = results(tmp_path).values()
    assert set(found["config"]["dataset"]["arguments"]) == {"mine", "sinusoid"}


def test_a_cell_that_another_process_runs_is_left_to_it(call, tmp_path):
    (cell,) = cells.expand(ran(tmp_path))
    held = CellDir(tmp_path, cell.cell_id)
    held.acquire()
    try:
        held.start(cell.config, cell.train_id)
        code, _, err = call(*ran(tmp_path))
    finally:
        held.release()
    assert code == 1 and f"cell {cell.cell_id} is being run by process {os.getpid()}" in err
    assert not results(tmp_path) and held.status["attempt"] == 1


def test_a_reader_that_has_enough_ends_it_quietly():
    """`metalearn --help | head -1`: no traceback, and the exit code of a program that SIGPIPE ends."""
    command = [sys.executable, "-c", "import sys; sys.argv[1:] = ['--help']; from metalearn.cli import main; main()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 128 + signal.SIGPIPE)
