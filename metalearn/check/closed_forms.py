"""Outer gradients by formula: loops over tasks and steps, and plain automatic differentiation of single losses.

Nothing of the engine's inner loops, adjoints and chunks is used; the networks' forward passes are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.algorithms import MAML, Reptile
from metalearn.episode import Examples, MetaBatch, Params
from metalearn.learner import MetaLearner
from metalearn.regularizers import Regularizer


class Form(NamedTuple):
    """A formula, and the function that evaluates it for a learner of the class that it belongs to."""

    name: str
    gradient: Callable[[MetaLearner, MetaBatch], list[Tensor]]


def closed_form(learner: MetaLearner) -> Form | None:
    """The formula for exactly this class (a subclass may compute something else); None if none is known.

    The formulas are those of means over tasks without a regularizer, MAML's without `inner_clip` and on no
    minibatches, Reptile's that of plain steps on the whole pool.
    """
    plain = learner.combine is None and not learner.couples_tasks and type(learner.regularizer) is Regularizer
    if isinstance(learner, MAML):
        plain = plain and learner.inner_clip is None and learner.variant == "query"
    if isinstance(learner, Reptile):
        plain = plain and learner.inner_optimizer == "sgd" and learner.inner_batch is None
    return FORMS.get(type(learner)) if plain else None


def _maml(learner: MetaLearner, batch: MetaBatch) -> list[Tensor]:
    """Mean over tasks of prod_j (I - alpha H_j) grad L_Q(phi_k), for the moving parameters (Finn et al. 2017, eq. 1).

    A frozen parameter psi gets d L_Q / d psi - alpha sum_j (d^2 L_S / d psi d phi_j) v_{j+1}, with v_j the partial
    products. First order: grad L_Q(phi_k), and d L_Q / d psi.
    """
    assert isinstance(learner, MAML)
    theta = {k: p.detach() for k, p in learner.net.named_parameters()}
    moving = [k for k in theta if learner.moves(k)]
    total = {k: torch.zeros_like(p) for k, p in theta.items()}
    for i in range(batch.total):
        task, points = batch.episodes.select(slice(i, i + 1)), [theta]
        for _ in range(learner.inner_steps):
            grads = _gradients(learner, points[-1], task.support, moving, inner=True)[0]
            points.append(
                points[-1] | {k: points[-1][k] - learner.alpha * g for k, g in zip(moving, grads, strict=True)}
            )
        v = dict(zip(theta, _gradients(learner, points.pop(), task.query, list(theta))[0], strict=True))
        while points and not learner.first_order:
            grads, at = _gradients(learner, points.pop(), task.support, moving, inner=True, graph=True)
            dot = sum(((g * v[k]).sum() for k, g in zip(moving, grads, strict=True)), torch.zeros(()))
            curved = torch.autograd.grad(dot, list(at.values()), materialize_grads=True)
            v = {k: v[k] - learner.alpha * c for k, c in zip(at, curved, strict=True)}
        total = {k: t + v[k] / batch.total for k, t in total.items()}
    return list(total.values())


def _reptile(learner: MetaLearner, batch: MetaBatch) -> list[Tensor]:
    """Mean over tasks of theta - U(theta) (Nichol et al. 2018, section 3), U being plain steps on the whole pool."""
    assert isinstance(learner, Reptile)
    theta = {k: p.detach() for k, p in learner.net.named_parameters()}
    names, total = [k for k in theta if learner.net.adapts(k)], {k: torch.zeros_like(p) for k, p in theta.items()}
    for i in range(batch.total):
        task, phi = batch.episodes.select(slice(i, i + 1)), theta
        pool = Examples(*(torch.cat(parts, 1) for parts in zip(task.support, task.query, strict=True)))
        for _ in range(learner.inner_steps):
            grads = _gradients(learner, phi, pool, names, inner=True)[0]
            phi = phi | {k: phi[k] - learner.alpha * g for k, g in zip(names, grads, strict=True)}
        total = {k: t + (theta[k] - phi[k]) / batch.total for k, t in total.items()}
    return list(total.values())


def _gradients(
    learner: MetaLearner, at: Params, task: Examples, names: list[str], *, inner: bool = False, graph: bool = False
) -> tuple[tuple[Tensor, ...], Params]:
    """Gradient of one task's loss in the parameters `names`, and the leaves that it was taken at."""
    leaves = {k: p.detach().requires_grad_() for k, p in at.items()}
    with torch.enable_grad():
        prediction = learner.run_net(leaves, task.x, when="inner" if inner else "query")
        value = learner.inner_loss(prediction, task.y) if inner else learner.loss(prediction, task.y)
        wanted = [leaves[k] for k in names]
        return torch.autograd.grad(value.sum(), wanted, create_graph=graph, materialize_grads=True), leaves


FORMS: dict[type[MetaLearner], Form] = {
    MAML: Form("product of I - alpha H_j", _maml),
    Reptile: Form("theta minus plain steps", _reptile),
}
"""By class; a learner may add its own."""
