"""Implicit MAML against closed forms, and finite differences of exactly solved inner problems (float64)."""

from typing import Any

import oracles
import pytest
import torch
from oracles import (
    INPUTS,
    QUADRATIC,
    assert_close,
    build,
    distance,
    forms,
    linear_form,
    meta_batch,
    normal,
    outer_gradient,
    quadratic,
    slope,
)
from peak import Peak
from table import create, regularizer, step
from test_hooks import Gate
from torch import Tensor

from metalearn.algorithms import IMAML, MAML
from metalearn.cells import expand
from metalearn.episode import Episode
from metalearn.functional import conjugate_gradient, hvp, per_task, task_dot, unrolled
from metalearn.learner import Diverged
from metalearn.meta_gradient import meta_gradient, objective
from metalearn.schema import BadInput

EYE = torch.eye(3, dtype=torch.float64)
SOLVED: dict[str, Any] = {"lam": 10.0, "alpha": 0.08, "inner_steps": 30, "cg_steps": 20, "cg_tolerance": 1e-26}
"""Strongly convex: every step shrinks the error to at most 0.4 of it."""


def times(a: Tensor) -> Any:
    """v -> A v for matrices `[B, d, d]`."""
    return lambda v: {"w": torch.einsum("bij,bj->bi", a, v["w"])}


def solve(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(a, b.unsqueeze(-1)).squeeze(-1)


# ---- conjugate gradient ------------------------------------------------------------------------------------------


def plain_conjugate_gradient(a: Tensor, b: Tensor, steps: int) -> tuple[Tensor, int, bool]:
    """One task: its iterate, the steps it took, whether it met a direction without positive curvature."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    for k in range(steps):
        if float(r @ r) < 1e-10 * float(b @ b) or not b.any():
            return x, k, False
        if float(p @ a @ p) <= 0:
            return x, k, True
        size = (r @ r) / (p @ a @ p)
        x, after = x + size * p, r - size * (a @ p)
        p, r = after + (after @ after) / (r @ r) * p, after
    return x, steps, False


def test_conjugate_gradient_ends_after_as_many_steps_as_unknowns():
    """I2, with errors that fall in the norm of A."""
    a, b = forms(4, 6, seed=0)
    x = solve(a, b)
    errors = []
    for steps in range(7):
        error = conjugate_gradient(times(a), {"w": b}, steps).x["w"] - x
        errors.append(torch.einsum("bi,bij,bj->b", error, a, error))
    assert all(bool((after < before).all()) for before, after in zip(errors, errors[1:], strict=False))
    assert_close(conjugate_gradient(times(a), {"w": b}, 6).x["w"], x, rtol=1e-9)  # loses orthogonality by rounding
    assert_close(conjugate_gradient(times(EYE[None].expand(4, 3, 3)), {"w": b[:, :3]}, 1).x["w"], b[:, :3])


def test_every_task_stops_by_itself():
    """One after one step, one after two, one after none, one not at all, and two where curvature is not positive."""
    a = torch.stack(
        [
            2 * EYE,
            torch.diag(torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)),
            EYE,
            forms(1, 3, seed=1)[0][0],
            -EYE,
            torch.diag(torch.tensor([5.0, 1.0, -1.0], dtype=torch.float64)),
        ]
    )
    b = normal(6, 3, seed=2)
    b[2] = 0
    b[5] = torch.tensor([1.0, 1.0, 1.0])
    found = conjugate_gradient(times(a), {"w": b}, 3)
    expected = [plain_conjugate_gradient(*pair, steps=3) for pair in zip(a, b, strict=True)]
    assert_close(found.x["w"], torch.stack([x for x, _, _ in expected]))
    assert found.steps.tolist() == [k for _, k, _ in expected] == [1, 2, 0, 3, 0, 1]
    assert found.indefinite.tolist() == [bad for _, _, bad in expected] == [False] * 4 + [True] * 2
    left = b - torch.einsum("bij,bj->bi", a, found.x["w"])
    assert_close(found.residual * b.norm(dim=1), left.norm(dim=1))


def test_a_solution_is_in_proportion_to_its_right_hand_side():
    """Also where the tolerance ends the loop, so that no weight of a task moves its gradient's direction."""
    a, b = forms(4, 6, seed=0)
    whole = conjugate_gradient(times(a), {"w": b}, 6, tolerance=1e-4)
    assert int(whole.steps.max()) < 6
    small = conjugate_gradient(times(a), {"w": 2.0**-30 * b}, 6, tolerance=1e-4)
    torch.testing.assert_close(small.x["w"] * 2.0**30, whole.x["w"], rtol=0, atol=0)
    assert torch.equal(small.steps, whole.steps)


def test_what_is_not_finite_stays_so():
    """In its own task: a solution of zero would hide it."""
    a, b = forms(2, 3, seed=0)
    b[0, 1] = torch.nan
    x = conjugate_gradient(times(a), {"w": b}, 3).x["w"]
    assert bool(x[0].isnan().all()) and bool(x[1].isfinite().all())


def test_inner_products_are_those_of_flat_vectors():
    a, b = ({"w": normal(4, 2, 3, seed=s), "scalar": normal(4, seed=s + 2)} for s in (0, 1))
    flat = [torch.cat([v["w"].flatten(1), v["scalar"][:, None]], 1) for v in (a, b)]
    assert_close(task_dot(a, b), (flat[0] * flat[1]).sum(1))


def test_hessian_vector_products_are_those_of_the_hessian():
    """Of every task's own loss; twice from one graph."""
    net, support = oracles.mlp(), oracles.curves(3).support
    phi = {k: normal(3, *shape, seed=i) / 2 for i, (k, shape) in enumerate(net.shapes().items())}
    product = hvp(lambda phi, x: (net.run(phi, x) - support.y).square().flatten(1).mean(1), phi, support.x)
    sizes = [p[0].numel() for p in phi.values()]

    def value(flat: Tensor, i: int) -> Tensor:
        parts = [p.view(shape) for p, shape in zip(flat.split(sizes), net.shapes().values(), strict=True)]
        params = dict(zip(phi, parts, strict=True))
        return oracles.loss(oracles.forward(net, params, support.x[i]), support.y[i])

    flat = torch.cat([p.flatten(1) for p in phi.values()], 1)
    for seed in (5, 6):
        v = normal(3, sum(sizes), seed=seed)
        parts = [part.view(3, *shape) for part, shape in zip(v.split(sizes, 1), net.shapes().values(), strict=True)]
        actual = torch.cat([p.flatten(1) for p in product(dict(zip(phi, parts, strict=True))).values()], 1)
        for i in range(3):
            hessian = torch.autograd.functional.hessian(lambda f, i=i: value(f, i), flat[i])
            assert_close(actual[i], hessian @ v[i])


# ---- quadratics --------------------------------------------------------------------------------------------------


def test_quadratic_fixture():
    """I1: numbers of the specification. The paper's objective without 1/2 would give half of it."""
    i, expected = INPUTS, QUADRATIC["imaml"]
    support = quadratic(i["A_support_hessian"][None], i["c_support"][None])
    episodes = Episode(support, quadratic(i["D_query_hessian"][None], i["c_query"][None]), {})
    learner = linear_form(IMAML, i["theta"], lam=expected["lambda"], alpha=0.3, inner_steps=60, cg_steps=2)
    phi = learner.adapt(learner.theta(), support, steps=60)[-1]["head.weight"][0, 0]
    assert_close(phi, torch.tensor(expected["phi_star"], dtype=torch.float64))
    gradient = torch.tensor(expected["grad"], dtype=torch.float64)
    assert_close(slope(learner, episodes), gradient)
    half = torch.tensor(expected["printed_objective_without_half_minimiser"], dtype=torch.float64)
    assert_close(2 * half, gradient)


def test_outer_gradient_of_quadratics():
    """I1: phi = (A + lam)^-1 (A c + lam theta), gradient = mean over tasks of (I + A / lam)^-1 D (phi - c')."""
    (a, c), (d, c_query), theta, lam = forms(5, 3, seed=0), forms(5, 3, seed=2), normal(3, seed=4), 1.5
    learner = linear_form(IMAML, theta, alpha=0.3, lam=lam, inner_steps=100, cg_steps=3)
    phi = solve(a + lam * EYE, torch.einsum("bij,bj->bi", a, c) + lam * theta)
    expected = solve(EYE + a / lam, torch.einsum("bij,bj->bi", d, phi - c_query))
    episodes = Episode(quadratic(a, c), quadratic(d, c_query), {})
    assert_close(learner.adapt(learner.theta(), episodes.support, steps=100)[-1]["head.weight"][:, 0], phi)
    assert_close(slope(learner, episodes), expected.mean(0))


def test_the_authors_solver_and_system():
    """n plain steps, one of the proximal term, and ((1 + 1) I + A / (lam + 10))^-1 instead of (I + A / lam)^-1."""
    (a, c), (d, c_query), theta, lam = forms(5, 3, seed=0), forms(5, 3, seed=2), normal(3, seed=4), 1.5
    arguments = {"alpha": 0.2, "lam": lam, "inner_steps": 3, "cg_steps": 3}
    official = {"inner_solver": "official", "cg_damping": 1.0, "lam_damping": 10.0}
    learner = linear_form(IMAML, theta, **arguments, **official)
    plain = c + torch.einsum("bij,bj->bi", torch.linalg.matrix_power(EYE - 0.2 * a, 3), theta - c)
    phi = plain - 0.2 * lam * (plain - theta)
    expected = solve(2 * EYE + a / (lam + 10), torch.einsum("bij,bj->bi", d, phi - c_query))
    episodes = Episode(quadratic(a, c), quadratic(d, c_query), {})
    trajectory = learner.adapt(learner.theta(), episodes.support, steps=3)
    assert_close(trajectory[0]["head.weight"][:, 0], theta.expand(5, 3))
    assert_close(trajectory[3]["head.weight"][:, 0], phi)
    assert_close(slope(learner, episodes), expected.mean(0))


def test_an_early_end_of_the_solver_is_an_iterate():
    """K steps: phi - phi* shrinks by I - alpha (A + lam) each; the outer gradient is taken there."""
    (a, c), theta, lam = forms(5, 3, seed=0), normal(3, seed=4), 1.5
    learner = linear_form(IMAML, theta, alpha=0.2, lam=lam, inner_steps=2, cg_steps=3)
    end = solve(a + lam * EYE, torch.einsum("bij,bj->bi", a, c) + lam * theta)
    power = torch.linalg.matrix_power(EYE - 0.2 * (a + lam * EYE), 2)
    phi = end + torch.einsum("bij,bj->bi", power, theta - end)
    task = quadratic(a, c)
    assert_close(learner.adapt(learner.theta(), task, steps=2)[-1]["head.weight"][:, 0], phi)
    expected = solve(EYE + a / lam, torch.einsum("bij,bj->bi", a, phi - c))
    assert_close(slope(learner, Episode(task, task, {})), expected.mean(0))


def test_a_heavy_proximal_term_is_joint_training():
    """I3: lam to infinity. What remains is of relative size |H| / lam, about 1e-8."""
    episodes, gradients = oracles.curves(), []
    for cls, changes in ((IMAML, {"lam": 1e8, "alpha": 1e-8, "inner_steps": 2}), (MAML, {"inner_steps": 0})):
        learner = build(cls, oracles.mlp(), "regression", **{"alpha": 0.1, **changes})
        gradients.append(list(outer_gradient(learner, episodes).values()))
    assert 1e-12 < distance(*gradients) < 1e-6


# ---- networks, inner problems solved to rounding -----------------------------------------------------------------


def directional(learner: Any, episodes: Episode, directions: int = 2) -> tuple[list[float], list[float]]:
    """Derivatives of the outer objective along random directions of all meta-parameters: ours, central differences."""
    grads, leaves = list(outer_gradient(learner, episodes).values()), list(learner.parameters())
    value, ours, slopes = objective(learner, meta_batch(episodes)), [], []
    for seed in range(directions):
        v = [normal(*p.shape, seed=1000 * seed + i) for i, p in enumerate(leaves)]
        ours.append(float(sum((g * d).sum() for g, d in zip(grads, v, strict=True))))
        values = []
        for h in (1e-5, -2e-5):
            with torch.no_grad():
                torch._foreach_add_(leaves, v, alpha=h)
            values.append(value())
        with torch.no_grad():
            torch._foreach_add_(leaves, v, alpha=1e-5)
        slopes.append((values[0] - values[1]) / 2e-5)
    return ours, slopes


def products(learner: Any, theta: Any, episodes: Any, out: Any) -> Tensor:
    """Depends on all tasks' parameters and predictions."""
    parts = [*out.phi.values(), out.prediction]
    return torch.stack([(part * part.roll(1, 0)).sum() for part in parts]).sum()


@pytest.mark.parametrize("inner", [True, False], ids=["affine", "affine_outer"])
@pytest.mark.parametrize("adapted", ["", "head", "block2"])
def test_outer_gradient_is_the_slope_of_the_exact_objective(adapted, inner):
    """I4, for all that moves and for what does not: a frozen body, an affine map of batch norm."""
    net = oracles.conv_net(bn_affine_inner=inner)
    learner = build(IMAML, net, "classification", adapted=adapted, **SOLVED)
    ours, slopes = directional(learner, oracles.pictures(2))
    assert ours == pytest.approx(slopes, rel=1e-6)
    learner.lam_damping = 1e12  # without curvature it is not the slope
    assert directional(learner, oracles.pictures(2), 1)[0] != pytest.approx(slopes[:1], rel=1e-3)


@pytest.mark.parametrize("adapted", ["", "head"])
def test_everything_that_depends_on_the_solution_is_differentiated(adapted):
    """A penalty on all tasks' parameters and predictions; a regularizer with a parameter inside the network."""
    gate = type("GatedPenalty", (Gate,), {"penalty": staticmethod(products)})()
    for rule in (regularizer(penalty=products), Gate(), gate):
        learner = build(IMAML, oracles.mlp(), "regression", adapted=adapted, regularizer=rule, **SOLVED)
        for chunk_bytes in (0, 1):
            learner.chunk_bytes = chunk_bytes
            ours, slopes = directional(learner, oracles.curves(2))
            assert ours == pytest.approx(slopes, rel=1e-6)


def test_it_is_the_limit_of_differentiating_through_the_solver():
    """I5: MAML's derivative of many steps on the regularised objective."""
    episodes = oracles.curves(3)
    learner = build(
        IMAML, oracles.mlp(), "regression", lam=2.0, alpha=0.25, inner_steps=120, cg_steps=40, cg_tolerance=1e-26
    )
    theta = learner.theta()["net"]
    start = per_task(theta, 3, learner.shapes)

    def regularised(phi: dict[str, Tensor], start: dict[str, Tensor]) -> Tensor:
        away = {k: phi[k] - start[k] for k in phi}
        support = learner.loss(learner.net.run(phi, episodes.support.x), episodes.support.y)
        return support + learner.lam / 2 * task_dot(away, away)

    phi = unrolled(regularised, start, start, 0.25, 120)[-1]
    objective = learner.loss(learner.net.run(phi, episodes.query.x), episodes.query.y).mean()
    expected = torch.autograd.grad(objective, list(theta.values()))
    assert distance(list(outer_gradient(learner, episodes).values()), expected) < 1e-10


def test_adapting_without_the_proximal_term_is_gradient_descent():
    """test_lam = 0, as the authors test; training keeps lam."""
    episodes = oracles.curves()
    maml = create(("maml", "regression"))
    expected = maml.adapt(maml.theta(), episodes.support, steps=3)
    for solver in ("prox_gd", "official"):
        learner = create(("imaml", "regression"), test_lam=0.0, inner_solver=solver)
        assert_close(learner.adapt(learner.theta(), episodes.support, steps=3), expected)
        phi = learner.task_loss(learner.theta(), episodes).phi
        assert distance(list(phi.values()), list(expected[2].values())) > 1e-2


# ---- what may go wrong -------------------------------------------------------------------------------------------


class Saddle(IMAML):
    """Squared error of the first example minus that of the second: a Hessian of 2 diag(1, -z^2) for x = diag(1, z)."""

    def inner_loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        error = (prediction - y).square().squeeze(-1)
        return error[:, 0] - error[:, 1]


def test_indefinite_curvature_is_reported_and_does_not_explode():
    """Tasks with x = 0 in the second example are convex, and get their exact gradient; the others are flagged."""
    x = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    x[:, 1, 1] = torch.tensor([0.0, 5.0, 0.0])
    y = normal(3, 2, 1, seed=0)
    task = Episode(type(oracles.curves().support)(x, y), oracles.curves(3, inputs=2).query, {})
    learner = linear_form(Saddle, normal(2, seed=1), alpha=0.02, lam=1.0, inner_steps=2, cg_steps=5)
    step(learner, meta_batch(task))
    assert learner.aux["cg_indefinite"].tolist() == [0, 1, 0]
    assert learner.aux["cg_steps"][1] < 2 and 0 < learner.reports()["cg_indefinite"] < 1
    learner = linear_form(Saddle, normal(2, seed=1), alpha=0.02, lam=1.0, inner_steps=2, cg_steps=5)
    result = meta_gradient(learner, meta_batch(task))
    assert result.finite
    phi = learner.adapt(learner.theta(), task.support, steps=2)[-1]["head.weight"][:, 0]
    b = 2 * torch.einsum(
        "bni,bn->bi", task.query.x, torch.einsum("bni,bi->bn", task.query.x, phi) - task.query.y[..., 0]
    )
    b = b / task.query.x.shape[1]
    hessians = torch.stack([torch.diag(torch.stack([2 * one[0, 0] ** 2, -2 * one[1, 1] ** 2])) for one in x])
    expected = torch.stack(
        [plain_conjugate_gradient(EYE[:2, :2] + h, v, steps=5)[0] for h, v in zip(hessians, b, strict=True)]
    )
    assert_close(result.grads[0][0], expected.mean(0))


def test_divergence_says_which_step_would_not():
    learner, episodes = create(("imaml", "regression"), alpha=1e3, inner_steps=200), oracles.curves()
    with pytest.raises(
        Diverged, match=r"algorithm.alpha = 1000.0.*alpha < 2 / \(lambda_max \+ lam\), which is at most 1:"
    ):
        step(learner, meta_batch(episodes))


def test_a_step_beyond_the_proximal_term_alone_is_refused():
    """Before anything is run: curvature that is not negative only makes it worse."""
    for name in ("lam", "test_lam"):
        with pytest.raises(BadInput, match=f"algorithm.alpha=1.0: must be < 2 / algorithm.{name} = 0.5"):
            expand(["algorithm=imaml", "algorithm.alpha=1.0", "algorithm.lam=1.0", f"algorithm.{name}=4.0"])


def test_the_proximal_weight_is_positive():
    with pytest.raises(ValueError, match="algorithm.lam = 0.0: must be > 0"):
        create(("imaml", "regression"), lam=0.0)


# ---- memory ------------------------------------------------------------------------------------------------------


def peak(cls: Any, steps: int, **arguments: Any) -> int:
    learner = build(cls, oracles.mlp(hidden=[16, 16]), "regression", alpha=0.01, inner_steps=steps, **arguments)
    with Peak() as mode:
        meta_gradient(learner, meta_batch(oracles.curves(2)))
    return mode.bytes


def test_memory_does_not_grow_with_the_inner_steps():
    """MAML's does: the measure sees it."""
    assert peak(IMAML, 64, lam=1.0) == peak(IMAML, 2, lam=1.0)
    assert peak(MAML, 16) > 3 * peak(MAML, 2)
