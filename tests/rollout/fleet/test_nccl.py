"""The versions of NCCL of trainer and servers, without either."""

import pytest
import torch.distributed as dist

from nft_megatron.cli import doctor
from nft_megatron.rollout.fleet import nccl


@pytest.fixture
def environment(tmp_path):
    """The Python of an environment that holds this wheel of NCCL, or none."""

    def make(version: str) -> str:
        path = tmp_path / f"python{version}"
        path.write_text(f"#!/bin/sh\necho {version}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_the_version_is_that_of_the_wheel_in_the_other_environment(tmp_path, monkeypatch):
    wheel = tmp_path / "nvidia_nccl_cu13-2.29.7.dist-info"
    wheel.mkdir()
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-nccl-cu13\nVersion: 2.29.7\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert nccl.nccl_version() == "2.29.7"


def test_an_environment_without_nccl_or_that_does_not_run_has_no_version(environment, tmp_path):
    assert nccl.nccl_version(environment("")) is None
    assert nccl.nccl_version(str(tmp_path / "nothing")) is None


def test_before_a_group_exists_a_receiver_with_another_version_refuses():
    store = dist.HashStore()
    nccl.agree(store, 0, "2.28.9")
    nccl.agree(store, 1, "2.28.9")
    with pytest.raises(RuntimeError, match=r"NCCL is 2\.28\.9 in the trainer and 2\.30\.7 in vLLM"):
        nccl.agree(store, 2, "2.30.7")


@pytest.mark.parametrize(("theirs", "is_fault"), [("2.28.9", False), ("2.30.7", True)])
def test_doctor_compares_the_environments_of_a_configuration(monkeypatch, environment, theirs, is_fault):
    python = environment(theirs)
    monkeypatch.setattr(doctor, "servers_python", lambda config: python)
    monkeypatch.setattr(doctor, "nccl_version", lambda python=None: nccl.nccl_version(python) if python else "2.28.9")
    (finding,) = doctor._broadcasts(object())
    assert finding.is_fault == is_fault
    assert "2.28.9" in finding.state
    assert theirs in finding.state
