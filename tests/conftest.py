"""Shared set-up of the tests."""

import pytest
import torch

from metalearn import launchers, schema, sweeper


@pytest.fixture(scope="session", autouse=True)
def hydra_knows_us():
    """What the command line does first."""
    schema.register()
    sweeper.register()
    launchers.register()


@pytest.fixture(autouse=True)
def one_thread():
    """Results must not depend on how many threads the machine offers."""
    torch.set_num_threads(1)
