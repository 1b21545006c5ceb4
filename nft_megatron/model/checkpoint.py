"""Saves and restores weights, optimizer and generators in Megatron-Core's ``torch_dist`` format.

A checkpoint does not depend on the layout that wrote it: every tensor is stored by its position in the whole model. So it loads
under other tensor, pipeline and data sizes. Each rank writes the weights and optimizer state of which it alone is in charge
(:mod:`.parameter_shards`), and under the same layout reads them back; nothing is gathered but the weights after reading.

A save has two halves. :func:`take_snapshot` copies this part to host memory, while the ranks wait; :meth:`Snapshot.write` no
longer needs the model and may run in a thread, with its own control group. The caller provides an empty folder and publishes
it once all ranks have returned. Saving follows Megatron's own ``dist_checkpointing.save`` with two differences. Its writer
forks processes and starts a manager, which needs a ``__main__`` guard in the user's script and waits without a deadline for
workers that the kernel killed (dist_checkpointing/strategies/filesystem_async.py:54, 266 and 308); here torch's writer works
in this process. And if rank 0 fails to write the common part, the other ranks learn of it instead of waiting.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

from nft_megatron.base.errors import UserError
from nft_megatron.model.checkpoint_reader import REMEDY, StoredCheckpoint
from nft_megatron.model.checksums import verify_checksums, write_checksums
from nft_megatron.model.control import on_main, together
from nft_megatron.model.engine_state import load_engine_state, without_engine_state
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.parameter_shards import parameter_shards
from nft_megatron.model.policy import policy_model
from nft_megatron.model.topology import Topology
from nft_megatron.model.weight_gathering import gather_replaced_weights, gather_weights

_FORMAT = 1
_COMMON_KINDS = {"format": int, "layout": list, "num_updates": int, "extra": dict}


def _layout(topology: Topology) -> list[int]:
    return [topology.tensor_size, topology.pipeline_size, topology.context_size, topology.data_size]


def _generators(topology: Topology) -> ShardedObject:
    """This rank's random generators: torch's on the CPU and on the device, and Megatron's tracker."""
    states = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state() if topology.device.type == "cuda" else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    place = (topology.tensor_rank, topology.pipeline_rank, topology.context_rank, topology.data_rank)
    return ShardedObject("generators", states, tuple(_layout(topology)), place, replica_id=0)


def _set_generators(states: dict[str, Any], topology: Topology) -> None:
    torch.set_rng_state(states["cpu"])
    if (states["device"] is None) != (topology.device.type == "cpu"):
        return  # a GPU's generators have other states than a CPU's; this device's keep their seeds, as on another layout
    if states["device"] is not None:
        torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def sharded_state(chunks: Sequence[DistributedDataParallel], optimizer: PolicyOptimizer, topology: Topology) -> dict[str, Any]:
    """What this rank alone holds of weights and optimizer state, and by the chunk's number what else its modules keep."""
    metadata = {"dp_cp_group": topology.replica_group}
    model = {str(part): policy_model(chunk).sharded_state_dict(metadata=metadata) for part, chunk in enumerate(chunks)}
    shards = parameter_shards(optimizer.megatron.chained_optimizers, model)
    objects = {
        part: {name: each for name, each in state.items() if isinstance(each, ShardedObject)} for part, state in model.items()
    }
    return {"shards": {str(number): shard for number, shard in enumerate(shards)}, "model": objects}


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, in host memory: training may continue while it is written.

    ``shards``: the shards that this rank writes. ``common``: what is not sharded.
    """

    shards: dict[str, Any]
    common: dict[str, Any]

    def write(self, folder: Path, topology: Topology) -> None:
        """Write it into the empty ``folder``. A collective over ``topology.control_group``, which must have no other use
        meanwhile.

        Raises:
            OSError: on every rank, if any rank could not write (disk full, no permission).
        """
        on_main(topology, lambda: _write_common(self.common, folder))
        _write_shards(self.shards, folder, topology.control_group)
        on_main(topology, lambda: save_config(CheckpointingConfig("torch_dist"), str(folder)))
        write_checksums(folder, topology)


def take_snapshot(
    chunks: Sequence[DistributedDataParallel], optimizer: PolicyOptimizer, topology: Topology, extra: dict[str, Any]
) -> Snapshot:
    """Everything that training needs to resume from here. A collective over all ranks.

    ``extra`` is returned by :func:`load_checkpoint`: plain Python objects, the same on every rank.
    """
    state = sharded_state(chunks, optimizer, topology)
    state["generators"] = _generators(topology)
    state["common"] = {
        "format": _FORMAT,
        "layout": _layout(topology),
        "num_updates": optimizer.num_updates,
        "extra": extra,
    }
    sharded, common = save_preprocess(state)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    _copy(by_key)
    return Snapshot(mcore_to_pyt_state_dict(by_key, is_loading=False), copy.deepcopy(common))


def _copy(by_key: dict[str, list[ShardedBase]]) -> None:
    """Copy tensors out of the memory that training changes, one after the other."""
    for shards in by_key.values():
        for shard in shards:
            if isinstance(shard, ShardedTensor):
                shard.data = shard.data.detach().to("cpu", copy=True)


def save_checkpoint(
    folder: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: PolicyOptimizer,
    topology: Topology,
    extra: dict[str, Any],
) -> None:
    """:func:`take_snapshot` and :meth:`Snapshot.write` in one."""
    take_snapshot(chunks, optimizer, topology, extra).write(folder, topology)


def _write_common(common: dict[str, Any], folder: Path) -> None:
    """Write rank 0's part: what is not sharded."""
    try:
        torch.save(common, folder / COMMON_STATE_FNAME)
    except (RuntimeError, OSError) as error:
        raise _not_written(folder, error) from error


def _write_shards(shards: dict[str, Any], folder: Path, control_group: dist.ProcessGroup) -> None:
    """Every rank writes its own shards into one file, flushed. A failure on one rank raises on all."""
    try:
        torch.distributed.checkpoint.save(
            shards,
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=control_group,
        )
    except CheckpointException as error:
        # The frames of the failed write hold, in a cycle, a view of a BytesIO. Python 3.12's collector may take the BytesIO
        # apart before the view, and crashes when it releases the view (Modules/_io/bytesio.c, bytesiobuf_releasebuffer).
        traceback.clear_frames(error.__traceback__)
        raise _not_written(folder, next(iter(error.failures.values()))[0]) from error


def _not_written(folder: Path, cause: BaseException) -> OSError:
    """The cause with its errno. torch's zip writer reports a full disk as a RuntimeError about positions, so ask the disk."""
    if not isinstance(cause, OSError):
        try:
            with (folder / "probe").open("wb") as probe:
                probe.write(bytes(1 << 20))
        except OSError as error:
            cause = error
    if isinstance(cause, OSError):
        return OSError(cause.errno, f"{cause.strerror} while saving a checkpoint", str(folder))
    return OSError(f"{folder}: the checkpoint could not be written: {cause}")


def load_checkpoint(
    folder: Path, chunks: Sequence[DistributedDataParallel], optimizer: PolicyOptimizer, topology: Topology
) -> dict[str, Any]:
    """Restore what :meth:`Snapshot.write` wrote, under this run's layout, and return its ``extra``. A collective.

    On the layout and kind of device that wrote it, training continues bit for bit as if it had not stopped. On others,
    generators keep their seeds. The optimizer keeps its own settings: a changed config takes effect.

    Every byte of the files is read once, under the layout that wrote it by the rank that needs it, and kept in host memory
    until all files are verified.

    Raises:
        UserError: on every rank, for a folder that is incomplete, damaged, or of another version or model; in the last case
            weights may be partly overwritten.
    """
    contents = verify_checksums(folder, topology)
    stored = together(topology, lambda: StoredCheckpoint(folder, contents))
    common = together(topology, lambda: _common(stored))
    gather_weights(chunks)  # or a later one would put the shards of before over what is loaded
    with optimizer.state_on_device():
        _load(stored, chunks, optimizer, topology, common)
    return common["extra"]


def _common(stored: StoredCheckpoint) -> dict[str, Any]:
    common = stored.common.get("common")
    if not isinstance(common, dict) or not _COMMON_KINDS.items() <= {key: type(value) for key, value in common.items()}.items():
        raise UserError("checkpoint", stored.folder / "common.pt", "is not of a run of nft_megatron", REMEDY)
    if common["format"] != _FORMAT:
        raise UserError(
            "checkpoint",
            stored.folder,
            f"has format {common['format']}, but this version reads {_FORMAT}",
            "resume it with the version of nft_megatron that wrote it",
        )
    return common


def _load(
    stored: StoredCheckpoint,
    chunks: Sequence[DistributedDataParallel],
    optimizer: PolicyOptimizer,
    topology: Topology,
    common: dict[str, Any],
) -> None:
    state = sharded_state(chunks, optimizer, topology)
    without_engine_state(state["model"], stored.metadata.state_dict_metadata)
    if common["layout"] == _layout(topology):
        state["generators"] = _generators(topology)
    try:
        loaded = stored.load(state)
    except (CheckpointException, CheckpointingException) as error:
        if isinstance(first := _first(error), UserError):
            raise first from error
        raise UserError(
            "checkpoint",
            stored.folder,
            f"is of another model: {_first_line(error)}",
            "use the run's original model.path, or another run_dir",
        ) from error
    gather_replaced_weights(chunks)
    for part, chunk in enumerate(chunks):
        load_engine_state(policy_model(chunk), loaded.get("model", {}).get(str(part), {}))
    optimizer.num_updates = common["num_updates"]
    optimizer.count_updates()
    if "generators" in loaded:
        try:
            _set_generators(loaded["generators"], topology)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            problem = f"has no usable states of random generators ({_first_line(error)})"
            raise UserError("checkpoint", stored.folder, problem, REMEDY) from error


def _first(error: BaseException) -> BaseException:
    """The error of the first rank that failed: torch wraps those of all ranks."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _first_line(error: BaseException) -> str:
    """The error without the tracebacks of all ranks that torch puts into its message."""
    error = _first(error)
    return (str(error).splitlines() or [type(error).__name__])[0]
