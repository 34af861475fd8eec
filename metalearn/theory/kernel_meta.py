"""MAML on linear tasks with more features than samples (N K < d), through inner products alone.

Psi `[n, d]` are the features of all n = N K training samples, y `[n]` their labels (less the model's output at w = 0,
for a linearised network), and k = Psi Psi^T. After one inner step the residuals of task i are D_i (Psi_i w - y_i),
D_i = I - 2 alpha / K Psi_i Psi_i^T, so the meta-solution of least norm is w = Psi^T c with c = D (D k D)^+ D y.
If all D_i are invertible and the kernel is, it interpolates, c = k^-1 y, for every alpha: the rate then only matters at
test time. Nothing here is larger than the kernels.

Zou, Liu & Li, "Unraveling Model-Agnostic Meta-Learning via the Adaptation Learning Rate", ICLR 2022, section H.

Shape letters: `T` tasks, `K` support and `Q` query samples, `A` any axes of rates (none for a number).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from metalearn.theory.symmetric import inverse, largest


def coefficients(kernel: Tensor, labels: Tensor, alpha: float | Tensor, sizes: Sequence[int]) -> Tensor:
    """The c of w_m(alpha) = Psi^T c: predictions for other inputs are their kernel with the training samples times c.

    Args:
        kernel: Psi Psi^T, `[n, n]`.
        labels: y, `[n]`.
        alpha: rates; 0 for ERM.
        sizes: samples K of each task, in the order of the kernel.

    Returns:
        `[A, n]` float64.

    Raises:
        ValueError: if the sizes are not those of the kernel and the labels, or anything is not finite.
    """
    k, y = kernel.double(), labels.double()
    rates = torch.as_tensor(alpha, dtype=k.dtype, device=k.device)
    if k.shape != (sum(sizes), sum(sizes)) or y.shape != k.shape[:1]:
        shapes = f"a kernel of shape {list(k.shape)} and {len(y)} labels"
        raise ValueError(f"{shapes} are not those of {sum(sizes)} samples")
    if not bool(k.isfinite().all() and y.isfinite().all()):
        raise ValueError("the kernel or the labels are not finite")
    own, count = torch.zeros_like(k), torch.ones_like(y)
    for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        block = slice(end - size, end)
        own[block, block], count[block] = k[block, block], size
    unit = count.rsqrt()[:, None]
    found, unadapted = [], largest(unit * k * unit.mT)
    for rate in rates.flatten().unbind():  # one n x n inverse at a time
        d = unit * (torch.eye(len(k), dtype=k.dtype, device=k.device) - 2 * rate * own / count[:, None])
        found.append(d.mT @ (inverse(d @ k @ d.mT, unadapted) @ (d @ y)))
    return torch.stack(found).view(*rates.shape, len(y))


def adapted_residual(
    residual: Tensor,
    kernel: Tensor,
    alpha: float | Tensor,
    steps: int = 1,
    query: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Prediction less label at the query samples after gradient steps on the support samples: `[A, T, Q]`.

    A step of rate alpha on the mean squared error takes 2 alpha / K k r from the residuals r.

    Args:
        residual: at the support samples before adaptation, `[T, K]`.
        kernel: among these, `[T, K, K]`.
        alpha: rates.
        steps: how many.
        query: residuals at the query samples before adaptation `[T, Q]`, and their kernel with the support samples
            `[T, Q, K]` (fresh inputs); the support samples themselves (training inputs), if None.
    """
    r, k = residual.double(), kernel.double()
    rate = torch.as_tensor(alpha, dtype=r.dtype, device=r.device)[..., None, None] * 2 / r.shape[1]
    judged, across = (r, k) if query is None else (query[0].double(), query[1].double())
    r, judged = (x.expand(*rate.shape[:-2], *x.shape) for x in (r, judged))
    for _ in range(steps):
        judged = judged - rate * torch.einsum("tqk,...tk->...tq", across, r)
        r = r - rate * torch.einsum("tqk,...tk->...tq", k, r)
    return judged


def adapted_loss(
    residual: Tensor,
    kernel: Tensor,
    alpha: float | Tensor,
    steps: int = 1,
    query: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean squared error of each task after adaptation, `[A, T]`; arguments as of `adapted_residual`."""
    return adapted_residual(residual, kernel, alpha, steps, query).square().mean(-1)
