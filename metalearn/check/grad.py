"""The outer gradient of one cell against central differences, closed forms and slower ways to the same thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from metalearn.cells import Cell
from metalearn.check.closed_forms import closed_form
from metalearn.data import Episodes
from metalearn.episode import MetaBatch
from metalearn.learner import MetaLearner
from metalearn.meta_gradient import meta_gradient, objective
from metalearn.random import Key
from metalearn.record import git_state, versions
from metalearn.run import DTYPES, build, build_data, build_learner

STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
"""Of central differences, relative to the norm of the parameters. A kink of ReLU or max-pooling between the two points
spoils a difference, and the smaller the step, the rarer that is; rounding spoils the smallest. The best one counts: a
wrong gradient is far from all of them."""
SLOPE, SAME, FIRST, SINGLE = 1e-5, 1e-9, 1e-6, 2e-2


@dataclass
class Check:
    """One comparison: `passed` is None where it does not apply, and `why` says the reason."""

    name: str
    value: float | None
    bound: float | None
    relation: str
    passed: bool | None
    why: str = ""


def check(cell: Cell, *, tasks: int = 2, directions: int = 3) -> dict[str, Any]:
    """The certificate of a cell: what was compared, how, and how far apart it was.

    Args:
        cell: the run.
        tasks: of the meta-batch that everything is computed on, the run's own first training tasks.
        directions: random ones for central differences, for each group of meta-parameters (the network, rates, ...).
    """
    dataset = build("dataset", cell.config["dataset"])
    learner, batch = _double(cell, dataset, tasks)
    learner.observe(batch)
    found = meta_gradient(learner, batch)
    if not found.finite:
        raise FloatingPointError("the outer gradient is not finite at the initial parameters")
    checks = [
        *_slopes(learner, batch, found.grads, directions),
        _closed(learner, batch, found.grads),
        _first_order(learner, batch, found.grads),
        _alone(learner, batch, found.grads),
        _run_precision(cell, dataset, batch, found.grads),
    ]
    commit, dirty = git_state()
    names = {group: cell.config[group]["name"] for group in ("algorithm", "dataset", "backbone")}
    return {
        "about": {**names, "tasks": tasks, "parameters": sum(p.numel() for p in learner.parameters())},
        "cell_id": cell.cell_id,
        "train_id": cell.train_id,
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": versions(cell.config["dataset"]),
        "checks": [asdict(c) for c in checks],
        "passed": all(c.passed is not False for c in checks),
    }


def _double(cell: Cell, dataset: Any, tasks: int) -> tuple[MetaLearner, MetaBatch]:
    """The run's learner at its initial parameters and its first training tasks, in float64."""
    learner = build_learner(cell.config, dataset).double()
    learner.compiler = None
    data: Episodes = build_data(cell.config, dataset)
    data.meta_batch_size, data.dtype = tasks, torch.float64
    learner.settle(data)
    return learner, next(iter(data.training(0, 1)))


def _slopes(learner: MetaLearner, batch: MetaBatch, grads: list[Tensor], directions: int) -> list[Check]:
    """Central differences of the outer objective along random directions of each group of meta-parameters."""
    groups: dict[str, list[int]] = {}
    for i, (name, _) in enumerate(learner.named_parameters()):
        groups.setdefault(name.split(".", 1)[0], []).append(i)
    parameters, value = list(learner.parameters()), objective(learner, batch)
    exact, checks = learner.exact, []
    for group, members in groups.items():
        worst = 0.0
        for d in range(directions):
            generator = torch.Generator().manual_seed(Key(d, f"check/{group}").integer())
            v = [torch.randn(parameters[i].shape, generator=generator, dtype=torch.float64) for i in members]
            length = torch.stack([x.norm() for x in v]).norm()
            v = [x / length for x in v]
            # along the gradient as well: a random direction in a large space is nearly orthogonal to it
            norm = torch.stack([grads[i].norm() for i in members]).norm()
            if norm > 0:
                v = [x + grads[i] / norm for x, i in zip(v, members, strict=True)]
            expected = float(sum((grads[i] * x).sum() for i, x in zip(members, v, strict=True)))
            scale = max(1.0, float(torch.stack([parameters[i].detach().norm() for i in members]).norm()))
            found = [_difference(value, [parameters[i] for i in members], v, h * scale) for h in STEPS]
            error = min(abs(f - expected) for f in found) / max(abs(expected), 1e-12)
            worst = max(worst, error)
        if exact:
            checks.append(Check(f"central differences, {group}", worst, SLOPE, "<", worst < SLOPE))
        else:
            why = "not the slope of the objective, by design" if worst > SLOPE else "equal to the slope here"
            checks.append(Check(f"central differences, {group}", worst, None, "", None, why))
    return checks


def _difference(value: Callable[[], float], parameters: list[Any], v: list[Tensor], h: float) -> float:
    kept, ends = [p.detach().clone() for p in parameters], []
    with torch.no_grad():
        for sign in (1, -1):
            for p, k, x in zip(parameters, kept, v, strict=True):
                p.copy_(k + sign * h * x)
            ends.append(value())
        for p, k in zip(parameters, kept, strict=True):
            p.copy_(k)
    return (ends[0] - ends[1]) / (2 * h)


def _closed(learner: MetaLearner, batch: MetaBatch, grads: list[Tensor]) -> Check:
    """Against a formula that does not use the engine's inner loop; see `closed_forms`."""
    form = closed_form(learner)
    if form is None:
        return Check("closed form", None, None, "", None, f"none is known for {type(learner).__name__}")
    error = _apart(grads, form.gradient(learner, batch))
    return Check(f"closed form: {form.name}", error, SAME, "<", error < SAME)


def _first_order(learner: MetaLearner, batch: MetaBatch, grads: list[Tensor]) -> Check:
    """Second order differs from first order wherever there is curvature, and first order is what it says."""
    name = "first order differs from second order"
    if not hasattr(learner, "first_order"):
        return Check(name, None, None, "", None, "this algorithm has one form only")
    kept: Any = learner.first_order
    vars(learner)["first_order"] = not kept
    error = _apart(meta_gradient(learner, batch).grads, grads)
    vars(learner)["first_order"] = kept
    if getattr(learner, "descents", learner.inner_steps) == 0 or getattr(learner, "alpha", None) == 0:
        return Check(name, error, SAME, "<", error < SAME, "without adaptation they are equal")
    return Check(name, error, FIRST, ">", error > FIRST)


def _alone(learner: MetaLearner, batch: MetaBatch, grads: list[Tensor]) -> Check:
    """All tasks at once against one task after the other."""
    name = "batched is one task after the other"
    if learner.combine is not None or learner.couples_tasks:
        return Check(name, None, None, "", None, "the objective couples tasks")
    if batch.total == 1:
        return Check(name, None, None, "", None, "one task only")
    total = [torch.zeros_like(g) for g in grads]
    for i in range(batch.total):
        part = slice(i, i + 1)
        one = batch._replace(total=1, episodes=batch.episodes.select(part), key=batch.key.select(part))
        torch._foreach_add_(total, meta_gradient(learner, one).grads)
    error = _apart(grads, [g / batch.total for g in total])
    return Check(name, error, SAME, "<", error < SAME)


def _run_precision(cell: Cell, dataset: Any, batch: MetaBatch, grads: list[Tensor]) -> Check:
    """The gradient in the run's own precision; its error is noise that every meta-step has."""
    precision = cell.config["trainer"]["precision"]
    dtype = DTYPES[precision]
    learner = build_learner(cell.config, dataset)
    learner.compiler = None
    batch = batch._replace(episodes=batch.episodes.to(dtype))
    learner.settle(build_data(cell.config, dataset))
    learner.observe(batch)
    error = _apart([g.double() for g in meta_gradient(learner, batch).grads], grads)
    return Check(f"precision {precision}", error, SINGLE, "<", error < SINGLE)


def _apart(actual: list[Tensor], expected: list[Tensor]) -> float:
    """|actual - expected| / |expected|, both as one long vector."""
    a, b = (torch.cat([t.detach().flatten() for t in part]) for part in (actual, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-300))
