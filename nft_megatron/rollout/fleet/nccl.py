"""NCCL's version in the trainer's environment and in the servers': a broadcast between two versions is refused by NCCL itself,
with "invalid usage" or by hanging, in the middle of a run. Compared before one begins. Standard library only.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

    from nft_megatron.config.schema import Config

_SECONDS = 120
# The wheel's version, without importing torch; what torch was built with where there is none, as in NVIDIA's containers.
_LOOK = """
from importlib.metadata import distributions
named = {d.metadata["Name"]: d.version for d in distributions() if (d.metadata["Name"] or "").startswith("nvidia-nccl-")}
if named:
    print(max(named.values()))
else:
    import torch
    if torch.version.cuda:
        print(".".join(map(str, torch.cuda.nccl.version())))
"""


def nccl_version(python: str = sys.executable) -> str | None:
    """The version that the torch of this interpreter uses; None if it has none, or does not run."""
    try:
        found = subprocess.run([python, "-c", _LOOK], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def nccl_problem(trainer: str | None, servers: str | None) -> str | None:
    """What is wrong with these two versions, in one sentence.

    >>> nccl_problem("2.28.9", "2.29.7")
    'NCCL is 2.28.9 in the trainer and 2.29.7 in vLLM, which cannot share a broadcast: install the same torch in both'
    >>> nccl_problem("2.29.7", "2.29.7") is nccl_problem(None, "2.29.7") is None
    True
    """
    if not trainer or not servers or trainer == servers:
        return None
    versions = f"NCCL is {trainer} in the trainer and {servers} in vLLM"
    return f"{versions}, which cannot share a broadcast: install the same torch in both"


def servers_python(config: Config) -> str | None:
    """The Python of the servers that get their weights by broadcast, if that is another one than the trainer's."""
    broadcasts = config.rollout.engine == "vllm" and config.fleet.weights == "transfer"
    return str(config.fleet.python) if broadcasts and config.fleet.python else None


def agree(store: dist.Store, rank: int, version: str) -> None:
    """Every rank of a group says its version before the group exists; rank 0's is the one to have.

    Raises:
        RuntimeError: on the ranks that have another.
    """
    if rank == 0:
        store.set("nccl", version)
    elif problem := nccl_problem(store.get("nccl").decode(), version):
        raise RuntimeError(problem)
