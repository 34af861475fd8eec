"""Tangent features and curvatures against explicit Jacobians and Hessians of plain implementations."""

import pytest
import torch
from oracles import (
    LinearForm,
    assert_close,
    build,
    conv_net,
    curves,
    forms,
    forward,
    linear_form,
    loss,
    meta_batch,
    mlp,
    normal,
    pictures,
    quadratic,
)
from torch import Tensor
from torch.autograd.functional import hessian
from torch.func import jacrev

from metalearn.algorithms import MAML, MMAML, MTNet, TNet
from metalearn.episode import Episode, Examples
from metalearn.theory import tangent as t
from metalearn.theory.alpha_star import limit, of_curvature, split

SAME = 1e-9  # two ways of differentiating in float64


def make(kind: str, **arguments) -> tuple[MAML, Episode]:
    if kind == "classification":
        return build(MAML, conv_net(), kind, alpha=0.1, **arguments), pictures(3)
    return build(MAML, mlp(), kind, alpha=0.1, **arguments), curves(3)


def tangent(learner: MAML, episodes: Episode) -> t.Tangent:
    return t.tangent(learner, learner.constants(), episodes, meta_batch(episodes).key)


def explicit(learner: MAML, x: Tensor) -> Tensor:
    """J `[n O, P]` of one task, by torch's own operators."""
    theta = {k: p.detach() for k, p in learner.net.named_parameters()}
    moving = {k: p for k, p in theta.items() if learner.moves(k)}
    found = jacrev(lambda phi: forward(learner.net, theta | phi, x))(moving)
    return torch.cat([j.flatten(2).flatten(0, 1) for j in found.values()], 1)


def curvature(learner: MAML, x: Tensor, y: Tensor) -> Tensor:
    """J^T H J `[P, P]` of one task's mean loss."""
    value = forward(learner.net, dict(learner.net.named_parameters()), x).detach()
    h = hessian(lambda f: loss(f, y), value).reshape(value.numel(), value.numel())
    j = explicit(learner, x)
    return j.mT @ h @ j


def vector(learner: MAML, flat: Tensor) -> dict[str, Tensor]:
    shapes = {k: s for k, s in learner.shapes.items() if learner.moves(k)}
    parts = flat.split([s.numel() for s in shapes.values()], -1)
    return {k: p.unflatten(-1, s) for (k, s), p in zip(shapes.items(), parts, strict=True)}


@pytest.mark.parametrize("adapted", ["", "head"])
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_rows_are_those_of_the_explicit_jacobian(kind, adapted):
    learner, episodes = make(kind, adapted=adapted)
    found = tangent(learner, episodes)
    for jacobian, part in zip(found, (episodes.support, episodes.query), strict=True):
        (rows,) = t.features(jacobian)
        expected = torch.stack([explicit(learner, x) for x in part.x])
        assert_close(rows, expected, SAME)
        v, u = normal(3, expected.shape[2], seed=1), normal(*jacobian.value.shape, seed=2)
        assert_close(jacobian.times(vector(learner, v)).flatten(1), (expected @ v.unsqueeze(2)).squeeze(2), SAME)
        back = jacobian.transposed(u)
        assert_close(back, vector(learner, (u.flatten(1).unsqueeze(1) @ expected).squeeze(1)), SAME)


def test_blocks_of_rows_are_parts_of_the_whole():
    jacobian = tangent(*make("classification")).support
    (whole,) = t.features(jacobian)
    row = whole[:, 0].numel() * 8
    blocks = list(t.features(jacobian, limit=4 * row + 1))
    assert [b.shape[1] for b in blocks] == [4, 4, 4, 4, 2]
    assert torch.equal(torch.cat(blocks, 1), whole)
    assert len(list(t.features(jacobian, limit=1))) == whole.shape[1]


def test_a_kernel_is_the_same_with_all_rows_held_and_with_two_blocks():
    blocks, made = [normal(n, 5, seed=n) for n in (3, 1, 4)], []
    psi = torch.cat(blocks)
    makers = [lambda i=i: made.append(i) or blocks[i] for i in range(3)]
    for held, times in ((3 * 3 * 5 * 8, [1, 1, 1]), (3 * 3 * 5 * 8 - 1, [3, 2, 1])):
        made.clear()
        assert_close(t.kernel(makers, held=held), psi @ psi.mT, SAME)
        assert [made.count(i) for i in range(3)] == times


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [("regression", "mean"), ("classification", "mean"), ("classification", "sum_over_shots")],
)
def test_traces_are_those_of_the_gauss_newton_matrices(kind, reduction):
    learner, episodes = make(kind, inner_loss_reduction=reduction)
    times = 3 if reduction == "sum_over_shots" else 1
    a = torch.stack([times * curvature(learner, x, y) for x, y in zip(*episodes.support, strict=True)])
    b = torch.stack([curvature(learner, x, y) for x, y in zip(*episodes.query, strict=True)])
    found = tangent(learner, episodes)
    v = normal(3, a.shape[1], seed=1)
    assert_close(found.support.curvature(vector(learner, v)), vector(learner, (a @ v.unsqueeze(2)).squeeze(2)), SAME)
    expected = torch.stack(
        [(x @ torch.stack([y, y @ x])).diagonal(dim1=1, dim2=2).sum(1) for x, y in zip(a, b, strict=True)]
    )
    assert_close(t.grams(*found).traces(), expected, SAME)
    for traces, other in ((t.grams(*found).traces(), b), (t.grams(found.support).traces(), None)):
        assert_close(tuple(t.curvature_terms(traces).estimate()), tuple(of_curvature(a, other)), SAME)


def test_on_a_linear_form_it_is_the_estimate_from_the_inputs():
    episodes = curves(6, inputs=4)
    learner = linear_form(MAML, normal(4, seed=0), alpha=0.1)
    found = tangent(learner, episodes)
    (rows,) = t.features(found.support)
    assert torch.equal(rows, episodes.support.x)
    same, other = (t.curvature_terms(t.grams(*pair).traces()).estimate() for pair in ((found.support,), found))
    assert_close(tuple(same), tuple(limit(episodes.support.x)), SAME)
    assert_close(tuple(other), tuple(split(episodes.support.x, episodes.query.x)), SAME)


def test_features_times_c_divide_alpha_by_c_squared():
    episodes, learner = curves(6, inputs=4), linear_form(MAML, normal(4, seed=0), alpha=0.1)

    def alpha(c: float) -> float:
        scaled = Episode(*(Examples(c * part.x, part.y) for part in episodes[:2]), {})
        return t.curvature_terms(t.grams(*tangent(learner, scaled)).traces()).estimate().value

    assert alpha(3.0) == pytest.approx(alpha(1.0) / 9, rel=SAME)


def test_of_the_head_alone_it_is_the_estimate_from_last_layer_features():
    learner, episodes = make("regression", adapted="head")
    support, query = t.last_layer(learner, learner.constants(), episodes)
    assert torch.equal(support[..., -1], torch.ones(3, 5, dtype=torch.float64))
    found = tangent(learner, episodes)
    assert_close(tuple(t.curvature_terms(t.grams(*found).traces()).estimate()), tuple(split(support, query)), SAME)
    bare, _ = t.last_layer(learner, learner.constants(), episodes, offset=False)
    assert torch.equal(bare, support[..., :-1])


def test_a_step_of_that_size_is_perfect_where_all_directions_curve_alike():
    """Z5: G = lambda I in every task, so that one step reaches the optimum: the query loss is zero."""
    d = 4
    x = torch.stack([torch.linalg.qr(m)[0] * 3.0 for m in normal(5, d, d, seed=3)])
    y = x @ normal(5, d, 1, seed=4)
    episodes = Episode(Examples(x, y), Examples(x.flip(1), y.flip(1)), {})
    learner = linear_form(MAML, normal(d, seed=5), alpha=0.0)
    estimate = t.curvature_terms(t.grams(*tangent(learner, episodes)).traces()).estimate()
    assert estimate.value == pytest.approx(d / (2 * 9.0), rel=SAME) and estimate.se < SAME
    learner.use_rate(estimate.value)
    theta = learner.constants()
    phi = learner.adapt(theta, episodes.support, steps=1)[1]
    prediction = learner.predict(theta, phi, episodes.query.x, support=episodes.support, bn="batch")
    assert float(learner.loss(prediction, episodes.query.y).max()) < 1e-20


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_probes_are_right_on_average(kind):
    """A task 500 times, each with its own probe: the mean is within 4 of the standard errors that it shows."""
    learner, episodes = make(kind)
    one = episodes.select(slice(0, 1))
    many = Episode(*(Examples(*(v.expand(500, *v.shape[1:]) for v in part)) for part in one[:2]), {})
    found, key = tangent(learner, many), meta_batch(many).key
    exact = tangent(learner, one)
    for query, exact_query in ((found.query, exact.query), (None, None)):
        drawn = t.probed(found.support, query, 1, key)
        expected = t.grams(exact.support, exact_query).traces()[0]
        error = drawn.std(0) / len(drawn) ** 0.5
        assert bool(((drawn.mean(0) - expected).abs() < 4 * error).all())
        assert bool((error < 0.1 * expected).all())
    again = t.probed(found.support, found.query, 1, key)
    assert torch.equal(again, t.probed(found.support, found.query, 1, key))


def test_more_probes_have_less_spread():
    learner, episodes = make("classification")
    one = episodes.select(slice(0, 1))
    many = Episode(*(Examples(*(v.expand(400, *v.shape[1:]) for v in part)) for part in one[:2]), {})
    found, key = tangent(learner, many), meta_batch(many).key
    one_probe, four = (t.probed(found.support, found.query, n, key).var(0) for n in (1, 4))
    assert_close(one_probe / four, torch.full((2,), 4.0, dtype=torch.float64), 0.4)


@pytest.mark.parametrize("shift", [0.0, -40.0], ids=["positive", "indefinite"])
def test_power_iteration_finds_the_largest_eigenvalue(shift):
    """Also where the eigenvalue of largest size is negative."""
    root, _ = forms(4, 6, seed=11)
    matrices = root.clone()
    matrices[2] += shift * torch.diag(torch.arange(6.0, dtype=torch.float64) / 5)
    like = {"a": torch.zeros(4, 2, dtype=torch.float64), "b": torch.zeros(4, 2, 2, dtype=torch.float64)}

    def product(v):
        out = matrices @ torch.cat([p.flatten(1) for p in v.values()], 1).unsqueeze(2)
        return {"a": out[:, :2, 0], "b": out[:, 2:, 0].unflatten(1, (2, 2))}

    found = t.largest_eigenvalue(product, like, steps=5000, tolerance=1e-6)
    assert_close(found.value, torch.linalg.eigvalsh(matrices)[:, -1], 1e-8)
    assert bool((found.residual <= 1e-6).all())
    rough = t.largest_eigenvalue(product, like, steps=3, tolerance=1e-6)
    assert rough.steps <= 6 and bool((rough.residual > 1e-6).any())


def test_curvature_of_the_support_loss_is_that_of_its_hessian():
    learner, episodes = make("regression")
    theta = dict(learner.net.named_parameters())

    def value(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss(forward(learner.net, vector(learner, flat), x), y)

    flat = torch.cat([p.detach().flatten() for p in theta.values()])
    full = torch.stack(
        [hessian(lambda f, x=x, y=y: value(f, x, y), flat) for x, y in zip(*episodes.support, strict=True)]
    )
    found = t.support_curvature(
        learner, learner.constants(), episodes, meta_batch(episodes).key, steps=5000, tolerance=1e-6
    )
    assert_close(found.value, torch.linalg.eigvalsh(full)[:, -1], 1e-6)


def test_masks_leave_out_the_rows_that_a_task_does_not_adapt():
    learner, episodes = build(MTNet, mlp(), "regression", alpha=0.1), curves(3)
    plain = build(TNet, mlp(), "regression", alpha=0.1)
    plain.load_state_dict({k: v for k, v in learner.state_dict().items() if not k.startswith("zeta.")})
    key = meta_batch(episodes).key
    masks = learner.multipliers(learner.constants(), key)
    flat = torch.cat([masks[k].expand(3, *s).flatten(1) for k, s in learner.shapes.items()], 1)
    assert 0 < float(flat.mean()) < 1
    for masked, full in zip(tangent(learner, episodes), tangent(plain, episodes), strict=True):
        (rows,), (all_rows,) = t.features(masked), t.features(full)
        assert_close(rows, all_rows * flat.unsqueeze(1), SAME)
        v = normal(3, flat.shape[1], seed=1)
        assert_close(masked.times(vector(learner, v)), full.times(vector(learner, v * flat)), SAME)


class Graded(MAML):
    """Each row of parameters has a rate of its own, as a T-net's transform would give it, none of them 0 or 1."""

    def multipliers(self, theta, key):
        return {k: normal(*s, seed=i).square() for i, (k, s) in enumerate(self.shapes.items())}


@pytest.mark.parametrize("algorithm", [MTNet, Graded])
def test_curvature_is_that_of_the_scaled_parameters(algorithm):
    """lambda_max of M^1/2 H M^1/2, from which 2 / lambda_max is: rates M on both sides of the Hessian."""
    learner, episodes = build(algorithm, mlp(), "regression", alpha=0.1), curves(3)
    key, names = meta_batch(episodes).key, dict(learner.shapes)
    multipliers = learner.multipliers(learner.constants(), key)
    with torch.no_grad():
        start = learner.origin(learner.constants(), episodes.support, key)
        problem, moving, context = t.support_problem(learner, start, episodes.support, learner.moves)
    curve = t.hvp(problem, moving, context)
    size = sum(s.numel() for s in names.values())
    columns = []
    for unit in torch.eye(size, dtype=torch.float64):
        product = curve(vector(learner, unit.expand(3, size)))
        columns.append(torch.cat([product[k].flatten(1) for k in names], 1))
    root = torch.cat([multipliers[k].expand(3, *s).flatten(1) for k, s in names.items()], 1).sqrt()
    full = root[:, :, None] * torch.stack(columns, 2) * root[:, None, :]
    found = t.support_curvature(learner, learner.constants(), episodes, key, steps=5000, tolerance=1e-6)
    assert_close(found.value, torch.linalg.eigvalsh(full)[:, -1], 1e-6)


def test_tasks_of_different_starts_have_their_own_features():
    """MMAML's network is modulated by each task's support set: chunks of tasks are the same tasks."""
    learner, episodes = build(MMAML, mlp(), "regression", alpha=0.1, hidden=3), curves(3)
    together = t.grams(*tangent(learner, episodes)).traces()
    alone = [t.grams(*tangent(learner, episodes.select(slice(i, i + 1)))).traces() for i in range(3)]
    assert_close(together, torch.cat(alone), SAME)


def test_quadratic_tasks_have_the_curvature_they_are_made_of():
    a, c = forms(3, 4, seed=7)
    parts = [quadratic(x, y) for x, y in zip(a, c, strict=True)]
    examples = Examples(*(torch.stack(list(v)) for v in zip(*parts, strict=True)))
    learner = build(MAML, LinearForm(4), "regression", alpha=0.1)
    found = t.grams(tangent(learner, Episode(examples, examples, {})).support)
    assert_close(torch.linalg.eigvalsh(found.support), torch.linalg.eigvalsh(a), SAME)
