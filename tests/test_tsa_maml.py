"""TSA-MAML against MAML, closed forms and plain loops (float64 unless bits are compared)."""

import math
from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from oracles import assert_close, forms, linear_form, meta_batch, normal, outer_gradient, quadratic
from runs import cell_of, checkpoint
from table import assert_same_bits, bits, create, tasks_for, trained
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn import clustering
from metalearn.algorithms import MAML, TSAMAML
from metalearn.algorithms.tsa_maml import GROUP, Collapsed
from metalearn.episode import Episode, MetaBatch
from metalearn.optim import SGD, Adam
from metalearn.queues import Queues
from metalearn.random import Key
from metalearn.run import run
from metalearn.schema import BadInput

CASE = ("tsa_maml", "classification")


def star(learner: TSAMAML) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in learner.net.named_parameters()}


def group(learner: TSAMAML, i: int) -> dict[str, Tensor]:
    """theta_i by the network's names."""
    own = {k: p.detach().clone() for k, p in learner.groups.named_parameters()}
    return {k.partition(".")[2]: p for k, p in own.items() if k.startswith(f"{i}.")}


def maml_at(params: dict[str, Tensor], case: Any = ("maml", "classification"), **changes: Any) -> MAML:
    """MAML that starts at these parameters."""
    learner = create(case, **changes)
    learner.net.load_state_dict(params)
    return learner


# ---- a group is MAML ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["per_group_queue", "mixed"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_one_group_is_maml_from_its_centre(batching, clip):
    """TS1: the same bits after every meta-step, in float32, with the same stream of tasks."""
    learner = create(CASE, m=1, batching=batching).float()
    learner.place(0.1 * normal(1, sum(p.numel() for p in learner.net.parameters()), seed=3).float())
    maml = maml_at(group(learner, 0)).float()
    optimizers = []
    for each in (learner, maml):
        each.attach(Adam(lr=0.01, clip_norm=clip), 10)
        optimizers.append(each.configure_optimizers())
    for s in range(4):
        batch = meta_batch(tasks_for(CASE, seed=s).to(torch.float32), step=s)
        for each, optimizer in zip((learner, maml), optimizers, strict=True):
            assert each.meta_step(batch, optimizer) is not None
        assert_same_bits(group(learner, 0), {k: p.detach() for k, p in maml.net.named_parameters()})
    batch = meta_batch(tasks_for(CASE, seed=9).to(torch.float32))
    scores = [each.evaluate(batch, {"batch": [0, 3], "support_plus_one": [3]}) for each in (learner, maml)]
    torch.testing.assert_close(*scores, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_groups_gradient_is_that_of_maml_on_its_tasks(kind):
    """Mixed: the sum over the group's tasks, divided by the size of the meta-batch."""
    learner, episodes = create((CASE[0], kind)), tasks_for((CASE[0], kind), tasks=7)
    chosen = learner.route(learner.theta(), episodes.support)
    assert 0 < int(chosen.sum()) < 7
    grads = outer_gradient(learner, episodes)
    for i in range(2):
        mine = episodes.select((chosen == i).nonzero().flatten())
        plain = outer_gradient(maml_at(group(learner, i), ("maml", kind)), mine)
        for name, gradient in plain.items():
            assert_close(grads[name.replace("net.", f"groups.{i}.", 1)], gradient * (mine.tasks / 7))


@pytest.mark.parametrize("affine_inner", [True, False])
def test_parameters_that_the_inner_loop_leaves_are_learned_in_each_group(affine_inner):
    """Without inner adaptation a group's batch-norm scales are theta*'s at first; adaptation starts from its own."""
    learner, episodes = create(CASE, net=oracles.conv_net(bn_affine_inner=affine_inner)), tasks_for(CASE)
    learner.place(learner.displacement(learner.theta(), episodes.support)[:2])
    for name, p in group(learner, 1).items():
        still = "conv.bias" in name or (not affine_inner and ".norm." in name)
        assert still == (float((p - star(learner)[name]).abs().max()) < 1e-15)
    moved = {k for k, g in outer_gradient(learner, episodes).items() if g.any()}
    assert {f"groups.{i}.block1.norm.weight" for i in (0, 1)} <= moved
    theta, chosen = learner.theta(), learner.route(learner.theta(), episodes.support)
    first = learner.adapt(theta, episodes.support, steps=1)[0]
    assert first.keys() == learner.shapes.keys()
    for k, p in first.items():
        assert_close(p, torch.stack([group(learner, int(g))[k] for g in chosen]))


# ---- routing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["initial", "current"])
@pytest.mark.parametrize("compared", ["all", "body", "head"])
def test_tasks_go_to_the_nearest_reference(routing, compared):
    """g(T) by a plain loop: inner steps from theta* and Euclidean distances of the compared parameters."""
    learner, episodes = create(CASE, routing=routing, cluster_params=compared), tasks_for(CASE, tasks=9)
    deltas, origin = learner.displacement(learner.theta(), episodes.support), star(learner)
    learner.place(deltas[:2])
    centres, moved = ([group(learner, i) for i in range(2)] for _ in range(2))
    with torch.no_grad():
        for name, p in learner.groups.named_parameters():  # as if training had moved them
            i, _, rest = name.partition(".")
            p.copy_(origin[rest] + learner._named(deltas[2:4])[rest][int(i)])
            moved[int(i)][rest] = p.clone()
    names = [k for k in origin if compared == "all" or k.startswith("head") == (compared == "head")]
    references = moved if routing == "current" else centres
    expected = []
    for i in range(9):
        task = type(episodes.support)(episodes.support.x[i], episodes.support.y[i])
        leaves = {k: p.clone().requires_grad_() for k, p in origin.items()}
        phi = oracles.descend(learner.net, leaves, task, learner.alpha, learner.id_steps, list(origin), True)
        gaps = [sum((phi[k] - r[k]).square().sum() for k in names) for r in references]
        expected.append(int(torch.stack(gaps).argmin()))
    assert learner.route(learner.theta(), episodes.support).tolist() == expected
    assert len(set(expected)) > 1


def test_routing_sees_no_query():
    """TS5."""
    learner, episodes, other = create(CASE), tasks_for(CASE, tasks=8), tasks_for(CASE, tasks=8, seed=5)
    changed = Episode(episodes.support, other.query, {})
    one, two = (learner.task_loss(learner.theta(), e) for e in (episodes, changed))
    assert torch.equal(one.aux[GROUP], two.aux[GROUP]) and not torch.equal(one.loss, two.loss)


def test_without_the_head_labels_may_be_permuted():
    """TS6: from a zero head, displacements of the body are equal to rounding; those of the head are not."""
    body, whole = (create(CASE, cluster_params=c, id_steps=3) for c in ("body", "all"))
    episodes = tasks_for(CASE, tasks=8)
    order = torch.tensor([2, 0, 1])
    permuted = episodes.support._replace(y=order[episodes.support.y])
    for learner in (body, whole):
        with torch.no_grad():
            for p in (learner.net.head.weight, learner.net.head.bias):
                p.zero_()
        theta, part = learner.theta(), learner.compared
        one, two = (learner.displacement(theta, s)[:, part] for s in (episodes.support, permuted))
        same = float((one - two).norm() / one.norm()) < oracles.ROUNDING
        assert same == (learner is body)
    routes = [body.route(body.theta(), s) for s in (episodes.support, permuted)]
    assert torch.equal(*routes) and len(set(routes[0].tolist())) == 2


@pytest.mark.parametrize("what", ["body", "head"])
def test_nothing_to_compare_is_refused(what):
    adapted = {"body": "head", "head": "block1"}[what]
    with pytest.raises(BadInput, match=f"algorithm.cluster_params={what}: the inner loop moves no such parameter"):
        create(CASE, cluster_params=what, adapted=adapted, m=1)


# ---- families of quadratic tasks ----------------------------------------------------------------------------------


class Quadratics:
    """Tasks 1/2 (w - c)^T A (w - c) of families with their own mean of c; support and query are the same loss."""

    def __init__(self, families: int = 3, d: int = 4, tasks: int = 90):
        self.train_key, self.d = Key(0, "train"), d
        self.a = forms(1, d, seed=0)[0][0]
        self.family = torch.arange(tasks) % families
        self.means = 5 * normal(families, d, seed=1)
        self.c = self.means[self.family] + 0.2 * normal(tasks, d, seed=2)

    def stream(self, name: str, first: int, last: int) -> MetaBatch:
        rows = torch.arange(first, last)
        examples = quadratic(self.a.expand(len(rows), -1, -1), self.c[rows])
        return meta_batch(Episode(examples, examples, {"group": self.family[rows]}))


def prepared(learner: TSAMAML, data: Any) -> dict[str, float]:
    """Go through the phases without a disk."""
    pieces: list[Any] = []
    for phase in learner.phases(data):
        pieces = [phase.make(i, iter(pieces)) for i in range(phase.pieces)]
    return learner.begin(iter(pieces))


@pytest.mark.parametrize("batching", ["per_group_queue", "mixed"])
def test_families_are_told_apart_and_solved(batching):
    """TS3: pure clusters and routes; theta_i ends at its family's MAML solution, the mean of c for a common A."""
    data = Quadratics()
    options = {"alpha": 0.1, "inner_steps": 1, "id_steps": 3, "m": 3, "tasks": 90, "batching": batching}
    learner = linear_form(TSAMAML, normal(4, seed=7), **options)
    found = prepared(learner, data)
    assert found["cluster_purity"] == 1 and found["cluster_silhouette"] > 0.7
    everything = data.stream("", 0, 90)
    chosen = learner.route(learner.theta(), everything.episodes.support)
    assert clustering.purity(chosen, data.family) == 1
    learner.attach(SGD(lr=1.0), 300)
    optimizer = learner.configure_optimizers()
    for s in range(120):  # contracts by 1 - (1 - 0.1 a)^2 a <= 0.8 an update (a third of it, mixed)
        learner.meta_step(everything._replace(step=s), optimizer)
    for i in range(3):
        assert_close(group(learner, i)["head.weight"][0], data.c[chosen == i].mean(0), rtol=1e-6)
    assert_close(star(learner)["head.weight"][0], normal(4, seed=7))


def test_one_group_starts_at_the_mean_of_the_adapted_parameters():
    """TS1, first half. Tolerance: displacements are kept in 11 bits."""
    data = Quadratics(families=2, tasks=150)
    learner = linear_form(TSAMAML, normal(4, seed=7), alpha=0.1, m=1, tasks=150, id_steps=2)
    found = prepared(learner, data)
    theta, ends = normal(4, seed=7), []
    for c in data.c:
        phi = theta
        for _ in range(2):
            phi = phi - 0.1 * data.a @ (phi - c)
        ends.append(phi)
    assert_close(group(learner, 0)["head.weight"][0], torch.stack(ends).mean(0), rtol=2**-11 * 3)
    assert found["cluster_purity"] == 0.5


def test_displacements_cluster_as_adapted_parameters_do():
    """TS2: k-means of theta* + Delta, stored by their differences from zero, and of Delta."""
    theta, delta = 3 * normal(50, seed=0), normal(60, 50, seed=1) + 2 * normal(3, 50, seed=2)[torch.arange(60) % 3]
    found = []
    for points in (theta + delta, delta):
        vectors = clustering.Vectors(torch.zeros(50), 60)
        vectors.add(points.float())
        found.append(clustering.cluster(vectors, 3))
    assert torch.equal(found[0].labels, found[1].labels)
    torch.testing.assert_close(found[0].centroids, found[1].centroids + theta.float(), rtol=2**-11, atol=2**-8)


def test_stored_vectors_come_back_as_they_are():
    vectors, again = clustering.Vectors(torch.zeros(30), 8), clustering.Vectors(torch.zeros(30), 8)
    vectors.add(normal(8, 30, seed=0).float() * torch.logspace(-6, 6, 8)[:, None])
    for rows in (slice(0, 3), slice(3, 8)):
        again.restore(*(t[rows] for t in vectors.stored()))
    for (_, a), (_, b) in zip(vectors.part(slice(5, 20)).columns(), again.columns(), strict=True):
        assert torch.equal(a, b[:, 5:20])


# ---- updates -------------------------------------------------------------------------------------------------------


def routed(learner: TSAMAML, wanted: list[int], seed: int = 0) -> Episode:
    """Tasks that choose these groups, in this order."""
    pool = tasks_for(CASE, tasks=40, seed=seed)
    chosen = learner.route(learner.theta(), pool.support)
    rows = {i: (chosen == i).nonzero().flatten().tolist() for i in set(wanted)}
    return pool.select(torch.tensor([rows[i].pop() for i in wanted]))


def test_a_group_without_tasks_is_not_touched():
    """TS4: neither its parameters nor what Adam knows of them; nor theta*, ever."""
    learner = create(CASE)
    learner.attach(Adam(lr=0.01), 10)
    optimizer, before = learner.configure_optimizers(), star(learner)
    learner.meta_step(meta_batch(routed(learner, [0, 1, 1, 0])), optimizer)

    def known(i: int) -> list[Any]:
        return [optimizer.state[p] for n, p in learner.groups.named_parameters() if n.startswith(f"{i}.")]

    assert all(int(s["step"]) == 1 for i in (0, 1) for s in known(i))
    kept = group(learner, 1), [{k: v.clone() for k, v in s.items()} for s in known(1)]
    learner.meta_step(meta_batch(routed(learner, [0, 0, 0, 0], seed=1)), optimizer)
    assert_same_bits(group(learner, 1), kept[0])
    torch.testing.assert_close(known(1), kept[1], rtol=0, atol=0)
    assert all(int(s["step"]) == 2 for s in known(0))
    assert_same_bits(star(learner), before)
    assert all(p not in optimizer.state for p in learner.net.parameters())


def test_queues_update_a_group_with_its_own_tasks_as_maml_does():
    """Three meta-steps of four tasks: the third task of group 1 waits until a fourth comes."""
    learner = create(CASE, batching="per_group_queue", routing="initial")
    learner.attach(SGD(lr=0.1), 10)
    optimizer, start = learner.configure_optimizers(), group(learner, 1)
    first, second = routed(learner, [1, 0, 1, 0]), routed(learner, [1, 0, 0, 1], seed=1)
    before = bits(learner)
    assert learner.meta_step(meta_batch(first), optimizer) is None
    learner_before = {k: v for k, v in before.items() if k != "_extra_state"}
    assert_same_bits({k: v for k, v in bits(learner).items() if k != "_extra_state"}, learner_before)
    assert learner.meta_step(meta_batch(second, step=1), optimizer) is not None and learner.meta_steps == 2
    maml, parts = maml_at(start), [first.select(torch.tensor([0, 2])), second.select(torch.tensor([0, 3]))]
    together = pytree.tree_map(lambda *leaves: torch.cat(leaves), *parts)
    maml.attach(SGD(lr=0.1), 10)
    maml.meta_step(meta_batch(together), maml.configure_optimizers())
    assert_close(group(learner, 1), {k: p.detach() for k, p in maml.net.named_parameters()})


def numbered(step: int, size: int) -> MetaBatch:
    """Tasks that carry their own number."""
    batch = meta_batch(oracles.curves(size, seed=step), step)
    return batch._replace(episodes=batch.episodes._replace(latent={"number": batch.key.task + size * step}))


def test_queues_lose_and_repeat_no_task():
    """Every update has B tasks of one group, oldest first; fewer than m updates are ever outstanding."""
    m, size, steps = 3, 4, 200
    queues, seen, made = Queues(m), [[] for _ in range(m)], 0
    groups = [torch.randint(m, (size,), generator=oracles.generator(s)) for s in range(steps)]
    for s in range(steps):
        if s == 77:  # a checkpoint
            state, queues = queues.state(), Queues(m)
            queues.load(state)
        for part in queues.push(numbered(s, size), groups[s]):
            numbers = part.episodes.latent["number"]
            assert part.total == part.episodes.tasks == size and part.step == s
            assert torch.equal(part.key.step * size + part.key.task, numbers)
            (mine,) = set(torch.cat(groups)[numbers].tolist())
            seen[mine] += numbers.tolist()
            made += 1
        assert s + 1 - m < made <= s + 1
    for i in range(m):
        arrived = (torch.cat(groups) == i).nonzero().flatten().tolist()
        assert seen[i] == arrived[: len(seen[i])] and len(arrived) - len(seen[i]) < size


# ---- collapse --------------------------------------------------------------------------------------------------------


def test_drift_sends_all_tasks_to_the_least_moved_group():
    """The simulation of the specification: |theta_i - theta*|^2 outgrows Delta^T (theta_i - theta*)."""
    d, m, n = 2000, 3, 300
    centres, drift = 0.02 * normal(m, d, seed=0), torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)[:, None]
    family = torch.arange(n) % m
    delta = centres[family] + 0.02 * normal(n, d, seed=1)
    moved = drift * normal(m, d, seed=2)
    learner = linear_form(TSAMAML, torch.zeros(d, dtype=torch.float64), alpha=0.1, m=m)
    learner.displacement = lambda theta, support: delta  # what tasks are is given here
    support, right = SimpleNamespace(y=family), []
    learner.place(centres)
    for routing, size in (("initial", 0.0), ("current", 0.0), ("current", 0.05), ("initial", 0.05)):
        learner.routing = routing
        with torch.no_grad():
            for i in range(m):
                learner.groups.get_parameter(f"{i}.head.weight").copy_((centres + size * moved)[i : i + 1])
        chosen = learner.route(learner.theta(), support)
        right.append(float((chosen == family).double().mean()))
    assert right[0] == right[1] == right[3] == 1
    assert right[2] < 0.4 and (chosen == family).all()


@pytest.mark.parametrize(
    ("routing", "steps", "stops"), [("current", 3, True), ("current", 0, False), ("initial", 3, False)]
)
def test_collapse_is_said_and_stops(routing, steps, stops):
    learner = create(CASE, routing=routing, collapse_steps=steps)
    optimizer = learner.configure_optimizers()
    learner.attach(SGD(lr=1e-9), 10)
    batch = meta_batch(routed(learner, [1, 1, 1, 1]))
    for _ in range(2):
        learner.meta_step(batch, optimizer)
    said = learner.reports()
    assert (said["usage_0"], said["usage_1"], said["usage_entropy"]) == (0, 1, 0) and GROUP not in said
    if not stops:
        learner.meta_step(batch, optimizer)
        return
    with pytest.raises(Collapsed, match=r"group 1 took 100.0% of the tasks of 3 updates.*use routing=initial"):
        learner.meta_step(batch, optimizer)


def test_usage_is_the_share_of_tasks():
    learner = create(CASE)
    learner.meta_step(meta_batch(routed(learner, [0, 1, 1, 1])), learner.configure_optimizers())
    said = learner.reports()
    assert said["usage_1"] == 0.75
    assert said["usage_entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


# ---- what it starts from ---------------------------------------------------------------------------------------------


def test_only_a_network_of_the_same_shape_is_inherited():
    learner = create(CASE)
    state = create(("maml", "classification")).state_dict()
    learner.inherit([state])
    assert_same_bits(star(learner), {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
    wider = create(("maml", "classification"), net=oracles.conv_net(width=4)).state_dict()
    with pytest.raises(BadInput, match=r"algorithm.pretrained: net.block1.conv.weight is \[4, 2, 3, 3\] there and \[3"):
        learner.inherit([wider])
    with pytest.raises(BadInput, match="net.block1.conv.weight is absent there"):
        learner.inherit([{}])
    with pytest.raises(BadInput, match="must be a run of maml, and it has gates, too"):
        learner.inherit([state | {"gates.weight": torch.zeros(1)}])


def test_running_averages_are_inherited():
    """With no training of its own, mode `running` uses MAML's."""
    maml, _ = trained(("maml", "classification"))
    learner = create(CASE)
    learner.inherit([maml.state_dict()])
    assert_same_bits(dict(learner.running.named_buffers()), dict(maml.running.named_buffers()))
    assert int(learner.running.steps) == 1


def test_without_training_the_groups_are_the_centres(tmp_path):
    """TS7: S = 0."""
    cell = cell_of(
        tmp_path, "algorithm=tsa_maml", "algorithm.pretrain_steps=2", "algorithm.tasks=20", "trainer.max_steps=0"
    )
    assert run(cell) == "done"
    state = checkpoint(tmp_path, cell)["learner"]
    (maml,) = cell.needs
    theta = checkpoint(tmp_path, maml, "best")["learner"]
    size = 0
    for name, p in theta.items():
        if name.startswith("net."):
            assert torch.equal(state[name], p)
            shift = torch.stack([state[name.replace("net.", f"groups.{i}.", 1)] for i in range(3)]) - p
            part = state["centres"][:, size : size + p.numel()].unflatten(1, p.shape)
            size += p.numel()
            torch.testing.assert_close(shift, part, rtol=0, atol=1e-6)  # float32 sums of numbers up to 1
            assert shift.any()
