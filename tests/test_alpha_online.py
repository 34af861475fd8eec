"""`algorithm.alpha=online` and `algorithm.test_alpha`: a running estimate of the head's rate; a rate of test alone."""

import json
import math
from types import SimpleNamespace

import oracles
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from oracles import assert_close, meta_batch, plain_maml
from runs import assert_twins, cell_of, checkpoint, folder, killed_and_run_again, result
from table import create, select, step, tasks_for, trained

from metalearn.algorithms import MAML
from metalearn.cells import expand
from metalearn.compiled import Compiler
from metalearn.figures import series
from metalearn.learner import Diverged
from metalearn.results import Result
from metalearn.run import build, build_data, build_learner, run
from metalearn.schema import BadInput
from metalearn.selection import select as results_of

KINDS = ["classification", "regression"]
COVARIANCES = ["gram_mean", "feature_mean", "diag"]
ONLINE = ("algorithm=anil", "algorithm.alpha=online")


def fresh(kind, **changes):
    """A learner that has seen nothing."""
    learner = create(("anil_online", kind), **changes)
    learner.running_rate.value.fill_(math.nan)
    return learner


# ---- the estimate, entry by entry --------------------------------------------------------------------------------


def slow_estimate(net, support_x, covariance):
    """1 / (2 n sigma^2) of one task, by loops over the entries of the normalised features."""
    body = SimpleNamespace(stages=net.stages[:-1], stage=net.stage)
    theta = {k: p.detach() for k, p in net.named_parameters()}
    rows = [(f / math.sqrt(sum(v * v for v in f))).tolist() for f in oracles.forward(body, theta, support_x)]
    n, d = len(rows), len(rows[0])
    if covariance == "gram_mean":
        entries = [sum(a * b for a, b in zip(one, other, strict=True)) for one in rows for other in rows]
    else:
        moments = [[sum(r[j] * r[k] for r in rows) for k in range(d)] for j in range(d)]
        square = covariance == "feature_mean"
        entries = [moments[j][k] for j in range(d) for k in range(d) if square or j == k]
    return 1 / (2 * n * (sum(entries) / len(entries)))


def slow_average(net, episodes, covariance):
    return sum(slow_estimate(net, x, covariance) for x in episodes.support.x) / episodes.tasks


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_meta_steps_by_hand(kind, first_order):
    """alpha is the first estimate, then 0.9 of it and 0.1 of the second; the very step has it as a constant."""
    learner, rate = fresh(kind, first_order=first_order), None
    for i in range(2):
        episodes = tasks_for(("anil_online", kind), seed=i)
        estimate = slow_average(learner.net, episodes, "gram_mean")
        rate = estimate if rate is None else 0.9 * rate + 0.1 * estimate
        like = SimpleNamespace(
            net=learner.net, adapted="head", alpha=rate, inner_steps=learner.inner_steps, first_order=first_order
        )
        before = [p.detach().clone() for p in learner.parameters()]
        losses, grads = plain_maml(like, episodes)
        found = step(learner, meta_batch(episodes, step=i))
        assert_close(float(learner.alpha), float(rate), 1e-11)
        assert_close(found.loss, losses, 1e-11)
        assert_close(
            [p.detach() for p in learner.parameters()], [b - g for b, g in zip(before, grads, strict=True)], 1e-10
        )
        assert learner.reports()["alpha"] == float(learner.alpha)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_reading_of_the_covariance(kind, covariance):
    learner, episodes = fresh(kind, alpha_cov=covariance), tasks_for(("anil_online", kind))
    expected = slow_average(learner.net, episodes, covariance)
    learner.observe(meta_batch(episodes))
    assert_close(float(learner.alpha), expected, 1e-11)


def test_with_diag_nothing_is_estimated():
    """d / (2 n^2), whatever is learned."""
    learner, found = fresh("regression", alpha_cov="diag"), []
    for i in range(3):
        step(learner, meta_batch(tasks_for(("anil_online", "regression"), seed=i), step=i))
        found.append(float(learner.alpha))
    n, d = 5, learner.net.head.weight.shape[1]
    assert found == pytest.approx([d / (2 * n * n)] * 3, rel=1e-12)


def test_equal_features_have_the_smallest_rate():
    """All cosines are 1: alpha = 1 / (2 n)."""
    learner, episodes = fresh("regression"), tasks_for(("anil_online", "regression"))
    episodes.support.x[:] = episodes.support.x[:, :1]
    learner.observe(meta_batch(episodes))
    assert float(learner.alpha) == pytest.approx(1 / 10, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_momentum_is_the_weight_of_the_past(momentum):
    learner, estimates = fresh("regression", alpha_momentum=momentum), []
    for i in range(3):
        episodes = tasks_for(("anil_online", "regression"), seed=i)
        estimates.append(slow_average(learner.net, episodes, "gram_mean"))
        learner.observe(meta_batch(episodes))
    a, b, c = estimates
    expected = momentum * (momentum * a + (1 - momentum) * b) + (1 - momentum) * c
    assert_close(float(learner.alpha), expected, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_no_estimate(kind):
    rates = []
    for chunk_bytes in (1, 0):
        learner = fresh(kind, chunk_bytes=chunk_bytes)
        for i in range(3):
            step(learner, meta_batch(tasks_for(("anil_online", kind), seed=i), step=i))
        rates.append(learner.alpha.clone())
    assert_close(rates[0], rates[1], 1e-12)


def test_a_refused_update_takes_its_estimate_back():
    learner, batch = trained(("anil_online", "regression"))
    kept = float(learner.alpha)
    learner.observe(batch)
    assert float(learner.alpha) != kept
    learner.forget()
    assert float(learner.alpha) == kept


def test_a_task_without_an_estimate_is_named():
    """Not the tasks that its estimate takes the rate from: all of them lose their query loss."""
    learner = fresh("regression")
    with torch.no_grad():
        for name, parameter in learner.net.named_parameters():
            parameter.mul_(0 if name.endswith("bias") and not name.startswith("head") else 1)
    batch = meta_batch(tasks_for(("anil_online", "regression"), seed=0))
    batch.episodes.support.x[1] = 0  # so that every rectifier of the body is at 0
    with pytest.raises(
        Diverged, match=r"the estimate for algorithm.alpha is not finite for task 1: what enters its head"
    ):
        step(learner, batch)
    assert math.isnan(float(learner.alpha))


@pytest.mark.slow
def test_a_compiled_step_reads_the_estimate():
    """One program, recorded at the first step, for all rates."""
    plain, fast = (fresh("regression", inner_steps=1) for _ in range(2))
    fast.compiler = compiler = Compiler(always=True)
    for i in range(3):
        batch = meta_batch(tasks_for(("anil_online", "regression"), seed=i), step=i)
        step(plain, batch)
        step(fast, batch)
    assert len(compiler.programs) == 1 and None not in compiler.programs.values()
    assert_close(dict(fast.state_dict()), dict(plain.state_dict()), 1e-10)


# ---- runs --------------------------------------------------------------------------------------------------------


def logged(output, cell, name):
    rows = [json.loads(x) for x in (folder(output, cell) / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r[name] for r in rows if name in r}


@pytest.mark.parametrize("per_call", [1, 7])
def test_a_run_logs_every_rate_and_reports_that_of_the_tested_checkpoint(tmp_path, per_call):
    """Lines of the loss are as far apart as in all runs: the last meta-step's is the only one here."""
    more = ("trainer.max_steps=12", "trainer.val_every=5", f"trainer.meta_steps_per_call={per_call}")
    cell = cell_of(tmp_path, *ONLINE, *more)
    assert run(cell) == "done"
    rates, found = logged(tmp_path, cell, "alpha"), result(tmp_path, cell)
    assert list(rates) == list(range(1, 13)) and len(set(rates.values())) == 12
    assert cell.config["trainer"]["log_every"] > 12 and list(logged(tmp_path, cell, "loss")) == [12]
    tested = found["metrics"]["alpha_star"]
    assert tested["mean"] == rates[found["protocol"]["selection"]["step"]] and tested["unit"] == "1"
    assert next(iter(found["metrics"])) == "mse"  # the headline
    state = checkpoint(tmp_path, cell)["learner"]
    assert float(state["running_rate.value"]) == rates[12]


def test_every_rate_is_a_row_of_the_log_and_a_point_of_a_figure(tmp_path):
    """The rates are those of the same run with a line for every meta-step."""
    cells = [cell_of(tmp_path / str(n), *ONLINE, "trainer.max_steps=13", f"trainer.log_every={n}") for n in (10, 1)]
    for cell in cells:
        run(cell)
    sparse, dense = (Result(folder(tmp_path / n, c), {}).log() for n, c in zip(("10", "1"), cells, strict=True))
    assert sparse["step"].tolist() == dense["step"].tolist() == list(range(1, 14))
    assert sparse["alpha"].tolist() == dense["alpha"].tolist()
    assert sparse["loss"].notna().sum() == 2 and dense["loss"].notna().sum() == 13
    entries = results_of(["algorithm=anil"], place=tmp_path / "10")
    drawn = series.plot(entries, series.Request(x="meta_step", metric="alpha"))
    assert [(p.place.x, p.mean) for p in drawn.points] == list(enumerate(sparse["alpha"], 1))
    assert drawn.split == "training" and not any("Validation" in note for note in drawn.notes)


def test_without_a_running_rate_lines_are_as_far_apart_as_ever(tmp_path):
    cell = cell_of(tmp_path, "trainer.max_steps=12", "trainer.val_every=0", "trainer.log_every=10")
    run(cell)
    rows = [json.loads(x) for x in (folder(tmp_path, cell) / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [10, 12]


def test_a_diverged_run_has_logged_its_last_rate(tmp_path, monkeypatch):
    """Also those of the call that does not come to its end."""
    more = ("trainer.max_steps=12", "trainer.val_every=0", "trainer.meta_steps_per_call=10")
    cell, guard = cell_of(tmp_path, *ONLINE, *more), MAML._guard

    def bad(self, result, batch):
        guard(self, result._replace(finite=batch.step < 4), batch)

    monkeypatch.setattr(MAML, "_guard", bad)
    assert run(cell) == "diverged"
    assert list(logged(tmp_path, cell, "alpha")) == [1, 2, 3, 4]


@pytest.mark.slow
def test_killed_and_started_again_it_has_the_bits_and_the_rates_of_its_twin(tmp_path):
    more = (*ONLINE, "trainer.max_steps=400", "trainer.val_every=60", "trainer.save_seconds=0.05")
    cell = killed_and_run_again(tmp_path, *more)
    assert_twins(tmp_path / "twin", tmp_path / "killed", cell)
    twin, killed = (Result(folder(tmp_path / n, cell), {}).log()[["step", "alpha"]] for n in ("twin", "killed"))
    assert twin["step"].tolist() == list(range(1, 401)) and killed.equals(twin)


def test_validation_and_test_adapt_at_the_estimate(tmp_path):
    cell = cell_of(tmp_path, *ONLINE, "trainer.max_steps=3", "trainer.val_every=3")
    run(cell)
    rate = logged(tmp_path, cell, "alpha")[3]
    assert logged(tmp_path, cell, "val_mse")[3] == pytest.approx(scores(tmp_path, cell, "val", rate), rel=1e-6)
    assert result(tmp_path, cell)["metrics"]["mse"]["mean"] == pytest.approx(
        scores(tmp_path, cell, "test", rate), rel=1e-6
    )


def scores(output, cell, split, rate):
    """The mean score on frozen episodes of a cell's last parameters, adapted at this fixed rate."""
    config = cell.config | {"algorithm": cell.config["algorithm"] | {"alpha": rate, "test_alpha": None}}
    dataset = build("dataset", config["dataset"])
    learner, data = build_learner(config, dataset), build_data(config, dataset)
    state = checkpoint(output, cell)["learner"]
    learner.load_state_dict({k: v for k, v in state.items() if not k.startswith("running_rate")})
    learner.watch(["none"], "headline")
    values = [learner.evaluate(b, {"none": [-1]}) for b in data.evaluation(split, 0, 1)]
    return float(torch.cat([v for part in values for v, _ in part.values()]).double().mean())


def steps_on_rank(rank, place):
    """Three meta-steps of one of two processes, with two and three of five tasks; writes the rates."""
    dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=rank, world_size=2)
    learner, rates = fresh("regression"), []
    for i in range(3):
        batch = meta_batch(tasks_for(("anil_online", "regression"), seed=i), step=i)
        step(learner, select(batch, slice(0, 2) if rank == 0 else slice(2, 5))._replace(total=5))
        rates.append(float(learner.alpha))
    (place / f"rank{rank}").write_text(json.dumps(rates))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_estimate_the_same_rate(tmp_path):
    """The mean over the tasks of both ranks, however many each has (float64, to rounding)."""
    torch.multiprocessing.spawn(steps_on_rank, (tmp_path,), nprocs=2)
    learner, expected = fresh("regression"), []
    for i in range(3):
        step(learner, meta_batch(tasks_for(("anil_online", "regression"), seed=i), step=i))
        expected.append(float(learner.alpha))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}").read_text()) == pytest.approx(expected, rel=1e-11)


# ---- another rate in test ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["maml", "anil algorithm.alpha=online", "tnet"])
def test_another_rate_in_test_trains_nothing(tmp_path, algorithm):
    """Selection and training are shared; scores are those of adapting at that rate, which may be negative."""
    common = (*f"algorithm={algorithm}".split(), "trainer.max_steps=4", "trainer.val_every=4")
    first, second = cell_of(tmp_path, *common), cell_of(tmp_path, *common, "algorithm.test_alpha=-0.002")
    assert first.train_id == second.train_id and first.cell_id != second.cell_id
    run(first)
    run(second)
    assert not (folder(tmp_path, second) / "checkpoints").exists()
    a, b = (result(tmp_path, c) for c in (first, second))
    assert a["protocol"]["selection"] == b["protocol"]["selection"]
    rows = [pd.read_parquet(folder(tmp_path, c) / "episodes.parquet") for c in (first, second)]
    steps = first.config["algorithm"]["test_steps"]
    before, after = ([r[r["step"] == s]["value"].to_numpy() for r in rows] for s in (0, steps))
    assert (before[0] == before[1]).all() and (after[0] != after[1]).all()


def test_the_scores_are_those_of_the_other_rate(tmp_path):
    """Trained at 0.01 and tested at -0.002 scores as parameters of 0.01 under a learner of rate -0.002."""
    cell = cell_of(tmp_path, "trainer.max_steps=4", "trainer.val_every=4", "algorithm.test_alpha=-0.002")
    run(cell)
    assert result(tmp_path, cell)["metrics"]["mse"]["mean"] == pytest.approx(
        scores(tmp_path, cell, "test", -0.002), rel=1e-6
    )
    assert logged(tmp_path, cell, "val_mse")[4] == pytest.approx(scores(tmp_path, cell, "val", 0.01), rel=1e-6)


def test_a_rate_of_test_leaves_the_learner_as_it_was():
    learner, batch = create(("maml", "regression"), test_alpha=-1.0), meta_batch(tasks_for(("maml", "regression")))
    learner.watch(["batch"], "headline")
    other = create(("maml", "regression"), alpha=-1.0)
    other.watch(["batch"], "headline")
    assert_close(learner.test_step(batch, 0), other.evaluate(batch, other.test_points))
    assert learner.alpha == 0.3
    assert_close(learner.validation_step(batch, 0), create(("maml", "regression")).evaluate(batch, learner.val_points))


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("algorithm=maml algorithm.alpha=online", "algorithm.alpha=online: needs algorithm.adapted=head"),
        (
            "algorithm=tnet algorithm.alpha=online",
            "algorithm.alpha=online: must be a number or auto with algorithm=tnet",
        ),
        (
            "algorithm=meta_sgd algorithm.alpha=online",
            "algorithm.alpha=online: must be a number or auto with algorithm=meta_sgd",
        ),
        ("algorithm=anil algorithm.alpha_cov=diag", "algorithm.alpha_cov=diag: needs algorithm.alpha=online"),
        ("algorithm=anil algorithm.alpha_momentum=0.5", "algorithm.alpha_momentum=0.5: needs algorithm.alpha=online"),
        ("algorithm=anil algorithm.alpha=online algorithm.alpha_momentum=1", "algorithm.alpha_momentum=1: must be"),
        ("algorithm=anil algorithm.alpha=online algorithm.alpha_cov=gram", "did you mean 'gram_mean'"),
        ("algorithm=anil algorithm.alpha=online algorithm.variant=tail", "needs algorithm.variant=query"),
        ("algorithm=anil algorithm.alpha=online trainer.max_steps=0", "needs trainer.max_steps >= 1"),
        ("algorithm=meta_sgd algorithm.test_alpha=0.1", "algorithm.test_alpha=0.1: must be null with meta_sgd"),
        ("algorithm=reptile algorithm.test_alpha=0.1", "algorithm.test_alpha"),
    ],
)
def test_what_has_no_meaning_is_refused(line, message):
    with pytest.raises(BadInput) as refused:
        expand(["dataset=sinusoid", *line.split()])
    assert message in str(refused.value)


def test_the_summed_loss_has_no_estimate():
    with pytest.raises(BadInput, match="needs algorithm.inner_loss_reduction=mean"):
        expand([*ONLINE, "algorithm.inner_loss_reduction=sum_over_shots"])


def test_state_is_one_number():
    learner = create(("anil_online", "regression"))
    plain = create(("anil", "regression"))
    assert set(learner.state_dict()) - set(plain.state_dict()) == {"running_rate.value"}
