"""Report: how much faster FOMAML's meta-step is than MAML's (the overview quotes 33 % from the MAML paper)."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from metalearn.bench.workloads import WORKLOADS, Workload, make_arrays
from metalearn.options import whole
from metalearn.reports import Content, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Time of MAML's meta-step over FOMAML's, on Conv4 (overview, section 2.3: 33 % speed-up)"
DESCRIPTION = """Wall-clock times of both in turns, and the numbers of operations that they need at least. Use an
otherwise idle machine; OMP_NUM_THREADS sets the number of threads."""
NAMES = ("W1", "W1q", "W1k5", "W3")


def options(parser: argparse.ArgumentParser) -> None:
    """Rounds, workloads and device."""
    text = "meta-steps of each after one to warm up; default 5 (a minute or two)"
    parser.add_argument("--rounds", type=whole(1), default=5, metavar="N", help=text)
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {NAMES}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")


def run(options: argparse.Namespace) -> Content:
    """Both forms of each workload in turns."""
    import torch

    rows = [_measure(name, options.rounds, options.device) for name in options.workloads]
    threads = f"threads: {torch.get_num_threads()}" if options.device == "cpu" else torch.cuda.get_device_name()
    text = [
        "# MAML's meta-step over FOMAML's",
        f"Medians of {options.rounds} rounds in turns (and the range of the ratio), {threads}. The overview quotes a "
        "speed-up of 33 %, a ratio of 1.33 if it is of speed and of 1.5 if it is of time.",
        table(
            ["workload", "MAML, ms", "FOMAML, ms", "ratio", "range", "by CPU time", "of operations"],
            [
                [r["title"], f"{r['maml_ms']:.0f}", f"{r['fomaml_ms']:.0f}", f"{r['ratio']:.2f}"]
                + [f"{min(r['ratios']):.2f} to {max(r['ratios']):.2f}"]
                + ["-" if r["cpu_ratio"] is None else f"{r['cpu_ratio']:.2f}", f"{r['operations']:.2f}"]
                for r in rows
            ],
        ),
    ]
    return Content(
        "\n\n".join(text), {"device": threads, "rounds": options.rounds, "workloads": rows}, {"speed": _figure(rows)}
    )


def _measure(name: str, rounds: int, device: str) -> dict[str, Any]:
    from metalearn.bench.ours import Subject

    workloads = {form: replace(WORKLOADS[name], form=form) for form in ("maml", "fomaml")}
    subjects = {form: Subject(w.as_dict(), make_arrays(w), device) for form, w in workloads.items()}
    times: dict[str, list[float]] = {form: [] for form in subjects}
    cpu: dict[str, list[float]] = {form: [] for form in subjects}
    for turn in range(rounds + 1):
        for form, subject in subjects.items():
            subject.sync()
            began, spent = time.perf_counter(), time.process_time()
            subject.step()
            subject.sync()
            if turn:
                times[form].append(1000 * (time.perf_counter() - began))
                cpu[form].append(time.process_time() - spent)
    by_cpu = median(a / b for a, b in zip(cpu["maml"], cpu["fomaml"], strict=True))
    ratios = [a / b for a, b in zip(times["maml"], times["fomaml"], strict=True)]
    return {
        "workload": name,
        "title": _title(WORKLOADS[name]),
        "maml_ms": median(times["maml"]),
        "fomaml_ms": median(times["fomaml"]),
        "ratio": median(ratios),
        "ratios": ratios,
        "cpu_ratio": by_cpu if device == "cpu" else None,
        "operations": workloads["maml"].flop() / workloads["fomaml"].flop(),
    }


def _title(w: Workload) -> str:
    channels, height, width = w.image
    tasks = f"{w.tasks} x {w.way}-way {w.shot}-shot, queries {w.queries}"
    return f"{w.name}: {height}x{width}x{channels}, {w.filters} filters, {tasks}, inner steps {w.steps}"


def _figure(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    at = range(len(rows))
    ratios = [r["ratio"] for r in rows]
    low, high = ([abs(f(r["ratios"]) - r["ratio"]) for r in rows] for f in (min, max))
    axis.bar(at, ratios, yerr=[low, high], capsize=4, color="tab:blue", label="measured (bars: range)")
    axis.plot(at, [r["operations"] for r in rows], "kD", label="operations")
    axis.axhline(1.33, color="grey", linestyle=":", label="33 % faster")
    axis.set_xticks(list(at), [r["workload"] for r in rows])
    axis.set(xlabel="workload", ylabel="MAML / FOMAML", title="Time of a meta-step")
    axis.legend(fontsize=8)
    return figure
