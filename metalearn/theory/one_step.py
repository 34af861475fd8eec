"""MAML with one inner step on linear models, in sample space: any labels, features never but as kernels.

Task i has rows R_i `[K, r]` of a linear model z, K x K kernels k_i, labels y_i and the loss |R_i z - y_i|^2 / K (no
1/2). One inner step of rate alpha leaves the residuals M_i (R_i z - y_i), M_i = I - 2 alpha k_i / K, so that
the best start minimises

    sum_i |M_i (R_i z - y_i)|^2                                                            (eq. 3.1, with any labels)

Where the model is w and its features Phi_i, R_i = Phi_i and k_i = Phi_i Phi_i^T. With more features than samples, w is
restricted to the leading directions of all samples' features: see `Directions`. `kernel_meta.coefficients` is the same
without a restriction, one inverse of n x n numbers for each rate; here a grid of rates costs one eigendecomposition.

Shape letters: `A` rates, `N` tasks, `K` samples, `r` directions. Everything is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.theory.symmetric import inverse


class Directions(NamedTuple):
    """Leading eigenvectors of the kernel Psi Psi^T of all samples: `vectors` `[n, r]`, `values` `[r]`, descending.

    A model w = Psi^T U S^-1 z predicts U z on the samples, so that a task's rows are those of U. Of all w with these
    predictions it is the shortest.
    """

    vectors: Tensor
    values: Tensor

    @classmethod
    def of(cls, kernel: Tensor) -> Directions:
        """All of a kernel `[n, n]`."""
        values, vectors = torch.linalg.eigh(kernel)
        return cls(vectors.flip(-1), values.flip(-1))

    def cut(self, cutoff: float) -> Directions:
        """Those whose eigenvalue is more than `cutoff` times the largest."""
        kept = int((self.values > cutoff * self.values[0]).sum())
        return Directions(self.vectors[:, :kept], self.values[:kept])

    def coefficients(self, z: Tensor) -> Tensor:
        """c with w = Psi^T c, `[..., n]`, for z `[..., r]`."""
        return (z / self.values) @ self.vectors.mT


class OneStep(NamedTuple):
    """The meta-problem as a polynomial in alpha: sums over tasks of R^T (k / K)^p R and R^T (k / K)^p y, p = 0, 1, 2.

    matrices: `[3, r, r]`; vectors: `[3, r]`.
    """

    matrices: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, rows: Tensor, kernels: Tensor, labels: Tensor) -> OneStep:
        """Of tasks with rows `[N, K, r]`, kernels `[N, K, K]` and labels `[N, K]`."""
        k, flat = kernels / kernels.shape[-1], rows.flatten(0, 1)
        moved, targets = rows, labels.unsqueeze(-1)
        matrices, vectors = [], []
        for _ in range(3):
            matrices.append(flat.mT @ moved.flatten(0, 1))
            vectors.append((flat.mT @ targets.flatten(0, 1))[:, 0])
            moved, targets = k @ moved, k @ targets
        return cls(torch.stack(matrices), torch.stack(vectors))

    def minimisers(self, alphas: Tensor) -> Tensor:
        """z(alpha) `[A, r]`, the shortest where it is not unique; alpha = 0 is joint training."""
        found = []
        for alpha in alphas.tolist():
            weights = self.matrices.new_tensor([1.0, -4 * alpha, 4 * alpha * alpha])
            matrix = torch.einsum("p,pij->ij", weights, self.matrices)
            found.append(_solved((matrix + matrix.mT) / 2, weights @ self.vectors))
        return torch.stack(found)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The shortest solution of a symmetric system; by Cholesky where it is far from singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if not failed and float((diagonal.min() / diagonal.max()) ** 2) > 1e-9:
        return torch.cholesky_solve(right[:, None], factor)[:, 0]
    return inverse(matrix) @ right
