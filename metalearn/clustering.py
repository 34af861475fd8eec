"""Clustering adapted parameters: k-means of n vectors in d >> n dimensions through their Gram matrix.

Tasks' adapted parameters phi_i stay close to the initialisation theta and n of them span at most n dimensions, so all
that k-means needs is the centred n x n matrix of inner products (`docs/performance.md`, clustering). What is exact:

- k-means of the vectors is k-means in their span: `distances`, `lloyd` and `silhouette` need only the Gram matrix and
  are those of the full vectors, up to the rounding of that matrix.
- k-means on the top r principal directions only proposes a partition. With r = m - 1 it is k-means with real numbers
  for labels (Ding & He, ICML 2004); more directions describe vectors better that form no tight clusters. Either escapes
  the optima that plain k-means starts in when d >> n, where a vector's own 1/n_c share of its centroid outweighs the
  clusters. Lloyd's steps on the full vectors follow, and the least inertia wins: the result is a fixed point of plain
  k-means all the same.
- Centroids and inertia are those of the vectors as stored, each entry within 2^-11 of its distance from theta,
  computed in float32.

Shapes: n vectors, d parameters, m clusters, r principal directions.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

COLUMNS, ROWS = 4096, 2048
"""Parameters and vectors in one block of the Gram matrix's products. They fix the rounding, so they are constants."""


class Vectors:
    """phi_1, ..., phi_n as they arrive, in two bytes an entry: phi_i = theta + 2^e_i h_i.

    What is rounded is the difference from theta, not the parameters: theta's digits would take the place of those that
    tell tasks apart. Each vector has its own exponent, so that float16 neither overflows nor loses small vectors; its
    11 bits are 8 times as precise as bfloat16's. Everything lies on theta's device.
    """

    def __init__(self, theta: Tensor, capacity: int):
        """theta: `[d]`, any point near the vectors, which matters for rounding alone; capacity: the most that come."""
        if theta.dim() != 1:
            raise ValueError(f"theta must be one vector [d], not {list(theta.shape)}")
        self.theta = theta.detach().clone()
        self._h = torch.empty(capacity, len(theta), dtype=torch.float16, device=theta.device)
        self._scale = torch.empty(capacity, 1, device=theta.device)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def add(self, phi: Tensor) -> None:
        """Append the vectors `[b, d]`; how they are divided into stacks changes no bit of any result.

        Raises:
            ValueError: for another shape, more vectors than the capacity, or a vector that is not finite or whose
                squared distance from theta overflows float32; then none of the stack is added.
        """
        new = slice(self._n, self._n + len(phi))
        if phi.dim() != 2 or phi.shape[1] != len(self.theta):
            raise ValueError(f"vectors must come as [b, {len(self.theta)}], not {list(phi.shape)}")
        if new.stop > len(self._h):
            raise ValueError(f"{new.stop} vectors exceed the capacity of {len(self._h)}")
        x = (phi.detach().to(self.theta.device) - self.theta).float()
        if bad := (~torch.linalg.vector_norm(x, dim=1).square().isfinite()).nonzero().flatten().tolist():
            names = ", ".join(str(new.start + i) for i in bad[:8]) + (f" and {len(bad) - 8} more" if bad[8:] else "")
            raise ValueError(
                f"adapted parameters are not finite in vectors {names}: lower algorithm.alpha or drop them"
            )
        # largest entry below 2^15; the bound on e keeps 2^-e finite where a vector is all but zero
        e = (torch.frexp(x.abs().amax(1, keepdim=True)).exponent - 15).clamp(min=-100)
        self._h[new], self._scale[new] = torch.ldexp(x, -e), torch.ldexp(torch.ones_like(x[:, :1]), e)
        self._n = new.stop

    def stored(self) -> tuple[Tensor, Tensor]:
        """What `restore` takes back: h `[n, d]` in float16, and the powers of two `[n, 1]`."""
        return self._h[: self._n], self._scale[: self._n]

    def restore(self, h: Tensor, scale: Tensor) -> None:
        """Append vectors that were `stored` relative to the same theta, as they are."""
        new = slice(self._n, self._n + len(h))
        self._h[new], self._scale[new] = h, scale
        self._n = new.stop

    def part(self, parameters: slice) -> Vectors:
        """The same vectors in some of their dimensions; shares their memory."""
        view = copy.copy(self)
        view.theta, view._h = self.theta[parameters], self._h[:, parameters]
        return view

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks `[n, COLUMNS]` of the differences phi_i - theta in float32, each with the columns that it covers."""
        for start in range(0, len(self.theta), COLUMNS):
            block = slice(start, start + COLUMNS)
            yield block, self._h[: self._n, block].float().mul_(self._scale[: self._n])


class Clusters(NamedTuple):
    """A partition of n vectors; clusters are numbered by decreasing size, and none is empty."""

    labels: Tensor  # [n] in 0..m-1
    centroids: Tensor  # [m, d], means of the members
    inertia: float  # sum of squared distances from the own centroid, all d dimensions
    silhouette: Tensor  # [n] in [-1, 1]; 0 for the only member of a cluster, and for m = 1
    directions: int  # principal directions r of the proposal that won
    refined: int  # vectors that Lloyd's steps moved after it


def cluster(
    vectors: Vectors,
    m: int,
    *,
    seed: int = 0,
    gram: Tensor | None = None,
    directions: Sequence[int] | None = None,
    restarts: int = 20,
    refine: bool = True,
) -> Clusters:
    """k-means of the vectors: proposed on their principal directions, refined on all dimensions.

    Args:
        vectors: n >= m of them.
        m: number of clusters.
        seed: of k-means++ and of the eigensolver's start; equal seeds give equal clusters.
        gram: `gram_matrix(vectors)`, if several m share it.
        directions: numbers r >= m - 1 of principal directions, one proposal each; by default m - 1 and 4 m.
        restarts: k-means++ starts of a proposal, of which the one of least inertia there is kept.
        refine: take Lloyd's steps on the full vectors, to a fixed point of plain k-means.

    Raises:
        ValueError: if m < 1, n < m, r < m - 1, or fewer than m vectors differ.
    """
    ranks = _ranks(len(vectors), len(vectors.theta), m, directions)
    gram = gram_matrix(vectors) if gram is None else gram
    points = principal_coordinates(gram, ranks[-1], seed=seed)
    proposals = [_kmeans(points[:, :r], m, seed, restarts) for r in ranks]
    partitions = [lloyd(gram, labels, m) if refine else labels for labels in proposals]
    spread = [float(distances(gram, labels, m).gather(1, labels[:, None]).sum()) for labels in partitions]
    best = min(range(len(ranks)), key=spread.__getitem__)
    labels, refined = partitions[best], int((partitions[best] != proposals[best]).sum())
    labels = labels.bincount(minlength=m).argsort(descending=True, stable=True).argsort()[labels]
    means, inertia = centroids(vectors, labels, m)
    shifts = (means - vectors.theta).float()
    if m > 1 and not F.pdist(shifts).min() > 1e-5 * shifts.norm(dim=1).max():  # NaN: a cluster without members
        raise ValueError(
            f"fewer than {m} of the {len(vectors)} vectors differ by more than the rounding of phi - theta to float16: "
            "lower algorithm.m, or give a theta nearer to them"
        )
    return Clusters(labels, means, inertia, silhouette(gram, labels, m), ranks[best], refined)


def gram_matrix(vectors: Vectors, *, dtype: torch.dtype | None = None) -> Tensor:
    """<phi_i - mean, phi_j - mean>: the centred Gram matrix, `[n, n]` float32.

    Centring comes before rounding to `dtype`, so that the error is relative to |phi_i - mean| |phi_j - mean|: about
    0.003 / sqrt(d) of it in bfloat16 for vectors without structure. Sums over blocks, and the squared norms on the
    diagonal, are float32 or better.

    Args:
        vectors: the n vectors.
        dtype: of the products' factors; by default bfloat16, or float32 on a processor without fast bfloat16.
    """
    n, device = len(vectors), vectors.theta.device
    dtype = dtype or (torch.bfloat16 if _fast_bfloat16(device) else torch.float32)
    gram, squares = torch.zeros(n, n, device=device), torch.zeros(n, dtype=torch.float64, device=device)
    blocks = [slice(i, min(i + ROWS, n)) for i in range(0, n, ROWS)]
    for _, x in vectors.columns():
        x -= x.mean(0)
        squares += torch.linalg.vector_norm(x, dim=1).double().square()
        h = x.to(dtype)
        for rows in blocks:  # the lower triangle
            gram[rows, : rows.stop] += h[rows] @ h[: rows.stop].T
    for rows in blocks:
        gram[: rows.start, rows] = gram[rows, : rows.start].T
        gram[rows, rows] = (gram[rows, rows] + gram[rows, rows].T) / 2
    gram.diagonal().copy_(squares)
    return gram


def principal_coordinates(gram: Tensor, r: int, *, seed: int = 0) -> Tensor:
    """The vectors' coordinates along their top r <= n principal directions, largest first, U sqrt(Lambda): `[n, r]`.

    Distances between rows are those between the vectors projected on these directions. Lanczos iterations, each one
    product with the Gram matrix where it lies, to 1e-3 of each eigenvalue; small matrices are diagonalised.
    """
    n, trace = len(gram), float(gram.trace())
    if r == 0 or trace == 0:
        return gram.new_zeros(n, r, dtype=torch.float64)
    if n <= 512 or r > n // 8:
        values, directions = torch.linalg.eigh(gram.double())
    else:
        product = LinearOperator(
            (n, n), lambda v: (gram @ torch.as_tensor(v.ravel()).to(gram)).cpu().numpy(), dtype="f4"
        )
        v0 = np.random.default_rng(seed).standard_normal(n).astype("f4")
        values, directions = map(torch.from_numpy, eigsh(product, r, which="LA", v0=v0, tol=1e-3))
    coordinates = directions.double() * values.double().clamp(min=0).sqrt()
    return coordinates[:, -r:].flip(1).to(gram.device)


def distances(gram: Tensor, labels: Tensor, m: int) -> Tensor:
    """|phi_i - c_k|^2 = g_ii - 2 mean_{j in k} g_ij + mean_{j, l in k} g_jl: `[n, m]`, infinite for empty clusters."""
    members = F.one_hot(labels, m).to(gram)
    weights = members / members.sum(0)  # NaN in the column of an empty cluster
    to_mean = gram @ weights
    squares = gram.diagonal()[:, None] - 2 * to_mean + (weights * to_mean).sum(0)
    return squares.nan_to_num(nan=float("inf"))


def lloyd(gram: Tensor, labels: Tensor, m: int, *, steps: int = 300) -> Tensor:
    """Lloyd's k-means of the full vectors from a partition, until it stays: every label is that of the nearest mean.

    As in scikit-learn, a cluster that runs empty restarts at the vector farthest from its own mean.
    """
    for _ in range(steps):
        nearest, new = distances(gram, labels, m).min(1)
        empty = (new.bincount(minlength=m) == 0).nonzero().flatten()
        new[nearest.topk(len(empty)).indices] = empty
        if torch.equal(new, labels):
            break
        labels = new
    return labels


def silhouette(gram: Tensor, labels: Tensor, m: int) -> Tensor:
    """(b - a) / max(a, b) of every vector: `[n]` (Rousseeuw 1987), from all pairwise distances |phi_i - phi_j|.

    a is the mean distance from the others of its cluster, b that from the members of the next one; 0 for the only
    member of a cluster, and for m = 1. Distances below a few per cent of |phi - mean| drown in a bfloat16 Gram matrix.
    """
    members, squares = F.one_hot(labels, m).to(gram), gram.diagonal()
    rows = [slice(i, i + ROWS) for i in range(0, len(gram), ROWS)]
    sums = torch.cat([(squares[i, None] + squares - 2 * gram[i]).clamp(min=0).sqrt() @ members for i in rows])
    sizes, own = members.sum(0), labels[:, None]
    a = sums.gather(1, own)[:, 0] / (sizes[labels] - 1)
    b = (sums / sizes).scatter(1, own, float("inf")).amin(1)
    value = (b - a) / torch.maximum(a, b)
    return value.where((sizes[labels] > 1) & value.isfinite(), 0.0)


def centroids(vectors: Vectors, labels: Tensor, m: int) -> tuple[Tensor, float]:
    """Mean of each cluster, `[m, d]` in theta's type, and the sum of squared distances from them."""
    members = F.one_hot(labels, m).float()
    weights, theta = (members / members.sum(0)).T, vectors.theta
    means, inertia = theta.new_empty(m, len(theta)), 0.0
    for block, x in vectors.columns():
        c = weights @ x
        means[:, block] = theta[block] + c
        inertia += float(torch.linalg.vector_norm(x.sub_(c[labels]), dim=1).double().square().sum())
    return means, inertia


def majority(labels: Tensor, truth: Tensor) -> Tensor:
    """Whether each vector's true group is the most frequent one of its cluster: `[n]` of 0 and 1 in float64."""
    labels, truth = labels.cpu(), truth.cpu()
    clusters, groups = int(labels.max()) + 1, int(truth.max()) + 1
    counts = (labels * groups + truth).bincount(minlength=clusters * groups).unflatten(0, (clusters, groups))
    return (counts.argmax(1)[labels] == truth).double()


def purity(labels: Tensor, truth: Tensor) -> float:
    """Fraction of vectors whose true group is the most frequent one of their cluster; 1 if every cluster is pure."""
    return float(majority(labels, truth).mean())


def _ranks(n: int, d: int, m: int, directions: Sequence[int] | None) -> list[int]:
    if m < 1:
        raise ValueError(f"algorithm.m = {m} clusters: must be at least 1")
    if n < m:
        raise ValueError(f"{n} vectors cannot form {m} clusters: sample more tasks or lower algorithm.m")
    directions = (m - 1, 4 * m) if directions is None else directions
    if not directions or min(directions) < m - 1:
        raise ValueError(f"directions = {list(directions)}: {m} clusters need at least {m - 1}")
    return sorted({min(r, n, d) for r in directions})


def _kmeans(points: Tensor, m: int, seed: int, restarts: int) -> Tensor:
    if m == 1:
        return torch.zeros(len(points), dtype=torch.int64, device=points.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than clusters: `cluster` says so
        labels = KMeans(m, n_init=restarts, random_state=seed).fit(points.cpu().numpy()).labels_
    return torch.from_numpy(labels).to(points.device, torch.int64)


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # AVX-512 or better; elsewhere bfloat16 products are slower than float32 ones
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
