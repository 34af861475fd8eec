"""The benchmark: operation counts, statistics, reports, the command line, workers."""

import importlib.util
import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from metalearn.bench import command, peak, report
from metalearn.bench.ours import Subject
from metalearn.bench.peers import IMPLEMENTATIONS, OURS, SCRIPTS, Implementation
from metalearn.bench.process import Setting, Worker, WorkerError
from metalearn.bench.rounds import Bench, Log, checked, distance
from metalearn.bench.statistics import paired_ratio, spread
from metalearn.bench.workloads import WORKLOADS, make_arrays
from metalearn.schema import BadInput

TINY = replace(WORKLOADS["W1"], tasks=4, filters=32, image=(1, 16, 16))  # not so tiny that it is compiled


# ---- workloads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, giga",
    [("W1", 36.8), ("W1k5", 147), ("W1q", 167), ("W2", 294), ("W3", 261), ("W1q-fomaml", 148), ("W1q-anil", 148)],
)
def test_operation_counts_are_those_of_the_specification(name, giga):
    assert float(f"{WORKLOADS[name].flop() / 1e9:.3g}") == giga


@pytest.mark.parametrize("name, giga", [("W1", 18.6), ("W1k5", 55.7), ("W1q", 148), ("W2", 111), ("W3", 121)])
def test_first_order_counts_are_those_of_the_specification(name, giga):
    assert float(f"{replace(WORKLOADS[name], form='fomaml').flop() / 1e9:.3g}") == giga


def products(workload, *, hessian: bool) -> int:
    """Operations that PyTorch counts in one example's gradient, or in its Hessian-vector product alone."""
    arrays = make_arrays(workload)
    params = {k[6:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("param.")}
    x = torch.from_numpy(arrays["support.x"][0])

    def loss(p):
        h = x
        for i in range(1, 5):
            h = torch.nn.functional.conv2d(h, p[f"block{i}.conv.weight"], padding=1)
            h = torch.nn.functional.avg_pool2d(torch.tanh(h), 2)
        return torch.nn.functional.linear(h.flatten(1), p["head.weight"], p["head.bias"]).square().sum()

    leaves = {k: p.requires_grad_() for k, p in params.items() if "norm" not in k}
    with FlopCounterMode(display=False) as count:
        grads = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=hessian)
    if hessian:
        with FlopCounterMode(display=False) as count:
            torch.autograd.grad(grads, list(leaves.values()), [torch.ones_like(g) for g in grads], allow_unused=True)
    return count.get_total_flops() // len(x)


@pytest.mark.parametrize("channels", [1, 3])
def test_operation_counts_are_those_that_pytorch_counts(channels):
    """A meta-step is S gradients and Hessian-vector products K times, and Q gradients, for each task."""
    w = replace(WORKLOADS["W1"], tasks=2, steps=3, queries=2, filters=8, image=(channels, 16, 16))
    gradient, hessian = (products(w, hessian=h) for h in (False, True))
    hessian -= 2 * w.layers()[0]  # PyTorch's double backward of the first convolution has a product that nobody needs
    assert replace(w, form="fomaml").flop() == w.tasks * (3 * w.support + w.query) * gradient
    assert w.flop() == w.tasks * (3 * w.support * (gradient + hessian) + w.query * gradient)


def test_reptile_takes_every_example_of_the_pool_once():
    w = WORKLOADS["W1q-reptile"]
    rows = make_arrays(w)["rows"]
    assert rows.shape == (w.tasks, w.steps, w.minibatch)
    assert (np.sort(rows.reshape(w.tasks, -1)) == np.arange(w.support + w.query)).all()


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_fits_our_learners(monkeypatch, name):
    """Parameters load by name, and one step of the part that is checked gives a finite gradient for each."""
    monkeypatch.setattr("metalearn.bench.ours.STEPS", 1)  # too few to compile anything
    w = replace(checked(WORKLOADS[name]), filters=4, image=(WORKLOADS[name].image[0], 16, 16))
    subject = Subject(w.as_dict(), make_arrays(w), "cpu")
    subject.step()
    found = subject.gradient()
    assert {k: v.shape for k, v in found.items()} == w.shapes()
    assert all(np.isfinite(v).all() for v in found.values()) and np.isfinite(subject.loss())


# ---- statistics and reports --------------------------------------------------------------------------------------


def test_spread_is_median_and_quartiles():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0, 5)
    assert spread([7.0]) == (7.0, 7.0, 7.0, 1)


def test_ratios_are_of_the_same_round():
    """What slows a whole round cancels; rounds that only one has are left out."""
    assert paired_ratio({0: 4.0, 1: 40.0, 2: 1.0}, {0: 2.0, 1: 20.0}) == (2.0, 2.0, 2.0, 2)
    assert paired_ratio({0: 1.0}, {}) is None


def test_distance_is_relative_and_sees_what_is_missing():
    reference = np.array([3.0, 4.0])
    assert distance(reference * 1.01, reference) == pytest.approx(0.01)
    assert distance(reference[:1], reference) == float("inf")
    assert not distance(reference * np.nan, reference) <= 1


def records() -> list[dict]:
    cell = {"workload": "W1", "threads": 2, "wait": "default"}
    found = [{"kind": "peak", **cell, "flop": 1e9}]
    for name, seconds in ((OURS, 0.1), ("learn2learn", 0.3)):
        found.append({"kind": "check", "workload": "W1", "implementation": name, "gradient_error": 1e-15})
        found.append({"kind": "first", **cell, "implementation": name, "peak_bytes": 5_000_000, "heavy": False})
        for r in range(3):
            sample = {"seconds": seconds * (1 + r), "cpu_seconds": 2 * seconds * (1 + r), "round": r, "others": 0.4}
            found.append({"kind": "sample", **cell, "implementation": name, **sample})
    found.append(
        {
            "kind": "sample",
            **cell,
            "implementation": "peak",
            "round": 0,
            "seconds": 0.002,
            "cpu_seconds": 0.004,
            "others": 0.4,
        }
    )
    return [*found, {"kind": "error", **cell, "implementation": "higher", "error": "not built: no | compiler"}]


def test_summary_holds_medians_ratios_and_shares():
    ours, theirs, failed = report.summary(records())
    assert ours["ms"] == pytest.approx({"median": 200.0, "low": 150.0, "high": 250.0, "n": 3})
    assert ours["share"] == pytest.approx(WORKLOADS["W1"].flop() / 0.2 / 5e11)
    assert theirs["ratio"]["median"] == pytest.approx(3.0) and theirs["cpu_ratio"]["n"] == 3
    assert ours["peak_mb"] == 5.0 and ours["tasks_per_second"] == pytest.approx(160)
    assert failed["error"].startswith("not built") and "ms" not in failed


def test_table_has_a_row_for_everyone_and_says_what_failed():
    text = report.table({"date": "today"}, records())
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {len(report.COLUMNS)}
    cells = {row[0].strip(): [c.strip() for c in row[1:]] for row in rows}
    assert cells["learn2learn"][0] == "600 [450, 750]" and cells["learn2learn"][3] == "3.00 [3.00, 3.00]"
    assert cells["higher"][0] == "not built: no / compiler"
    assert (
        "W1: speed over learn2learn's: 3.00 (3.00-3.00; CPU time 3.00; other work took 0.4 cores) at 2 threads" in text
    )
    assert "500 GFLOP/s" in text and "Other work took 0.4 cores meanwhile" in text


def test_chart_is_an_xml_picture_with_a_bar_for_each():
    root = ElementTree.fromstring(report.chart(records()))
    bars = [e for e in root.iter() if e.tag.endswith("rect")]
    assert len(bars) == 1 + 2  # the background, ours and learn2learn
    assert float(bars[2].attrib["width"]) > float(bars[1].attrib["width"]) > 0
    ElementTree.fromstring(report.chart([]))


@pytest.mark.parametrize("value, text", [(1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"), (0.0, "0")])
def test_numbers_have_three_digits(value, text):
    assert report._number(value) == text


def test_log_survives_half_a_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    Log.open(path).add("sample", workload="W1", round=0)
    with open(path, "a") as file:
        file.write('{"kind": "sam')
    log = Log.open(path)
    log.add("done", workload="W1")
    assert [r["kind"] for r in Log.open(path).records] == ["sample", "done"]
    log.drop(workload="W1")
    assert Log.open(path).records == []


# ---- the command line --------------------------------------------------------------------------------------------


def metalearn(*arguments: str) -> subprocess.CompletedProcess:
    code = (
        "import sys; from metalearn.cli import main\n"
        "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def test_help_needs_no_torch():
    done = metalearn("bench", "--help")
    assert done.returncode == 0 and done.stderr.strip() == "False"
    for option in ("--workloads", "--peers", "--threads", "--wait", "--rounds", "--quick"):
        assert option in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workloads", "W1,W11"], "--workloads W11: must be one of W1, W4"),
        (["--peers", "learn2lern"], "did you mean 'learn2learn'?"),
        (["--wait", "active"], "--wait active"),
        (["--threads", "two"], "--threads two: must be whole numbers"),
        (["--threads", "0"], "--threads 0: must be in 1.."),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_bad_options_are_one_message(arguments, message):
    with pytest.raises(BadInput) as error:
        command.main(arguments)
    assert str(error.value).startswith("bench: ") and message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_bad_options_exit_with_2():
    done = metalearn("bench", "--peers", "nobody")
    assert done.returncode == 2 and done.stderr.startswith("metalearn: bench: --peers nobody: must be one of")


def test_list_names_workloads_and_peers(capsys):
    assert command.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*WORKLOADS, *IMPLEMENTATIONS))


def test_settings_treat_all_workers_alike(monkeypatch):
    """Neither the caller's OpenMP settings nor those of training runs reach a worker."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "3000")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    default, passive = (Setting(2, wait).environment() for wait in ("default", "passive"))
    assert not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & default.keys()
    assert passive["OMP_WAIT_POLICY"] == "passive" and passive["OMP_NUM_THREADS"] == "2"
    assert default["MALLOC_MMAP_MAX_"] == "0"


# ---- workers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def workers():
    made = []

    def make(name: str) -> Worker:
        made.append(Worker(IMPLEMENTATIONS[name].command(), Setting(1), sys.stderr, patience=60))
        return made[-1]

    yield make
    for worker in made:
        worker.end()


@pytest.mark.slow
def test_our_worker_answers(workers, tmp_path):
    np.savez(tmp_path / "a.npz", **make_arrays(TINY))
    worker = workers(OURS)
    for memory in (True, False):  # twice: the second workload comes after the first was closed
        first = worker.open(TINY.as_dict(), tmp_path / "a.npz", "cpu", tmp_path / "g.npz", memory=memory)
        timed = worker.run(10**6, at_most=0.2)
        worker.close()
    subject = Subject(TINY.as_dict(), make_arrays(TINY), "cpu")
    subject.step()
    assert first["loss"] == pytest.approx(subject.loss(), rel=1e-5) and first["peak_bytes"] is None
    with np.load(tmp_path / "g.npz") as file:
        assert {k: file[k].shape for k in file} == TINY.shapes()
    assert 0 < timed["seconds"] < 10 and timed["cpu_seconds"] > 0 and timed["others"] >= 0
    with pytest.raises(WorkerError, match="FileNotFoundError"):
        worker.open(TINY.as_dict(), tmp_path / "nothing.npz", "cpu")
    assert worker.open(TINY.as_dict(), tmp_path / "a.npz", "cpu")["loss"] > 0  # an error ends the workload alone


@pytest.mark.slow
def test_a_peer_that_is_not_built_stands_in_the_table(monkeypatch, tmp_path):
    """Its error is recorded, the others are measured, and a second call measures nothing again."""
    monkeypatch.setitem(WORKLOADS, "W1", TINY)
    monkeypatch.setattr("metalearn.bench.peers.CACHE", tmp_path)
    (tmp_path / "higher.json").write_text(json.dumps({"error": "no compiler"}))
    log = Log.open(tmp_path / "samples.jsonl")
    both = [IMPLEMENTATIONS[OURS], IMPLEMENTATIONS["higher"]]
    bench = Bench(log, both, "cpu", rounds=2, budget=0, errors=sys.stderr, say=lambda _: None)
    assert list(bench.measure(Setting(1), [TINY])) == [TINY]
    ours, higher = report.summary(log.records)
    assert ours["ms"]["n"] == 2 and ours["ratio"]["median"] == 1.0
    assert higher["error"] == "not built: no compiler"
    assert list(bench.measure(Setting(1), [TINY])) == []


@pytest.mark.slow
@pytest.mark.parametrize("large", [0, float("inf")])
def test_peers_are_paired_with_us_in_every_round(monkeypatch, tmp_path, large):
    """Interleaved with all others, or, if they need much memory, in turns with ours alone."""
    monkeypatch.setitem(WORKLOADS, "W1", TINY)
    monkeypatch.setattr("metalearn.bench.rounds.LARGE", large)
    log = Log.open(tmp_path / "samples.jsonl")
    three = [IMPLEMENTATIONS[name] for name in (OURS, "loop", "vmap")]
    bench = Bench(log, three, "cpu", rounds=4, budget=60, errors=sys.stderr, say=lambda _: None)
    assert list(bench.measure(Setting(1), [TINY])) == [TINY]
    found = {e["implementation"]: e for e in report.summary(log.records)}
    turns = 4 if large else 2
    assert [found[name]["ratio"]["n"] for name in ("loop", "vmap")] == [turns, turns]
    assert found[OURS]["ms"]["n"] == (4 if large else 2 + 2 + 4)
    assert all(e["gradient_error"] < 1e-12 and "error" not in e and e["share"] > 0 for e in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["maml", "fomaml", "anil", "protonet"])
@pytest.mark.parametrize("name", ["vmap", "vmap8"])
def test_torch_func_computes_what_we_compute(workers, tmp_path, name, form):
    log, w = Log(tmp_path / "samples.jsonl"), replace(WORKLOADS["W1"], name=form, form=form, queries=2)
    bench = Bench(log, [IMPLEMENTATIONS[OURS]], "cpu", 1, 0, io.StringIO())
    bench._check(w, OURS, workers(OURS), tmp_path)
    bench._check(w, name, workers(name), tmp_path)
    assert log.of("check", implementation=name)[0]["gradient_error"] < 1e-12


@pytest.mark.slow
def test_a_peer_that_computes_something_else_is_found(workers, tmp_path):
    log, w = Log(tmp_path / "samples.jsonl"), replace(TINY, name="tiny")
    bench = Bench(log, [IMPLEMENTATIONS[OURS]], "cpu", 1, 0, io.StringIO())
    bench._check(w, OURS, workers(OURS), tmp_path)
    with pytest.raises(WorkerError, match="computes something else"):
        bench._check(replace(w, alpha=0.41), "vmap", workers("vmap"), tmp_path)


@pytest.mark.slow
def test_batch_norm_under_vmap_has_a_wrong_second_derivative():
    """Why `peers/vmap.py` writes batch norm out. If this fails, PyTorch is repaired and it can use F.batch_norm."""
    scale = torch.ones(3, dtype=torch.double)

    def slope(x):  # of the sum of cubes along the scale
        return grad(lambda w: torch.nn.functional.batch_norm(x, None, None, w, None, True).pow(3).sum())(scale).sum()

    x = torch.randn(2, 4, 3, 5, 5, dtype=torch.double, requires_grad=True)
    (alone,) = torch.autograd.grad(sum(slope(part) for part in x), x)
    (mapped,) = torch.autograd.grad(vmap(slope)(x).sum(), x)
    assert not torch.allclose(mapped, alone)


def test_a_peer_that_cannot_be_built_leaves_its_error(monkeypatch, tmp_path):
    """It does not stop the others, and is tried again by the next call; what is built is left alone."""
    spec = importlib.util.spec_from_file_location("build_peers", SCRIPTS / "build.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tried = []

    def build(peer):
        tried.append(peer)
        if peer == "higher":
            raise subprocess.CalledProcessError(1, "pip", stderr="trying\nERROR: no such version\nhint: none")
        return ["jax==1"]

    monkeypatch.setattr(script, "CACHE", tmp_path)
    monkeypatch.setattr(script, "build", build)
    monkeypatch.setattr("metalearn.bench.peers.CACHE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["build.py", "higher", "jax"])
    assert [script.main(), script.main()] == [0, 0] and tried == ["higher", "jax", "higher"]
    assert IMPLEMENTATIONS["higher"].missing() == "not built: ERROR: no such version"
    assert IMPLEMENTATIONS["jax"].missing() is None
    monkeypatch.setattr(sys, "argv", ["build.py", "nobody"])
    assert script.main() == 2


def test_implementations_are_found_by_the_worker():
    assert all(isinstance(i, Implementation) and i.name == name for name, i in IMPLEMENTATIONS.items())


def test_the_peak_counts_the_operations_that_it_times():
    """Of the fastest shape, whichever that was."""
    for shapes in ((2, 4, 6), (1, 3, 20)), ((1, 3, 20), (2, 4, 6)):
        subject = peak.Subject("cpu", shapes)
        x, w = subject.tensors
        assert subject.flop == 2 * x.numel() * w[0].numel()
