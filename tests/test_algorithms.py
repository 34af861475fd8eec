"""Every algorithm through common properties (float64)."""

import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.distributed as dist
from oracles import assert_close, distance, meta_batch, outer_gradient
from table import (
    CASES,
    CLASSIFIERS,
    ROWS,
    assert_same_bits,
    bits,
    create,
    each,
    each_setting,
    every_score,
    regularizer,
    select,
    step,
    tasks_for,
    trained,
    where,
)
from torch import Tensor

from metalearn.algorithms import Reptile
from metalearn.bn import MODES
from metalearn.episode import Episode
from metalearn.learner import Diverged, MetaLearner
from metalearn.meta_gradient import meta_gradient
from metalearn.optim import SGD, Adam

# ---- what holds for all ------------------------------------------------------------------------------------------


@each_setting(CASES)
def test_shapes(case):
    learner, episodes = create(case), tasks_for(case)
    theta, (tasks, queries) = learner.theta(), episodes.query.y.shape[:2]
    trajectory = learner.adapt(theta, episodes.support, steps=3, key=meta_batch(episodes).key)
    assert len(trajectory) == (1 if ROWS[case[0]].static else 4)
    outputs = 3 if case[1] == "classification" else 1  # of a task's head, whatever that of training has
    shapes = {k: (outputs, *shape[1:]) if k.startswith("head.") else shape for k, shape in learner.shapes.items()}
    for phi in trajectory:
        assert all(p.shape == (tasks, *shapes[k]) for k, p in phi.items())
    prediction = learner.predict(theta, trajectory[-1], episodes.query.x, support=episodes.support, bn="batch")
    assert prediction.shape == (tasks, queries, outputs)
    assert learner.task_loss(theta, episodes, meta_batch(episodes).key).loss.shape == (tasks,)
    scores = every_score(learner, meta_batch(episodes))
    assert scores.keys() == {(bn, k) for bn in MODES for k in range(len(trajectory))}
    assert all(value.shape == (tasks,) for pair in scores.values() for value in pair)


@each_setting(where(couples=False))
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


@each_setting(CASES)
@pytest.mark.parametrize("fits", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_chunks_change_nothing(case, fits):
    """One task at a time, or two unequal chunks."""
    learner, batch = trained(case)
    whole = meta_gradient(learner, batch), every_score(learner, batch)
    assert len(learner.chunks(batch.episodes)) == 1
    learner.chunk_bytes = fits * learner.task_bytes(batch.episodes)
    assert len(learner.chunks(batch.episodes)) == (5 if fits == 1 else 2)
    assert_close((meta_gradient(learner, batch), every_score(learner, batch)), whole)


@each_setting(CASES)
def test_no_parameters_are_put_into_modules(case, monkeypatch):
    """Chunks run at the same time on threads: a module that held one's parameters would lend them to the others."""
    learner, batch = create(case), meta_batch(tasks_for(case))

    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("functional_call on a module that threads share")

    monkeypatch.setattr(torch.nn.utils.stateless, "_reparametrize_module", refuse)
    meta_gradient(learner, batch)
    every_score(learner, batch)


@each_setting(where(waits=False))
def test_task_order_changes_nothing(case):
    """Of serial Reptile it changes everything: each task starts where the one before ended."""
    ends = []
    for order in ([0, 1, 2, 3, 4], [2, 0, 4, 1, 3]):
        learner, batch = trained(case)
        step(learner, select(batch, torch.tensor(order)))
        ends.append([p.detach() for p in learner.parameters()])
    assert (distance(*ends) < oracles.ROUNDING) == (not ROWS[case[0]].ordered)


@each_setting(CASES)
def test_evaluation_leaves_no_trace(case):
    learner, batch = trained(case)
    before, random = bits(learner), torch.get_rng_state()
    first, second = every_score(learner, batch), every_score(learner, batch)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert_same_bits(bits(learner), before)
    assert torch.equal(torch.get_rng_state(), random)


@each_setting(CASES)
def test_every_parameter_that_matters_has_a_gradient(case):
    """The bias of a convolution before batch norm does not: its gradient is exactly zero."""
    learner = create(case)
    grads = outer_gradient(learner, tasks_for(case))
    assert all(bool(torch.isfinite(g).all()) for g in grads.values())
    silent = ROWS[case[0]].silent
    assert {n for n, g in grads.items() if not g.any()} == {n for n in grads if any(part in n for part in silent)}


@each_setting(CASES)
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


@each_setting(CASES)
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


@each([case for case in where(couples=False) if case in CLASSIFIERS and ROWS[case[0]].cls is not Reptile])
def test_outer_gradient_is_the_slope_of_the_objective(case):
    """G1, A3, P6: finite differences along every meta-parameter of a tanh network; first order has to fail."""
    row, episodes = ROWS[case[0]], oracles.pictures(2, side=1)
    learner = create(case, oracles.mlp(row.outputs(case[1])))
    grads = list(outer_gradient(learner, episodes).values())
    actual, slopes = oracles.slopes_along(
        lambda: oracles.outer_value(learner, episodes), list(learner.parameters()), grads
    )
    error = distance([actual], [slopes])
    assert error < 1e-6 if row.exact else error > 1e-4


@each_setting(where(joint=True))
@pytest.mark.parametrize("changes", [{"alpha": 0.0}, {"inner_steps": 0}], ids=["alpha", "steps"])
def test_without_adaptation_it_is_joint_training(case, changes):
    """G4: the gradient of the mean query loss at theta."""
    learner, episodes = create(case, **changes), tasks_for(case)
    theta = {k: p.detach().requires_grad_() for k, p in learner.net.named_parameters()}
    losses = [oracles.loss(oracles.forward(learner.net, theta, x), y) for x, y in zip(*episodes.query, strict=True)]
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()), materialize_grads=True)
    assert_close(list(outer_gradient(learner, episodes).values()), list(expected))


# ---- batch norm --------------------------------------------------------------------------------------------------


def predictions(learner: MetaLearner, episodes: Episode, bn: str) -> Any:
    """Maps query inputs to outputs of the adapted learner."""
    theta, key = learner.theta(), meta_batch(episodes).key
    phi = learner.adapt(theta, episodes.support, steps=learner.test_steps, key=key)[-1]
    return partial(learner.predict, learner.theta(), phi, support=episodes.support, bn=bn)


@each(CLASSIFIERS)
@pytest.mark.parametrize("bn", MODES)
def test_only_batch_statistics_mix_queries(case, bn):
    """BN (i) and (iii): other queries matter in mode `batch` alone; their order never does."""
    (learner, batch), other = trained(case), tasks_for(case, seed=2).query.x
    predict, x = predictions(learner, batch.episodes, bn), batch.episodes.query.x
    mixed = torch.cat([x[:, :1], other[:, 1:]], 1)
    plain = predict(x).detach()
    moved = float((predict(mixed)[:, 0].detach() - plain[:, 0]).abs().max() / plain.abs().max())
    assert moved > 1e-4 if bn == "batch" else moved < oracles.ROUNDING
    order = torch.randperm(x.shape[1], generator=oracles.generator(0))
    assert_close(predict(x[:, order]), predict(x)[:, order])


@each(CLASSIFIERS)
def test_modes_agree_without_batch_norm(case):
    """BN (ii)."""
    net = oracles.conv_net(ROWS[case[0]].outputs(case[1]), bn=False)
    learner, episodes = create(case, net), tasks_for(case)
    out = [predictions(learner, episodes, bn)(episodes.query.x) for bn in (*MODES, "none")]
    assert_close(out[1:], out[:1] * len(MODES))


def test_unknown_modes_are_refused():
    episodes = oracles.pictures()
    with pytest.raises(ValueError, match="unknown batch-norm mode 'eval'; one of batch, support_plus_one"):
        predictions(create(("maml", "classification")), episodes, "eval")(episodes.query.x)


@pytest.mark.parametrize("optimizer", [Adam(lr=0.01), SGD(lr=0.01, momentum=0.9)])
@each_setting(where(ordered=False, waits=False))
def test_meta_steps_follow_the_plain_optimizer(case, optimizer):
    """Three meta-steps are three of torch's unfused optimizer on the meta-gradients, whatever their memory layout."""
    learner, episodes = create(case), tasks_for(case)
    learner.attach(optimizer, 3)
    ours = learner.configure_optimizers()
    plain = {n: torch.nn.Parameter(p.detach().clone().contiguous()) for n, p in learner.named_parameters()}
    adam = isinstance(optimizer, Adam)
    theirs = torch.optim.Adam(plain.values(), lr=0.01) if adam else torch.optim.SGD(plain.values(), 0.01, momentum=0.9)
    for _ in range(3):
        learner.observe(meta_batch(episodes))
        grads = outer_gradient(learner, episodes)
        learner.forget()
        for name, parameter in plain.items():
            parameter.grad = grads[name].detach().clone().contiguous()
        theirs.step()
        learner.meta_step(meta_batch(episodes), ours)
        assert_close({n: p.detach() for n, p in learner.named_parameters()}, {n: p.detach() for n, p in plain.items()})


# ---- divergence --------------------------------------------------------------------------------------------------


@each_setting(where(ordered=False, waits=False))
def test_divergence_names_its_place_and_spoils_nothing(case):
    learner, batch = trained(case)
    before = bits(learner)
    for part in batch.episodes[:2]:
        part.x[2] = math.nan
    learner.observe(batch)
    place = "query loss of task 2 is not finite at meta-step 1" + (
        f", algorithm.alpha = {float(learner.alpha)}" if hasattr(learner, "alpha") else ""
    )
    learner.forget()
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
