"""The table of versions, the container that installs it, and the doctor that compares with it."""

import re
import runpy
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from nft_megatron.cli import doctor

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "nft_megatron" / "cli" / "versions.toml"
VERSIONS = tomllib.loads(TABLE.read_text())


def test_trainer_and_servers_share_torch_and_nccl():
    for package in ("torch", "nvidia-nccl-cu13"):
        assert VERSIONS["trainer"][package] == VERSIONS["servers"][package]


def test_the_trainer_s_versions_are_those_that_ci_pins():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints" / "py312-mcore019.txt").read_text().splitlines() if "==" in line
    )
    for package in ("torch", "megatron-core", "transformers"):
        assert VERSIONS["trainer"][package] == pinned[package]


def test_the_dockerfile_names_no_version_of_its_own():
    text = (ROOT / "container" / "Dockerfile").read_text()
    assert re.findall(r"^ARG BASE=(.*)$", text, re.MULTILINE) == [VERSIONS["image"]["base"]]
    assert not re.findall(r"[a-z]==|>=", text)
    assert VERSIONS["image"]["base"].startswith(f"nvidia/cuda:{VERSIONS['image']['cuda']}.")
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split())
    used = re.findall(r"requirements\.py nft_megatron/cli/versions\.toml (\S+)([\w\s-]*?) >", text)
    assert [(side, names.split()) for side, names in used] == [
        ("servers", []),
        ("trainer", []),
        ("trainer", ["torch", "nvidia-nccl-cu13"]),
    ]


def test_requirements_for_pip_come_from_the_table():
    requirements = runpy.run_path(str(ROOT / "container" / "requirements.py"))["requirements"]
    every = requirements(TABLE, "trainer", [])
    assert f"transformer-engine[core_cu13,pytorch]=={VERSIONS['trainer']['transformer-engine[core_cu13,pytorch]']}" in every
    assert len(every) == len(VERSIONS["trainer"])
    assert requirements(TABLE, "servers", ["torch"]) == [f"torch=={VERSIONS['servers']['torch']}"]
    with pytest.raises(SystemExit, match="no apex in"):
        requirements(TABLE, "trainer", ["apex", "torch"])


def test_the_doctor_says_what_differs(monkeypatch):
    found = {"torch": "2.13.0+cu130", "megatron-core": "0.19.20", "transformers": None}
    monkeypatch.setattr(doctor, "installed", lambda package: found.get(package))
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.12.11")
    assert doctor.version_differences("13.0") == ["megatron-core 0.19.20 (0.19.2)"]
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.11.2")
    assert doctor.version_differences("12.8")[1:] == ["python 3.11.2 (3.12)", "cuda 12.8 (13.0)"]


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_a_gpu_s_findings_name_the_switch_that_the_environment_overrules(on_gpu, monkeypatch, run_config):
    from nft_megatron.config.load import load_config

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(doctor, "_imports", lambda module: module == "transformer_engine")
    config = load_config(run_config(parallel={"tensor": 2}, kernels={"gradient_accumulation_fusion": False}))
    found = {finding.name: finding for finding in doctor.findings(config)}
    connections = found["CUDA_DEVICE_MAX_CONNECTIONS"]
    assert (connections.state, connections.remedy) == ("32 in the environment", "unset it; section kernels asks for 1")
    assert found["PYTORCH_ALLOC_CONF"].state == "expandable_segments:True" and not found["PYTORCH_ALLOC_CONF"].remedy
    assert found["weight gradients"].remedy == "set kernels.gradient_accumulation_fusion=true"
    assert f"torch {version('torch')}" in found["versions"].state or version("torch").startswith(VERSIONS["trainer"]["torch"])
    without = {finding.name: finding for finding in doctor.findings()}
    assert without["weight gradients"].state == "added to main_grad by Transformer Engine's kernel"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in without


def test_switches_that_need_transformer_engine_are_faults_without_it(on_gpu, monkeypatch, run_config):
    from nft_megatron.config.load import load_config

    config = load_config(
        run_config(
            model={"dtype": "bfloat16"},
            parallel={"tensor": 2},
            train={"pad_to_budget": True},
            kernels={"overlap_tensor_communication": True},
            optimizer={"first_moment": "bfloat16"},
        )
    )
    for has_engine in (True, False):
        monkeypatch.setattr(doctor, "_imports", lambda module, has_engine=has_engine: has_engine)
        found = {finding.name: finding for finding in doctor.findings(config)}
        overlap, moment = found["kernels.overlap_tensor_communication"], found["optimizer.first_moment"]
        assert "optimizer.second_moment" not in found
        assert (overlap.is_fault, moment.is_fault) == (not has_engine, not has_engine)
        needs = "" if has_engine else ", needs a GPU and Transformer Engine"
        assert (overlap.state, moment.state) == (f"true{needs}", f"bfloat16{needs}")
        assert found["LM head"].state == ("Triton's kernels" if has_engine else "torch's operators, a pass over memory each")
    assert found["LM head"].remedy == "pip install triton"
