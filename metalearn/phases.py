"""Work that precedes the first meta-step of a run, in pieces that a killed run does not repeat."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from metalearn.ledger import CellDir, Checkpoints

Piece = dict[str, Any]
"""Tensors, numbers and texts by name: what `torch.load` takes back without running code."""


class Phase(NamedTuple):
    """One stage of that work.

    name: of its files and in the heartbeat. pieces: how many there are. make: piece i, from its index and the pieces of
    the phase before (none before the first); a pure function, so that a piece made again has the same bits.
    """

    name: str
    pieces: int
    make: Callable[[int, Iterator[Piece]], Piece]


def products(phases: Sequence[Phase], cell: CellDir) -> Iterator[Piece]:
    """The pieces of the last phase, in order; what is not on disk yet is made and kept under `<cell>/phases/`.

    Of the phases before, only what missing pieces are made from is asked for.
    """
    _complete(phases, cell)
    return _stored(phases, cell)


def _complete(phases: Sequence[Phase], cell: CellDir) -> None:
    """Make the missing pieces of the last phase."""
    if not phases:
        return
    *before, phase = phases
    files = Checkpoints(cell.path / "phases")
    missing = [i for i in range(phase.pieces) if files.load(f"{phase.name}-{i}") is None]
    if missing:
        _complete(before, cell)
    for i in missing:
        cell.beat(force=i == missing[0], phase=f"{phase.name} {i + 1}/{phase.pieces}")
        piece = phase.make(i, _stored(before, cell))
        files.save(f"{phase.name}-{i}", 0, lambda file, piece=piece: torch.save(piece, file))  # type: ignore[misc]


def _stored(phases: Sequence[Phase], cell: CellDir) -> Iterator[Piece]:
    """The pieces of the last phase, all of which are on disk."""
    for phase in phases[-1:]:
        for i in range(phase.pieces):
            found = Checkpoints(cell.path / "phases").load(f"{phase.name}-{i}")
            assert found is not None
            yield torch.load(io.BytesIO(found[1]), weights_only=True, map_location="cpu")


def forget(phases: Sequence[Phase], cell: CellDir) -> None:
    """Drop the pieces of all phases but the last: they may be large, and what follows from them is in a checkpoint."""
    for phase in phases[:-1]:
        for path in (cell.path / "phases").glob(f"{phase.name}-*"):
            path.unlink()
