"""The cluster that the tests of a session share; each begins with no job and with every node idle."""

import pytest
from slurm.lab import Lab, missing
from slurm.runs import SlurmRun


@pytest.fixture(scope="session")
def slurm_installed():
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(slurm_installed):
    with Lab() as lab:
        yield lab


@pytest.fixture
def lab(cluster):
    """A real Slurm of four nodes, n1 to n4, with 8 GPUs each that are links to /dev/null."""
    yield cluster
    cluster.clear()


@pytest.fixture
def slurm_run(lab, run_config, tmp_path):
    """Makes a run on two nodes, a rank on each. Keyword arguments replace fields of sections."""

    def make(run_dir="run", **sections) -> SlurmRun:
        sections = {
            "cluster": {"trainer_nodes": 2, "gpus_per_node": 1},
            **sections,
            "slurm": {
                "gres": "",
                "time": "30",
                "preflight": False,
                "max_failures": 2,
                "exclude_after": 9,
                **sections.get("slurm", {}),
            },
        }
        return SlurmRun(lab, run_config(run_dir, **sections), tmp_path / run_dir)

    return make
