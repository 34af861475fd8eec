"""C++ kernels for CPUs, compiled on first use with the machine's own compiler and kept in the cache folder.

They do nothing that PyTorch's operators cannot: where there is no compiler the operators are used, and `reason()`
says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.paths import cache_dir

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-std=c++14", "-fPIC", "-shared"]
REAL = {torch.float32: "float", torch.float64: "double"}
Library = ctypes.CDLL


class Unavailable(RuntimeError):
    """Why there are no kernels."""


@functools.cache
def _library(dtype: torch.dtype) -> Library | Unavailable:
    try:
        return ctypes.CDLL(str(_build(REAL[dtype])))
    except (Unavailable, OSError) as error:
        log.warning("kernels: PyTorch's operators instead of compiled ones, because %s", error)
        return error if isinstance(error, Unavailable) else Unavailable(str(error))


enabled = os.environ.get("METALEARN_KERNELS", "native") != "torch"
"""Whether the kernels may be used at all."""


def library(x: Tensor) -> Library | None:
    """The kernels for tensors like x; None if PyTorch's operators are to be used."""
    if not enabled or not x.is_cpu or x.dtype not in REAL:
        return None
    found = _library(x.dtype)
    return found if isinstance(found, Library) else None


def reason() -> str | None:
    """Why float32 tensors on a CPU do without the kernels; None if they do not."""
    if not enabled:
        return "METALEARN_KERNELS=torch"
    found = _library(torch.float32)
    return str(found) if isinstance(found, Unavailable) else None


def _build(real: str) -> Path:
    """Compile for this processor, once: the name holds everything that the result depends on."""
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        raise Unavailable("no C++ compiler was found (CXX, c++, g++, clang++)")
    flags = [*FLAGS, *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else [])]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    what = "\0".join([SOURCE.read_text(), *flags, version, _processor(), real])
    target = cache_dir() / "kernels" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}-{real}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=target.parent, suffix=".so")
        os.close(handle)
        try:
            done = subprocess.run(
                [compiler, *flags, f"-DREAL={real}", str(SOURCE), "-o", draft], capture_output=True, text=True
            )
            if done.returncode:
                raise Unavailable(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
            os.chmod(draft, 0o755)  # the cache may be shared
            os.replace(draft, target)  # processes that build at the same time all end with a whole file
        finally:
            Path(draft).unlink(missing_ok=True)
    return target


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="kernel")


def parts(units: int, channels: int) -> int:
    """Into how many parts of its channels each unit is to be divided, so that no thread is idle."""
    return max(1, min(-(-torch.get_num_threads() // units), channels // 16))


@functools.cache
def _function(library: Library, name: str, arguments: str) -> Any:
    """A kernel that takes a shape, a range of units, and tensors (`p`) or numbers (`d`)."""
    function = library[name]
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "d": ctypes.c_double}
    function.argtypes = [kinds["p"], ctypes.c_int64, ctypes.c_int64, *(kinds[a] for a in arguments)]
    return function


def call(name: str, shape: ctypes.Structure, units: int, *arguments: Tensor | float) -> None:
    """Run a kernel on units 0..units-1, split among torch's threads. The first argument is a tensor.

    Raises:
        MemoryError: a kernel found no memory for its scratch space.
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    kinds = "".join("p" if isinstance(a, Tensor) else "d" for a in arguments)
    kernel = _function(_library(first.dtype), name, kinds)
    where = ctypes.addressof(shape)
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    threads = min(torch.get_num_threads(), units)
    if threads == 1:
        failed = kernel(where, 0, units, *values)
    else:

        def part(i: int) -> int:
            return int(kernel(where, units * i // threads, units * (i + 1) // threads, *values))

        failed = max(_pool().map(part, range(threads)))
    if failed:
        raise MemoryError("no memory for a kernel's scratch space")
