"""Build the environments of the benchmark's peers: one virtual environment each, under .bench/, from public packages.

    python scripts/bench/build.py [PEER ...]      all of them by default; make bench does this
    TORCH=torch==2.13.0                           what is installed before everything else (see the Makefile)

What is built already is left alone; what failed is tried again. How it went is in .bench/<peer>.json, and a peer that
cannot be built stands with its error in the benchmark's table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".bench"
TORCH = os.environ.get("TORCH", "torch==2.13.0")
NUMPY = "numpy==2.4.6"
GPU = "[cuda12]" if Path("/dev/nvidiactl").exists() else ""

# Installed one after the other, without looking at what they say they need: their own pins date from old releases of
# PyTorch, and would replace it.
RECIPES: dict[str, list[list[str]]] = {
    "learn2learn": [[TORCH], [NUMPY]],
    "higher": [[TORCH], [NUMPY], ["--no-deps", "higher==0.2.1"]],
    "torchopt": [[TORCH], [NUMPY], ["graphviz==0.21", "optree==0.17.0"], ["--no-deps", "torchopt==0.7.3"]],
    "torchmeta": [[TORCH], [NUMPY], ["--no-deps", "torchmeta==1.8.0"]],
    "jax": [[f"jax{GPU}==0.10.2", "jaxlib==0.10.2", NUMPY]],
}
SOURCES = {"learn2learn": ("learn2learn==0.2.0", ["cython==0.29.37", "setuptools==75.8.0", "wheel==0.45.1"])}
"""Copied from their source distribution without compiling: the C extensions do not build, and are not needed."""
WANTED = {
    "learn2learn": "import importlib.util as u; assert u.find_spec('learn2learn')",
    "higher": "import higher",
    "torchopt": "import torchopt",
    "torchmeta": "import importlib.util as u; assert u.find_spec('torchmeta')",
    "jax": "import jax",
}


def main() -> int:
    """Build what the command line names."""
    peers = sys.argv[1:] or list(RECIPES)
    for peer in peers:
        if peer not in RECIPES:
            print(f"{peer}: no such peer; one of {', '.join(RECIPES)}", file=sys.stderr)
            return 2
    CACHE.mkdir(exist_ok=True)
    for peer in peers:
        state, recipe = CACHE / f"{peer}.json", [RECIPES[peer], SOURCES.get(peer)]
        recipe = json.loads(json.dumps(recipe))
        if state.is_file():
            found = json.loads(state.read_text())
            if "error" not in found and found["recipe"] == recipe:
                continue
        print(f"building {peer} (a minute or more)", flush=True)
        result: dict = {"recipe": recipe}
        try:
            result["versions"] = build(peer)
        except subprocess.CalledProcessError as error:
            text = (error.stderr or "").strip().splitlines()
            lines = [line for line in text if "error" in line.lower()] or text or [str(error)]
            result["error"] = lines[-1][:300]
            print(f"{peer}: {result['error']}", file=sys.stderr)
            (CACHE / f"{peer}.log").write_text("\n".join(text))
        state.write_text(json.dumps(result, indent=1))
    return 0


def build(peer: str) -> list[str]:
    """Make one environment; returns the installed versions."""
    folder = CACHE / peer
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    for step in RECIPES[peer]:
        run(*pip, "install", "-q", *step)
    if peer in SOURCES:
        package, tools = SOURCES[peer]
        run(*pip, "install", "-q", *tools)
        copy_source(pip, package, folder)
    run(python, "-c", WANTED[peer])
    versions = run(*pip, "freeze").stdout.split()
    return versions + [package for package, _ in [SOURCES[peer]]] if peer in SOURCES else versions


def copy_source(pip: list, package: str, folder: Path) -> None:
    """The pure Python part of a source distribution, into the environment's packages."""
    name = package.split("==")[0]
    with tempfile.TemporaryDirectory() as scratch:
        run(*pip, "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", name, "-d", scratch, package)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        (source,) = Path(scratch).glob(f"{name}-*/{name}")
        (target,) = folder.glob("lib/python*/site-packages")
        shutil.copytree(source, target / name)


def run(*command) -> subprocess.CompletedProcess:
    """A command that must succeed."""
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
