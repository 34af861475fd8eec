"""The outer gradient of a meta-batch: chunked over tasks, with no more than one chunk's graph alive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn import parallel
from metalearn.bn import task_mean
from metalearn.episode import Episode, MetaBatch, Params, TaskOutput, Theta
from metalearn.ops import Statistics
from metalearn.ops.norm import Moments
from metalearn.random import TaskKey

if TYPE_CHECKING:
    from metalearn.learner import MetaLearner


Differentiated = tuple[list[Tensor], TaskOutput, Tensor]


class MetaGradient(NamedTuple):
    """What one outer update needs.

    grads: gradient of the objective in every meta-parameter, in their order, over all ranks. loss: `[b]` of this
    rank's tasks. finite: whether losses and gradients are, on all ranks. seen: batch-norm statistics, and state: new
    learner state, both averaged over the tasks. aux: reports of this rank's tasks, `[b]` each; `weight` is that of an
    outer rule.
    """

    grads: list[Tensor]
    loss: Tensor
    finite: bool
    seen: Statistics
    state: dict[str, Any]
    aux: dict[str, Tensor]


def meta_gradient(learner: MetaLearner, batch: MetaBatch) -> MetaGradient:
    """The gradient of `learner.outer` (plus the regularizer's penalty) over the tasks of all ranks."""
    regularizer = learner.regularizer
    episodes = regularizer.episodes(batch.episodes, batch.key)
    grads, out, finite = (learner.compiler or differentiate)(learner, episodes, batch)
    if learner.combine is not None and learner.combine.drop:
        kept = out.aux["weight"] != 0  # what a dropped task has seen is not finite either
        selected = pytree.tree_map(lambda t: t[kept] if isinstance(t, Tensor) else t, (out.seen, out.state))
        out = out._replace(seen=selected[0], state=selected[1])
    seen = task_mean(out.seen)
    state = {k: v.mean(0) for k, v in out.state.items()}
    if _ranks() > 1:
        # dense, in the parameters' layout: ranks add memory, not entries
        grads = [torch.empty_like(p).copy_(g) for p, g in zip(learner.parameters(), grads, strict=True)]
        seen, state = _all_reduce(grads, seen, state, out.loss.shape[0] / batch.total)
        finite = finite.to(torch.int32)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return MetaGradient(grads, out.loss, bool(finite), seen, state, out.aux)


def differentiate(learner: MetaLearner, episodes: Episode, batch: MetaBatch) -> Differentiated:
    """The gradient over this rank's tasks, their outputs, and whether losses and gradients are finite."""
    grads, out = (_coupled if learner.couples_tasks else _separable)(learner, episodes, batch)
    counted = out.loss
    if learner.combine is not None and learner.combine.drop:  # a task of weight zero takes no part
        without = out.aux["weight"] == 0
        counted = torch.where(without & ~without.all(), 0.0, out.loss)
    largest = torch.stack(torch._foreach_norm([*grads, counted], float("inf")))  # NaN and infinity come through
    return grads, out, largest.isfinite().all()


def objective(learner: MetaLearner, batch: MetaBatch) -> Callable[[], float]:
    """A function that evaluates the outer objective at the learner's present parameters, for the meta-batch.

    The weights of an outer rule (`learner.combine`) are constants of the objective; they are those of now.
    """
    weights = meta_gradient(learner, batch).aux.get("weight")
    episodes = learner.regularizer.episodes(batch.episodes, batch.key)

    def value() -> float:
        with torch.no_grad():
            theta = learner.theta()
            out = learner.task_loss(theta, episodes, batch.key)
            if weights is not None:
                return float(weights @ out.loss)
            return float(_objective(learner, theta, episodes, out))

    return value


def bad_tasks(loss: Tensor, batch: MetaBatch) -> list[int]:
    """Indices of the tasks whose loss is not finite, on all ranks (each of which has to ask)."""
    bad = (~loss.isfinite()).to(batch.key.task.device)
    found = [batch.key.task[bad].tolist()]
    if (ranks := _ranks()) > 1:
        mine, found = found[0], [[]] * ranks
        dist.all_gather_object(found, mine)
    return sorted(task for part in found for task in part)


def _separable(learner: MetaLearner, episodes: Episode, batch: MetaBatch) -> tuple[list[Tensor], TaskOutput]:
    """Each chunk's graph is built, differentiated and freed by itself: the objective is a mean over tasks."""

    def work(chunk: slice) -> tuple[list[Tensor], TaskOutput]:
        part, theta = episodes.select(chunk), _leaves(learner)
        out = learner.task_loss(theta, part, batch.key.select(chunk))
        objective = learner.outer(theta, part, out) * (part.tasks / batch.total)
        return _grad([objective], theta), _detached(out._replace(prediction=None, phi={}))

    if learner.combine is not None or learner.regularizer.overrides("task_gradients"):
        return _rewritten(learner, episodes, batch)
    pieces = parallel.over(work, learner.chunks(episodes), episodes.support.x.device)
    first, out = next(pieces)
    total, outputs = [g.clone() for g in first], [out]  # they may share memory, or be expanded
    for more, out in pieces:
        torch._foreach_add_(total, more)
        outputs.append(out)
    return total, _join(outputs)


def _rewritten(learner: MetaLearner, episodes: Episode, batch: MetaBatch) -> tuple[list[Tensor], TaskOutput]:
    """The tasks' outer gradients one by one, through the regularizer's hook, weighted by the learner's outer rule."""
    combine = learner.combine
    if combine is not None and batch.total != episodes.tasks:
        raise ValueError("algorithm.outer weighs all tasks of a meta-batch against each other; set trainer.devices=1")
    chunks = learner.chunks(episodes)
    if not learner.stacks:
        chunks = [slice(i, i + 1) for i in range(episodes.tasks)]

    def work(chunk: slice) -> tuple[list[Tensor], TaskOutput]:
        part = episodes.select(chunk)
        theta = _leaves(learner, part.tasks if learner.stacks else None)
        out = learner.task_loss(theta, part, batch.key.select(chunk))
        grads = _grad([out.loss.sum()], theta)
        phi = out.phi if combine is not None and combine.needs_phi else {}
        return grads if learner.stacks else [g[None] for g in grads], _detached(out._replace(prediction=None, phi=phi))

    grads, outs = zip(*parallel.over(work, chunks, episodes.support.x.device), strict=True)
    names = [(group, name) for group, params in learner.theta().items() for name in params]
    stacked = {f"{g}.{n}": torch.cat([part[i] for part in grads]) for i, (g, n) in enumerate(names)}
    if learner.regularizer.overrides("task_gradients"):
        stacked = learner.regularizer.task_gradients(stacked)
    out = _join(list(outs))
    if combine is None:
        return [g.sum(0) / batch.total for g in stacked.values()], out
    with torch.no_grad():  # weights are constants of the outer step
        weights = combine.weights(stacked, learner.theta(), out)
    # a task without weight takes no part, whatever its gradient is
    total = [torch.einsum("b,b...->...", weights, _where(weights != 0, g)) for g in stacked.values()]
    return total, out._replace(phi={}, aux=out.aux | {"weight": weights})


def _where(kept: Tensor, g: Tensor) -> Tensor:
    return torch.where(kept.view(-1, *[1] * (g.dim() - 1)), g, 0.0)


def _coupled(learner: MetaLearner, episodes: Episode, batch: MetaBatch) -> tuple[list[Tensor], TaskOutput]:
    """The objective needs all tasks' outputs: compute them, differentiate it in them, then pull back by chunk."""
    if batch.total != episodes.tasks:
        raise ValueError("this objective couples the tasks of a meta-batch; set trainer.devices=1")
    chunks = learner.chunks(episodes)
    if len(chunks) == 1:
        theta = _leaves(learner)
        out = learner.task_loss(theta, episodes, batch.key)
        return _grad([_objective(learner, theta, episodes, out)], theta), _detached(out)

    def forward(chunk: slice) -> TaskOutput:
        with torch.no_grad():
            return _detached(learner.task_loss(_leaves(learner), episodes.select(chunk), batch.key.select(chunk)))

    device = episodes.support.x.device
    out = _join(list(parallel.over(forward, chunks, device)))
    ports, structure = pytree.tree_flatten((out.loss, out.prediction, out.phi))
    ports = [p.detach().requires_grad_() if isinstance(p, Tensor) else p for p in ports]
    loss, prediction, phi = pytree.tree_unflatten(ports, structure)
    theta = _leaves(learner)
    objective = _objective(learner, theta, episodes, out._replace(loss=loss, prediction=prediction, phi=phi))
    live = [p for p in ports if isinstance(p, Tensor)]
    flat = [p for params in theta.values() for p in params.values()]
    both = torch.autograd.grad(objective, live + flat, materialize_grads=True)
    pulled, total = both[: len(live)], [g.clone() for g in both[len(live) :]]  # they may share memory, or be expanded

    def pull(chunk: slice) -> tuple[list[Tensor], TaskOutput]:
        theta = _leaves(learner)
        part = learner.task_loss(theta, episodes.select(chunk), batch.key.select(chunk))
        outputs = [p for p in pytree.tree_leaves((part.loss, part.prediction, part.phi)) if isinstance(p, Tensor)]
        grads = _grad(outputs, theta, [g[chunk] for g in pulled])
        return grads, _detached(part._replace(prediction=None, phi={}))

    parts = []
    for more, part in parallel.over(pull, chunks, device):
        torch._foreach_add_(total, more)
        parts.append(part)
    return total, out._replace(aux=_join(parts).aux)  # with what was reported while differentiating


def _objective(learner: MetaLearner, theta: Theta, episodes: Episode, out: TaskOutput) -> Tensor:
    penalty = learner.regularizer.penalty(learner, theta, episodes, out)
    value = learner.outer(theta, episodes, out)
    return value if penalty is None else value + penalty


def _leaves(learner: MetaLearner, tasks: int | None = None) -> Theta:
    """Fresh leaves of theta that record gradients; with `tasks`, one copy per task."""

    def leaf(p: Tensor) -> Tensor:
        p = p.detach()
        return (p if tasks is None else p.expand(tasks, *p.shape)).requires_grad_()

    return {group: {k: leaf(p) for k, p in params.items()} for group, params in learner.theta().items()}


def _grad(outputs: Sequence[Tensor], theta: Theta, weights: Sequence[Tensor] | None = None) -> list[Tensor]:
    leaves = [p for params in theta.values() for p in params.values()]
    live = [i for i, o in enumerate(outputs) if o.requires_grad]
    cotangents = None if weights is None else [weights[i] for i in live]
    return list(torch.autograd.grad([outputs[i] for i in live], leaves, cotangents, materialize_grads=True))


def _detached(out: TaskOutput) -> TaskOutput:
    return TaskOutput(*pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tuple(out)))


def _join(parts: list[TaskOutput]) -> TaskOutput:
    """One output from those of the chunks."""
    if len(parts) == 1:
        return parts[0]

    def cat(*leaves: Any) -> Any:
        return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]

    return TaskOutput(*pytree.tree_map(cat, tuple(parts[0]), *(tuple(p) for p in parts[1:])))


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of one number a task over the tasks of all ranks, each of which has some; NaN are left out."""
    both = torch.stack([values.nansum(), (~values.isnan()).sum()])
    if _ranks() > 1:
        dist.all_reduce(both)
    return both[0] / both[1]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(grads: list[Tensor], seen: Statistics, state: dict[str, Any], share: float) -> Any:
    """Sum gradients over ranks, in place; statistics and state become means over all ranks' tasks."""
    names = sorted(state)
    means = [t * share for m in seen.values() for t in (m.mean, m.var)] + [state[k] * share for k in names]
    for tensor in (*grads, *means):
        dist.all_reduce(tensor)
    moments = iter(means)
    seen = {k: Moments(next(moments), next(moments), m.size) for k, m in seen.items()}
    return seen, {k: next(moments) for k in names}


__all__ = ["MetaGradient", "Params", "TaskKey", "bad_tasks", "mean_over_ranks", "meta_gradient"]
