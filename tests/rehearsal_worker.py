"""Runs whole training steps on the pretended GPU, and on the CPU to compare them with; see rehearsal_device.py.

    python tests/rehearsal_worker.py CASES.json

imports everything once and forks the ranks of one case after the other. Every case writes ``OUT/rank<r>.json``, or the
traceback to ``OUT/rank<r>.err``; rank 0 also ``OUT/weights.safetensors``, the weights after the updates.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TORCHDYNAMO_DISABLE"] = "1"
warnings.filterwarnings("ignore")

import rehearsal_cuda  # noqa: E402
import rehearsal_faults  # noqa: E402
import rehearsal_head  # noqa: E402
import torch  # noqa: E402
from rehearsal_device import CALLED, Device  # noqa: E402
from rehearsal_host import FAULTS, SYNCS  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from whole_step import everything_else  # noqa: E402

from nft_megatron.config.load import load_config  # noqa: E402
from nft_megatron.model import build, lm_head  # noqa: E402
from nft_megatron.model.topology import Topology, init_topology, shutdown  # noqa: E402
from nft_megatron.run.build import build_trainer  # noqa: E402
from nft_megatron.weights import read_shape  # noqa: E402


@dataclass(frozen=True)
class Case:
    """``bucket``: elements of a gradient bucket; null: Megatron's default. ``fault``: a name in rehearsal_faults.py.

    ``resumes``: a checkpoint that is loaded at the end. ``stages``: stop after the updates, or do everything.
    """

    out: str
    config: str
    ledger: str
    world: int = 1
    device: str = "cuda"
    bucket: int | None = None
    fault: str | None = None
    resumes: str | None = None
    stages: str = "all"


def main(path: Path) -> None:
    cases = [Case(**fields) for fields in json.loads(path.read_text())]
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for case in cases:
        Path(case.out).mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [_fork(case, rank, port) for rank in range(case.world)]
        for pid in ranks:
            os.waitpid(pid, 0)


def _fork(case: Case, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.world, "LOCAL_WORLD_SIZE": case.world}
    if case.world > 1:
        os.environ.update({name: str(value) for name, value in (env | {"MASTER_PORT": port}).items()}, MASTER_ADDR="127.0.0.1")
    place = Path(case.out) / f"rank{rank}"
    try:
        place.with_suffix(".json").write_text(json.dumps(rehearse(case)))
    except BaseException as error:
        kind = type(error).__name__ if isinstance(error, FAULTS) else ""
        place.with_suffix(".err").write_text(f"{kind}\n{traceback.format_exc()}")
    os._exit(0)


def rehearse(case: Case) -> dict[str, Any]:
    if case.device == "cuda":
        rehearsal_cuda.install()
        lm_head.kernels = lambda: rehearsal_head
    with Device() if case.device == "cuda" else contextlib.nullcontext():
        parallel = load_config(Path(case.config)).parallel
        topology = init_topology(
            parallel.tensor,
            parallel.pipeline,
            parallel.context,
            virtual_pipeline=parallel.virtual_pipeline,
            first_stage_layers=parallel.first_stage_layers,
            last_stage_layers=parallel.last_stage_layers,
            expert=parallel.expert,
            timeout_seconds=120,
            threads=1,
        )
        with rehearsal_faults.planted(case.fault, topology), _bucket_size(case.bucket):
            result = _steps(case, topology)
        del topology
        gc.collect()
        shutdown()
    return result


@contextlib.contextmanager
def _bucket_size(size: int | None) -> Iterator[None]:
    """Buckets so small that there are several, each of them reduced while the backward pass goes on."""
    if size is None:
        yield
        return
    config = partial(build.DistributedDataParallelConfig, bucket_size=size)
    with mock.patch.object(build, "DistributedDataParallelConfig", config):
        yield


def _steps(case: Case, topology: Topology) -> dict[str, Any]:
    config, ledger, out = load_config(Path(case.config)), Path(case.ledger), Path(case.out)
    trainer = build_trainer(config, topology, read_shape(config.model.path))
    assert next(trainer.chunks[0].parameters()).is_cuda == (case.device == "cuda")
    prepare = _Syncs()
    batch = trainer.prepare(ledger, 1)
    prepare.stop()
    updates, syncs = [], []
    for minibatch in batch.minibatches:
        update = _Syncs()
        updates.append(trainer.update(minibatch))
        syncs.append(update.stop())
    result: dict[str, Any] = {
        "summary": trainer.summary(batch, updates),
        "num_micro_batches": sum(len(minibatch.micro_batches) for minibatch in batch.minibatches),
        "num_buckets": sum(len(buffer.buckets) for chunk in trainer.chunks for buffer in chunk.buffers),
        "overlaps": trainer.chunks[0].ddp_config.overlap_grad_reduce,
        "layers": trainer.chunks[0].config.transformer_impl,
        "stand_ins": dict(CALLED),
        "prepare_syncs": prepare.counts,
        "update_syncs": syncs,
    }
    if case.stages == "all":
        result |= everything_else(trainer, ledger, config.model.path, out)
        if case.resumes:
            trainer.load(Path(case.resumes))
            trainer.update(trainer.prepare(ledger, 1).minibatches[0])
    weights = {name: tensor.cpu() for name, tensor in trainer.hf_tensors()}
    if topology.is_main:
        save_file(weights, out / "weights.safetensors")
    return result


class _Syncs:
    """Counts how often the host waited for the device from here to :meth:`stop`."""

    def __init__(self) -> None:
        SYNCS.clear()

    def stop(self) -> list[dict[str, Any]]:
        self.counts = [asdict(sync) | {"is_ours": sync.is_ours, "count": count} for sync, count in SYNCS.items()]
        return self.counts


if __name__ == "__main__":
    main(Path(sys.argv[1]))
