"""SIGKILL at random points of a real process leaves what an undisturbed run leaves."""

import json
import random
import signal
import subprocess
import time

import pytest
from runs import assert_twins, cell_of, command, console, folder

RUN = ("trainer.max_steps=400", "trainer.val_every=60", "trainer.save_seconds=0.05", "trainer.meta_batch_size=25")


TSA = ("algorithm=tsa_maml", "algorithm.tasks=700", "algorithm.pretrain_steps=60", "trainer.max_steps=60")


@pytest.mark.slow
@pytest.mark.timeout(500)  # a dozen processes, each of which imports torch first
@pytest.mark.parametrize(("seed", "more"), [(0, ()), (1, ()), (2, ()), (3, TSA), (4, TSA)])
def test_sigkill_at_random_points_equals_the_undisturbed_twin(tmp_path, seed, more):
    """Killed several times wherever it is: starting, preparing, training, writing a checkpoint, validating, testing."""
    generator = random.Random(seed)
    overrides = (*RUN, *more)
    cell = cell_of(tmp_path, *overrides)
    assert console(tmp_path / "twin", *overrides).returncode == 0
    kills = 0
    while not (folder(tmp_path / "killed", cell) / "result.json").exists():
        process = subprocess.Popen(
            command(tmp_path / "killed", *overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        patience = time.monotonic() + 60
        wanted = generator.uniform(0, 8 if more else 2.5) if kills < (6 if more else 4) else 300
        while process.poll() is None and not list(tmp_path.glob("killed/runs/*/checkpoints")):
            assert time.monotonic() < patience
            time.sleep(0.02)
        try:
            process.wait(wanted)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 1
    assert_twins(tmp_path / "twin", tmp_path / "killed", cell)
    steps = [
        json.loads(x)["step"]
        for x in (folder(tmp_path / "killed", cell) / "metrics.jsonl").read_text().splitlines()
        if x.endswith("}")
    ]
    assert max(steps) == cell.config["trainer"]["max_steps"]
