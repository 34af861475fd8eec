"""Time, memory and recovery of `metalearn.clustering` on planted clusters, beside scikit-learn's k-means.

n vectors of d parameters: m centres of norm `separation` in random directions, plus noise of standard deviation 1 in
every parameter. By default the setting of TSA-MAML on Conv4, n = 10,000 and d = 112,000; scikit-learn runs on the first
`--peer-n` of the vectors (it needs them all in float32), and ours once more on the same ones.

    python scripts/bench_clustering.py
    python scripts/bench_clustering.py --n 1500 --separation 12
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from metalearn import clustering
from metalearn.clustering import Vectors

STACK = 50


def planted(n: int, d: int, m: int, separation: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stacks of vectors `[b, d]` with their clusters `[b]`; the first stacks do not depend on n."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(m, d, generator=generator)) * separation
    for start in range(0, n, STACK):
        truth = torch.arange(start, min(start + STACK, n)) % m
        yield centres[truth] + torch.randn(len(truth), d, generator=generator), truth


def peak_gb() -> float:
    """Largest resident set of this process so far, in 10^9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


class Stopwatch:
    """Wall and processor seconds by stage; calls of one stage add up."""

    def __init__(self) -> None:
        self.stages: dict[str, list[float]] = {}

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to the stage."""

        def call(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            value = function(*args, **kwargs)
            seconds = self.stages.setdefault(stage, [0.0, 0.0, 0.0])
            seconds[0] += time.perf_counter() - wall
            seconds[1] += time.process_time() - cpu
            seconds[2] = peak_gb()
            return value

        return call

    def __str__(self) -> str:
        wall, cpu, peak = zip(*self.stages.values(), strict=True)
        rows = [*self.stages.items(), ("total", [sum(wall), sum(cpu), max(peak)])]
        return "\n".join(f"{name:<34} {s[0]:8.1f} s {s[1]:8.1f} CPU-s {s[2]:6.2f} GB" for name, s in rows)


STAGES = {
    "gram_matrix": "Gram matrix",
    "principal_coordinates": "principal directions",
    "_kmeans": "k-means on them",
    "lloyd": "Lloyd's steps on all dimensions",
    "centroids": "centroids and inertia",
    "silhouette": "silhouettes",
}


def ours(stacks: Iterator[tuple[Tensor, Tensor]], n: int, d: int, m: int, seed: int) -> None:
    """Store, cluster, print the time of each stage (the peak memory is that up to its end) and the agreement."""
    watch, vectors, groups = Stopwatch(), Vectors(torch.zeros(d), n), []
    add = watch.timed("round and store, as they arrive", vectors.add)
    for phi, group in stacks:
        add(phi)
        groups.append(group)
    with ExitStack() as patches:
        for name, stage in STAGES.items():
            timed = watch.timed(stage, getattr(clustering, name))
            patches.enter_context(mock.patch.object(clustering, name, timed))
        clusters = clustering.cluster(vectors, m, seed=seed)
    print(watch)
    report("metalearn.clustering", torch.cat(groups), clusters.labels, clusters.inertia)
    print(f"  proposed on {clusters.directions} directions, {clusters.refined} vectors moved by Lloyd's steps")


def report(name: str, truth: Tensor, labels: Tensor, inertia: float) -> None:
    """One line: adjusted Rand index against the planted clusters, and sum of squared distances."""
    print(f"  {name}: adjusted Rand index {adjusted_rand_score(truth, labels):.3f}, inertia {inertia:.6g}", flush=True)


def peers(stacks: list[tuple[Tensor, Tensor]], m: int, seed: int) -> None:
    """scikit-learn on the vectors themselves."""
    x, truth = torch.cat([phi for phi, _ in stacks]).numpy(), torch.cat([group for _, group in stacks])
    for kind in (KMeans, MiniBatchKMeans):
        watch, model = Stopwatch(), kind(m, n_init=10, random_state=seed)
        watch.timed(f"scikit-learn {kind.__name__}", model.fit)(x)
        print(str(watch).splitlines()[0])
        report(kind.__name__, truth, torch.from_numpy(model.labels_), model.inertia_)


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="vectors")
    parser.add_argument("--d", type=int, default=112_000, help="parameters")
    parser.add_argument("--clusters", type=int, default=5, help="m")
    parser.add_argument("--separation", type=float, default=12.0, help="norm of a centre, noise standard deviation 1")
    parser.add_argument("--peer-n", type=int, default=1500, help="vectors for scikit-learn; 0 for none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(f"n = {a.n}, d = {a.d}, m = {a.clusters}, separation {a.separation:g}, {a.threads} threads")
    ours(planted(a.n, a.d, a.clusters, a.separation, a.seed), a.n, a.d, a.clusters, a.seed)
    if n := min(a.n, a.peer_n):
        print(f"the first {n} of them")
        few = list(planted(n, a.d, a.clusters, a.separation, a.seed))
        if n < a.n:
            ours(iter(few), n, a.d, a.clusters, a.seed)
        peers(few, a.clusters, a.seed)


if __name__ == "__main__":
    main()
