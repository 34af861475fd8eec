"""What comes before the first meta-step: cells that are run first, phases in pieces, and dying anywhere in between."""

import json
import time

import pytest
import torch
from runs import assert_same_bits, assert_twins, cell_of, checkpoint, folder, result

from metalearn import prerequisites, training
from metalearn.cells import expand
from metalearn.ledger import CellDir, Checkpoints, read_json, write_json
from metalearn.phases import Phase, forget, products
from metalearn.prerequisites import NoStart
from metalearn.run import build, build_learner, run
from metalearn.schema import BadInput

TSA = (
    *("algorithm=tsa_maml", "algorithm.m=2", "algorithm.tasks=150", "algorithm.id_steps=2", "algorithm.alpha=0.05"),
    *("algorithm.pretrain_steps=5", "trainer.max_steps=6", "trainer.val_every=3", "trainer.save_seconds=1e-9"),
)


def lines(output, cell):
    return [json.loads(line) for line in (folder(output, cell) / "metrics.jsonl").read_text().splitlines()]


# ---- pieces ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the process's death between two statements."""


def chain(made: list) -> list[Phase]:
    """Squares, their running sums, and how many there are."""

    def square(i, _):
        made.append(f"square {i}")
        return {"value": torch.tensor(i * i)}

    def total(i, pieces):
        made.append("total")
        return {"value": torch.stack([p["value"] for p in pieces]).sum(), "names": ["a", "b"]}

    return [Phase("square", 4, square), Phase("total", 1, total)]


def test_pieces_are_made_once_and_only_as_they_are_asked_for(tmp_path):
    cell, made = CellDir(tmp_path, "abc"), []
    steps = chain(made)
    for _ in range(2):
        (piece,) = products(steps, cell)
        assert piece == {"value": torch.tensor(14), "names": ["a", "b"]}
        assert made == ["square 0", "square 1", "square 2", "square 3", "total"]
    assert read_json(cell.path / "status.json")["phase"] == "total 1/1"  # a run would have started the cell
    forget(steps, cell)
    assert {p.name for p in (cell.path / "phases").iterdir()} == {"total-0.json", "total-0-00000000.ckpt"}
    assert list(products(steps, cell)) == [piece] and len(made) == 5
    assert list(products([], cell)) == []


@pytest.mark.parametrize("dies_at", range(6))
def test_a_killed_chain_repeats_at_most_one_piece(tmp_path, monkeypatch, dies_at):
    """Before piece 0 to 4 is in place, or never."""
    cell, made, real, count = CellDir(tmp_path, "abc"), [], Checkpoints.save, iter(range(100))

    def save(*arguments):
        if next(count) == dies_at:
            raise Killed
        real(*arguments)

    monkeypatch.setattr(Checkpoints, "save", save)
    try:
        (piece,) = products(chain(made), cell)
    except Killed:
        (piece,) = products(chain(made), cell)
    assert int(piece["value"]) == 14 and len(made) == (5 if dies_at == 5 else 6)


def test_a_damaged_piece_is_made_again(tmp_path):
    cell, made = CellDir(tmp_path, "abc"), []
    list(products(chain(made), cell))
    for path in (cell.path / "phases").glob("*-0-00000000.ckpt"):
        path.write_bytes(path.read_bytes()[:-1])
    (piece,) = products(chain(made), cell)
    assert int(piece["value"]) == 14 and made[5:] == ["square 0", "total"]


# ---- a cell that is run first --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """An undisturbed run."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("twin")
    run(cell_of(output, *TSA))
    return output


def test_the_first_cell_is_the_maml_run_of_the_same_keys(tmp_path):
    """So that `algorithm=maml` finds it finished, and all m share it; only pre-training's own keys tell them apart."""
    cell = cell_of(tmp_path, *TSA)
    (need,) = cell.needs
    own = [o for o in TSA if o.split("=")[0] in ("algorithm.alpha", "trainer.val_every", "trainer.save_seconds")]
    assert need.cell_id == cell_of(tmp_path, *own, "trainer.max_steps=5").cell_id
    for same in ("algorithm.m=3", "algorithm.tasks=99", "trainer.max_steps=9", "optimizer.schedule=cosine"):
        assert cell_of(tmp_path, *TSA, same).needs[0].cell_id == need.cell_id
    for other in ("algorithm.pretrain_steps=6", "algorithm.pretrain_schedule=cosine", "algorithm.alpha=0.1", "seed=1"):
        changed = cell_of(tmp_path, *TSA, other)
        assert changed.needs[0].train_id != need.train_id and changed.train_id != cell.train_id
    assert all(c.needs == () for c in expand(["algorithm=maml,reptile", "dataset=sinusoid"]))


def test_what_happens_is_recorded(twin):
    cell = cell_of(twin, *TSA)
    first, *rest = lines(twin, cell)
    assert first["step"] == 0 and 0 < first["cluster_silhouette"] <= 1 and first["seconds"] > 0
    assert {"usage_0", "usage_1", "usage_entropy"} <= rest[-2].keys()
    assert result(twin, cell)["steps"] == 6 and result(twin, cell.needs[0])["steps"] == 5
    assert CellDir(twin, cell.cell_id).status["phase"] == "test"
    state, first = checkpoint(twin, cell)["learner"], checkpoint(twin, cell.needs[0], "best")["learner"]
    theta = {k: v for k, v in first.items() if k.startswith("net.")}
    assert_same_bits({k: state[k] for k in theta}, theta)


FAST = ((7, False), (10, True), (13, False))
SLOW = tuple(
    (i, after) for i in (0, 3, 6, 7, 8, 9, 10, 11, 13, 15) for after in (False, True) if (i, after) not in FAST
)


@pytest.mark.parametrize(("dies_at", "after"), [*FAST, *(pytest.param(*p, marks=pytest.mark.slow) for p in SLOW)])
def test_dying_anywhere_leaves_what_never_dying_leaves(tmp_path, monkeypatch, twin, dies_at, after):
    """Before or after a write: in pre-training (0 to 5), collecting (6 to 8), clustering, meta-step 0 and training."""
    real, count, kinds = Checkpoints.save, iter(range(100)), []

    def save(self, kind, *arguments):
        kinds.append(kind)
        now = next(count)
        if now == dies_at and not after:
            raise Killed
        real(self, kind, *arguments)
        if now == dies_at:
            raise Killed

    cell = cell_of(tmp_path, *TSA)
    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Killed):
        run(cell)
    assert kinds[6:10] == ["collect-0", "collect-1", "collect-2", "cluster-0"][: max(0, dies_at - 5)]
    monkeypatch.undo()
    assert run(cell) == "done"
    assert_twins(twin, tmp_path, cell)
    assert_twins(twin, tmp_path, cell.needs[0])
    assert sorted(p.name for p in (folder(tmp_path, cell) / "phases").iterdir()) == [
        "cluster-0-00000000.ckpt",
        "cluster-0.json",
    ]
    queues = checkpoint(tmp_path, cell)["learner"]["_extra_state"]["queues"]
    assert sum(len(q[1]) for q in queues if q) % 4 == 0  # 6 meta-steps of 4 tasks, in updates of 4


def test_only_the_training_cell_is_prepared(twin, tmp_path, monkeypatch):
    """A cell with other test keys takes the trained parameters; nothing runs before it."""
    monkeypatch.setattr(prerequisites, "ready", None)
    cell = cell_of(twin, *TSA, "trainer.test_episodes=11")
    assert cell.train_id == cell_of(twin, *TSA).train_id
    assert run(cell) == "done" and not (folder(twin, cell) / "phases").exists()


def test_one_training_serves_all(twin, tmp_path, capfd):
    cell = cell_of(twin, *TSA, "algorithm.m=3")
    before = CellDir(twin, cell.needs[0].cell_id).status
    assert run(cell) == "done"
    assert CellDir(twin, cell.needs[0].cell_id).status == before and "training it" not in capfd.readouterr().err


def test_a_cell_waits_while_another_process_trains_what_it_needs(tmp_path, monkeypatch, capfd):
    cell, waits = cell_of(tmp_path, *TSA), []
    (need,) = cell.needs
    other = CellDir(tmp_path, need.cell_id)
    other.acquire()

    def sleep(seconds):
        waits.append(CellDir(tmp_path, cell.cell_id).status["state"])
        if len(waits) == 2:
            run(need)
            other.release()

    monkeypatch.setattr(prerequisites, "time", type("Clock", (), {"sleep": staticmethod(sleep)}))
    assert run(cell) == "done"
    said = capfd.readouterr().err
    assert waits == ["running"] * 2 and said.count(f"cell {cell.cell_id} waits: cell {need.cell_id} is being run") == 1
    assert CellDir(tmp_path, need.cell_id).status["attempt"] == 1


def test_heartbeats_reach_the_cell_that_waits(tmp_path, monkeypatch):
    monkeypatch.setattr("metalearn.ledger.HEARTBEAT_SECONDS", 0.0)
    outer = CellDir(tmp_path, "outer")
    outer.start({}, "t")
    began = outer.status["heartbeat"]
    inner = CellDir(tmp_path, "inner", outer)
    inner.start({}, "u")
    time.sleep(1.01)  # times are kept in seconds
    inner.beat(step=3)
    assert inner.status["step"] == 3 and outer.status["phase"] == "training of inner"
    assert outer.status["heartbeat"] > began


def test_divergence_before_is_divergence(tmp_path, capfd):
    """It is this cell's result, and that of the next one that needs the same, without another try."""
    for m in (2, 3):
        cell = cell_of(tmp_path, *TSA, "algorithm.alpha=1e30", f"algorithm.m={m}")
        assert run(cell) == "diverged"
        found = result(tmp_path, cell)
        assert (found["status"], found["steps"], found["metrics"]) == ("diverged", 0, {})
        assert (
            f"cell {cell.needs[0].cell_id} (maml), whose parameters this cell starts from, diverged" in found["error"]
        )
        assert "algorithm.alpha = 1e+30" in found["error"]
    assert CellDir(tmp_path, cell.needs[0].cell_id).status["attempt"] == 1
    assert capfd.readouterr().err.count("training it") == 1


def test_failure_before_is_failure_and_is_tried_again(tmp_path, monkeypatch):
    cell = cell_of(tmp_path, *TSA)

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(training.Recorder, "save", broken)
    with pytest.raises(RuntimeError, match="starts from, failed: OSError: disk full"):
        run(cell)
    monkeypatch.undo()
    assert (
        CellDir(tmp_path, cell.cell_id).status["state"] == "failed" and not (folder(tmp_path, cell) / "phases").exists()
    )
    assert "disk full" in CellDir(tmp_path, cell.cell_id).status["error"]
    assert run(cell) == "done"


def test_lost_checkpoints_are_trained_again(tmp_path):
    cell = cell_of(tmp_path, *TSA)
    run(cell.needs[0])
    before = checkpoint(tmp_path, cell.needs[0], "best")["learner"]
    for path in (folder(tmp_path, cell.needs[0]) / "checkpoints").iterdir():
        path.unlink()
    assert run(cell) == "done"
    assert_same_bits(checkpoint(tmp_path, cell.needs[0], "best")["learner"], before)
    assert (folder(tmp_path, cell.needs[0]) / "old" / "1" / "result.json").exists()


# ---- a given checkpoint ----------------------------------------------------------------------------------------------


def test_a_given_cell_or_file_replaces_pre_training(tmp_path, twin):
    """The same parameters, the same result; the contents name the run, wherever they lie."""
    plain = cell_of(twin, *TSA)
    place = folder(twin, plain.needs[0])
    entry = json.loads((place / "checkpoints" / "best.json").read_text())[0]
    copy = tmp_path / "elsewhere.ckpt"
    copy.write_bytes((place / "checkpoints" / entry["file"]).read_bytes())
    cells = [cell_of(tmp_path, *TSA, f"algorithm.pretrained={path}") for path in (place, copy)]
    assert cells[0].train_id == cells[1].train_id != plain.train_id and cells[0].needs[0].sha256 == entry["sha256"]
    assert run(cells[0]) == "done" and len(list((tmp_path / "runs").iterdir())) == 1
    assert result(tmp_path, cells[0])["metrics"] == result(twin, plain)["metrics"]
    copy.write_bytes(copy.read_bytes() + b" ")
    assert cell_of(tmp_path, *TSA, f"algorithm.pretrained={copy}").train_id != cells[0].train_id
    with pytest.raises(BadInput, match="its contents have changed since this run was named"):
        prerequisites.ready(cells[1], CellDir(tmp_path, "x"), run)


def test_what_cannot_be_started_from_is_refused(tmp_path, twin):
    def given(path) -> None:
        cell_of(tmp_path, *TSA, f"algorithm.pretrained={path}")

    with pytest.raises(BadInput, match="algorithm.pretrained=.*nowhere: no such file or folder"):
        given(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="not the folder of a finished run"):
        given(tmp_path)
    bad = tmp_path / "runs" / "abc"
    write_json(bad / "result.json", {"status": "diverged"})
    with pytest.raises(BadInput, match="the run there is diverged"):
        given(bad)
    write_json(bad / "result.json", {"status": "done"})
    with pytest.raises(BadInput, match="no intact checkpoint in"):
        given(bad)
    (tmp_path / "text").write_text("no checkpoint")
    cell = cell_of(tmp_path, *TSA, f"algorithm.pretrained={tmp_path / 'text'}")
    with pytest.raises(BadInput, match=r"algorithm.pretrained=.*text: no checkpoint of a run \(UnpicklingError\)"):
        run(cell)
    wider = cell_of(
        twin, *TSA, "backbone.hidden=[8,8]", f"algorithm.pretrained={folder(twin, cell_of(twin, *TSA).needs[0])}"
    )
    with pytest.raises(BadInput, match=r"algorithm.pretrained: net.h1.weight is \[40, 1\] there and \[8, 1\] here"):
        run(wider)


def test_parameters_of_other_data_are_refused(tmp_path):
    """Their training classes may be this run's test classes."""
    cell = cell_of(tmp_path, "trainer.max_steps=1", "dataset.variant=reptile", "dataset.shot=6")
    assert run(cell) == "done"
    wanted = cell_of(tmp_path, *TSA, f"algorithm.pretrained={tmp_path / 'runs' / cell.cell_id}")
    directory = CellDir(tmp_path, wanted.cell_id)
    with pytest.raises(BadInput, match="it was trained with dataset.variant=reptile, and this run has finn"):
        prerequisites.ready(wanted, directory, run)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.tasks=1", "algorithm.tasks=1: must be >= algorithm.m=2"),
        ("trainer.devices=2", "trainer.devices=2: must be 1 with tsa_maml"),
        ("algorithm.outer=agreement", "algorithm.outer_vector=displacement: tsa_maml"),
        ("algorithm.routing=nearest", "algorithm.routing=nearest: must be one of initial, current"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, override, message):
    with pytest.raises(BadInput, match=message):
        cell_of(tmp_path, *TSA, override)


def test_errors_of_this_module_are_divergence():
    """So that a cell records them as its result."""
    assert issubclass(NoStart, prerequisites.Diverged)


def test_an_algorithm_that_needs_no_run_inherits_none(tmp_path):
    config = cell_of(tmp_path).config
    with pytest.raises(TypeError, match="MAML starts from no other run"):
        build_learner(config, build("dataset", config["dataset"])).inherit([{}])
