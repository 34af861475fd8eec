"""Files that are whole or not there, one writer at a time, and checkpoints that can be trusted."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metalearn import ledger
from metalearn.ledger import (
    Busy,
    CellDir,
    Checkpoints,
    note_trained,
    read_json,
    trained_by,
    write_atomically,
    write_json,
)


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def crash(monkeypatch):
    """`crash("replace")` makes this call of the operating system the last one."""

    def at(call: str) -> None:
        def end(*arguments, **options):
            raise Crash

        monkeypatch.setattr(os, call, end)

    yield at
    monkeypatch.undo()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file(tmp_path, crash, monkeypatch, call):
    path = tmp_path / "new folder" / "file.json"
    write_json(path, {"a": 1})
    crash(call)
    with pytest.raises(Crash):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    monkeypatch.undo()
    write_json(path, {"a": 3})
    assert read_json(path) == {"a": 3} and [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_what_json_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            write_json(path, {"a": value})
    assert read_json(path) == {"a": 1}


def test_what_is_no_whole_json_reads_as_nothing(tmp_path):
    (tmp_path / "torn.json").write_text('{"a": 1')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for name in ("torn.json", "bytes.json", "missing.json", "torn.json/below.json"):
        assert read_json(tmp_path / name) is None


def python(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """SIGKILL in the middle of endless writing of large files."""
    code = (
        "import sys; from pathlib import Path; from metalearn.ledger import write_json\n"
        "n = 0\n"
        "while n := n + 1:\n"
        "    write_json(Path(sys.argv[1]), [n] * 200_000)\n"
        "    if n == 2: print('writing', flush=True)\n"
    )
    for wait in (0.01, 0.05):
        with python(code, tmp_path / "file.json") as writer:
            assert writer.stdout.readline() == "writing\n"
            time.sleep(wait)
            writer.kill()
        found = read_json(tmp_path / "file.json")
        assert len(found) == 200_000 and set(found) == {found[0]} and found[0] >= 2


HOLD = (
    "import sys; from metalearn.ledger import CellDir\n"
    "cell = CellDir(sys.argv[1], 'abc'); cell.acquire(); cell.start({}, 'def')\n"
    "print('held', flush=True); sys.stdin.read()\n"
)


def test_one_process_at_a_time_holds_a_cell(tmp_path):
    """The second one is told who holds it; the kernel frees the lock of a killed process."""
    cell = CellDir(tmp_path, "abc")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Busy, match=f"abc .*{holder.pid}.*{socket.gethostname()}.*attempt 1"):
            cell.acquire()
        CellDir(tmp_path, "another").acquire()
        assert cell.status["state"] == "running" and cell.status["pid"] == holder.pid
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    cell.acquire()
    assert cell.start({}, "def") == 2
    cell.release()


def test_a_cell_in_a_lock_without_status_is_busy_too(tmp_path):
    held, other = CellDir(tmp_path, "abc"), CellDir(tmp_path, "abc")
    held.acquire()
    with pytest.raises(Busy, match="abc"):
        other.acquire()
    held.release()
    other.acquire()
    other.release()


def test_status_tells_attempt_state_and_progress(tmp_path, monkeypatch):
    cell = CellDir(tmp_path, "abc")
    assert cell.status == {} and cell.result is None
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert cell.start({}, "def") == 1
    began = cell.status
    assert (began["cell_id"], began["train_id"], began["pid"]) == ("abc", "def", os.getpid())
    assert (began["state"], began["slurm_job_id"], began["error"]) == ("running", "77", None)
    cell.beat(step=3)
    assert "step" not in cell.status  # at most one line in ten seconds
    monkeypatch.setattr(ledger, "HEARTBEAT_SECONDS", 0.0)
    cell.beat(step=4)
    assert cell.status["step"] == 4 and cell.status["heartbeat"] >= began["started"]
    cell.finish("failed", "ValueError: no")
    assert (cell.status["state"], cell.status["error"]) == ("failed", "ValueError: no")
    again = CellDir(tmp_path, "abc")
    assert again.start({}, "def") == 2 and again.status["error"] is None
    again.finish("killed")
    assert again.start({}, "def") == 3
    again.finish("failed")
    assert again.status["failures"] == 2


def test_archiving_keeps_every_old_run(tmp_path):
    cell = CellDir(tmp_path, "abc")
    for run in (1, 2, 3):
        write_json(cell.path / "result.json", run)
        write_atomically(cell.path / "checkpoints" / "last-1.ckpt", b"x")
        cell.archive()
        assert cell.result is None and [p.name for p in cell.path.iterdir()] == ["old"]
        assert read_json(cell.path / "old" / str(run) / "result.json") == run
        assert (cell.path / "old" / str(run) / "checkpoints" / "last-1.ckpt").exists()


def test_an_interrupted_archiving_leaves_the_cell_unfinished(tmp_path, monkeypatch):
    """The result goes first, so that what is left never passes for finished."""
    cell = CellDir(tmp_path, "abc")
    for name in ("a.json", "result.json", "z.json"):
        write_json(cell.path / name, name)
    real, calls = os.replace, []

    def once(*paths):
        if calls:
            raise Crash
        calls.append(paths)
        real(*paths)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(Crash):
        cell.archive()
    assert cell.result is None and read_json(cell.path / "old/1/result.json") == "result.json"


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def save(checkpoints: Checkpoints, kind: str, *steps: int, text: str = "state") -> None:
    for step in steps:
        checkpoints.save(kind, step, lambda file, step=step: file.write(f"{text} {step}".encode()))


def content(checkpoints: Checkpoints, kind: str = "last", step: int | None = None) -> bytes | None:
    found = checkpoints.load(kind, step)
    return None if found is None else found[1]


def files(checkpoints: Checkpoints) -> set[str]:
    return {p.name for p in checkpoints.folder.iterdir()}


def test_two_generations_of_each_kind_are_kept(checkpoints):
    assert checkpoints.generations("last") == [] and content(checkpoints) is None
    save(checkpoints, "best", 1)
    save(checkpoints, "last", 1, 2, 3)
    assert [e["step"] for e in checkpoints.generations("last")] == [3, 2]
    assert files(checkpoints) == {
        *("last.json", "last-00000003.ckpt", "last-00000002.ckpt", "best.json", "best-00000001.ckpt")
    }
    assert content(checkpoints) == b"state 3" and content(checkpoints, step=2) == b"state 2"
    assert content(checkpoints, step=1) is None and content(checkpoints, "best") == b"state 1"


def test_saving_a_step_again_keeps_the_generation_before(checkpoints):
    save(checkpoints, "last", 1, 2)
    save(checkpoints, "last", 2, text="again")
    assert [e["step"] for e in checkpoints.generations("last")] == [2, 1]
    assert content(checkpoints) == b"again 2" and content(checkpoints, step=1) == b"state 1"


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b"state X"), Path.unlink]
)
def test_a_damaged_generation_is_passed_over(checkpoints, damage):
    """Cut short, altered, or gone: the one before is taken, and none if both are bad."""
    save(checkpoints, "last", 4, 5)
    damage(checkpoints.folder / "last-00000005.ckpt")
    assert content(checkpoints) == b"state 4" and content(checkpoints, step=5) is None
    damage(checkpoints.folder / "last-00000004.ckpt")
    assert content(checkpoints) is None


@pytest.mark.parametrize("replacements", [0, 1])
def test_a_crash_while_saving_leaves_a_good_generation(checkpoints, monkeypatch, replacements):
    """Before the file is in place, or after it but before the list names it."""
    save(checkpoints, "last", 4, 5)
    real, left = os.replace, [None] * replacements

    def replace(*paths):
        if not left:
            raise Crash
        left.pop()
        real(*paths)

    for step in (6, 5):
        left[:] = [None] * replacements
        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(Crash):
            save(checkpoints, "last", step, text="new")
        monkeypatch.undo()
        if step == 6:
            assert content(checkpoints) == b"state 5"
    assert content(checkpoints) == (b"state 4" if replacements else b"state 5")  # 5 was being written over
    save(checkpoints, "last", 7)
    assert content(checkpoints) == b"state 7"


def test_a_training_is_found_while_its_checkpoints_are_good(tmp_path):
    assert trained_by(tmp_path, "t1") is None
    note_trained(tmp_path, "t1", "abc")
    assert trained_by(tmp_path, "t1") is None  # a note alone is not enough
    checkpoints = Checkpoints(CellDir(tmp_path, "abc").path / "checkpoints")
    save(checkpoints, "last", 3)
    found = trained_by(tmp_path, "t1")
    assert found is not None and found.cell_id == "abc" and trained_by(tmp_path, "t2") is None
    (checkpoints.folder / "last-00000003.ckpt").write_bytes(b"torn")
    assert trained_by(tmp_path, "t1") is None
