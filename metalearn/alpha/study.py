"""Everything that `metalearn alpha` says of a cell, as plain data."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metalearn.algorithms.maml import MAML
from metalearn.alpha import estimate
from metalearn.alpha.command import POINTS, SPAN, STABILITY_TASKS
from metalearn.alpha.stacked import stacked
from metalearn.cells import Cell
from metalearn.ledger import given_checkpoint
from metalearn.prerequisites import state_of, take
from metalearn.record import git_state, versions
from metalearn.run import build, build_data, build_learner, set_precision
from metalearn.schema import BadInput


def study(
    cell: Cell,
    *,
    tasks: int | None = None,
    probes: int | None = None,
    alphas: Sequence[float] | None = None,
    start: Path | None = None,
) -> dict[str, Any]:
    """The content of alpha.json; numbers that are not finite are None.

    Args:
        cell: the run; what its `algorithm.alpha` is plays no part.
        tasks: how many; None for `estimate.TASKS`.
        probes: see `estimate.star`.
        alphas: of the curve, ascending; None for some around the estimate.
        start: a checkpoint, or the folder of a finished run, with the parameters to ask at; None for the initial ones.

    Raises:
        BadInput: if nothing can be estimated there.
    """
    config = copy.deepcopy(cell.config)
    config["algorithm"]["alpha"] = "auto"
    set_precision(config["trainer"]["precision"])
    dataset = build("dataset", config["dataset"])
    learner, data = build_learner(config, dataset), build_data(config, dataset)
    assert isinstance(learner, MAML)
    if start is not None:
        _start_from(learner, start)
    batch = estimate.tasks_of(learner, data, tasks or estimate.TASKS)
    try:
        split = estimate.star(learner, batch, probes=probes)
        same = estimate.star(learner, batch, same=True, probes=probes)
        together = stacked(learner, batch)
    except ValueError as error:
        raise BadInput(f"alpha: {error}") from None
    value = split.estimate.value
    grid = alphas or estimate.ladder(value / SPAN, value * SPAN, POINTS)
    curve = estimate.curve(learner, batch, grid)
    _refuse(curve, value)
    trainer, (commit, dirty) = config["trainer"], git_state()
    heuristic = estimate.heuristic(learner, batch, max(1, trainer["max_steps"]) * trainer["meta_batch_size"])
    stability = estimate.stability(learner, estimate.first(batch, STABILITY_TASKS))
    return {
        "about": {
            **{group: config[group]["name"] for group in ("algorithm", "dataset", "backbone")},
            "seed": config["seed"],
            "start": None if start is None else str(start),
            "moving": sum(p.numel() for k, p in learner.net.named_parameters() if learner.moves(k)),
            "support": batch.episodes.support.y.shape[1],
            "query": batch.episodes.query.y.shape[1],
            "inner_steps": learner.descents,
            "test_steps": learner.test_steps,
            "inner_loss_reduction": learner.inner_loss_reduction,
            "loss": "mse" if learner.kind == "regression" else "cross-entropy",
            "bn": "batch" if learner.net.has_norm else "none",
        },
        "cell_id": cell.cell_id,
        "overrides": list(cell.overrides),
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": versions(config["dataset"]),
        "alpha_star": split.numbers(),
        "alpha_star_same_set": same.numbers(),
        "stacked": None if together is None else together.numbers(),
        "heuristic": None if heuristic is None else heuristic._asdict(),
        "stability": {k: v if math.isfinite(v) else None for k, v in stability._asdict().items()},
        "curve": curve._asdict(),
        "sweep": estimate.sweep(value, curve.best),
    }


def _start_from(learner: MAML, start: Path) -> None:
    """Take a trained network's parameters in place of the initial ones, whatever algorithm trained them.

    Raises:
        BadInput: if there are none, or they are another network's.
    """
    try:
        state = state_of(given_checkpoint(start))
    except ValueError as error:
        raise BadInput(f"alpha: --start={start}: {error}") from None
    own = {name: p for name, p in learner.named_parameters() if name.startswith("net.")}
    take(own, state, f"alpha: --start={start}: ")


def _refuse(curve: estimate.Curve, star: float) -> None:
    """Say that a curve shows nothing, if so."""
    if not math.isfinite(curve.start):
        raise BadInput("alpha: the query loss without a step is not finite; check the targets of the data")
    if all(loss is None for loss in curve.losses):
        ends = f"{curve.alphas[0]:g} .. {curve.alphas[-1]:g}"
        raise BadInput(
            f"alpha: --alphas={ends}: the query loss after one step is finite at none of them; alpha* is {star:.3g}"
        )
