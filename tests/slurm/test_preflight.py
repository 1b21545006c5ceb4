"""What the check of a node finds, with an nvidia-smi and a kernel log that report faults on demand."""

import json

import pytest

from nft_megatron.slurm.preflight import gpu_problems, node_problems, read_preflight, xid_problems


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program of this name, which prints ``text``, before all others."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def make(name, text, code=0):
        (tmp_path / f"{name}.txt").write_text(text)
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncat {tmp_path}/{name}.txt\nexit {code}\n")
        path.chmod(0o755)

    return make


def gpus(*rows):
    return "".join(f"{index}, {ecc}, {used}\n" for index, (ecc, used) in enumerate(rows))


def test_good_gpus_have_no_problems(program):
    program("nvidia-smi", gpus(*[("0", "4")] * 6, ("[N/A]", "0"), ("[Not Supported]", "512")))
    assert gpu_problems(8) == []


def test_missing_failing_and_busy_gpus_are_named(program):
    program("nvidia-smi", gpus(("0", "4"), ("3", "4"), ("0", "71234")))
    assert gpu_problems(4) == [
        "3 GPUs instead of 4",
        "GPU 1 had 3 uncorrected ECC errors",
        "71234 MiB of GPU 2 are in use",
    ]


def test_an_nvidia_smi_that_fails_or_is_missing_is_a_problem(program, monkeypatch, tmp_path):
    program("nvidia-smi", "Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error", 15)
    assert gpu_problems(8) == ["nvidia-smi failed: Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpu_problems(8) == ["nvidia-smi is missing"]


def test_serious_xids_are_told_from_those_of_programs(program):
    program(
        "dmesg",
        "[12.3] NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=python, Ch 00000008, MMU Fault\n"
        "[13.3] NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.\n",
    )
    assert xid_problems() == ["Xid 79 in the kernel log"]


def test_the_sites_own_check_counts():
    assert node_problems(0, "true") == []
    assert node_problems(0, "echo the fan is blocked >&2; exit 3") == [
        "slurm.preflight_command exited with 3: the fan is blocked"
    ]


def write(folder, name, **content):
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_what_the_agent_makes_of_the_answers(tmp_path):
    assert read_preflight(tmp_path, ["n1", "n2"]).problem == "no node wrote to the shared folder"
    write(tmp_path, "n1", node="n1", problems=[])
    assert read_preflight(tmp_path, ["n1", "n2"]).bad == {"n2": "did not report in the preflight"}
    write(tmp_path, "n2", node="n2", problems=["7 GPUs instead of 8", "Xid 79 in the kernel log"])
    assert read_preflight(tmp_path, ["n1", "n2"]).bad == {"n2": "7 GPUs instead of 8; Xid 79 in the kernel log"}
    write(tmp_path, "n2", node="n2", problems=[])
    found = read_preflight(tmp_path, ["n1", "n2"])
    assert (found.bad, found.problem) == ({}, "the all-reduce over all nodes did not complete")
    write(tmp_path, "all_reduce", problem="all-reduce: 2 ones add up to 1")
    assert read_preflight(tmp_path, ["n1", "n2"]).problem == "all-reduce: 2 ones add up to 1"
    write(tmp_path, "all_reduce", problem=None)
    found = read_preflight(tmp_path, ["n1", "n2"])
    assert (found.bad, found.problem) == ({}, None)
