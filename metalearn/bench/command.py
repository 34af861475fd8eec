"""`metalearn bench`: options, settings, files. Imports no torch: workers do."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from metalearn.bench import report
from metalearn.bench.peers import IMPLEMENTATIONS, OURS, SCRIPTS, Implementation
from metalearn.bench.process import MALLOC, Setting
from metalearn.bench.rounds import Bench, Log
from metalearn.bench.workloads import WORKLOADS
from metalearn.options import Parser
from metalearn.schema import BadInput
from metalearn.schema.keys import nearest

WAITING = ("W1", "W1q", "W4", "W4k5")
"""Workloads that are measured with passive waiting too, unless it is asked for."""
QUICK = {"workloads": "W1,W4", "peers": "learn2learn,vmap,vmap8", "minutes": 0.5}

DESCRIPTION = """Time meta-steps, ours and those of other libraries, in interleaved rounds.

Needs a checkout; peers' environments are built by `make bench` (scripts/bench/build.py). Each peer computes the same
thing, which is checked before it is timed. Written to the folder as they arise: samples.jsonl, then results.json,
table.md, chart.svg. A call with the folder of an interrupted one goes on with it."""


def parser() -> Parser:
    """The verb's options."""
    p = Parser("bench", DESCRIPTION)
    p.add_argument("--quick", action="store_true", help="W1 and W4 beside learn2learn and vmap, under three minutes")
    p.add_argument("--workloads", metavar="NAMES", help=f"of {', '.join(WORKLOADS)}; default all")
    peers = [name for name in IMPLEMENTATIONS if name != OURS]
    p.add_argument("--peers", metavar="NAMES", help=f"of {', '.join(peers)}, or none; default all but loop")
    p.add_argument("--threads", metavar="NUMBERS", help="default 1 and 2 (as far as there are cores)")
    wait = f"of default, passive (of OpenMP's idle threads); by default passive for {', '.join(WAITING)} only"
    p.add_argument("--wait", metavar="POLICIES", help=wait)
    p.add_argument("--rounds", type=int, default=9, metavar="N", help="at most, of a workload and setting; default 9")
    p.add_argument(
        "--minutes", type=float, metavar="M", help="for further rounds than two of each workload and setting; default 5"
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    p.add_argument("--folder", metavar="PATH", help="default outputs/bench/<date and time>")
    p.add_argument("--list", action="store_true", help="print workloads and implementations, and measure nothing")
    return p


def main(arguments: Sequence[str]) -> int:
    """Measure what the options ask for; 0 unless we ourselves could not be measured."""
    options = parser().parse_args(arguments)
    defaults: dict[str, Any] = QUICK if options.quick else {}
    workloads = _chosen("--workloads", options.workloads or defaults.get("workloads"), list(WORKLOADS))
    available = [name for name in IMPLEMENTATIONS if name != OURS]
    usual = [name for name in available if not IMPLEMENTATIONS[name].optional]
    peers = _chosen("--peers", options.peers or defaults.get("peers"), [*available, "none"], usual)
    implementations = [IMPLEMENTATIONS[name] for name in (OURS, *peers) if name != "none"]
    minutes = defaults.get("minutes", 5.0) if options.minutes is None else options.minutes
    if options.rounds < 1:
        raise BadInput(f"bench: --rounds {options.rounds}: must be at least 1")
    if options.list:
        print(_listing())
        return 0
    if not (SCRIPTS / "worker.py").is_file():
        raise BadInput("bench: needs a checkout of the repository (scripts/bench is not part of the package)")
    device = _device() if options.device == "auto" else options.device
    settings = _settings(options, device)
    folder = Path(options.folder or Path("outputs/bench") / time.strftime("%Y-%m-%d-%H-%M-%S"))
    folder.mkdir(parents=True, exist_ok=True)
    log = Log.open(folder / "samples.jsonl")
    with open(folder / "workers.log", "a") as errors:
        budget = 60 * minutes / (len(settings) * len(workloads))
        bench = Bench(log, implementations, device, options.rounds, budget, errors, say=_progress)
        header = _header(implementations, device)
        for setting in settings:
            passive = setting.wait == "passive" and not options.wait
            names = [name for name in workloads if name in WAITING or not passive]
            for _ in bench.measure(setting, [WORKLOADS[name] for name in names]):
                _write(folder, header, log)
    for line in report.verdicts(report.summary(log.records)):
        print(line)
    print(f"table: {folder / 'table.md'}", file=sys.stderr)
    return 0 if log.of("sample", implementation=OURS) else 1


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _chosen(option: str, text: str | None, names: list[str], default: list[str] | None = None) -> list[str]:
    if not text:
        return default or names
    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        if name not in names:
            raise BadInput(f"bench: {option} {name}: must be one of {', '.join(names)}{nearest(name, names)}")
    return [name for name in names if name in found]


def _settings(options: argparse.Namespace, device: str) -> list[Setting]:
    """One thread has nobody to wait for, so its waiting policy is not varied unless it is asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if options.threads:
        try:
            threads = [int(part) for part in options.threads.split(",")]
        except ValueError as error:
            raise BadInput(f"bench: --threads {options.threads}: must be whole numbers with commas") from error
        if not all(1 <= n <= cores for n in threads):
            raise BadInput(f"bench: --threads {options.threads}: must be in 1..{cores}, the cores of this machine")
    else:
        threads = [cores] if device != "cpu" else [n for n in (2, 1) if n <= cores]
    alone = ["default"] if options.quick or device != "cpu" else ["default", "passive"]
    waits = _chosen("--wait", options.wait, ["default", "passive"], alone)
    return [Setting(n, wait) for wait in waits for n in threads if wait == "default" or n > 1 or options.wait]


def _device() -> str:
    """`cuda` where there is one; asked of the driver, since torch is not imported here."""
    return "cuda" if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists() else "cpu"


def _header(implementations: list[Implementation], device: str) -> dict[str, Any]:
    from metalearn.record import git_state

    commit, dirty = git_state()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": device,
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": f"{commit}{' (changed)' if dirty else ''}",
        "environment of all workers": " ".join(f"{k}={v}" for k, v in MALLOC.items()),
        "peers": ", ".join(i.title for i in implementations[1:]) or "none",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _write(folder: Path, header: dict[str, Any], log: Log) -> None:
    results = {
        "header": header,
        "workloads": {name: asdict(w) | {"flop": w.flop()} for name, w in WORKLOADS.items()},
        "peaks": report.peaks(log.records),
        "results": report.summary(log.records),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    (folder / "table.md").write_text(report.table(header, log.records))
    (folder / "chart.svg").write_text(report.chart(log.records))


def _listing() -> str:
    lines = [f"{w.name:<13} {w.flop() / 1e9:>8.3g} GFLOP  {w.title}" for w in WORKLOADS.values()]
    lines.append("")
    for i in IMPLEMENTATIONS.values():
        lines.append(f"{i.name:<13} {i.title:<36} {i.missing() or 'ready'}")
    return "\n".join(lines)
