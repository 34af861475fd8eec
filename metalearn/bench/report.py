"""What was measured, as numbers (json), a table (Markdown) and a chart (SVG): pure functions of the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from metalearn.bench.peers import IMPLEMENTATIONS, OURS, PEAK
from metalearn.bench.process import Setting
from metalearn.bench.statistics import Spread, paired_ratio, spread
from metalearn.bench.workloads import WORKLOADS

Record = dict[str, Any]


BUSY = 0.2
"""Cores taken by other work from which a report says so."""


def summary(records: Sequence[Record]) -> list[Record]:
    """One entry for each workload, setting and implementation that was tried.

    `ms` and `cpu_ms` of a step, `ratio` and `cpu_ratio` (its time over ours in the same round) are `{median, low,
    high, n}` with the quartiles; `tasks_per_second`; `share` of the convolution peak, the best that any round of the
    setting reached; `peak_mb`; `gradient_error` against ours, of the check in float64; `others`: cores that other work
    took meanwhile, by the median over all samples; `error` instead of all that where it failed.
    """
    cells = {(r["workload"], r["threads"], r["wait"]): None for r in records if "threads" in r}
    found = []
    for workload, threads, wait in cells:
        mine = [r for r in records if (r.get("workload"), r.get("threads"), r.get("wait")) == (workload, threads, wait)]
        peak = _peak(records, threads, wait)
        ours = _seconds(mine, OURS)
        others = [r["others"] for r in mine if r["kind"] == "sample"]
        for name in IMPLEMENTATIONS:
            entry = _entry(mine, name, ours, peak)
            if "ms" in entry:
                told = [r for r in records if r.get("workload") == workload and r.get("implementation") == name]
                memory = [r["peak_bytes"] / 1e6 for r in told if r["kind"] == "first" and r["peak_bytes"] is not None]
                errors = [r["gradient_error"] for r in told if r["kind"] == "check"]
                entry["others"] = spread(others).median
                entry |= {"peak_mb": next(iter(memory), None), "gradient_error": next(iter(errors), None)}
            if entry:
                found.append({"workload": workload, "threads": threads, "wait": wait, "implementation": name, **entry})
    return found


def _entry(mine: Sequence[Record], name: str, ours: dict[int, float], peak: float | None) -> Record:
    error = next((r["error"] for r in mine if r["kind"] == "error" and r["implementation"] == name), None)
    seconds = _seconds(mine, name)
    if not seconds:
        return {"error": error} if error else {}
    workload = WORKLOADS[mine[0]["workload"]]
    cpu = _seconds(mine, name, "cpu_seconds")
    median = spread(list(seconds.values())).median
    ratio, cpu_ratio = paired_ratio(seconds, ours), paired_ratio(cpu, _seconds(mine, OURS, "cpu_seconds"))
    entry: Record = {
        "ms": _scaled(spread(list(seconds.values())), 1e3),
        "cpu_ms": _scaled(spread(list(cpu.values())), 1e3),
        "ratio": ratio._asdict() if ratio else None,
        "cpu_ratio": cpu_ratio._asdict() if cpu_ratio else None,
        "tasks_per_second": workload.tasks / median,
        "gflops": workload.flop() / median / 1e9,
        "share": workload.flop() / median / peak if peak and workload.net == "conv4" else None,
    }
    return entry | ({"error": error} if error else {})


def _scaled(s: Spread, by: float) -> Record:
    return {"median": s.median * by, "low": s.low * by, "high": s.high * by, "n": s.n}


def _seconds(mine: Sequence[Record], name: str, which: str = "seconds") -> dict[int, float]:
    return {r["round"]: r[which] for r in mine if r["kind"] == "sample" and r["implementation"] == name}


def _peak(records: Sequence[Record], threads: int, wait: str) -> float | None:
    """Best operations a second of the plain convolution, over all rounds of a setting."""
    here = [r for r in records if r.get("threads") == threads and r.get("wait") == wait]
    flop = {r["workload"]: r["flop"] for r in here if r["kind"] == "peak"}
    rates = [
        flop[r["workload"]] / r["seconds"]
        for r in here
        if r["kind"] == "sample" and r["implementation"] == PEAK.name and r["workload"] in flop
    ]
    return max(rates, default=None)


def peaks(records: Sequence[Record]) -> list[Record]:
    """Convolution peak of every setting, in GFLOP/s."""
    settings = {(r["threads"], r["wait"]): None for r in records if "threads" in r}
    found = [(t, w, _peak(records, t, w)) for t, w in settings]
    return [{"threads": t, "wait": w, "gflops": p / 1e9} for t, w, p in found if p]


def verdicts(entries: Sequence[Record]) -> list[str]:
    """One line a workload: how many times as fast as learn2learn we are, under every setting."""
    lines = []
    for workload in dict.fromkeys(e["workload"] for e in entries):
        parts = []
        for e in (e for e in entries if e["workload"] == workload and e["implementation"] == "learn2learn"):
            setting = Setting(e["threads"], e["wait"])
            if e.get("ratio"):
                r, cpu = e["ratio"], e["cpu_ratio"]["median"]
                company = f"; other work took {e['others']:.1f} cores" if e["others"] >= BUSY else ""
                spread_ = f"{r['low']:.2f}-{r['high']:.2f}; CPU time {cpu:.2f}{company}"
                parts.append(f"{r['median']:.2f} ({spread_}) at {setting}")
            else:
                parts.append(f"none ({e.get('error', 'not measured')}) at {setting}")
        lines.append(f"{workload}: speed over learn2learn's: " + (", ".join(parts) or "not measured"))
    return lines


COLUMNS = ("", "ms a step", "CPU ms", "tasks/s", "peer / ours", "by CPU", "conv peak", "peak MB", "error", "n")


def table(header: Record, records: Sequence[Record]) -> str:
    """The whole report in Markdown."""
    entries = summary(records)
    lines = ["# Benchmark", "", *(f"- {k}: {v}" for k, v in header.items())]
    for p in peaks(records):
        lines.append(f"- convolution peak, {Setting(p['threads'], p['wait'])}: {p['gflops']:.0f} GFLOP/s")
    lines += ["", *(f"- {line}" for line in verdicts(entries)), "", NOTES]
    cells = dict.fromkeys((e["workload"], e["threads"], e["wait"]) for e in entries)
    for name in dict.fromkeys(w for w, _, _ in cells):
        workload = WORKLOADS[name]
        lines += ["", f"## {name}", "", f"{workload.title}; {workload.flop() / 1e9:.3g} GFLOP a step"]
        for _, threads, wait in (c for c in cells if c[0] == name):
            here = [e for e in entries if (e["workload"], e["threads"], e["wait"]) == (name, threads, wait)]
            lines += ["", f"### {name}, {Setting(threads, wait)}", "", *_rows(here, name), *_company(here)]
    return "\n".join(lines) + "\n"


NOTES = """Times are medians of interleaved rounds with the quartiles in brackets; `peer / ours` is the median over
rounds of the two times in the same round. CPU time counts all threads, the waiting ones too. Every implementation
starts from the same parameters and tasks; before it is timed, its loss and outer gradient on two of the tasks are
compared with ours in float64 (error: relative, of the gradient). Peak MB is memory beyond data, parameters and
libraries. All workers have the same environment: OpenMP's own waiting or `OMP_WAIT_POLICY=passive` (not the
`GOMP_SPINCOUNT` that training runs set), `MALLOC_MMAP_MAX_=0` and a large `MALLOC_TRIM_THRESHOLD_`."""


def _company(entries: Sequence[Record]) -> list[str]:
    """A warning, if the machine was not ours."""
    others = max((e["others"] for e in entries if "others" in e), default=0.0)
    if others < BUSY:
        return []
    return ["", f"Other work took {others:.1f} cores meanwhile: times are too long, most of all with spinning threads."]


def _rows(entries: Sequence[Record], workload: str) -> list[str]:
    rows = [list(COLUMNS)]
    for e in entries:
        title = IMPLEMENTATIONS[e["implementation"]].title
        if "ms" not in e:
            rows.append([title, e["error"], *[""] * (len(COLUMNS) - 2)])
            continue
        rows.append(
            [
                title,
                _spread(e["ms"]),
                _number(e["cpu_ms"]["median"]),
                _number(e["tasks_per_second"]),
                _spread(e["ratio"]) if e["ratio"] else "",
                _number(e["cpu_ratio"]["median"]) if e["cpu_ratio"] else "",
                "" if e["share"] is None else f"{100 * e['share']:.1f} %",
                "" if e["peak_mb"] is None else _number(e["peak_mb"]),
                "" if e["gradient_error"] is None else f"{e['gradient_error']:.0e}",
                str(e["ms"]["n"]) + (f"; {e['error']}" if "error" in e else ""),
            ]
        )
    tried = {e["implementation"] for e in entries}
    for name, implementation in IMPLEMENTATIONS.items():
        if name not in tried and (reason := implementation.omits(WORKLOADS[workload])):
            rows.append([implementation.title, reason, *[""] * (len(COLUMNS) - 2)])
    rule = [":---", *["---:"] * (len(COLUMNS) - 1)]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in (rows[0], rule, *rows[1:])]


def _spread(s: Record) -> str:
    return f"{_number(s['median'])} [{_number(s['low'])}, {_number(s['high'])}]"


def _number(value: float) -> str:
    """Three digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


# ---- the chart ---------------------------------------------------------------------------------------------------

BAR, GAP, LEFT, WIDTH = 14, 4, 230, 760


def chart(records: Sequence[Record]) -> str:
    """Bars of `peer / ours` for each workload under the setting with most threads and default waiting, as SVG."""
    entries = [e for e in summary(records) if e.get("ratio")]
    threads = max((e["threads"] for e in entries), default=1)
    waits = [e["wait"] for e in entries if e["threads"] == threads]
    wait = "default" if "default" in waits or not waits else waits[0]
    entries = [e for e in entries if (e["threads"], e["wait"]) == (threads, wait)]
    longest = max((e["ratio"]["high"] for e in entries), default=1.0)
    origin = min(0.5, *(e["ratio"]["low"] / 1.5 for e in entries)) if entries else 0.5
    scale = (WIDTH - LEFT - 60) / math.log2(longest / origin)
    y, body = (
        40,
        [_text(10, 22, f"Time of a meta-step over ours, {Setting(threads, wait)} (logarithmic; ours = 1)", 14)],
    )
    for workload in dict.fromkeys(e["workload"] for e in entries):
        y += 22
        body.append(_text(10, y - 6, workload, 12, "bold"))
        for e in (e for e in entries if e["workload"] == workload):
            r, ours = e["ratio"], e["implementation"] == OURS
            x = [LEFT + scale * math.log2(r[k] / origin) for k in ("low", "median", "high")]
            middle, colour = y + BAR / 2, "#c2410c" if ours else "#64748b"
            body.append(_text(20, y + BAR - 3, IMPLEMENTATIONS[e["implementation"]].title, 11))
            body.append(f'<rect x="{LEFT}" y="{y}" width="{x[1] - LEFT:.1f}" height="{BAR}" fill="{colour}"/>')
            body.append(f'<path d="M{x[0]:.1f} {middle}H{x[2]:.1f}" stroke="#0f172a"/>')
            body.append(_text(x[2] + 5, y + BAR - 3, f"{r['median']:.2f}", 11))
            y += BAR + GAP
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 20}" font-family="sans-serif">'
    return "\n".join([start, f'<rect width="{WIDTH}" height="{y + 20}" fill="white"/>', *body, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, size: int, weight: str = "normal") -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}">{text}</text>'
