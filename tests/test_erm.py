"""ERM against MAML without adaptation, closed forms and plain loops (float64)."""

from typing import Any

import oracles
import pytest
import torch
from oracles import VALUES, assert_close, meta_batch, outer_gradient
from table import Case, create, each, step, tasks_for
from torch import Tensor, nn

from metalearn.algorithms import ERM, MAML
from metalearn.algorithms.pools import pooled
from metalearn.backbones import Module
from metalearn.cells import expand
from metalearn.datasets.omniglot import Omniglot, split_characters
from metalearn.datasets.sinusoid import Sinusoid
from metalearn.episode import Episode, Examples
from metalearn.run import build, build_learner
from metalearn.schema import BadInput

SINE = ["dataset=sinusoid", "backbone=mlp_sine"]
GLOBAL: list[Case] = [("erm", "classification"), ("erm_drawn", "classification")]
KEPT: list[Case] = [("erm_fixed_label", "classification"), ("erm", "regression")]


@each(KEPT)
def test_its_gradient_is_that_of_maml_without_adaptation(case):
    """E1: alpha = 0 on the same data, the pool of support and query examples."""
    learner, episodes = create(case), tasks_for(case)
    maml = create(("maml", case[1]), alpha=0.0)
    everything = Episode(episodes.support, pooled(episodes), {})
    assert_close(outer_gradient(learner, episodes), outer_gradient(maml, everything))


@each(GLOBAL)
def test_the_global_form_classifies_all_training_classes(case):
    """The loss of plain passes of each task's pool, its labels looked up one by one."""
    learner, episodes = create(case), tasks_for(case)
    theta = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
    losses, ids = [], episodes.latent["class_ids"]
    assert theta["head.weight"].shape[0] == 7 and int(ids.max()) == 6
    for i, (x, y) in enumerate(zip(*pooled(episodes), strict=True)):
        labels = torch.tensor([int(ids[i, int(label)]) for label in y])
        losses.append(oracles.loss(oracles.forward(learner.net, theta, x), labels))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()), materialize_grads=True)
    assert_close(list(outer_gradient(learner, episodes).values()), list(expected))


@each([*GLOBAL, *KEPT])
@pytest.mark.parametrize("adapted", ["", "head"])
def test_fine_tuning_is_that_of_maml(case, adapted):
    """From theta, but for the new head of the global form; all parameters, or the head alone."""
    learner, episodes = create(case, adapted=adapted), tasks_for(case)
    key, support = meta_batch(episodes).key, episodes.support
    trajectory = learner.adapt(learner.theta(), support, steps=3, key=key)
    for i in range(episodes.tasks):
        phi = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
        if case in GLOBAL:
            head = {k: trajectory[0][k][i].detach().requires_grad_() for k in ("head.weight", "head.bias")}
            assert head["head.weight"].shape == (3, phi["head.weight"].shape[1]) and not head["head.bias"].any()
            assert bool(head["head.weight"].any()) == (case[0] == "erm_drawn")
            phi |= head
        moving = [k for k in phi if k.startswith(adapted)]
        task = Examples(support.x[i], support.y[i])
        end = oracles.descend(learner.net, phi, task, learner.alpha, 3, moving, first_order=True)
        assert {k for k in trajectory[3] if k.startswith(adapted)} == set(moving)
        assert_close({k: p[i] for k, p in trajectory[3].items()}, {k: end[k].detach() for k in trajectory[3]})


def test_new_heads_are_drawn_for_each_task():
    """Uniform within Xavier's bound sqrt(6 / (way + width)), so of standard deviation bound / sqrt(3)."""
    learner, episodes = create(GLOBAL[1], oracles.conv_net(7, width=32)), oracles.pictures(40)
    key = meta_batch(episodes).key
    head = learner.adapt(learner.theta(), episodes.support, steps=0, key=key)[0]["head.weight"]
    bound = (6 / (3 + 32)) ** 0.5
    assert head.shape == (40, 3, 32) and 0.99 * bound < float(head.abs().max()) <= bound
    assert float(head.std()) == pytest.approx(bound / 3**0.5, rel=0.05)  # 3,840 draws: standard error 0.7 %
    assert len(head.flatten(1).unique(dim=0)) == 40
    part = slice(3, 5)
    alone = learner.adapt(learner.theta(), episodes.select(part).support, steps=0, key=key.select(part))
    assert torch.equal(alone[0]["head.weight"], head[part])
    with pytest.raises(ValueError, match="adapt needs the tasks' key"):
        learner.adapt(learner.theta(), episodes.support, steps=0)


def test_new_tasks_may_have_another_way():
    learner = create(GLOBAL[0])
    step(learner, meta_batch(oracles.pictures(way=3)))
    episodes = oracles.pictures(way=5)
    scores = learner.evaluate(meta_batch(episodes), {"running": [0, 3]})
    assert_close(scores["running", 0][1], torch.full((4,), 5.0, dtype=torch.float64).log())  # uniform, from a zero head
    assert bool((scores["running", 3][1] != scores["running", 0][1]).all())


def test_linear_regression_converges_to_the_closed_form():
    """E2, the specification's fixture: w_r = (sum G_i)^-1 sum G_j a_j (eq. 18.1), by the outer optimizer's own steps.

    Eigenvalues of the objective's Hessian, the mean of 2/3 Phi^t Phi, are 1.3 and 6: SGD of rate 0.25 contracts by at
    least 0.68 a step, and 100 steps by 1e-16.
    """
    fixture = VALUES["linear_maml"]
    x, a = (torch.tensor(fixture["inputs"][k], dtype=torch.float64) for k in ("Phi", "a"))
    grams = x.mT @ x
    rest = torch.linalg.solve(grams.sum(0), torch.einsum("bij,bj->i", grams, a))
    assert_close(rest, torch.tensor(fixture["w_erm"], dtype=torch.float64))
    curvature = torch.linalg.eigvalsh(2 / 3 * grams.mean(0))
    assert 1.2 < curvature[0] and curvature[1] < 6.2
    examples = Examples(x, x @ a.unsqueeze(-1))
    learner = oracles.linear_form(ERM, torch.zeros(2, dtype=torch.float64), alpha=0.1)
    learner.attach(type(learner.outer_optimizer)(lr=0.25), 100)
    optimizer = learner.configure_optimizers()
    for _ in range(100):
        learner.meta_step(meta_batch(Episode(examples, examples, {})), optimizer)
    assert_close(learner.net.head.weight.detach()[0], rest)
    risk = learner.task_loss(learner.theta(), Episode(examples, examples, {})).loss.mean().detach()
    assert_close(risk, torch.tensor(fixture["risk_at_minimiser"]["0.0"], dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm.form=fixed_label"], "algorithm.form=fixed_label: needs dataset.label_assignment=fixed_label"),
        (["algorithm.form=global", *SINE], "algorithm.form=global: only for classification"),
        (["algorithm.new_head=drawn", *SINE], "algorithm.new_head=drawn: needs classification"),
        (["algorithm.adapted=block1"], "algorithm.adapted=block1: must be empty or head, which algorithm.form=global"),
        (
            ["algorithm.form=fixed_label", "dataset.label_assignment=fixed_label"],
            "dataset.test_way=5: must equal dataset.way=40",
        ),
        (["algorithm.inner_steps=2"], "algorithm.inner_steps: no such key"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(BadInput, match=message):
        expand(["algorithm=erm", *arguments])


def test_legal_forms_have_the_right_heads():
    for arguments, outputs in (
        (["dataset.test_way=4"], 847),
        (["algorithm.form=global"], 847),
        (["algorithm.form=fixed_label", "dataset.label_assignment=fixed_label", "dataset.way=5"], 5),
        (SINE, 1),
    ):
        (cell,) = expand(["algorithm=erm", *arguments], to_run=False)
        learner = build_learner(cell.config, build("dataset", cell.config["dataset"]))
        assert learner.net.stage("head").shape == (outputs,)


def test_omniglot_knows_its_classes_before_it_is_read():
    for split, count in (("train", 4112), ("val", 688), ("test", 1692)):
        assert 4 * len(split_characters("vinyals", (), 0)[split]) == count
        data = Omniglot.__new__(Omniglot)
        data.variant, data.rotations = "vinyals", True
        assert data.classes(split) == count


def test_tasks_without_class_ids_cannot_be_global():
    class Silent(Sinusoid):
        kind = "classification"

    with pytest.raises(BadInput, match="algorithm.form=global: tasks of Silent do not say which classes they are of"):
        ERM.head_width(Silent(), {"form": None})


def chain(*, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, outputs, bias=False))


def uncovered(*, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.GELU(), nn.Linear(4, outputs))


def test_heads_of_a_users_network():
    """By the names of its last layer; one without a bias gets none; a network that is one piece has no head."""

    def learner(name: str, **arguments: Any) -> ERM:
        net = Module(input_shape=(2, 6, 6), outputs=7, factory=f"test_erm:{name}")
        return oracles.build(ERM, net, "classification", alpha=0.1, **arguments)

    phi: dict[str, Tensor] = learner("chain").adapt(learner("chain").theta(), oracles.pictures().support, steps=1)[-1]
    assert phi.keys() == {"1.weight", "1.bias", "3.weight"} and phi["3.weight"].shape == (4, 3, 4)
    with pytest.raises(BadInput, match="the network's last layer must be a linear map"):
        learner("uncovered")
    with pytest.raises(BadInput, match="algorithm.adapted=1: must include the head"):
        learner("chain", adapted="1")
    kept = learner("uncovered", form="fixed_label")
    assert kept.adapt(kept.theta(), oracles.pictures(way=7).support, steps=1)[-1].keys() == kept.shapes.keys()
    assert isinstance(kept, MAML)
