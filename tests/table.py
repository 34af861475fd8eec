"""All algorithms in one table, which the common tests run through; and how their learners and tasks are made."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import oracles
import pytest
import torch
from oracles import build, meta_batch
from torch import Tensor

from metalearn.algorithms import (
    ERM,
    HSML,
    IMAML,
    MAML,
    MMAML,
    TSAMAML,
    MatchingNet,
    MetaLSTM,
    MetaSGD,
    MTNet,
    ProtoNet,
    Reptile,
    TNet,
)
from metalearn.bn import MODES
from metalearn.episode import Episode, MetaBatch
from metalearn.learner import MetaLearner
from metalearn.meta_gradient import MetaGradient
from metalearn.outer import Agreement
from metalearn.regularizers import Regularizer

STEPS: dict[str, Any] = {"alpha": 0.3, "inner_steps": 2, "test_steps": 3}
MINIBATCHES: dict[str, Any] = {**STEPS, "alpha": 0.01, "inner_batch": 4, "test_inner_batch": 3}
OFFICIAL: dict[str, Any] = {
    "lam": 2.0,
    "inner_solver": "official",
    "test_lam": 0.0,
    "cg_damping": 1.0,
    "lam_damping": 10.0,
}
GATED: dict[str, Any] = {
    **STEPS,
    "hidden": 2,
    "tree": [2, 2, 1],
    "example_filters": 1,
    "example_widths": [2],
    "xi": 0.1,
}
MODULATED: dict[str, Any] = {**STEPS, "hidden": 2, "example_filters": 1, "inner_clip": 0.01}
OPTIMIZER: dict[str, Any] = {"inner_batch": 3, "divide_grad_by_batch": True, "recompute": True}
TUNED: dict[str, Any] = {"alpha": 0.3, "test_steps": 3}
SITES = ["input", "block1", "block2", "feat", "head"]


class Row(NamedTuple):
    """An algorithm with small arguments, and where it differs from the others in what the common tests ask.

    static: nothing is adapted, the trajectory is its start. ordered: the order of a meta-batch's tasks matters.
    waits: tasks of a meta-step may wait for a later one.
    joint: without adaptation (alpha or steps zero) its outer gradient is that of the mean query loss at theta.
    passes: sites of the network that a pass of the support and one of the query set see in `task_loss` with two inner
    steps; None where they are not those of one network. silent: parts of the names of those meta-parameters whose
    gradient is exactly zero (a convolution's bias before batch norm). exact: the outer gradient is the slope of the
    outer objective; first-order methods' is not. couples: the outer gradient is no mean over tasks. arrange: what
    training finds before its first meta-step, in place of that. classes: outputs of the head that is learned on
    pictures.
    """

    name: str
    cls: type[MetaLearner]
    arguments: dict[str, Any]
    static: bool = False
    ordered: bool = False
    waits: bool = False
    joint: bool = False
    passes: tuple[list[str], list[str]] | None = (SITES * 2, SITES)
    silent: tuple[str, ...] = ("conv.bias",)
    exact: bool = False
    couples: bool = False
    arrange: Callable[[Any], None] = lambda learner: None
    classes: int = 3

    def outputs(self, kind: str) -> int:
        """Width of the network's head, 0 for none."""
        return (self.classes if kind == "classification" else 1) if self.cls.needs_head else 0


def apart(learner: TSAMAML) -> None:
    """Groups on a line through theta*: of two, about half of the tasks choose either."""
    size = sum(learner.shapes[k].numel() for k in learner.order)
    where = torch.linspace(0.1, -0.1, learner.m, dtype=torch.float64)[:, None]
    learner.place((where * oracles.normal(1, size, seed=9)).to(learner.centres))


def estimated(learner: Any) -> None:
    """An inner rate as if one meta-batch had been seen."""
    learner.running_rate.absorb(torch.tensor(0.3, dtype=torch.float64))


TSA: dict[str, Any] = {**STEPS, "m": 2, "id_steps": 1}
ALGORITHMS = [
    Row("maml", MAML, STEPS, joint=True, exact=True),
    Row("fomaml", MAML, {**STEPS, "first_order": True}, joint=True),
    Row(
        "fomaml_last_minibatch",
        MAML,
        {**STEPS, "first_order": True, "variant": "last_minibatch", "minibatch": 4},
        passes=(SITES, SITES),
    ),
    Row(
        "fomaml_tail",
        MAML,
        {**STEPS, "first_order": True, "variant": "tail", "minibatch": 4},
        passes=(SITES, SITES),
    ),
    Row(
        "maml_last_minibatch",
        MAML,
        {**STEPS, "variant": "last_minibatch", "minibatch": 4},
        exact=True,
        passes=(SITES, SITES),
    ),
    Row("anil", MAML, {**STEPS, "adapted": "head"}, joint=True, exact=True, passes=([*SITES, "head"], SITES)),
    Row(
        "anil_online",
        MAML,
        {**STEPS, "adapted": "head", "alpha": "online"},
        exact=True,
        passes=([*SITES, "head"], SITES),
        arrange=estimated,
    ),
    Row("erm", ERM, TUNED, exact=True, passes=([], SITES), classes=7),
    Row("erm_drawn", ERM, {**TUNED, "new_head": "drawn"}, exact=True, passes=([], SITES), classes=7),
    Row("erm_fixed_label", ERM, {**TUNED, "form": "fixed_label"}, exact=True, passes=([], SITES)),
    Row("meta_sgd", MetaSGD, STEPS, exact=True),
    Row("tnet", TNet, STEPS, exact=True),
    Row("mtnet", MTNet, STEPS),
    Row(
        "reptile",
        Reptile,
        {**STEPS, "inner_optimizer": "sgd", "inner_batch": None, "test_inner_batch": None},
        passes=(SITES * 2, []),
    ),
    Row("reptile_reset", Reptile, {**MINIBATCHES, "inner_state": "reset"}, passes=(SITES * 2, [])),
    Row("reptile_carry", Reptile, MINIBATCHES, passes=(SITES * 2, [])),
    Row("reptile_serial", Reptile, {**MINIBATCHES, "serial": True}, ordered=True, passes=(SITES * 2, [])),
    Row("gradient_agreement", MAML, {**STEPS, "combine": Agreement()}, couples=True),
    Row(
        "reptile_agreement",
        Reptile,
        {**STEPS, "inner_optimizer": "sgd", "inner_batch": None, "test_inner_batch": None, "combine": Agreement()},
        passes=(SITES * 2, []),
        couples=True,
    ),
    Row("imaml", IMAML, {**STEPS, "lam": 2.0}),
    Row("imaml_official", IMAML, {**STEPS, **OFFICIAL}),
    Row("imaml_head", IMAML, {**STEPS, "lam": 0.5, "adapted": "head"}, passes=([*SITES, "head"], SITES)),
    Row("hsml", HSML, GATED, exact=True),
    Row("mmaml", MMAML, MODULATED, exact=True),
    Row(
        "tsa_maml",
        TSAMAML,
        {**TSA, "batching": "mixed"},
        passes=(SITES * 3, SITES),
        silent=("conv.bias", "net."),
        exact=True,
        arrange=apart,
    ),
    Row(
        "tsa_maml_queue",
        TSAMAML,
        {**TSA, "cluster_params": "body", "routing": "current"},
        waits=True,
        passes=(SITES * 3, SITES),
        silent=("conv.bias", "net."),
        exact=True,
        arrange=apart,
    ),
    Row("meta_lstm", MetaLSTM, {"inner_steps": 2, "test_steps": 3, "hidden": 3}),
    Row("meta_lstm_minibatch", MetaLSTM, {"inner_steps": 2, "test_steps": 3, "hidden": 3, **OPTIMIZER}),
    Row("protonet", ProtoNet, {}, static=True, exact=True, passes=([], SITES[:-1])),
    Row("matchingnet", MatchingNet, {"scale": 10.0}, static=True, exact=True, passes=([], SITES[:-1])),
    Row("matchingnet_sum", MatchingNet, {"attention": "sum_cos"}, static=True, exact=True, passes=([], SITES[:-1])),
    Row("matchingnet_context", MatchingNet, {"context": True}, static=True, exact=True, passes=([], SITES[:-1])),
]
ROWS = {row.name: row for row in ALGORITHMS}
Case = tuple[str, str]
CASES: list[Case] = [(row.name, kind) for row in ALGORITHMS for kind in row.cls.kinds]
CLASSIFIERS = [case for case in CASES if case[1] == "classification"]


def each(cases: list[Case]) -> Any:
    """Run a test for these algorithms on these kinds of data."""
    return pytest.mark.parametrize("case", cases, ids="-".join)


def each_class(cases: list[Case]) -> Any:
    """The same, of which only the first row of each class runs with every `make test`: the others are its settings."""
    first: dict[tuple[type, str], Case] = {}
    for name, kind in cases:
        first.setdefault((ROWS[name].cls, kind), (name, kind))
    marked = [case if case in first.values() else pytest.param(case, marks=pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize("case", marked, ids=map("-".join, cases))


def each_setting(cases: list[Case]) -> Any:
    """The same, where a class's further rows, its settings, run with every `make test` on their first kind of data."""
    first = {row.cls: row.name for row in reversed(ALGORITHMS)}
    plain = [case for case in cases if case[0] in first.values() or case[1] == ROWS[case[0]].cls.kinds[0]]
    marked = [case if case in plain else pytest.param(case, marks=pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize("case", marked, ids=map("-".join, cases))


def where(**wanted: Any) -> list[Case]:
    """The cases whose rows have these values."""
    return [case for case in CASES if all(getattr(ROWS[case[0]], k) == v for k, v in wanted.items())]


def create(case: Case, net: Any = None, **changes: Any) -> MetaLearner:
    """The learner of a case: two convolutional blocks with batch norm, or a tanh network for regression."""
    name, kind = case
    row = ROWS[name]
    if net is None:
        net = (oracles.conv_net if kind == "classification" else oracles.mlp)(row.outputs(kind))
    learner = build(row.cls, net, kind, **{**row.arguments, **changes})
    row.arrange(learner)
    return learner


def tasks_for(case: Case, tasks: int = 5, seed: int = 0) -> Episode:
    return oracles.pictures(tasks, seed=seed) if case[1] == "classification" else oracles.curves(tasks, seed=seed)


def select(batch: MetaBatch, tasks: Any) -> MetaBatch:
    """Some tasks of a meta-batch as one of their own."""
    episodes = batch.episodes.select(tasks)
    return MetaBatch(batch.step, episodes.tasks, episodes, batch.key.select(tasks))


def step(learner: MetaLearner, batch: MetaBatch) -> MetaGradient | None:
    """One meta-step with a fresh outer optimizer."""
    return learner.meta_step(batch, learner.configure_optimizers())


def trained(case: Case, **changes: Any) -> tuple[MetaLearner, MetaBatch]:
    """A learner after one meta-step, so that its state is not zero, and the next meta-batch."""
    learner = create(case, **changes)
    step(learner, meta_batch(tasks_for(case, seed=1)))
    return learner, meta_batch(tasks_for(case), step=1)


def every_score(learner: MetaLearner, batch: MetaBatch) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    return learner.evaluate(batch, {bn: list(range(learner.test_steps + 1)) for bn in MODES})


def bits(learner: MetaLearner) -> dict[str, Any]:
    return copy.deepcopy(dict(learner.state_dict()))


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def regularizer(**hooks: Any) -> Regularizer:
    """One whose hooks are these functions (without self)."""
    return type("Toy", (Regularizer,), {name: staticmethod(hook) for name, hook in hooks.items()})()


def outer_value(learner: MetaLearner, episodes: Episode) -> Tensor:
    return oracles.outer_value(learner, episodes).detach()
