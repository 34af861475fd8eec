"""Tangent features of any network here: Jacobians of its outputs, and curvatures of support and query losses.

To first order around the parameters phi that an inner loop starts from, a network is linear: its features are the rows
of J = d f / d phi, the neural tangent features. With H the second derivative of a loss in the outputs f, J^T H J is the
loss's generalised Gauss-Newton curvature: A for the support loss as the inner loop descends it, B for the query loss.
One step of rate alpha leaves (I - alpha A)(w - a), and the best rate over tasks is

    alpha* = E tr(A B) / E tr(A B A)

which for the mean squared error (H = 2 / K) is eq. 3.3 of `alpha_star` on tangent features (B = A) and its Corollary 2
(B of other examples). For cross-entropy H = (diag(p) - p p^T) / K at the present parameters. `inner_loss_reduction`
scales A. With a square root H = R R^T both traces are those of matrices with as many rows as a set has outputs:

    M = R_s^T J_s J_s^T R_s,  X = R_q^T J_q J_s^T R_s,  tr(A B) = tr(X^T X),  tr(A B A) = tr(M X^T X)

All tasks of a stack are computed at once, and nothing is as large as the parameters squared. Batch norm normalises the
support set by itself and the query set by itself (mode `batch`), as in training. A parameter that a task's inner loop
moves by m alpha instead of alpha (MT-net's masks) has its features scaled by sqrt(m).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn.algorithms.maml import MAML, support_predictions, support_problem
from metalearn.episode import Episode, Params, Theta
from metalearn.functional import Product, along_tasks, hvp, task_dot
from metalearn.random import Key, TaskKey
from metalearn.theory.alpha_star import Terms

Outputs = Callable[[Params], Tensor]


class Jacobian:
    """J of outputs `[B, n, O]` in parameters phi, task by task, as products with vectors; reverse mode alone.

    J v is the derivative of u -> J^T u, which is linear: so every operator that second-order MAML can run serves.

    Args:
        outputs: phi to `[B, n, O]`.
        at: phi, leaves `[B, *shape]`.
        half: multiplies outputs by a square root R of a loss's second derivative, and by its transpose; see `HALVES`.
        size: reduction of that loss: H is this many times that of the mean loss.
        scale: leaves that broadcast against phi's; what the features of each parameter are multiplied by.
    """

    def __init__(self, outputs: Outputs, at: Params, half: Half, *, size: float = 1.0, scale: Params | None = None):
        self.at = {k: p.detach().requires_grad_() for k, p in at.items()}
        self.scale = scale
        with torch.enable_grad():
            value = outputs(self.at)
            self.u = torch.zeros_like(value, requires_grad=True)
            self.pulled = torch.autograd.grad(value, self.leaves, self.u, create_graph=True, materialize_grads=True)
        self.value, self.half, self.size = value, half, size

    @property
    def leaves(self) -> list[Tensor]:
        """Phi, in order."""
        return list(self.at.values())

    @property
    def rows(self) -> int:
        """Outputs of a task: n O."""
        return self.value[0].numel()

    def transposed(self, u: Tensor) -> Params:
        """J^T u, leaves `[B, *shape]`, for u `[B, n, O]`."""
        found = torch.autograd.grad(self.value, self.leaves, u, retain_graph=True, materialize_grads=True)
        return self._scaled(dict(zip(self.at, found, strict=True)))

    def times(self, v: Params) -> Tensor:
        """J v, `[B, n, O]`, for v with leaves `[B, *shape]`."""
        live = [(g, x) for g, x in zip(self.pulled, self._scaled(v).values(), strict=True) if g.requires_grad]
        if not live:
            return torch.zeros_like(self.value)
        outputs, weights = zip(*live, strict=True)
        (found,) = torch.autograd.grad(outputs, self.u, weights, retain_graph=True, materialize_grads=True)
        return found

    def root(self, u: Tensor) -> Params:
        """J^T R u."""
        return self.transposed(self.half.times(self.value.detach(), u) * self.size**0.5)

    def root_transposed(self, v: Params) -> Tensor:
        """R^T J v."""
        return self.half.transposed(self.value.detach(), self.times(v)) * self.size**0.5

    def curvature(self, v: Params) -> Params:
        """J^T H J v: the generalised Gauss-Newton curvature times v."""
        return self.root(self.root_transposed(v))

    def basis(self, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """The unit vectors of the outputs `[B, n, O]`, one row after the other."""
        for row in range(first, self.rows if last is None else last):
            u = torch.zeros_like(self.value).flatten(1)
            u[:, row] = 1.0
            yield u.view_as(self.value)

    def _scaled(self, v: Params) -> Params:
        return v if self.scale is None else {k: x * self.scale[k] for k, x in v.items()}


class Half(NamedTuple):
    """A square root R of the second derivative H = R R^T of a mean loss, as products with outputs `[B, n, O]`.

    Both take the predictions first.
    """

    times: Callable[[Tensor, Tensor], Tensor]
    transposed: Callable[[Tensor, Tensor], Tensor]


def _squared_error(value: Tensor, u: Tensor) -> Tensor:
    """R = sqrt(2 / (n O)): the mean squared error has no factor 1/2, and is a mean over outputs, too."""
    return u * (2 / value[0].numel()) ** 0.5


def _cross_entropy(value: Tensor, u: Tensor) -> Tensor:
    """R = (diag(sqrt p) - p sqrt(p)^T) / sqrt n."""
    p = value.softmax(-1)
    return (p.sqrt() * u - p * (p.sqrt() * u).sum(-1, keepdim=True)) * value.shape[1] ** -0.5


def _cross_entropy_transposed(value: Tensor, u: Tensor) -> Tensor:
    p = value.softmax(-1)
    return p.sqrt() * (u - (p * u).sum(-1, keepdim=True)) * value.shape[1] ** -0.5


HALVES = {
    "regression": Half(_squared_error, _squared_error),
    "classification": Half(_cross_entropy, _cross_entropy_transposed),
}
"""By the kind of task: mean squared error, or cross-entropy."""


# ---- of a learner ------------------------------------------------------------------------------------------------


class Tangent(NamedTuple):
    """A learner's predictions on the support and on the query sets of B tasks, where adaptation starts."""

    support: Jacobian
    query: Jacobian


def tangent(learner: MAML, theta: Theta, episodes: Episode, key: TaskKey | None = None) -> Tangent:
    """Both Jacobians of a stack of tasks, in the parameters that the inner loop moves.

    Args:
        learner: MAML or what is made of its inner loop; `learner.alpha` plays no part.
        theta: its meta-parameters, recording no gradients.
        episodes: B tasks; all at once, so the caller chunks them.
        key: of the tasks, for an algorithm that draws (MT-net).
    """
    with torch.no_grad():
        start = learner.origin(theta, episodes.support, key)
        scale = _root_of(learner.multipliers(theta, key))
        predict, moving, context = support_predictions(learner, start, episodes.support, learner.moves)
    own = {k: p for k, p in start.items() if k in learner.shapes and p.dim() > len(learner.shapes[k])}

    def on_query(phi: Params) -> Tensor:
        return learner.predict(theta, own | phi, episodes.query.x, support=episodes.support, bn="batch")

    half, size = HALVES[learner.kind], learner.inner_loss_scale(predict(moving, context))
    support = Jacobian(lambda phi: predict(phi, context), moving, half, size=size, scale=scale)
    return Tangent(support, Jacobian(on_query, moving, half, scale=scale))


def _root_of(multipliers: Params | None) -> Params | None:
    return None if multipliers is None else {k: m.detach().sqrt() for k, m in multipliers.items()}


def features(jacobian: Jacobian, *, limit: int | None = None) -> Iterator[Tensor]:
    """The rows of J, `[B, rows, P]` float64, in blocks of no more than `limit` bytes (at least one row); None for all.

    A row is an output of an example: all outputs of the first example, then of the second.
    """
    per_row = len(jacobian.value) * 8 * sum(p[0].numel() for p in jacobian.leaves)
    count = jacobian.rows if limit is None else max(1, limit // per_row)
    for first in range(0, jacobian.rows, count):
        last = min(jacobian.rows, first + count)
        yield torch.stack([_flat(jacobian.transposed(u)) for u in jacobian.basis(first, last)], 1)


def kernel(blocks: Sequence[Callable[[], Tensor]], *, held: int = 2**30) -> Tensor:
    """Psi Psi^T `[n, n]` float64 of rows Psi `[n, P]`, which come in blocks and need not fit into memory.

    Args:
        blocks: each makes some rows `[r, P]`, the same whenever it is called.
        held: bytes of rows that may be kept. If they would be more, at most two blocks are held, and each is made again
            for every block before it.
    """
    made = [blocks[0]().double()]
    if len(blocks) * made[0].numel() * 8 <= held:
        psi = torch.cat([*made, *(make().double() for make in blocks[1:])])
        return psi @ psi.mT
    strips = []
    for i, make in enumerate(blocks):
        own = made.pop() if made else make().double()
        strips.append([own @ other().double().mT for other in blocks[:i]] + [own @ own.mT])
    rows = [[strips[i][j] if j <= i else strips[j][i].mT for j in range(len(blocks))] for i in range(len(blocks))]
    return torch.cat([torch.cat(row, 1) for row in rows])


def last_layer(
    learner: MAML, theta: Theta, episodes: Episode, key: TaskKey | None = None, *, offset: bool = True
) -> tuple[Tensor, Tensor]:
    """What enters the head for the support and the query examples, `[B, n, d]` float64 each.

    Args:
        learner: whose network ends in a `head`.
        theta: its meta-parameters.
        episodes: B tasks.
        key: of the tasks.
        offset: append 1, the feature of the head's bias.
    """
    with torch.no_grad():
        site = learner.net.first_site(sorted(learner.net.parameters_of("head")))
        start = learner.origin(theta, episodes.support, key)
        found = [
            learner.run_net(start, part.x, when="inner", stop=site).flatten(2).double()
            for part in (episodes.support, episodes.query)
        ]
    if offset:
        found = [torch.cat([h, torch.ones_like(h[..., :1])], -1) for h in found]
    return found[0], found[1]


# ---- curvatures --------------------------------------------------------------------------------------------------


class Grams(NamedTuple):
    """M `[B, s, s]` and X `[B, q, s]` of the module's head, float64; s and q are rows of support and query set."""

    support: Tensor
    cross: Tensor

    def traces(self) -> Tensor:
        """tr(A B) and tr(A B A) of each task, `[B, 2]`."""
        inner = self.cross.mT @ self.cross
        return torch.stack([inner.diagonal(dim1=1, dim2=2).sum(1), (self.support * inner).sum((1, 2))], 1)


def grams(jacobian: Jacobian, query: Jacobian | None = None) -> Grams:
    """Exact Gram matrices of the curvatures; with no other query set X = M, of the support set itself.

    One vector of the parameters' size at a time: s products J_s^T u, J_s v and J_q v.
    """
    own, other = [], []
    for u in jacobian.basis():
        v = jacobian.root(u)
        own.append(jacobian.root_transposed(v).flatten(1).double())
        if query is not None:
            other.append(query.root_transposed(v).flatten(1).double())
    m = torch.stack(own, 2)
    m = (m + m.mT) / 2  # equal but for rounding
    return Grams(m, m if query is None else torch.stack(other, 2))


def probed(jacobian: Jacobian, query: Jacobian | None, probes: int, key: TaskKey) -> Tensor:
    """Unbiased estimates of tr(A B) and tr(A B A) of each task, `[B, 2]`, from random vectors instead of all rows.

    With z of independent signs (Hutchinson's probes) and w = J_q^T R_q z, the mean of w^T A w is tr(A B), and that of
    |A w|^2 is tr(A B A). Both come from the same w, so that their ratio varies by less than each of them. What
    the probes add to its error is in the spread over tasks, as each task has its own.

    Args:
        jacobian: of the support set.
        query: of the query set; the support set's again if None.
        probes: how many; each costs one product with J_q^T, J_s and J_s^T.
        key: of the tasks.
    """
    query = query or jacobian
    total = torch.zeros(len(query.value), 2, dtype=torch.float64, device=query.value.device)
    for i in range(probes):
        z = key.sub(f"probe/{i}").uniform(query.rows).to(query.value.device)
        w = query.root(torch.where(z < 0.5, -1.0, 1.0).to(query.value).view_as(query.value))
        half = jacobian.root_transposed(w)
        moved = jacobian.root(half)
        total[:, 0] += half.flatten(1).double().square().sum(1)
        total[:, 1] += task_dot(moved, moved).double()
    return total / probes


def curvature_terms(traces: Tensor) -> Terms:
    """alpha* = sum tr(A B) / sum tr(A B A) over tasks, from their traces `[T, 2]`: value, error and interval."""
    return Terms(traces.double(), lambda sums: sums[..., 0] / sums[..., 1])


# ---- stability ---------------------------------------------------------------------------------------------------


class Eigenvalue(NamedTuple):
    """The largest eigenvalue of each task's matrix and the residual |H v - lambda v|, `[B]`; products taken.

    The residual is relative to the eigenvalue, or where H was shifted to that of the shifted matrix.
    """

    value: Tensor
    residual: Tensor
    steps: int


def largest_eigenvalue(
    product: Product, like: Params, *, steps: int = 200, tolerance: float = 1e-2, seed: int = 0
) -> Eigenvalue:
    """The largest eigenvalue of symmetric matrices by power iteration, for each task by itself.

    Where the eigenvalue of largest size is negative, the matrix is shifted by it and the iteration repeated. The error
    of an eigenvalue is at most the residual |H v - lambda v|, and its square over the gap to the next one.

    Args:
        product: v -> H v, leaves `[B, *shape]`.
        like: parameters of the shapes of v.
        steps: products at most, in each of the two iterations.
        tolerance: relative residual at which a matrix is done.
        seed: of the first vector.
    """
    generator = torch.Generator().manual_seed(Key(seed, "power iteration").integer())

    def noise() -> Params:
        return {k: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for k, p in like.items()}

    v = noise()
    found, v = _power(product, v, task_dot(v, v) * 0, steps, tolerance)
    shift = found.value.clamp(max=0).abs() * 1.01  # a little more, so that no eigenvalue stays negative
    if not bool(shift.any()):
        return found
    v = {k: torch.where(along_tasks(shift, x) > 0, x, v[k]) for k, x in noise().items()}
    again, _ = _power(product, v, shift, steps, tolerance)
    return again._replace(steps=found.steps + again.steps)


def _power(product: Product, v: Params, shift: Tensor, steps: int, tolerance: float) -> tuple[Eigenvalue, Params]:
    """Power iteration on H + shift; the eigenvalue of H, and the last vector."""
    taken = 0
    while True:
        v = _normalised(v)
        curved = product(v)
        value, taken = task_dot(v, curved), taken + 1
        rest = {k: curved[k] - along_tasks(value, v[k]) * v[k] for k in v}
        residual = task_dot(rest, rest).sqrt() / (value + shift).abs().clamp(min=torch.finfo(value.dtype).tiny)
        if taken == steps or bool((residual <= tolerance).all()):
            return Eigenvalue(value.double(), residual.double(), taken), v
        v = {k: curved[k] + along_tasks(shift, v[k]) * v[k] for k in v}


def _normalised(v: Params) -> Params:
    length = task_dot(v, v).sqrt().clamp(min=torch.finfo(next(iter(v.values())).dtype).tiny)
    return {k: x / along_tasks(length, x) for k, x in v.items()}


def support_curvature(
    learner: MAML, theta: Theta, episodes: Episode, key: TaskKey | None = None, **options: Any
) -> Eigenvalue:
    """lambda_max of the Hessian of each task's support loss where adaptation starts; see `largest_eigenvalue`.

    Gradient steps on a quadratic with this curvature diverge from 2 / lambda_max on.
    """
    with torch.no_grad():
        start = learner.origin(theta, episodes.support, key)
        loss, moving, context = support_problem(learner, start, episodes.support, learner.moves)
    scale = _root_of(learner.multipliers(theta, key)) or {}
    curve = hvp(loss, moving, context)

    def scaled(v: Params) -> Params:
        hv = curve({k: x * scale[k] if k in scale else x for k, x in v.items()})
        return {k: x * scale[k] if k in scale else x for k, x in hv.items()}

    return largest_eigenvalue(scaled, moving, **options)


def _flat(v: Params) -> Tensor:
    return torch.cat([p.flatten(1) for p in v.values()], 1).double()
