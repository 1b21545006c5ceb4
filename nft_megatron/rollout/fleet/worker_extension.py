"""What runs inside vLLM's workers: taking over weights, and saying which ones arrived.

``--worker-extension-cls`` loads this module into every worker, which registers ``nft_broadcast`` as an engine of vLLM's weight
transfer. Its life is vLLM's own (start, update for each piece, finish); a piece is a folder of safetensors, or a bucket of a
broadcast. Every tensor is hashed as it is handed to the model, so that the receipt says what the model consumed.

Works around vLLM 0.32.0: a failed update leaves layers half-loaded, and what they had collected would count for the next one;
loaded tensors are kept until their layer is complete, so a bucket's memory is never used again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from nft_megatron.rollout.fleet.broadcast import Slot, broadcast, join_group, open_bucket
from nft_megatron.weights.hf_reader import HFReader
from nft_megatron.weights.receipt import combine_digests, tensor_digest

_HASH_THREADS = 4
_READ_AHEAD = 4  # tensors


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """Where the trainer's group meets; this server's workers have the ranks from ``first_rank`` on."""

    host: str
    port: int
    first_rank: int
    num_ranks: int
    seconds: float


@dataclass
class PieceInfo(WeightTransferUpdateInfo):
    """One piece of an update: a ``folder`` to read, or the ``slots`` of the next bucket of the broadcast."""

    folder: str | None = None
    slots: list[dict[str, Any]] = field(default_factory=list)
    num_bytes: int = 0


class Receiver(WeightTransferEngine[JoinInfo, PieceInfo]):
    """The receiving end, one in every worker."""

    init_info_cls = JoinInfo
    update_info_cls = PieceInfo
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.digests: dict[str, str] = {}
        self._group: Any = None
        self._hashers = ThreadPoolExecutor(_HASH_THREADS)

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        rank = self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
        patience = timedelta(seconds=init_info.seconds)
        store = dist.TCPStore(init_info.host, init_info.port, is_master=False, timeout=patience)
        self._group = join_group(store, init_info.first_rank + rank, init_info.num_ranks, self.device, init_info.seconds)

    def start_weight_update(self) -> None:
        self.digests = {}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except BaseException:
            with contextlib.suppress(Exception):  # the layers' books are closed; their contents are void until the next update
                finalize_layerwise_reload(self.model, self.model_config)
            raise

    def receive_weights(self, update_info: PieceInfo) -> None:
        if update_info.folder is not None:
            self._load(self._read(Path(update_info.folder)))
            return
        flat = torch.empty(update_info.num_bytes, dtype=torch.uint8, device=self.device)
        broadcast(self._group, flat)
        slots = [Slot(**{**slot, "shape": tuple(slot["shape"])}) for slot in update_info.slots]
        self._load(open_bucket(slots, flat))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._group = None

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand tensors to the model; they are hashed on other threads meanwhile."""
        digests = {}

        def hashed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                digests[name] = self._hashers.submit(tensor_digest, name, tensor)
                yield name, tensor.to(self.device)

        self.model.load_weights(hashed())
        self.digests |= {name: digest.result() for name, digest in digests.items()}

    def _read(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """A folder's tensors in the order of the files, read a little ahead."""
        with HFReader(folder, "weights") as reader, ThreadPoolExecutor(1) as ahead:
            places = reader.places
            names = sorted(places, key=lambda name: (places[name].file, places[name].offset))
            waiting = []
            for name in names:
                waiting.append((name, ahead.submit(reader.read, name, 0, 0, places[name].shape[0])))
                if len(waiting) > _READ_AHEAD:
                    ready, tensor = waiting.pop(0)
                    yield ready, tensor.result()
            for ready, tensor in waiting:
                yield ready, tensor.result()


if "nft_broadcast" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("nft_broadcast", Receiver)


class WeightKeeper:
    """Methods that ``/collective_rpc`` finds on every vLLM worker."""

    weight_transfer_engine: Receiver

    def nft_receipt(self) -> dict[str, Any]:
        """What the last update brought: ``{"receipt": …, "num_tensors": …}``."""
        digests = self.weight_transfer_engine.digests
        return {"receipt": combine_digests(digests.values()), "num_tensors": len(digests)}
