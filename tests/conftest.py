"""Shared by all tests: no GPU, no hub, no network, and one pool of ranks per session."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
# Processes that tests start must import this checkout, not one that is installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest
from support.pool import Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Up to eight ranks: `ranks.run(world, function, *args)`."""
    pool = Pool()
    yield pool
    pool.close()
