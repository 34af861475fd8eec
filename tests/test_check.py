"""`metalearn check grad`: right gradients pass, and every kind of wrong one fails."""

import json

import pytest
import runs
import torch

from metalearn import cli
from metalearn.algorithms import MAML, Reptile
from metalearn.cells import expand
from metalearn.check import command, grad
from metalearn.check.closed_forms import closed_form
from metalearn.functional import Trajectory
from metalearn.schema import BadInput

SINE = ["dataset=sinusoid", "dataset.shot=4", "dataset.queries=3"]
SMALL = ["backbone.width=4", "dataset.queries=2"]


def certificate(*overrides: str, **options) -> dict:
    (cell,) = expand(list(overrides))
    return grad.check(cell, **options)


def verdicts(found: dict) -> dict[str, bool | None]:
    return {c["name"].split(":")[0].split(",")[0]: c["passed"] for c in found["checks"]}


@pytest.mark.parametrize(
    "overrides",
    [
        [*SINE, "algorithm=maml", "algorithm.inner_steps=3"],
        [*SINE, "algorithm=anil"],
        [*SINE, "algorithm=anil", "algorithm.alpha=online"],
        [*SMALL, "algorithm=maml", "algorithm.inner_steps=2", "backbone.bn_affine_inner=false"],
        [*SMALL, "algorithm=anil", "algorithm.inner_loss_reduction=sum_over_shots"],
    ],
)
def test_exact_gradients_pass(overrides):
    found = certificate(*overrides)
    assert found["passed"]
    assert verdicts(found) == {
        "central differences": True,
        "closed form": True,
        "first order differs from second order": True,
        "batched is one task after the other": True,
        "precision 32": True,
    }


@pytest.mark.parametrize("overrides", [["algorithm=fomaml"], ["algorithm=reptile", "algorithm.inner_batch=null"]])
def test_first_order_methods_are_far_from_the_slope(overrides):
    """That is shown, and no failure; their own closed forms hold."""
    found = certificate(*SINE, *overrides)
    slope = next(c for c in found["checks"] if c["name"].startswith("central"))
    assert found["passed"] and slope["passed"] is None and slope["value"] > 1e-2
    assert verdicts(found)["closed form"] is True


def test_bounded_inner_gradients_have_no_such_form():
    """The product of I - alpha H_j is not their derivative; their slope is still checked."""
    found = certificate(*SINE, "algorithm=maml", "algorithm.inner_clip=0.01")
    assert verdicts(found)["closed form"] is None and verdicts(found)["central differences"] is True


def test_without_adaptation_the_orders_agree():
    found = certificate(*SINE, "algorithm=maml", "algorithm.inner_steps=0")
    assert found["passed"] and verdicts(found)["first order differs from second order"] is True


def test_agreement_is_the_slope_at_fixed_weights():
    found = certificate(*SINE, "algorithm=gradient_agreement")
    assert verdicts(found)["central differences"] is True
    assert verdicts(found)["closed form"] is verdicts(found)["batched is one task after the other"] is None


class Detached(MAML):
    """A mistake: the start of the inner loop is cut off."""

    def descend(self, start, *rest) -> Trajectory:
        return super().descend({k: p.detach() + 0.5 * (p - p.detach()) for k, p in start.items()}, *rest)


def test_a_gradient_that_is_wrong_fails(monkeypatch):
    monkeypatch.setattr("metalearn.algorithms.MAML", Detached)
    found = certificate(*SINE, "algorithm=maml")
    assert not found["passed"] and verdicts(found)["central differences"] is False


def test_a_wrong_closed_form_fails(monkeypatch):
    """FOMAML's gradient is not the product of the I - alpha H_j."""
    monkeypatch.setattr(MAML, "exact", True)
    (cell,) = expand([*SINE, "algorithm=fomaml"])
    learner, batch = grad._double(cell, grad.build("dataset", cell.config["dataset"]), 2)
    form, grads = closed_form(learner), grad.meta_gradient(learner, batch).grads
    assert grad._apart(grads, form.gradient(learner, batch)) < 1e-12
    learner.first_order = False
    assert grad._apart(grads, form.gradient(learner, batch)) > 1e-2


def test_forms_belong_to_exact_classes():
    (cell,) = expand([*SINE, "algorithm=maml"])
    learner, _ = grad._double(cell, grad.build("dataset", cell.config["dataset"]), 2)
    assert closed_form(learner) is not None
    learner.__class__ = Detached
    assert closed_form(learner) is None
    assert Reptile in __import__("metalearn.check.closed_forms", fromlist=["FORMS"]).FORMS


def test_the_verb_writes_a_certificate_that_the_result_takes_over(tmp_path, capsys):
    cell = runs.cell_of(tmp_path, "trainer.max_steps=2", "trainer.val_every=0")
    arguments = [*runs.TINY, f"output_dir={tmp_path}", "trainer.max_steps=2", "trainer.val_every=0"]
    assert command.main(["grad", *arguments, "--directions", "1"]) == 0
    said = capsys.readouterr().out
    assert "maml on sinusoid with mlp_sine" in said and "passed" in said
    written = json.loads((runs.folder(tmp_path, cell) / "certificate.json").read_text())
    assert written["passed"] and written["cell_id"] == cell.cell_id
    assert cli._main(arguments) == 0
    assert runs.result(tmp_path, cell)["certificate"] == written


def test_a_failed_check_is_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grad, "SLOPE", 0.0)
    assert command.main(["grad", *SINE, "algorithm=maml", f"output_dir={tmp_path}", "--directions", "1"]) == 1
    assert "FAILED: do not trust numbers of this run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["grads"], "check: argument what: invalid choice: 'grads'"),
        (["grad", "--tasks", "0"], "check: --tasks 0: must be >= 1"),
        (["grad", "seed=0,1"], "check: seed=0,1: names several runs"),
        (["grad", "algorithm=mamml"], "algorithm=mamml: no such algorithm; did you mean 'maml'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(BadInput, match=message):
        command.main(arguments)


def test_parameters_are_restored():
    (cell,) = expand([*SINE, "algorithm=maml"])
    learner, batch = grad._double(cell, grad.build("dataset", cell.config["dataset"]), 2)
    before = [p.detach().clone() for p in learner.parameters()]
    grad._slopes(learner, batch, grad.meta_gradient(learner, batch).grads, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True))
