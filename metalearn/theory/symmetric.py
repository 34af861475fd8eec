"""Pseudo-inverses of positive semi-definite matrices, and from where on an eigenvalue is taken for zero."""

from __future__ import annotations

import torch
from torch import Tensor

SINGULAR = 1e-12
"""Eigenvalues below this share of the largest are zero: a few thousand times what rounding leaves of a zero."""


def largest(matrix: Tensor) -> Tensor:
    """The largest eigenvalue, `[...]`, of each matrix `[..., n, n]`."""
    return torch.linalg.eigvalsh(matrix)[..., -1]


def inverse(matrix: Tensor, scale: Tensor | None = None, share: float = SINGULAR) -> Tensor:
    """Moore-Penrose inverses of symmetric matrices `[..., n, n]`, positive semi-definite but for rounding.

    Args:
        matrix: those.
        scale: `[...]`, in the place of the largest eigenvalue where it is larger: the size of the terms of a sum
            whose rounding errors may be all that is left of it.
        share: eigenvalues below this share of that are zero.
    """
    values, vectors = torch.linalg.eigh(matrix)
    top = values[..., -1] if scale is None else torch.maximum(values[..., -1], scale)
    kept = values.abs() > share * top[..., None]
    reciprocal = torch.where(kept, values, torch.inf).reciprocal()
    return (vectors * reciprocal[..., None, :]) @ vectors.mT
