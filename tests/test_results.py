"""The results store reads what runs leave, curated or not, and nothing else."""

import json

import pandas as pd
import pytest
import runs

from metalearn.results import Result, Stored, differing, find, frame, idle, matches, value
from metalearn.schema import BadInput

CONFIG = {
    "seed": 0, "output_dir": "outputs", "rerun": False,
    "algorithm": {"name": "maml", "alpha": 0.1}, "dataset": {"name": "glyphs", "way": 5, "flip": False},
    "backbone": {"name": "conv4"}, "regularizer": {"name": "none"},
}  # fmt: skip


def write(folder, *, seed=0, alpha=0.1, status="done", metrics=None):
    folder.mkdir(parents=True)
    config = {**CONFIG, "seed": seed, "algorithm": {"name": "maml", "alpha": alpha}, "output_dir": str(folder)}
    score = {"mean": 0.5, "std": 0.1, "ci95": 0.1, "n": 2, "interval": "tasks", "unit": "fraction"}
    metrics = {"accuracy": score, "accuracy@bn=support_plus_one": score | {"mean": 0.4}} if metrics is None else metrics
    data = {"cell_id": f"{seed:012d}", "seed": seed, "config": config, "status": status, "steps": 3, "seconds": 1.0}
    data |= {"protocol": {"bn": "batch", "test_steps": 2}, "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(data))
    rows = [(e, bn, s, 0.1 * e + seed) for bn in ("batch", "support_plus_one") for s in (1, 2) for e in (1, 0)]
    table = pd.DataFrame(rows, columns=["episode", "bn", "step", "value"]).assign(group=None, metric="accuracy", loss=0)
    table.to_parquet(folder / "episodes.parquet")


def test_find_reads_runs_and_curated_folders_but_no_archives(tmp_path):
    write(tmp_path / "runs" / "a")
    write(tmp_path / "runs" / "a" / "old" / "1", seed=7)
    write(tmp_path / "curated" / "maml" / "seed1", seed=1)
    (tmp_path / "runs" / "b").mkdir()
    (tmp_path / "runs" / "b" / "result.json").write_text('{"half')
    with pytest.warns(UserWarning, match=r"runs/b/result.json is no result, or damaged"):
        assert [r.data["seed"] for r in find(tmp_path)] == [1, 0]
    with pytest.raises(BadInput, match="no such folder"):
        find(tmp_path / "nothing")


@pytest.mark.filterwarnings("ignore:.*is no result")
@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"cell_id": "of another program"}'])
def test_other_files_of_that_name_are_left_out(tmp_path, text):
    write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_text(text)
    assert [r.folder.name for r in find(tmp_path)] == ["a"]


def test_damaged_episodes_are_a_warning(tmp_path):
    write(tmp_path / "a")
    (r,) = find(tmp_path)
    (tmp_path / "a" / "episodes.parquet").write_text("not parquet")
    with pytest.warns(UserWarning, match=r"a/episodes.parquet cannot be read and is left out"):
        assert len(r.values()) == 0 and r.metric("accuracy")["mean"] == 0.5


def test_metric_and_episodes_are_those_of_the_mode(tmp_path):
    write(tmp_path / "a")
    (r,) = find(tmp_path)
    assert r.metric("accuracy")["mean"] == r.metric("accuracy", bn="batch")["mean"] == 0.5
    assert r.metric("accuracy", bn="support_plus_one")["mean"] == 0.4
    assert r.metric("mse") is None
    assert r.episodes()[["episode", "step", "bn"]].to_numpy().tolist() == [[0, 2, "batch"], [1, 2, "batch"]]
    assert len(r.episodes(step=1, bn="support_plus_one")) == 2
    assert r.values().tolist() == r.episodes()["value"].tolist() == [0.0, 0.1]


def test_diverged_runs_are_rows_without_values(tmp_path):
    write(tmp_path / "a", status="diverged", metrics={})
    table = frame(find(tmp_path))
    assert table["status"].tolist() == ["diverged"] and "mean" not in table
    (r,) = find(tmp_path)
    assert len(r.values()) == 0 < len(r.episodes())


def test_values_are_compared_as_written_on_the_command_line():
    assert value(CONFIG, "algorithm") == "maml" and value(CONFIG, "algorithm.nope") is None
    assert matches(CONFIG, {"algorithm": "maml", "dataset.way": "5", "dataset.flip": "false"})
    assert matches(CONFIG, {"dataset.way": 5, "dataset.flip": False})
    assert not matches(CONFIG, {"algorithm.alpha": 0.2})


def test_sizes_of_test_tasks_are_those_of_training_unless_given():
    same, other = ({"dataset": {"name": "glyphs", "shot": 5, "test_shot": s}} for s in (None, 1))
    assert (value(same, "dataset.test_shot"), value(other, "dataset.test_shot")) == (5, 1)
    assert matches(other, {"dataset.test_shot": 1}) and not matches(same, {"dataset.test_shot": 1})
    assert value(same, "dataset.test_way") is None and value(same, "dataset.test_flip") is None


def test_differing_keys_leave_out_what_changes_no_number(tmp_path):
    write(tmp_path / "a", alpha=0.1)
    write(tmp_path / "b", alpha=0.2, seed=1)
    assert differing(find(tmp_path)) == ["seed", "algorithm.alpha"]


def test_keys_that_change_no_number_are_those_that_say_so():
    assert all(idle(k) for k in ("output_dir", "rerun", "logger.group", "trainer.threads", "trainer.chunk_mib"))
    assert not any(idle(k) for k in ("seed", "algorithm.alpha", "algorithm._target_", "trainer.test_episodes"))


def test_the_latest_attempt_wins_and_half_lines_are_passed_over(tmp_path):
    write(tmp_path / "a")
    lines = [
        '{"attempt": 1, "step": 1, "loss": 3}',
        '{"attempt": 1, "step": 2, "lo',
        '{"attempt": 2, "step": 1, "loss": 2}',
    ]
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(lines))
    (r,) = find(tmp_path)
    assert r.log()[["step", "loss"]].to_numpy().tolist() == [[1, 2]]


def test_stored_results_are_found_by_what_they_are_of(tmp_path):
    """Also where the data are not here; not by a configuration that differs in one key."""
    cell = runs.cell_of(tmp_path, "seed=3")
    config = cell.config
    kept = Result(tmp_path, {"cell_id": cell.cell_id, "data_hash": cell.data_hash, "config": config})
    other = Result(tmp_path, {"cell_id": "0" * 12, "data_hash": "f" * 16, "config": config})
    stored = Stored([other, kept])
    assert stored.of(config) is kept
    assert stored.of(runs.cell_of(tmp_path, "seed=4").config) is None
    assert stored.of(config | {"output_dir": "elsewhere"}) is kept
