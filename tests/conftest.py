"""Shared set-up of the tests."""

import pytest
import torch

from metalearn import composing, launchers, schema, sweeper


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


@pytest.fixture(scope="module")
def compose_once():
    """Keep compositions between calls of `expand`, for modules in which conf/ does not change."""
    with pytest.MonkeyPatch.context() as patch:
        for kept in (composing.base_of, composing.dataset_section):
            patch.setattr(kept, "cache_clear", lambda: None)
        yield
    composing.base_of.cache_clear()
    composing.dataset_section.cache_clear()
