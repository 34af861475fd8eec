"""SIGKILL at random points of a real process leaves what an undisturbed run leaves."""

import json
import random
import signal
import subprocess
import time

import pytest
from runs import assert_twins, cell_of, command, console, folder

RUN = ("trainer.max_steps=400", "trainer.val_every=60", "trainer.save_seconds=0.05", "trainer.meta_batch_size=25")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_random_points_equals_the_undisturbed_twin(tmp_path, seed):
    """Killed several times wherever it happens to be: starting, training, writing a checkpoint, validating, testing."""
    generator = random.Random(seed)
    cell = cell_of(tmp_path, *RUN)
    assert console(tmp_path / "twin", *RUN).returncode == 0
    kills = 0
    while not (folder(tmp_path / "killed", cell) / "result.json").exists():
        process = subprocess.Popen(
            command(tmp_path / "killed", *RUN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        patience = time.monotonic() + 60
        wanted = generator.uniform(0, 2.5) if kills < 4 else 60
        while process.poll() is None and not (folder(tmp_path / "killed", cell) / "checkpoints").exists():
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
    assert max(steps) == 400
