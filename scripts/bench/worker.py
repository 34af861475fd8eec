"""A worker of `metalearn bench`: computes meta-steps with one implementation, when it is told to.

    python worker.py MODULE VARIANT [PRELOAD ...]

MODULE (`peers.higher`, `metalearn.bench.ours`) has `build(workload, arrays, device, variant)`, whose result has
`step()` (outer gradient and outer Adam update), `sync()` (wait for the device), `loss()` and `gradient()` (of the last
step, the latter by parameter's name). It computes in the precision of the arrays. Each workload is handled by a fork of
this process, which has imported PRELOAD, so that it begins with clean memory. Lines of JSON come in on standard input,
and one answer a line goes out on standard output:

    {"workload": {...}, "arrays": path, "device": "cpu", "gradient": path, "memory": true}   the first of a workload
        {"loss": .., "first_seconds": .., "peak_bytes": .. or null, "flop": of a step, where it knows}
    {"steps": n, "at_most": seconds}        {"steps": done, "seconds": .., "cpu_seconds": ..}
    {"close": true}     {"closed": true}

or {"error": "..."}; then the workload is closed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
import traceback

import numpy as np


def main() -> None:
    """Serve until standard input ends."""
    module, variant, *preload = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    for name in preload:
        importlib.import_module(name)
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            handle(json.loads(line), module, variant, answers)
            answers.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            answer(answers, error=f"the worker died: wait status {status}" + (" (killed)" if status == 9 else ""))


def answer(answers, **values) -> None:
    """One line for the parent."""
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def handle(request: dict, module: str, variant: str, answers) -> None:
    """One workload, until it is closed."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out, this process ends, and no other
    except OSError:
        pass
    try:
        with np.load(request["arrays"]) as file:
            arrays = dict(file)
        subject = importlib.import_module(module).build(request["workload"], arrays, request["device"], variant)
        answer(answers, **first(subject, request))
        for line in iter(sys.stdin.readline, ""):
            message = json.loads(line)
            if message.get("close"):
                answer(answers, closed=True)
                return
            answer(answers, **timed(subject, message["steps"], message["at_most"]))
    except Exception as error:
        traceback.print_exc()
        answer(answers, error=f"{type(error).__name__}: {error}"[:500])


def first(subject, request: dict) -> dict:
    """The first step, whose result is checked; then, if wanted, one more for the memory meter."""
    anonymous = status_bytes("RssAnon")
    seconds = timed(subject, 1)["seconds"]
    loss, gradient = float(subject.loss()), None
    if request.get("gradient"):
        gradient = {k: np.asarray(v) for k, v in subject.gradient().items()}
        np.savez(request["gradient"], **gradient)
    del gradient
    peak = peak_bytes(subject, request["device"], anonymous) if request.get("memory") else None
    return {"loss": loss, "first_seconds": seconds, "peak_bytes": peak, "flop": getattr(subject, "flop", None)}


def timed(subject, steps: int, at_most: float = float("inf")) -> dict:
    """Wall and CPU time (of all threads) of some steps; none is begun after `at_most` seconds."""
    subject.sync()
    cpu, wall = time.process_time(), time.perf_counter()
    done = 0
    while done < steps and time.perf_counter() - wall < at_most:
        subject.step()
        done += 1
    subject.sync()
    return {"steps": done, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def peak_bytes(subject, device: str, anonymous: int) -> int | None:
    """Most memory that a step holds, beyond what there was before the first: data, parameters and libraries."""
    if device != "cpu":
        subject.step()
        subject.sync()
        return subject.peak_bytes()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compiling and first calls left behind
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew
    except (OSError, AttributeError):
        pass  # then it is that of the first step too
    subject.step()
    try:
        return max(0, status_bytes("VmHWM") - status_bytes("RssFile") - anonymous)
    except (OSError, KeyError):
        return None


def status_bytes(name: str) -> int:
    """A field of /proc/self/status; 0 where there is none."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return 0
    return int(fields[name].split()[0]) * 1024


if __name__ == "__main__":
    main()
