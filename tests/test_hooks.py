"""The hooks of a regularizer, through every algorithm (float64)."""

from typing import Any

import oracles
import pytest
import torch
from oracles import assert_close, build, meta_batch, outer_gradient
from table import (
    CASES,
    CLASSIFIERS,
    ROWS,
    Case,
    create,
    each,
    each_class,
    each_setting,
    every_score,
    outer_value,
    regularizer,
    select,
    tasks_for,
    trained,
    where,
)
from torch import Tensor, nn

from metalearn.algorithms import MAML
from metalearn.episode import Episode, Examples
from metalearn.learner import MetaLearner
from metalearn.meta_gradient import meta_gradient
from metalearn.random import TaskKey
from metalearn.regularizers import Regularizer

FITS = [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
"""Tasks of a chunk: unequal chunks are the hardest, and are tried on every run."""


# ---- hooks of a regularizer --------------------------------------------------------------------------------------


IDENTITIES: dict[str, Any] = {
    "features": lambda h, site, when, own: h,
    "episodes": lambda episodes, key: episodes,
    "task_gradients": lambda grads: grads,
    "penalty": lambda learner, theta, episodes, out: None,
}


@each_class(where(couples=False))
@pytest.mark.parametrize("hooks", [("features", "episodes"), ("task_gradients",), ("penalty",)], ids=" ".join)
@pytest.mark.parametrize("chunk_bytes", [1, pytest.param(2**25, marks=pytest.mark.slow)])
def test_hooks_that_change_nothing(case, hooks, chunk_bytes):
    """The paths for per-task gradients and for coupled tasks give what the plain one gives."""
    identities = regularizer(**{hook: IDENTITIES[hook] for hook in hooks})
    (plain, batch), (hooked, _) = (trained(case, chunk_bytes=chunk_bytes, regularizer=r) for r in (None, identities))
    assert_close(meta_gradient(hooked, batch), meta_gradient(plain, batch))


def mixing_penalty(learner: MetaLearner, theta: Any, episodes: Episode, out: Any) -> Tensor:
    """Products of neighbours in everything that tasks put out, and theta (whose gradient is then an expanded one)."""
    parts = [out.loss, *out.phi.values(), *([] if out.prediction is None else [out.prediction])]
    between = torch.stack([(part * part.roll(1, 0)).sum() for part in parts]).sum()
    return between + torch.stack([p.sum() for p in theta["net"].values()]).sum()


@each_class(where(couples=False))
@pytest.mark.parametrize("fits", FITS)
def test_a_penalty_that_couples_tasks(case, fits):
    """Chunked or not, its gradient is that of one graph over all tasks."""
    (plain, batch), learner = trained(case), create(case, regularizer=regularizer(penalty=mixing_penalty))
    learner.load_state_dict(plain.state_dict())
    theta = learner.theta()
    out = learner.task_loss(theta, batch.episodes, batch.key)
    objective = out.loss.mean() + mixing_penalty(learner, theta, batch.episodes, out)
    expected = torch.autograd.grad(objective, list(learner.parameters()), materialize_grads=True)
    learner.chunk_bytes = fits * learner.task_bytes(batch.episodes)
    result = meta_gradient(learner, batch)
    assert_close((result.grads, result.loss), (list(expected), out.loss.detach()))


def with_outer(case: Case, outer: Any) -> MetaLearner:
    """The learner of a case with another outer objective."""
    learner = create(case)
    learner.__class__ = type("Coupled", (type(learner),), {"outer": outer})
    return learner


def soft_maximum(learner: MetaLearner, theta: Any, episodes: Episode, out: Any) -> Tensor:
    """Of the tasks' losses, plus what couples their parameters: not a mean of anything that chunks could have."""
    return out.loss.logsumexp(0) + sum(p.mean(0).square().sum() for p in out.phi.values())


@each_class(where(couples=False))
@pytest.mark.parametrize("fits", FITS)
def test_an_outer_objective_that_couples_tasks(case, fits):
    """Chunked or not, its gradient is that of one graph over all tasks."""
    learner, batch = with_outer(case, soft_maximum), meta_batch(tasks_for(case))
    out = learner.task_loss(learner.theta(), batch.episodes, batch.key)
    objective = soft_maximum(learner, learner.theta(), batch.episodes, out)
    expected = torch.autograd.grad(objective, list(learner.parameters()), materialize_grads=True)
    learner.chunk_bytes = fits * learner.task_bytes(batch.episodes)
    assert len(learner.chunks(batch.episodes)) == {1: 5, 3: 2, 5: 1}[fits]
    assert_close(meta_gradient(learner, batch).grads, list(expected))


@pytest.mark.parametrize("hook", ["outer", "penalty"])
def test_coupled_tasks_have_no_task_gradients(hook):
    """A hook that would go unused is refused when the learner is made."""
    hooks = {name: IDENTITIES[name] for name in ({"task_gradients", hook} & IDENTITIES.keys())}
    cls = type("Coupled", (MAML,), {"outer": soft_maximum}) if hook == "outer" else MAML
    with pytest.raises(ValueError, match="Toy.task_gradients needs an outer objective that is a mean over tasks"):
        build(cls, oracles.mlp(), "regression", alpha=0.1, regularizer=regularizer(**hooks))


def test_tasks_of_other_ranks_cannot_be_coupled():
    learner, batch = with_outer(("maml", "regression"), soft_maximum), meta_batch(oracles.curves())
    with pytest.raises(ValueError, match="couples the tasks of a meta-batch; set trainer.devices=1"):
        meta_gradient(learner, batch._replace(total=2 * batch.total))


@each_class(where(couples=False))
def test_task_gradients_are_those_of_each_task(case):
    """Weighted by the hook: the weighted mean of the gradients of the tasks alone."""
    weights = torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0], dtype=torch.float64)

    def weigh(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: torch.einsum("b,b...->b...", weights, g) for k, g in grads.items()}

    learner, batch = trained(case, regularizer=regularizer(task_gradients=weigh))
    plain, _ = trained(case)
    plain.load_state_dict(learner.state_dict())
    alone = [meta_gradient(plain, select(batch, slice(i, i + 1))).grads for i in range(5)]
    expected = [sum(w * g for w, g in zip(weights, grads, strict=True)) / 5 for grads in zip(*alone, strict=True)]
    assert_close(meta_gradient(learner, batch).grads, expected)


@each([case for case in CLASSIFIERS if ROWS[case[0]].passes is not None])
def test_features_pass_each_site_once(case):
    """In each forward pass; ANIL's body makes one pass of the support set."""
    calls: list[tuple[str, str]] = []

    def record(h: Tensor, site: str, when: str, own: Any) -> Tensor:
        calls.append((when, site))
        return h

    learner, episodes = create(case, regularizer=regularizer(features=record)), tasks_for(case)
    learner.task_loss(learner.theta(), episodes, meta_batch(episodes).key)
    inner, query = ROWS[case[0]].passes
    assert calls == [("inner", site) for site in inner] + [("query", site) for site in query]


@pytest.mark.parametrize("when, part", [("inner", 0), ("query", 1)])
@each([("maml", "classification"), ("anil", "regression")])
def test_features_map_what_the_network_sees(case, when, part):
    """Doubling at the input is doubling the inputs, while adapting or on the query set."""
    double = regularizer(features=lambda h, site, when, own, at=when: 2 * h if (site, when) == ("input", at) else h)
    episodes = tasks_for(case)
    doubled = list(episodes)
    doubled[part] = Examples(2 * episodes[part].x, episodes[part].y)
    grads = outer_gradient(create(case, regularizer=double), episodes)
    assert_close(list(grads.values()), list(outer_gradient(create(case), Episode(*doubled)).values()))


class Gate(Regularizer):
    """Scales the features by a meta-parameter of its own, while adapting and on the query set."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def features(self, h: Tensor, site: str, when: str, own: Any) -> Tensor:
        return h * own["scale"] if site == "feat" else h


@each([("maml", "regression"), ("anil", "regression")])
def test_a_regularizer_inside_the_network_learns_through_the_inner_loop(case):
    """The gradient of its own parameter is the central difference of the objective, adaptation included."""
    gate = Gate()
    learner, episodes = create(case, regularizer=gate), tasks_for(case)
    grads = outer_gradient(learner, episodes)

    def objective(value: float) -> float:
        with torch.no_grad():
            gate.scale.fill_(value)
        return float(meta_gradient(learner, meta_batch(episodes)).loss.mean())

    at = gate.scale.item()
    central = (objective(at + 1e-5) - objective(at - 1e-5)) / 2e-5
    own = next(g for name, g in grads.items() if name.endswith("scale"))
    torch.testing.assert_close(float(own), central, rtol=1e-7, atol=1e-9)  # error of the difference about 1e-10


@each_setting(CASES)
def test_rewritten_episodes_are_learned_and_not_evaluated(case):
    def shift(episodes: Episode, key: TaskKey) -> Episode:
        return Episode(
            *(Examples(part.x + key.task.view(-1, *[1] * (part.x.dim() - 1)), part.y) for part in episodes[:2]),
            episodes.latent,
        )

    learner, plain = create(case, regularizer=regularizer(episodes=shift)), create(case)
    batch = meta_batch(tasks_for(case))
    assert_close(every_score(learner, batch), every_score(plain, batch))
    rewritten = batch._replace(episodes=shift(batch.episodes, batch.key))
    assert_close(meta_gradient(learner, batch), meta_gradient(plain, rewritten))


def test_a_regularizer_may_own_parameters():
    class Scaled(Regularizer):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def penalty(self, learner: Any, theta: Any, episodes: Any, out: Any) -> Tensor:
            return theta["regularizer"]["scale"].square() * out.loss.mean()

    learner, episodes = create(("maml", "regression"), regularizer=Scaled()), oracles.curves()
    grads = outer_gradient(learner, episodes)
    scale = grads.pop("regularizer.scale")
    plain = outer_gradient(create(("maml", "regression")), episodes)
    rho = learner.regularizer.scale.detach()
    assert_close(scale, 2 * rho * outer_value(learner, episodes))
    assert_close(grads, {k: (1 + rho.square()) * g for k, g in plain.items()})
