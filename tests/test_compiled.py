"""Compiled meta-steps: the plain ones, to rounding; and plain ones, with the reason, where they cannot be compiled."""

import logging
import shutil

import oracles
import pytest
import torch
from oracles import distance

from metalearn.algorithms import IMAML, MAML, TSAMAML, MetaLSTM, MetaSGD, MTNet, Reptile, TNet
from metalearn.algorithms.tsa_maml import GROUP
from metalearn.compiled import TOLERANCE, Compiler
from metalearn.meta_gradient import meta_gradient

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


def sinusoid(algorithm, **options):
    alpha = {} if algorithm is MetaLSTM else {"alpha": 0.05}
    net = oracles.MLP(input_shape=(2,), outputs=1, hidden=[4, 3]).double()
    learner = oracles.build(algorithm, net, "regression", **alpha, **options)
    return learner, oracles.meta_batch(oracles.curves(3, seed=1))


@pytest.fixture
def compiler(caplog):
    caplog.set_level(logging.INFO, "metalearn.compiled")
    return Compiler(always=True)


def assert_same(learner, batch, compiler):
    learner.compiler = None
    plain = meta_gradient(learner, batch)
    learner.compiler = compiler
    compiled = meta_gradient(learner, batch)
    assert distance(compiled.grads, plain.grads) < 1e-12 and distance([compiled.loss], [plain.loss]) < 1e-12


def test_a_compiled_step_is_the_plain_one(compiler, caplog):
    """And stays so for other tasks and after the parameters moved."""
    learner, batch = sinusoid(MAML, inner_steps=2)
    assert_same(learner, batch, compiler)
    assert "are compiled" in caplog.text
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.mul_(1.1)
    assert_same(learner, batch._replace(episodes=oracles.curves(3, seed=2)), compiler)
    assert len(compiler.programs) == 1 and None not in compiler.programs.values()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"first_order": True}, {"adapted": "head"}, {"inner_steps": 5}], ids=str)
def test_other_forms(options, compiler, caplog):
    learner, batch = sinusoid(MAML, **{"inner_steps": 1, **options})
    assert_same(learner, batch, compiler)
    assert "are compiled" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [MetaSGD, TNet, MTNet])
def test_other_algorithms(algorithm, compiler, caplog):
    """MT-net's masks are drawn by the coordinates of other meta-steps."""
    learner, batch = sinusoid(algorithm, inner_steps=2)
    for step in (0, 1):
        key = type(batch.key)(batch.key.key, batch.key.step + step, batch.key.task)
        assert_same(learner, batch._replace(key=key), compiler)
    assert "are compiled" in caplog.text


@pytest.mark.slow
def test_draws_and_carried_state_are_inputs(compiler, caplog):
    """Reptile draws minibatches by the task's coordinates and carries Adam's moments: neither may be frozen in."""
    learner, batch = sinusoid(Reptile, inner_steps=3, inner_batch=2)
    for step in (0, 1):
        key = type(batch.key)(batch.key.key, batch.key.step + step, batch.key.task)
        assert_same(learner, batch._replace(key=key), compiler)
        for buffer in learner.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.25)
    assert "are compiled" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_groups_are_found_or_given(compiler, caplog, given):
    """TSA-MAML routes in the step, or takes each task's group as an input: it may not be frozen in."""
    learner, batch = sinusoid(TSAMAML, m=2, id_steps=2, batching="mixed")
    deltas = learner.displacement(learner.theta(), batch.episodes.support)
    learner.place(deltas[:2])
    seen = set()
    for groups in ([0, 1, 0], [1, 1, 0]):
        latent = {GROUP: torch.tensor(groups)} if given else {}
        part = batch._replace(episodes=batch.episodes._replace(latent=latent))
        assert_same(learner, part, compiler)
        chosen = tuple(meta_gradient(learner, part).aux[GROUP].tolist())
        seen.add(chosen)
        assert not given or chosen == tuple(groups)
        learner.place(deltas[1:])
    assert len(seen) == 2 and len(compiler.programs) == 1 and "are compiled" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(600)  # the compiler's, on a busy machine
def test_reports_of_the_derivative_are_outputs(compiler, caplog):
    """iMAML's arise while the loss is differentiated."""
    learner, batch = sinusoid(IMAML, inner_steps=1, lam=1.0, cg_steps=2)
    assert_same(learner, batch, compiler)
    learner.compiler = None
    oracles.assert_close(compiler(learner, batch.episodes, batch)[1].aux, meta_gradient(learner, batch).aux)
    assert "are compiled" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_learned_optimizer(compiler, caplog):
    assert_same(*sinusoid(MetaLSTM, inner_steps=2, hidden=4, inner_batch=2), compiler)
    assert "are compiled" in caplog.text


def test_a_step_that_cannot_be_compiled_stays_plain(compiler, caplog, monkeypatch):
    learner, batch = sinusoid(MAML, inner_steps=1)
    loss = learner.loss
    monkeypatch.setattr(learner, "loss", lambda p, y: loss(p, y) * (1.0 if float(y.sum()) == 0 else 2.0))
    assert_same(learner, batch, compiler)
    assert "meta-steps are not compiled" in caplog.text


def test_a_wrong_program_is_not_used(compiler, caplog, monkeypatch):
    monkeypatch.setattr(
        torch._inductor, "compile", lambda graph, inputs, options: lambda *a: [2 * t for t in graph(*a)]
    )
    learner, batch = sinusoid(MAML, inner_steps=1)
    assert_same(learner, batch, compiler)
    assert "differs from the plain one" in caplog.text


def test_only_long_runs_of_tiny_networks_are_compiled(caplog):
    caplog.set_level(logging.INFO, "metalearn.compiled")
    learner, batch = sinusoid(MAML, inner_steps=1)
    learner.max_steps = 100
    learner.compiler = Compiler(always=False)
    meta_gradient(learner, batch)
    assert list(learner.compiler.programs.values()) == [None] and not caplog.text
    assert set(TOLERANCE) == {torch.float32, torch.float64}
