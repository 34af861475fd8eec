"""`algorithm.alpha=auto`: the estimate before training is the rate of the run, and part of its state."""

import json
import math

import pytest
import torch
from runs import assert_twins, cell_of, checkpoint, folder, killed_and_run_again, result

from metalearn.alpha import estimate
from metalearn.cells import expand
from metalearn.check.grad import check
from metalearn.learner import MetaLearner
from metalearn.ledger import CellDir
from metalearn.record import table
from metalearn.run import build, build_data, build_learner, run
from metalearn.schema import BadInput
from metalearn.theory.alpha_star import split

AUTO = ("algorithm.alpha=auto", "trainer.max_steps=3", "trainer.val_every=0")
LINEAR = ("backbone=mlp", "backbone.hidden=[]", "trainer.precision=64")


def objects(cell):
    dataset = build("dataset", cell.config["dataset"])
    return build_learner(cell.config, dataset), build_data(cell.config, dataset)


def log(output, cell) -> list[dict]:
    return [json.loads(line) for line in (folder(output, cell) / "metrics.jsonl").read_text().splitlines()]


def test_a_linear_net_takes_exactly_the_estimate_from_its_inputs(tmp_path):
    """Its tangent features are the inputs and 1: Corollary 2 on them, by the estimator itself."""
    cell = cell_of(tmp_path, *AUTO, *LINEAR)
    learner, data = objects(cell)
    assert math.isnan(learner.alpha)
    episodes = data.stream("alpha", 0, estimate.TASKS).episodes
    features = [torch.cat([part.x, torch.ones_like(part.x)], -1) for part in episodes[:2]]
    expected = split(*features)
    found = learner.settle(data)
    assert learner.alpha == found["alpha"] == pytest.approx(expected.value, rel=1e-12)
    assert found["alpha_low"] < found["alpha"] < found["alpha_high"]
    assert learner.findings()["alpha_star"]["ci95"] == pytest.approx(1.96 * expected.se, rel=1e-6)


def test_a_run_records_and_uses_what_it_chose(tmp_path):
    cell = cell_of(tmp_path, *AUTO)
    run(cell)
    learner, data = objects(cell)
    chosen = learner.settle(data)["alpha"]
    (first,) = (row for row in log(tmp_path, cell) if row["step"] == 0)
    assert first["alpha"] == chosen and first["alpha_low"] < chosen < first["alpha_high"]
    found = result(tmp_path, cell)
    star = found["metrics"]["alpha_star"]
    assert (star["mean"], star["n"], star["interval"]) == (chosen, estimate.TASKS, "tasks")
    assert found["config"]["algorithm"]["alpha"] == "auto"
    printed = table(found, CellDir(tmp_path, cell.cell_id))
    assert any(line.startswith("alpha_star") and f"{chosen:.4f}" in line for line in printed.splitlines())
    same = cell_of(tmp_path, *AUTO[1:], f"algorithm.alpha={chosen!r}")
    run(same)
    assert same.train_id != cell.train_id
    scores = {k: v for k, v in found["metrics"].items() if k != "alpha_star"}
    assert result(tmp_path, same)["metrics"] == scores


@pytest.mark.parametrize("algorithm", ["anil", "meta_sgd", "tnet", "mtnet", "hsml", "mmaml", "tsa_maml"])
def test_every_kind_of_maml_takes_it(tmp_path, algorithm):
    cell = cell_of(tmp_path, f"algorithm={algorithm}", "algorithm.alpha=auto")
    learner, data = objects(cell)
    alpha = learner.settle(data)["alpha"]
    assert 0 < alpha == learner.alpha < math.inf
    if algorithm == "meta_sgd":
        assert all(bool((r == torch.tensor(alpha)).all()) for r in learner.rates.parameters())
    other, _ = objects(cell)
    other.load_state_dict(learner.state_dict())
    assert other.alpha == alpha and other.findings() == learner.findings()


def test_a_number_keeps_its_state_and_its_findings(tmp_path):
    learner, data = objects(cell_of(tmp_path))
    assert learner.settle(data) == {} and learner.findings() == {}
    assert not any("estimated" in name for name in learner.state_dict())
    assert MetaLearner.settle(learner, data) == {}


def test_the_choice_depends_on_the_seed_and_not_on_batches(tmp_path):
    def chosen(*overrides: str) -> float:
        learner, data = objects(cell_of(tmp_path, "algorithm.alpha=auto", *overrides))
        return learner.settle(data)["alpha"]

    assert chosen() == chosen("trainer.meta_batch_size=3", "trainer.max_steps=9")
    assert chosen("seed=1") != chosen()


def test_a_resumed_run_does_not_estimate_again(tmp_path, monkeypatch):
    """Nor a cell that only tests: the checkpoint has it."""
    cell = cell_of(tmp_path, *AUTO)
    run(cell)
    kept = checkpoint(tmp_path, cell)["learner"]["estimated_rate._extra_state"]["value"]
    assert kept == result(tmp_path, cell)["metrics"]["alpha_star"]["mean"]
    monkeypatch.setattr(estimate, "star", lambda *_, **__: pytest.fail("estimated again"))
    other = cell_of(tmp_path, *AUTO, "trainer.test_episodes=5")
    run(other)
    assert other.train_id == cell.train_id and other.cell_id != cell.cell_id
    assert result(tmp_path, other)["metrics"]["alpha_star"] == result(tmp_path, cell)["metrics"]["alpha_star"]


def test_tsa_maml_and_its_first_run_choose_the_same(tmp_path):
    small = ("algorithm.pretrain_steps=2", "algorithm.tasks=8", "algorithm.id_steps=2", "algorithm.m=2")
    cell = cell_of(tmp_path, *AUTO, "algorithm=tsa_maml", *small)
    run(cell)
    (need,) = cell.needs
    chosen = log(tmp_path, cell)[0]
    assert chosen["step"] == 0 and "cluster_silhouette" in chosen
    assert result(tmp_path, cell)["metrics"]["alpha_star"]["mean"] == chosen["alpha"] == log(tmp_path, need)[0]["alpha"]


def test_its_gradient_can_be_checked(tmp_path):
    found = check(cell_of(tmp_path, *AUTO, "backbone=mlp", "backbone.hidden=[3]", "backbone.activation=tanh"))
    assert found["passed"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=reptile"], "algorithm.alpha=auto: must be a number with algorithm=reptile"),
        (["algorithm=imaml"], "algorithm.alpha=auto: must be a number with algorithm=imaml"),
        (["algorithm=erm"], "algorithm.alpha=auto: must be a number with algorithm=erm"),
        (["algorithm=meta_sgd", "algorithm.rate_init=uniform"], "algorithm.rate_init=uniform: must be constant with"),
        (["trainer.devices=2"], "trainer.devices=2: must be 1 with algorithm.alpha=auto"),
    ],
)
def test_what_cannot_be(overrides, message):
    with pytest.raises(BadInput, match=message):
        expand(["dataset=sinusoid", "algorithm.alpha=auto", *overrides])


def test_features_without_any_size_are_bad_input(tmp_path):
    learner, data = objects(cell_of(tmp_path, "algorithm.alpha=auto"))
    with torch.no_grad():
        for parameter in learner.net.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(BadInput, match=r"algorithm.alpha=auto: alpha\* would be nan"):
        learner.settle(data)


@pytest.mark.slow
def test_killed_and_started_again_it_has_the_bits_of_its_twin(tmp_path):
    overrides = ("algorithm.alpha=auto", "trainer.max_steps=300", "trainer.val_every=60", "trainer.save_seconds=0.05")
    cell = killed_and_run_again(tmp_path, *overrides)
    assert_twins(tmp_path / "twin", tmp_path / "killed", cell)
