"""What `metalearn bench` does not measure of the engine: memory against inner steps, evaluation, and whole runs.

usage: python scripts/bench_engine.py memory       peak memory of W1q for 1 to 64 inner steps: MAML (two forms), iMAML
       python scripts/bench_engine.py evaluation   frozen episodes a second, with and without the compiled kernels
       python scripts/bench_engine.py runs         meta-steps a second of a run from the command line, and of the engine
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS = 3


def child(code: str, **environment: str) -> dict[str, Any]:
    """What a fresh process prints, as JSON."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", PREPARE + code], capture_output=True, text=True, env=env, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


PREPARE = """
import json, statistics, time, torch
from metalearn.algorithms import IMAML, MAML, ProtoNet
from metalearn.backbones import MLP, Conv4
from metalearn.compiled import Compiler
from metalearn.episode import Episode, Examples, MetaBatch
from metalearn.memory import keep_freed_memory
from metalearn.optim import Adam
from metalearn.random import Key, TaskKey

def omniglot(cls, tasks, queries, **options):
    torch.manual_seed(0)
    net = Conv4(input_shape=(1, 28, 28), outputs=0 if cls is ProtoNet else 5)
    def part(n):
        return Examples(torch.randn(tasks, 5 * n, 1, 28, 28), torch.arange(5).repeat_interleave(n).repeat(tasks, 1))
    return finish(cls(net=net, kind="classification", **options), Episode(part(1), part(queries), {}), tasks)

def sinusoid(tasks=25):
    net = MLP(input_shape=(1,), outputs=1, hidden=[40, 40])
    def part():
        return Examples(torch.randn(tasks, 10, 1), torch.randn(tasks, 10, 1))
    return finish(MAML(net=net, kind="regression", alpha=0.01, inner_steps=1), Episode(part(), part(), {}), tasks)

def finish(learner, episodes, tasks):
    learner.initialize(0)
    learner.attach(Adam(lr=1e-3), 2**31)
    key = TaskKey(Key(0), torch.zeros(tasks, dtype=torch.int64), torch.arange(tasks))
    return learner, MetaBatch(0, tasks, episodes, key)

def times(step, n):
    step(); step()
    found = []
    for _ in range(n):
        began = time.perf_counter(); step(); found.append(time.perf_counter() - began)
    return found
"""

MEMORY = """
learner, batch = omniglot({learner}, inner_steps={steps}, chunk_bytes=1)
optimizer = learner.configure_optimizers()
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
before = status("VmRSS")
learner.meta_step(batch, optimizer)
began = time.process_time()
learner.meta_step(batch, optimizer)
print(json.dumps({{"mb": status("VmHWM") - before, "seconds": time.process_time() - began}}))
"""

EVALUATION = """
keep_freed_memory()
learner, batch = omniglot({cls}, 4, 15, {options})
learner.watch([{mode!r}], "last")
print(json.dumps(times(lambda: learner.evaluate(batch, learner.test_points), {n})))
"""

BARE = """
keep_freed_memory()
learner, batch = {problem}
learner.compiler = Compiler(always=False)
optimizer = learner.configure_optimizers()
print(json.dumps(times(lambda: learner.meta_step(batch, optimizer), {n})))
"""


def memory() -> None:
    """Memory beyond what the process has before its first meta-step, and CPU time; 8 tasks, one at a time."""
    print("| inner steps | MAML: MB | recomputed: MB | iMAML: MB | CPU time over MAML's: recomputed | iMAML |")
    print("| --- | --- | --- | --- | --- | --- |")
    learners = (
        "MAML, 8, 15, alpha=0.01",
        "MAML, 8, 15, alpha=0.01, recompute=True",
        "IMAML, 8, 15, alpha=0.01, lam=2.0",
    )
    for steps in (1, 4, 16, 64):
        found = [child(MEMORY.format(learner=args, steps=steps), OMP_NUM_THREADS="1") for args in learners]
        kept, again, implicit = (f"{one['mb']:.0f}" for one in found)
        _, more, other = (f"{one['seconds'] / found[0]['seconds']:.2f}" for one in found)
        print(f"| {steps} | {kept} | {again} | {implicit} | {more} | {other} |", flush=True)


def evaluation() -> None:
    """Rounds of both forms take turns; 4 frozen 5-way 1-shot tasks with 15 queries a class, one thread."""
    print(
        "| algorithm | bn | episodes/s | without kernels | ratio (median of rounds) |\n| --- | --- | --- | --- | --- |"
    )
    forms = {
        "maml": ("MAML", "alpha=0.4, inner_steps=1, test_steps=3"),
        "anil": ("MAML", "alpha=0.4, inner_steps=1, test_steps=3, adapted='head'"),
        "protonet": ("ProtoNet", ""),
    }
    for name, (cls, options) in forms.items():
        for mode in ("batch", "support_plus_one"):
            code = EVALUATION.format(cls=cls, options=options, mode=mode, n=2)
            pairs = []
            for _ in range(ROUNDS):
                ours, plain = (
                    statistics.median(child(code, OMP_NUM_THREADS="1", METALEARN_KERNELS=k))  # type: ignore[arg-type]
                    for k in ("native", "torch")
                )
                pairs.append((ours, plain))
            a, b = (4 / statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(plain / ours for ours, plain in pairs)
            print(f"| {name} | {mode} | {a:.1f} | {b:.1f} | {ratio:.2f} |", flush=True)


def runs() -> None:
    """Training time of runs (from metrics.jsonl) against the bare engine's, in turns, default logging, two threads."""
    commands = {
        "W1": (
            "omniglot(MAML, 32, 1, alpha=0.4, inner_steps=1)",
            "dataset=glyphs algorithm=maml dataset.queries=1 trainer.meta_batch_size=32 algorithm.inner_steps=1",
            100,
            30,
        ),
        "W4": ("sinusoid()", "dataset=sinusoid algorithm=maml", 20_000, 3000),
    }
    for name, (problem, command, steps, n) in commands.items():
        ratios = []
        for _ in range(ROUNDS):
            bare = statistics.mean(child(BARE.format(problem=problem, n=n)))  # type: ignore[arg-type]
            with tempfile.TemporaryDirectory() as folder:
                line = [
                    *command.split(),
                    f"trainer.max_steps={steps}",
                    "trainer.val_every=0",
                    "trainer.test_episodes=2",
                ]
                line += (
                    [f"output_dir={folder}", "evaluation.bn_modes=[batch]"]
                    if name == "W1"
                    else [f"output_dir={folder}"]
                )
                subprocess.run([sys.executable, "-m", "metalearn", *line], check=True, capture_output=True)
                log = next(Path(folder).glob("runs/*/metrics.jsonl")).read_text().splitlines()
            lines = [json.loads(entry) for entry in log]
            first = next(entry for entry in lines if entry["step"] >= steps // 10)  # after compiling and warming up
            last = lines[-1]
            run = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
            ratios.append(bare / run)
            print(f"{name}: {1 / bare:.1f} meta-steps/s bare, {1 / run:.1f} in a run: {bare / run:.0%}", flush=True)
        print(f"{name}: a run has {statistics.median(ratios):.0%} of the engine's speed (median of {len(ratios)})")


if __name__ == "__main__":
    began = time.monotonic()
    parts = {"memory": memory, "evaluation": evaluation, "runs": runs}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        sys.exit(__doc__)
    parts[sys.argv[1]]()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
