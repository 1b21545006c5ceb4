"""A check of every node before an attempt: ``srun python -m nft_megatron.slurm.preflight FOLDER --gpus N``.

The first task of a node checks the node and writes FOLDER/<node>.json. Once all nodes have written theirs, which proves that
the shared folder can be read and written, and none has a problem, all tasks run an all-reduce over the network. Where weights
will go to vLLM by broadcast, the first task then compares the versions of NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.deadline import Deadline
from nft_megatron.rollout.fleet.nccl import nccl_problem, nccl_version

_SERIOUS_XIDS = {48, 62, 64, 74, 79, 95, 119, 120, 140}
"""Double-bit ECC, halted firmware, failed row remapping, NVLink, off the bus, uncontained ECC, GSP, unrecovered ECC:
NVIDIA's "XID Errors" document. Others, such as 13 and 31, are mostly caused by programs."""
_MEMORY_LEFT_OVER = 2048
_QUERY = "index,ecc.errors.uncorrected.volatile.total,memory.used"
_ALL_REDUCE = "all_reduce.json"
_PAUSE = 0.2
_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class NodeReport:
    """What a node's first task found; without problems the node is good."""

    node: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Preflight:
    """``bad`` nodes with their reasons; ``problem``, if any, is one that no node can be blamed for."""

    bad: dict[str, str]
    problem: str | None


def read_preflight(folder: Path, nodes: Iterable[str]) -> Preflight:
    """The reports in ``folder``. A node without one is bad, unless no node reported."""
    reports = {node: _read(folder / f"{node}.json") for node in nodes}
    if not any(reports.values()):
        return Preflight({}, "no node wrote to the shared folder")
    bad = {}
    for node, report in reports.items():
        problems = report["problems"] if report else ["did not report in the preflight"]
        if problems:
            bad[node] = "; ".join(problems)
    all_reduce = _read(folder / _ALL_REDUCE)
    if bad or (all_reduce and all_reduce["problem"] is None):
        return Preflight(bad, None)
    return Preflight({}, all_reduce["problem"] if all_reduce else "the all-reduce over all nodes did not complete")


def node_problems(gpus: int, command: str | None) -> list[str]:
    """Problems of this machine, as short sentences."""
    problems = gpu_problems(gpus) + xid_problems() if gpus else []
    if command:
        try:
            done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return [*problems, "slurm.preflight_command did not finish within 120 s"]
        if done.returncode:
            words = (done.stdout + done.stderr).strip()[-200:]
            problems.append(f"slurm.preflight_command exited with {done.returncode}: {words}".rstrip(": "))
    return problems


def gpu_problems(gpus: int) -> list[str]:
    """From nvidia-smi: GPUs that are missing, had uncorrected ECC errors, or are still in use by another process."""
    try:
        query = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return ["nvidia-smi is missing"]
    except subprocess.TimeoutExpired:
        return ["nvidia-smi hangs"]
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode or any(len(row) != 3 for row in rows):
        return [f"nvidia-smi failed: {(answer.stderr or answer.stdout).strip()[:200]}"]
    problems = [] if len(rows) >= gpus else [f"{len(rows)} GPUs instead of {gpus}"]
    for index, ecc, used in rows:
        if ecc.isdigit() and int(ecc):  # "[N/A]" if ECC is off
            problems.append(f"GPU {index} had {ecc} uncorrected ECC errors")
        if used.isdigit() and int(used) > _MEMORY_LEFT_OVER:
            problems.append(f"{used} MiB of GPU {index} are in use")
    return problems


def xid_problems() -> list[str]:
    """Serious driver errors since the node booted, if the kernel log is readable."""
    try:
        log = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = {int(number) for number in re.findall(r"NVRM: Xid \([^)]*\): (\d+)", log)}
    return [f"Xid {number} in the kernel log" for number in sorted(found & _SERIOUS_XIDS)]


def all_reduce(rank: int, world: int, local_rank: int, seconds: float) -> str | None:
    """All-reduce a few megabytes of ones over all tasks; None, or what went wrong."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
            init_method=f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        )
        ones = torch.ones(_ELEMENTS if on_gpu else 1024, device=device)
        dist.all_reduce(ones)
        dist.all_reduce(torch.ones(1), group=dist.new_group(backend="gloo"))  # ranks coordinate over it
        total = float(ones.sum()) / len(ones)
        dist.destroy_process_group()
    except Exception as error:
        return f"all-reduce: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None if total == world else f"all-reduce: {world} ones add up to {total:g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """One task of the step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that a node should have; 0: do not check")
    parser.add_argument("--command", help="the site's own check")
    parser.add_argument("--servers-python", help="Python of the vLLM servers that get weights by broadcast")
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args(arguments)
    deadline = Deadline.of(options.seconds)
    env = os.environ
    rank, world, local_rank = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    if local_rank == 0:
        report = NodeReport(env["SLURMD_NODENAME"], tuple(node_problems(options.gpus, options.command)))
        with atomic_file(options.folder / f"{report.node}.json", make_folder=False) as temporary:
            temporary.write_text(json.dumps(asdict(report)))
    reports = _wait_for_reports(options.folder, int(env["SLURM_STEP_NUM_NODES"]), deadline)
    if reports is None or any(report["problems"] for report in reports):
        return
    problem = all_reduce(rank, world, local_rank, max(1.0, deadline.left))
    if rank == 0 and options.gpus and options.servers_python:
        problem = problem or nccl_problem(nccl_version(), nccl_version(options.servers_python))
    if rank == 0:
        with atomic_file(options.folder / _ALL_REDUCE, make_folder=False) as temporary:
            temporary.write_text(json.dumps({"problem": problem}))
    sys.stdout.flush()
    os._exit(0)  # a broken process group would wait for its threads


def _wait_for_reports(folder: Path, num_nodes: int, deadline: Deadline) -> list[dict] | None:
    """The reports of all nodes; None if some are still missing at the deadline."""
    while not deadline.has_passed:
        reports = [report for path in folder.glob("*.json") if path.name != _ALL_REDUCE and (report := _read(path))]
        if len(reports) == num_nodes:
            return reports
        time.sleep(_PAUSE)
    return None


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    main()
