"""The engine on a GPU: the same numbers as on a CPU, captured meta-steps, precisions, many tasks."""

import copy
import logging

import oracles
import pytest
import torch
from oracles import distance

from metalearn.algorithms import MAML, TSAMAML
from metalearn.compiled import Compiler
from metalearn.episode import Episode, Examples, MetaBatch
from metalearn.meta_gradient import MetaGradient, meta_gradient
from metalearn.ops import conv
from metalearn.random import TaskKey

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def moved(batch: MetaBatch) -> MetaBatch:
    support, query = (Examples(*(t.cuda() for t in part)) for part in (batch.episodes.support, batch.episodes.query))
    key = TaskKey(batch.key.key, batch.key.step.cuda(), batch.key.task.cuda())
    return batch._replace(episodes=Episode(support, query, {}), key=key)


def problem(tasks: int = 4, dtype: torch.dtype = torch.float64, **options):
    learner = oracles.build(MAML, oracles.conv_net(), "classification", alpha=0.1, inner_steps=2, **options).to(dtype)
    episodes = oracles.pictures(tasks).to(dtype)
    return learner, oracles.meta_batch(episodes)


def gradient(learner, batch) -> MetaGradient:
    return meta_gradient(learner, batch)


def test_the_same_gradient_as_on_a_cpu():
    learner, batch = problem()
    expected = gradient(learner, batch)
    found = gradient(copy.deepcopy(learner).cuda(), moved(batch))
    assert distance([g.cpu() for g in found.grads], expected.grads) < 1e-10


def test_a_captured_step_is_the_plain_one(caplog):
    caplog.set_level(logging.INFO, "metalearn.compiled")
    learner, batch = problem()
    learner, batch = learner.cuda(), moved(batch)
    for seed in (0, 1):
        now = batch._replace(episodes=moved(oracles.meta_batch(oracles.pictures(4, seed=seed))).episodes)
        learner.compiler = None
        plain = [g.clone() for g in gradient(learner, now).grads]
        learner.compiler = learner.__dict__.setdefault("captured", Compiler(always=False))
        assert distance([g.clone() for g in gradient(learner, now).grads], plain) < 1e-10
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.mul_(1.1)
    assert "are compiled" in caplog.text


@pytest.mark.parametrize("tasks", [32, 512])
def test_many_tasks(tasks):
    learner, batch = problem(tasks, torch.float32)
    expected = gradient(learner, batch)
    found = gradient(copy.deepcopy(learner).cuda(), moved(batch))
    assert distance([g.cpu() for g in found.grads], expected.grads) < 1e-3


def test_bfloat16_convolutions_are_close(monkeypatch):
    learner, batch = problem(8, torch.float32)
    learner, batch = learner.cuda(), moved(batch)
    expected = gradient(learner, batch)
    monkeypatch.setattr(conv, "operands", torch.bfloat16)
    assert 1e-5 < distance([gradient(learner, batch).loss], [expected.loss]) < 0.05


@pytest.mark.parametrize("batching", ["per_group_queue", "mixed"])
def test_groups_learn_as_on_a_cpu(batching):
    """Routing, queues and updates of TSA-MAML, with tasks that wait across meta-steps and a checkpoint between."""
    options = {"alpha": 0.1, "inner_steps": 1, "id_steps": 2, "m": 2, "batching": batching}
    learner = oracles.build(TSAMAML, oracles.conv_net(), "classification", **options)
    batches = [oracles.meta_batch(oracles.pictures(4, seed=seed), seed) for seed in range(4)]
    learner.place(learner.displacement(learner.theta(), batches[0].episodes.support)[:2])
    other = copy.deepcopy(learner).cuda()
    ours, theirs = learner.configure_optimizers(), other.configure_optimizers()
    for step, batch in enumerate(batches):
        assert (learner.meta_step(batch, ours) is None) == (other.meta_step(moved(batch), theirs) is None)
        if step == 1:
            other.load_state_dict({k: v.cpu() if torch.is_tensor(v) else v for k, v in other.state_dict().items()})
        found = [p.detach().cpu() for p in other.parameters()]
        assert distance(found, [p.detach() for p in learner.parameters()]) < 1e-9
