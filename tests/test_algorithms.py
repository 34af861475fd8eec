"""Every algorithm through common properties, and each against its closed forms (float64)."""

import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.distributed as dist
from oracles import VALUES, LinearForm, assert_close, build, distance, meta_batch, normal, outer_gradient, quadratic
from torch import Tensor, nn

from metalearn.algorithms import MAML, ProtoNet, Reptile
from metalearn.algorithms.protonet import logits, prototypes
from metalearn.algorithms.reptile import minibatches
from metalearn.bn import MODES
from metalearn.episode import Episode, Examples, MetaBatch
from metalearn.functional import per_task, unrolled
from metalearn.learner import Diverged, MetaLearner
from metalearn.meta_gradient import MetaGradient, meta_gradient
from metalearn.optim import SGD, Adam
from metalearn.random import TaskKey
from metalearn.regularizers import Regularizer

STEPS: dict[str, Any] = {"alpha": 0.3, "inner_steps": 2, "test_steps": 3}
MINIBATCHES: dict[str, Any] = {**STEPS, "alpha": 0.01, "inner_batch": 4, "test_inner_batch": 3}
ALGORITHMS: list[tuple[str, type[MetaLearner], dict[str, Any]]] = [
    ("maml", MAML, STEPS),
    ("fomaml", MAML, {**STEPS, "first_order": True}),
    ("anil", MAML, {**STEPS, "adapted": "head"}),
    ("reptile", Reptile, {**STEPS, "inner_optimizer": "sgd", "inner_batch": None, "test_inner_batch": None}),
    ("reptile_reset", Reptile, {**MINIBATCHES, "inner_state": "reset"}),
    ("reptile_carry", Reptile, MINIBATCHES),
    ("reptile_serial", Reptile, {**MINIBATCHES, "serial": True}),
    ("protonet", ProtoNet, {}),
]
Case = tuple[str, str]
CASES: list[Case] = [(name, kind) for name, cls, _ in ALGORITHMS for kind in cls.kinds]
CLASSIFIERS = [case for case in CASES if case[1] == "classification"]


def each(cases: list[Case]) -> Any:
    """Run a test for these algorithms on these kinds of data."""
    return pytest.mark.parametrize("case", cases, ids="-".join)


def create(case: Case, net: Any = None, **changes: Any) -> MetaLearner:
    """The learner of a case: two convolutional blocks with batch norm, or a tanh network for regression."""
    name, kind = case
    cls, arguments = next((cls, arguments) for n, cls, arguments in ALGORITHMS if n == name)
    if net is None:
        net = oracles.conv_net(3 if cls.needs_head else 0) if kind == "classification" else oracles.mlp()
    return build(cls, net, kind, **{**arguments, **changes})


def tasks_for(case: Case, tasks: int = 5, seed: int = 0) -> Episode:
    return oracles.pictures(tasks, seed=seed) if case[1] == "classification" else oracles.curves(tasks, seed=seed)


def select(batch: MetaBatch, tasks: Any) -> MetaBatch:
    """Some tasks of a meta-batch as one of their own."""
    episodes = batch.episodes.select(tasks)
    return MetaBatch(batch.step, episodes.tasks, episodes, batch.key.select(tasks))


def step(learner: MetaLearner, batch: MetaBatch) -> MetaGradient:
    """One meta-step with a fresh outer optimizer."""
    return learner.meta_step(batch, learner.configure_optimizers())


def trained(case: Case, **changes: Any) -> tuple[MetaLearner, MetaBatch]:
    """A learner after one meta-step, so that its state is not zero, and the next meta-batch."""
    learner = create(case, **changes)
    step(learner, meta_batch(tasks_for(case, seed=1)))
    return learner, meta_batch(tasks_for(case), step=1)


def every_score(learner: MetaLearner, batch: MetaBatch) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    return learner.evaluate(batch, {bn: list(range(learner.test_steps + 1)) for bn in MODES})


def bits(learner: MetaLearner) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in learner.state_dict().items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- what holds for all ------------------------------------------------------------------------------------------


@each(CASES)
def test_shapes(case):
    learner, episodes = create(case), tasks_for(case)
    theta, (tasks, queries) = learner.theta(), episodes.query.y.shape[:2]
    trajectory = learner.adapt(theta, episodes.support, steps=3)
    assert len(trajectory) == (1 if case[0] == "protonet" else 4)
    for phi in trajectory:
        assert all(p.shape == (tasks, *learner.shapes[k]) for k, p in phi.items())
    prediction = learner.predict(theta, trajectory[-1], episodes.query.x, support=episodes.support, bn="batch")
    assert prediction.shape == (tasks, queries, 3 if case[1] == "classification" else 1)
    assert learner.task_loss(theta, episodes, meta_batch(episodes).key).loss.shape == (tasks,)
    scores = every_score(learner, meta_batch(episodes))
    assert scores.keys() == {(bn, k) for bn in MODES for k in range(len(trajectory))}
    assert all(value.shape == (tasks,) for pair in scores.values() for value in pair)


@each(CASES)
def test_a_batch_is_its_tasks_alone(case):
    """Gradients are the mean over tasks, losses and scores those of each task by itself."""
    learner, batch = trained(case)
    parts = [select(batch, slice(i, i + 1)) for i in range(batch.total)]
    together, alone = meta_gradient(learner, batch), [meta_gradient(learner, part) for part in parts]
    assert_close(together.loss, torch.cat([one.loss for one in alone]))
    assert_close(
        together.grads, [sum(grads) / batch.total for grads in zip(*(one.grads for one in alone), strict=True)]
    )
    scores = [every_score(learner, part) for part in parts]
    for point, pair in every_score(learner, batch).items():
        assert_close(pair, tuple(torch.cat(values) for values in zip(*(s[point] for s in scores), strict=True)))


@each(CASES)
@pytest.mark.parametrize("fits", [1, 3])
def test_chunks_change_nothing(case, fits):
    """One task at a time, or two unequal chunks."""
    learner, batch = trained(case)
    whole = meta_gradient(learner, batch), every_score(learner, batch)
    assert len(learner.chunks(batch.episodes)) == 1
    learner.chunk_bytes = fits * learner.net.activation_bytes(batch.episodes.query.x.shape[1])
    assert len(learner.chunks(batch.episodes)) == (5 if fits == 1 else 2)
    assert_close((meta_gradient(learner, batch), every_score(learner, batch)), whole)


@each(CASES)
def test_task_order_changes_nothing(case):
    """Of serial Reptile it changes everything: each task starts where the one before ended."""
    ends = []
    for order in ([0, 1, 2, 3, 4], [2, 0, 4, 1, 3]):
        learner, batch = trained(case)
        step(learner, select(batch, torch.tensor(order)))
        ends.append([p.detach() for p in learner.parameters()])
    assert (distance(*ends) < oracles.ROUNDING) == (case[0] != "reptile_serial")


@each(CASES)
def test_evaluation_leaves_no_trace(case):
    learner, batch = trained(case)
    before, random = bits(learner), torch.get_rng_state()
    first, second = every_score(learner, batch), every_score(learner, batch)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert_same_bits(bits(learner), before)
    assert torch.equal(torch.get_rng_state(), random)


@each(CASES)
def test_every_parameter_that_matters_has_a_gradient(case):
    """The bias of a convolution before batch norm does not: its gradient is exactly zero."""
    learner = create(case)
    grads = outer_gradient(learner, tasks_for(case))
    assert all(bool(torch.isfinite(g).all()) for g in grads.values())
    assert {name for name, g in grads.items() if not g.any()} == {name for name in grads if "conv.bias" in name}


@each(CASES)
def test_a_checkpoint_continues_bit_by_bit(case):
    learner, optimizer = create(case), Adam(lr=0.01)
    learner.attach(optimizer, 10)
    outer = learner.configure_optimizers()
    batches = [meta_batch(tasks_for(case, seed=s), step=s) for s in range(3)]
    for batch in batches[:2]:
        learner.meta_step(batch, outer)
    file = io.BytesIO()
    torch.save([learner.state_dict(), outer.state_dict()], file)
    learner.meta_step(batches[2], outer)

    other = create(case)
    other.initialize(seed=1)
    other.attach(optimizer, 10)
    resumed = other.configure_optimizers()
    file.seek(0)
    for part, state in zip((other, resumed), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    other.meta_step(batches[2], resumed)
    assert_same_bits(bits(other), bits(learner))


@each(CASES)
def test_same_seed_same_bits(case):
    """Whatever the global generator is at; another seed starts elsewhere."""
    ends = []
    for seed, elsewhere in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(elsewhere)
        learner = create(case)
        learner.initialize(seed)
        for s in range(2):
            step(learner, meta_batch(tasks_for(case, seed=s), step=s))
        ends.append(bits(learner))
    assert_same_bits(ends[0], ends[1])
    assert all(not torch.equal(ends[2][name], ends[0][name]) for name in ends[0] if name.endswith("head.weight"))


# ---- batch norm --------------------------------------------------------------------------------------------------


def predictions(learner: MetaLearner, episodes: Episode, bn: str) -> Any:
    """Maps query inputs to outputs of the adapted learner."""
    phi = learner.adapt(learner.theta(), episodes.support, steps=learner.test_steps)[-1]
    return partial(learner.predict, learner.theta(), phi, support=episodes.support, bn=bn)


@each(CLASSIFIERS)
@pytest.mark.parametrize("bn", MODES)
def test_only_batch_statistics_mix_queries(case, bn):
    """BN (i) and (iii): other queries matter in mode `batch` alone; their order never does."""
    (learner, batch), other = trained(case), tasks_for(case, seed=2).query.x
    predict, x = predictions(learner, batch.episodes, bn), batch.episodes.query.x
    mixed = torch.cat([x[:, :1], other[:, 1:]], 1)
    moved = float((predict(mixed)[:, 0] - predict(x)[:, 0]).detach().abs().max())
    assert moved > 1e-3 if bn == "batch" else moved < oracles.ROUNDING
    order = torch.randperm(x.shape[1], generator=oracles.generator(0))
    assert_close(predict(x[:, order]), predict(x)[:, order])


@each(CLASSIFIERS)
def test_modes_agree_without_batch_norm(case):
    """BN (ii)."""
    net = oracles.conv_net(0 if case[0] == "protonet" else 3, bn=False)
    learner, episodes = create(case, net), tasks_for(case)
    out = [predictions(learner, episodes, bn)(episodes.query.x) for bn in (*MODES, "none")]
    assert_close(out[1:], out[:1] * len(MODES))


def test_unknown_modes_are_refused():
    episodes = oracles.pictures()
    with pytest.raises(ValueError, match="unknown batch-norm mode 'eval'; one of batch, support_plus_one"):
        predictions(create(("maml", "classification")), episodes, "eval")(episodes.query.x)


@pytest.mark.parametrize("optimizer", [Adam(lr=0.01), SGD(lr=0.01, momentum=0.9)])
@each([case for case in CASES if not case[0].endswith("serial")])
def test_meta_steps_follow_the_plain_optimizer(case, optimizer):
    """Three meta-steps are three of torch's unfused optimizer on the meta-gradients, whatever their memory layout."""
    learner, episodes = create(case), tasks_for(case)
    learner.attach(optimizer, 3)
    ours = learner.configure_optimizers()
    plain = {n: torch.nn.Parameter(p.detach().clone().contiguous()) for n, p in learner.named_parameters()}
    adam = isinstance(optimizer, Adam)
    theirs = torch.optim.Adam(plain.values(), lr=0.01) if adam else torch.optim.SGD(plain.values(), 0.01, momentum=0.9)
    for _ in range(3):
        grads = outer_gradient(learner, episodes)
        for name, parameter in plain.items():
            parameter.grad = grads[name].detach().clone().contiguous()
        theirs.step()
        learner.meta_step(meta_batch(episodes), ours)
        assert_close({n: p.detach() for n, p in learner.named_parameters()}, {n: p.detach() for n, p in plain.items()})


# ---- hooks of a regularizer --------------------------------------------------------------------------------------


def regularizer(**hooks: Any) -> Regularizer:
    """One whose hooks are these functions (without self)."""
    return type("Toy", (Regularizer,), {name: staticmethod(hook) for name, hook in hooks.items()})()


IDENTITIES: dict[str, Any] = {
    "features": lambda h, site, when, own: h,
    "episodes": lambda episodes, key: episodes,
    "task_gradients": lambda grads: grads,
    "penalty": lambda learner, theta, episodes, out: None,
}


@each(CASES)
@pytest.mark.parametrize("hook", IDENTITIES)
@pytest.mark.parametrize("chunk_bytes", [1, 2**25])
def test_hooks_that_change_nothing(case, hook, chunk_bytes):
    """The paths for per-task gradients and for coupled tasks give what the plain one gives."""
    (plain, batch), (hooked, _) = (
        trained(case, chunk_bytes=chunk_bytes, regularizer=r) for r in (None, regularizer(**{hook: IDENTITIES[hook]}))
    )
    assert_close(meta_gradient(hooked, batch), meta_gradient(plain, batch))


def mixing_penalty(learner: MetaLearner, theta: Any, episodes: Episode, out: Any) -> Tensor:
    """Products of neighbours in everything that tasks put out, and theta (whose gradient is then an expanded one)."""
    parts = [out.loss, *out.phi.values(), *([] if out.prediction is None else [out.prediction])]
    between = torch.stack([(part * part.roll(1, 0)).sum() for part in parts]).sum()
    return between + torch.stack([p.sum() for p in theta["net"].values()]).sum()


@each(CASES)
@pytest.mark.parametrize("fits", [1, 3, 5])
def test_a_penalty_that_couples_tasks(case, fits):
    """Chunked or not, its gradient is that of one graph over all tasks."""
    learner, batch = trained(case, regularizer=regularizer(penalty=mixing_penalty))
    theta = learner.theta()
    out = learner.task_loss(theta, batch.episodes, batch.key)
    objective = out.loss.mean() + mixing_penalty(learner, theta, batch.episodes, out)
    expected = torch.autograd.grad(objective, list(learner.parameters()), materialize_grads=True)
    learner.chunk_bytes = fits * learner.net.activation_bytes(batch.episodes.query.x.shape[1])
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


@each(CASES)
@pytest.mark.parametrize("fits", [1, 3, 5])
def test_an_outer_objective_that_couples_tasks(case, fits):
    """Chunked or not, its gradient is that of one graph over all tasks."""
    learner, batch = with_outer(case, soft_maximum), meta_batch(tasks_for(case))
    out = learner.task_loss(learner.theta(), batch.episodes, batch.key)
    objective = soft_maximum(learner, learner.theta(), batch.episodes, out)
    expected = torch.autograd.grad(objective, list(learner.parameters()), materialize_grads=True)
    learner.chunk_bytes = fits * learner.net.activation_bytes(batch.episodes.query.x.shape[1])
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


@each(CASES)
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


@each(CLASSIFIERS)
def test_features_pass_each_site_once(case):
    """In each forward pass; ANIL's body makes one pass of the support set."""
    calls: list[tuple[str, str]] = []

    def record(h: Tensor, site: str, when: str, own: Any) -> Tensor:
        calls.append((when, site))
        return h

    learner, episodes = create(case, regularizer=regularizer(features=record)), tasks_for(case)
    learner.task_loss(learner.theta(), episodes, meta_batch(episodes).key)
    sites = ["input", "block1", "block2", "feat", "head"]
    inner, query = {
        "anil": ([*sites, "head"], sites),
        "protonet": ([], sites[:-1]),
        "reptile": (sites * 2, []),
        "maml": (sites * 2, sites),
        "fomaml": (sites * 2, sites),
    }[case[0].split("_")[0]]
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


@each(CASES)
def test_rewritten_episodes_are_learned_and_not_evaluated(case):
    def shift(episodes: Episode, key: TaskKey) -> Episode:
        return Episode(
            *(Examples(part.x + key.task.view(-1, *[1] * (part.x.dim() - 1)), part.y) for part in episodes[:2]), {}
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


def outer_value(learner: MetaLearner, episodes: Episode) -> Tensor:
    return oracles.outer_value(learner, episodes).detach()


# ---- divergence --------------------------------------------------------------------------------------------------


@each([case for case in CASES if case[0] != "reptile_serial"])
def test_divergence_names_its_place_and_spoils_nothing(case):
    learner, batch = trained(case)
    before = bits(learner)
    for part in batch.episodes[:2]:
        part.x[2] = math.nan
    place = "query loss of task 2 is not finite at meta-step 1" + (
        "" if case[0] == "protonet" else f", algorithm.alpha = {learner.alpha}"
    )
    with pytest.raises(Diverged, match=place):
        step(learner, batch)
    assert_same_bits(bits(learner), before)


def test_an_infinite_gradient_of_a_finite_loss_is_divergence():
    learner = create(("maml", "regression"), regularizer=regularizer(penalty=lambda _, theta, *rest: root(theta)))

    def root(theta: Any) -> Tensor:
        return (0 * theta["net"]["h1.weight"]).sum().sqrt()

    with pytest.raises(Diverged, match="outer gradient is not finite at meta-step 0"):
        step(learner, meta_batch(oracles.curves()))


def test_large_gradients_are_no_divergence():
    """Finite float32 entries whose sum is not."""
    huge = regularizer(penalty=lambda _, theta, *rest: 3e38 * theta["net"]["h1.weight"].sum())
    learner = create(("maml", "regression"), regularizer=huge).float()
    batch = meta_batch(oracles.curves().to(torch.float32))
    result = meta_gradient(learner, batch)
    assert result.finite and not bool(sum(g.sum() for g in result.grads).isfinite())


def diverge_on_rank(rank: int, folder: Path) -> None:
    """One of two processes, of which the second has the bad task; writes what it says."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    learner, batch = create(("maml", "regression")), meta_batch(oracles.curves(5))
    batch.episodes.query.x[3] = math.nan
    mine = select(batch, slice(0, 2) if rank == 0 else slice(2, 5))._replace(total=5)
    try:
        step(learner, mine)
    except Diverged as diverged:
        (folder / f"rank{rank}").write_text(str(diverged))
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_rank_names_the_bad_task(tmp_path):
    torch.multiprocessing.spawn(diverge_on_rank, (tmp_path,), nprocs=2)
    said = {(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)}
    assert len(said) == 1 and said.pop().startswith("query loss of task 3 is not finite at meta-step 0")


# ---- MAML, FOMAML, ANIL ------------------------------------------------------------------------------------------


QUADRATIC = VALUES["quadratic_two_dim"]
INPUTS = {k: torch.tensor(v, dtype=torch.float64) for k, v in QUADRATIC["inputs"].items() if k != "loss"}


def linear_form(cls: type[MetaLearner], w: Tensor, **arguments: Any) -> MetaLearner:
    """A learner of `w -> x w`, at w."""
    learner = build(cls, LinearForm(len(w)), "regression", **arguments)
    with torch.no_grad():
        learner.net.head.weight.copy_(w[None])
    return learner


def slope(learner: MetaLearner, episodes: Episode) -> Tensor:
    """The outer gradient of a linear form."""
    return outer_gradient(learner, episodes)["net.head.weight"][0]


def forms(tasks: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positive definite matrices `[tasks, d, d]` with eigenvalues in about 0.5..2, and minima `[tasks, d]`."""
    root = normal(tasks, d, d, seed=seed) / 2
    return root @ root.mT + 0.5 * torch.eye(d, dtype=torch.float64), normal(tasks, d, seed=seed + 1)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_quadratic_fixture(steps):
    """Numbers of the specification for MAML (M1), FOMAML (F2) and Reptile on the support set alone (R3)."""
    i, expected = INPUTS, {k: torch.tensor(v, dtype=torch.float64) for k, v in QUADRATIC[f"k={steps}"].items()}
    support = quadratic(i["A_support_hessian"][None], i["c_support"][None])
    episodes = Episode(support, quadratic(i["D_query_hessian"][None], i["c_query"][None]), {})
    arguments = {"alpha": float(i["alpha"]), "inner_steps": steps}
    maml, fomaml = (linear_form(MAML, i["theta"], first_order=f, **arguments) for f in (False, True))
    assert_close(maml.adapt(maml.theta(), support, steps=steps)[-1]["head.weight"][0, 0], expected["phi"])
    assert_close(outer_value(maml, episodes), expected["query_loss"])
    assert_close(slope(maml, episodes), expected["maml_grad"])
    assert_close(slope(fomaml, episodes), expected["fomaml_grad"])
    reptile = linear_form(Reptile, i["theta"], inner_optimizer="sgd", inner_batch=None, **arguments)
    pooled = Episode(support, support, {})  # the pool's mean loss is that of the support set
    assert_close(slope(reptile, pooled) / i["alpha"], expected["reptile_grad_support_only"])


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_outer_gradient_of_quadratics(steps, first_order):
    """M1, F2: phi = c + (I - alpha A)^k (theta - c), gradient = mean over tasks of (I - alpha A)^k D (phi - c')."""
    (a, c), (d, c_query), theta = forms(5, 3, seed=0), forms(5, 3, seed=2), normal(3, seed=4)
    learner = linear_form(MAML, theta, alpha=0.2, inner_steps=steps, first_order=first_order)
    power = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - 0.2 * a, steps)
    phi = c + torch.einsum("bij,bj->bi", power, theta - c)
    grads = torch.einsum("bij,bj->bi", d, phi - c_query)
    expected = grads if first_order else torch.einsum("bij,bj->bi", power, grads)
    assert_close(slope(learner, Episode(quadratic(a, c), quadratic(d, c_query), {})), expected.mean(0))


@pytest.mark.parametrize("alpha", ["0.05", "0.1"])
def test_linear_regression_is_minimal_at_the_closed_form(alpha):
    """M2: the fixture's minimiser of the empirical objective, support = query, without noise."""
    fixture = VALUES["linear_maml"]
    x, a = (torch.tensor(fixture["inputs"][k], dtype=torch.float64) for k in ("Phi", "a"))
    examples = Examples(x, x @ a.unsqueeze(-1))
    w = torch.tensor(fixture["w_maml"][alpha], dtype=torch.float64)
    learner = linear_form(MAML, w, alpha=float(alpha), inner_steps=1)
    episodes = Episode(examples, examples, {})
    assert_close(slope(learner, episodes), torch.zeros(2, dtype=torch.float64))
    assert_close(outer_value(learner, episodes), torch.tensor(fixture["risk_at_minimiser"][alpha], dtype=torch.float64))


class Linear(MAML):
    """A loss without curvature."""

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction * y).flatten(1).mean(1)


def test_without_curvature_first_order_is_exact():
    """M3, F1."""
    episodes, theta = oracles.curves(inputs=3), normal(3, seed=0)
    exact, first = (
        slope(linear_form(Linear, theta, alpha=0.3, inner_steps=3, first_order=f), episodes) for f in (False, True)
    )
    assert_close(first, exact)
    assert_close(exact, (episodes.query.x * episodes.query.y).mean((0, 1)))


def test_one_step_on_the_query_set_itself():
    """M4: k = 1, S = Q: (I - alpha H(theta)) grad L(phi)."""
    support = oracles.curves(1).support
    learner = create(("maml", "regression"), inner_steps=1)
    theta = [p.detach() for p in learner.net.parameters()]

    def value(*params: Tensor) -> Tensor:
        return oracles.loss(
            oracles.forward(learner.net, dict(zip(learner.shapes, params, strict=True)), support.x[0]), support.y[0]
        )

    first = torch.autograd.functional.jacobian(value, tuple(theta))
    at_phi = torch.autograd.functional.jacobian(value, tuple(p - 0.3 * g for p, g in zip(theta, first, strict=True)))
    curved = torch.autograd.functional.hvp(value, tuple(theta), at_phi)[1]
    expected = [g - 0.3 * h for g, h in zip(at_phi, curved, strict=True)]
    assert_close(list(outer_gradient(learner, Episode(support, support, {})).values()), expected)


class Cosh(MAML):
    """Cosh of the error."""

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        return torch.cosh(prediction - y).flatten(1).mean(1)


def test_scalar_with_cosh_loss():
    """M5, two steps: d phi / d theta is the product of 1 - alpha cosh(phi_j - c)."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    theta, c, c_query, alpha = 0.4, -0.2, 0.7, 0.3
    learner = linear_form(Cosh, torch.tensor([theta], dtype=torch.float64), alpha=alpha, inner_steps=2)
    phi, chain = theta, 1.0
    for _ in range(2):
        phi, chain = phi - alpha * math.sinh(phi - c), chain * (1 - alpha * math.cosh(phi - c))
    episodes = Episode(Examples(one, c * one), Examples(one, c_query * one), {})
    assert slope(learner, episodes).item() == pytest.approx(chain * math.sinh(phi - c_query), rel=oracles.ROUNDING)


@pytest.mark.parametrize("name", ["maml", "anil", "fomaml", "protonet"])
def test_outer_gradient_is_the_slope_of_the_objective(name):
    """G1, A3, P6: finite differences in all meta-parameters of a tanh network; first order has to fail."""
    case, episodes = (name, "classification"), oracles.pictures(2, side=1)
    learner = create(case, oracles.mlp(0 if name == "protonet" else 3))
    slopes = oracles.finite_differences(lambda: oracles.outer_value(learner, episodes), list(learner.parameters()))
    error = distance(list(outer_gradient(learner, episodes).values()), slopes)
    assert error > 1e-2 if name == "fomaml" else error < 1e-6


@each([(name, kind) for name, kind in CASES if name in ("maml", "fomaml", "anil")])
@pytest.mark.parametrize("changes", [{"alpha": 0.0}, {"inner_steps": 0}], ids=["alpha", "steps"])
def test_without_adaptation_it_is_joint_training(case, changes):
    """G4: the gradient of the mean query loss at theta."""
    learner, episodes = create(case, **changes), tasks_for(case)
    theta = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
    losses = [oracles.loss(oracles.forward(learner.net, theta, x), y) for x, y in zip(*episodes.query, strict=True)]
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()), materialize_grads=True)
    assert_close(list(outer_gradient(learner, episodes).values()), list(expected))


def test_anil_is_maml_with_rates_zero_in_the_body():
    """A1, by differentiation through all steps of all parameters."""
    learner, episodes = create(("anil", "classification")), oracles.pictures()
    theta = learner.theta()["net"]
    rates = {k: 0.3 if k.startswith("head") else 0.0 for k in theta}

    def support_loss(phi: dict[str, Tensor], support: Examples) -> Tensor:
        return learner.loss(learner.net.run(phi, support.x), support.y)

    phi = unrolled(support_loss, per_task(theta, 4, learner.shapes), episodes.support, rates, 2)[-1]
    objective = learner.loss(learner.net.run(phi, episodes.query.x), episodes.query.y).mean()
    expected = torch.autograd.grad(objective, list(theta.values()), materialize_grads=True)
    assert_close(list(outer_gradient(learner, episodes).values()), list(expected))


def test_anil_of_one_layer_is_maml():
    """A2."""
    episodes, grads = oracles.curves(), []
    for name in ("anil", "maml"):
        grads.append(outer_gradient(create((name, "regression"), oracles.mlp(hidden=())), episodes))
    assert_close(*grads)


def test_sum_over_shots_is_a_step_times_the_way():
    """The loss of Finn et al.'s code: its alpha is way times smaller than that of the mean."""
    episodes = oracles.pictures(way=3)
    ends = []
    for alpha, reduction in ((0.1, "sum_over_shots"), (0.3, "mean")):
        learner = create(("maml", "classification"), alpha=alpha, inner_loss_reduction=reduction)
        ends.append(list(outer_gradient(learner, episodes).values()))
    assert_close(*ends)


# ---- Reptile -----------------------------------------------------------------------------------------------------

SGD: dict[str, Any] = {"inner_optimizer": "sgd", "inner_batch": None, "alpha": 0.2}


def pool(episodes: Episode) -> Examples:
    return Examples(*(torch.cat(parts, 1) for parts in zip(*episodes[:2], strict=True)))


def test_one_step_of_reptile_is_joint_training():
    """R1, R2: alpha times the gradient of the mean loss of the union of all pools."""
    learner, episodes = create(("reptile", "regression"), inner_steps=1), oracles.curves()
    theta = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
    union = Examples(*(part.flatten(0, 1) for part in pool(episodes)))
    value = 0.3 * oracles.loss(oracles.forward(learner.net, theta, union.x), union.y)
    expected = torch.autograd.grad(value, list(theta.values()))
    assert_close(list(outer_gradient(learner, episodes).values()), list(expected))


@each([("reptile", "classification"), ("reptile", "regression")])
def test_reptile_moves_to_the_mean_of_plain_loops(case):
    """R6 for several tasks: theta - mean of U(theta); with SGD of rate 1, theta becomes that mean."""
    learner, episodes = create(case), tasks_for(case)
    theta = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
    ends = [
        oracles.descend(learner.net, theta, Examples(x, y), 0.3, 2, list(theta), first_order=True)
        for x, y in zip(*pool(episodes), strict=True)
    ]
    step(learner, meta_batch(episodes))
    means = {k: torch.stack([end[k] for end in ends]).mean(0) for k in theta}
    assert_close(dict(learner.net.named_parameters()), means)


@pytest.mark.parametrize("steps", [1, 3])
def test_reptile_rests_where_displacements_cancel(steps):
    """R3: at (sum_i M_i)^-1 sum_i M_i c_i with M_i = I - (I - alpha A_i)^k; with equal A, at the mean of the c_i."""
    a, c = forms(3, 2, seed=0)
    eye = torch.eye(2, dtype=torch.float64)
    for forms_a in (a, a[:1].expand(3, 2, 2)):
        m = eye - torch.linalg.matrix_power(eye - 0.2 * forms_a, steps)
        rest = torch.linalg.solve(m.sum(0), torch.einsum("bij,bj->i", m, c))
        task = quadratic(forms_a, c)
        learner = linear_form(Reptile, rest, inner_steps=steps, **SGD)
        assert_close(slope(learner, Episode(task, task, {})), torch.zeros(2, dtype=torch.float64))
    assert_close(rest, c.mean(0))


@each([case for case in CASES if case[0] == "reptile_serial"])
def test_serial_reptile_is_one_task_after_the_other(case):
    """R4: with one task it is the batched form, and with several as many meta-steps of one."""
    serial, batched = create(case), create(case, serial=False)
    batch = meta_batch(tasks_for(case))
    step(serial, batch)
    for i in range(batch.total):
        step(batched, select(batch, slice(i, i + 1)))
    assert_same_bits(bits(serial), bits(batched))


@pytest.mark.parametrize("state", ["carry", "reset"])
def test_inner_adam_is_that_of_torch(state):
    """beta1 = 0, over three tasks in turn (serial, epsilon = 1, so that each starts where the last one ended).

    Tolerance: epsilon = 1e-8 is added before the bias correction here (as in the authors' TensorFlow), after it in
    PyTorch, which changes a step by alpha 1e-8 sqrt(1000) / |g|.
    """
    a, c = forms(3, 2, seed=0)
    theta, task = normal(2, seed=5), quadratic(a, c)
    learner = linear_form(
        Reptile,
        theta,
        alpha=0.1,
        inner_steps=4,
        inner_optimizer="adam",
        inner_state=state,
        inner_batch=None,
        serial=True,
    )
    step(learner, meta_batch(Episode(task, task, {})))
    w = nn.Parameter(theta.clone())
    adam = torch.optim.Adam([w], lr=0.1, betas=(0.0, 0.999))
    for form, minimum in zip(a, c, strict=True):
        if state == "reset":
            adam = torch.optim.Adam([w], lr=0.1, betas=(0.0, 0.999))
        for _ in range(4):
            w.grad = form @ (w.detach() - minimum)
            adam.step()
    assert_close(learner.net.head.weight.detach()[0], w.detach(), rtol=1e-6)
    assert int(learner.taken) == (12 if state == "carry" else 0)


def test_tasks_of_a_batch_carry_the_mean_of_their_moments():
    """After one inner step from zero: (1 - beta2) times the mean over tasks of the squared gradients."""
    (a, c), theta = forms(3, 2, seed=0), normal(2, seed=5)
    task = quadratic(a, c)
    learner = linear_form(Reptile, theta, alpha=0.1, inner_steps=1, inner_batch=None)
    step(learner, meta_batch(Episode(task, task, {})))
    squares = torch.einsum("bij,bj->bi", a, theta - c).square()
    assert_close(learner.second_head_weight[0], 0.001 * squares.mean(0))
    assert int(learner.taken) == 1


def test_minibatches_go_through_whole_shuffles():
    """Seven batches of three of five examples: four and a bit shuffles, each holding every row once."""
    key = meta_batch(oracles.curves(6)).key
    rows = minibatches(key, n=5, size=3, count=7)
    assert rows.shape == (6, 7, 3)
    shuffles = rows.flatten(1)[:, :20].unflatten(1, (4, 5))
    assert torch.equal(shuffles.sort(-1).values, torch.arange(5).expand(6, 4, 5))
    assert len({tuple(order) for order in shuffles.flatten(0, 1).tolist()}) > 20  # of 120 orders, 24 drawn


def test_reptile_descends_its_minibatches():
    """Gradient steps on the drawn rows, in their order."""
    learner, episodes = create(("reptile", "regression"), test_inner_batch=2), oracles.curves()
    key = meta_batch(episodes).key
    end = learner.adapt(learner.theta(), episodes.support, steps=3, key=key)[-1]
    rows = minibatches(key.sub("minibatch"), n=5, size=2, count=3)
    for i in range(episodes.tasks):
        phi = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
        for row in rows[i]:
            task = Examples(episodes.support.x[i, row], episodes.support.y[i, row])
            phi = oracles.descend(learner.net, phi, task, 0.3, 1, list(phi), first_order=True)
        assert_close({k: p[i] for k, p in end.items()}, {k: p.detach() for k, p in phi.items()})


# ---- ProtoNet ----------------------------------------------------------------------------------------------------


def test_prototype_fixture():
    """P1: numbers of the specification, and the linear classifier with weights 2c and offsets -|c|^2."""
    v = {
        k: torch.tensor(x, dtype=torch.int64 if k == "labels" else torch.float64) for k, x in VALUES["protonet"].items()
    }
    centres = prototypes(v["support"][None], v["labels"][None], 2)
    scores = logits(v["query"][None], centres)
    assert_close(centres[0], v["prototypes"])
    assert_close(-scores[0], v["sq_dist"])
    assert_close(scores.softmax(-1)[0], v["prob"])
    linear = v["query"] @ v["linear_weights_2c"].T + v["linear_bias_minus_c2"]
    assert_close(linear.softmax(-1), v["prob"])


def test_one_shot_prototypes_are_the_support_embeddings():
    """P2, whatever the order of the labels; a class without examples has no prototype."""
    z, y = normal(2, 4, 3, seed=0), torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    centres = prototypes(z, y, 5)
    for i in range(2):
        assert torch.equal(centres[i, y[i]], z[i])
    assert bool(centres[:, 4].isnan().all())


def test_distances_do_not_see_how_the_space_lies():
    """P3: rotating and shifting all embeddings changes no logit."""
    z, q, y = normal(2, 6, 3, seed=0), normal(2, 4, 3, seed=1), torch.tensor([0, 1, 2]).repeat(2, 2)
    rotation, shift = torch.linalg.qr(normal(3, 3, seed=2))[0], normal(3, seed=3)
    moved = [e @ rotation + shift for e in (z, q)]
    assert_close(logits(moved[1], prototypes(moved[0], y, 3)), logits(q, prototypes(z, y, 3)))
