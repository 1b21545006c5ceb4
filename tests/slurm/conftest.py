"""The cluster that the tests of a session share; each begins with no job and with every node idle."""

import pytest
from slurm.lab import Lab, missing


@pytest.fixture(scope="session")
def cluster():
    if reason := missing():
        pytest.skip(reason)
    with Lab() as lab:
        yield lab


@pytest.fixture
def lab(cluster):
    """A real Slurm of four nodes, n1 to n4, with 8 GPUs each that are links to /dev/null."""
    yield cluster
    cluster.clear()
