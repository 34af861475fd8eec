"""What we are compared with: names, forms, and where each peer's environment lies."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from metalearn.bench.workloads import Workload

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "bench"
CACHE = ROOT / ".bench"
"""Environments, built by `scripts/bench/build.py`."""
OURS = "metalearn"

GRADIENT = ("maml", "fomaml")
MAPPED = (*GRADIENT, "anil", "protonet")
LOOPED = (*GRADIENT, "reptile", "protonet")
ALL = (*MAPPED, "reptile")
SMALL = ("W1", "W4", "W4k5")


@dataclass(frozen=True)
class Implementation:
    """One column of the benchmark.

    Attributes:
        name: on the command line and in tables.
        title: what it is.
        module, variant: what the worker loads.
        environment: name of its environment under `.bench/`; empty for the project's own, which has PyTorch.
        forms, nets: algorithms and networks that it has an idiom for.
        preload: modules that the worker imports before it forks.
        only: workloads that it is measured on; empty for all.
        chunk: tasks of a chunk, if it is not measured where that is all of them.
        optional: whether it is left out unless it is asked for.
    """

    name: str
    title: str
    module: str
    variant: str = ""
    environment: str = ""
    forms: tuple[str, ...] = GRADIENT
    preload: tuple[str, ...] = ("torch",)
    nets: tuple[str, ...] = ("conv4", "mlp")
    only: tuple[str, ...] = ()
    chunk: int = 0
    optional: bool = False

    def omits(self, workload: Workload) -> str | None:
        """Why it is not measured on a workload, or None."""
        if workload.form not in self.forms or workload.net not in self.nets:
            return "n/a: no idiom for it"
        if self.chunk and self.chunk >= workload.tasks:
            return f"n/a: {workload.tasks} tasks are one chunk"
        return f"only measured on {', '.join(self.only)}" if self.only and workload.name not in self.only else None

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return CACHE / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    def missing(self) -> str | None:
        """Why it cannot run, or None."""
        if not self.environment:
            return None
        state = CACHE / f"{self.environment}.json"
        if not state.is_file():
            return f"not built (make bench-peers PEERS={self.environment})"
        error = json.loads(state.read_text()).get("error")
        return f"not built: {error}" if error else None

    def command(self) -> list[str]:
        """How its worker is started."""
        return [str(self.python), str(SCRIPTS / "worker.py"), self.module, self.variant, *self.preload]


IMPLEMENTATIONS = {
    i.name: i
    for i in (
        Implementation(
            OURS,
            "this package",
            "metalearn.bench.ours",
            forms=ALL,
            preload=("metalearn.algorithms", "metalearn.optim"),
        ),
        Implementation("learn2learn", "learn2learn", "peers.learn2learn", environment="learn2learn", forms=ALL),
        Implementation("higher", "higher", "peers.higher", environment="higher"),
        Implementation("torchopt", "TorchOpt MetaSGD", "peers.torchopt", environment="torchopt", forms=("maml",)),
        Implementation("torchmeta", "torchmeta modules", "peers.torchmeta", environment="torchmeta", only=SMALL),
        Implementation("loop", "functional_call loop", "peers.plain", forms=LOOPED, optional=True),
        Implementation("vmap", "torch.func vmap, all tasks at once", "peers.vmap", "0", forms=MAPPED),
        Implementation("vmap8", "torch.func vmap, chunks of 8", "peers.vmap", "8", forms=MAPPED, chunk=8),
        Implementation("jax", "JAX jit + vmap", "peers.jax", "vmap", "jax", MAPPED, ("numpy",), only=SMALL),
        Implementation(
            "jax-tuned", "JAX jit + lax.map + im2col", "peers.jax", "map", "jax", MAPPED, ("numpy",), ("conv4",)
        ),
    )
}
"""By name, in the order of tables; ours first."""

PEAK = Implementation("peak", "convolution peak", "metalearn.bench.peak")
"""Not compared: what shares of the peak refer to."""
