"""Runs inside vLLM's workers: loads weights and reports which ones arrived.

``--worker-extension-cls`` loads this module into every worker, which registers ``nft_broadcast`` as an engine of vLLM's weight
transfer. The calls are vLLM's own: start, updates, finish. An update brings a folder of safetensors or a bucket of a broadcast.
Every tensor is hashed as it is handed to the model, so the fingerprint covers what the model consumed.

Works around vLLM 0.32.0: a failed update leaves layers half-loaded, and what they have collected would count towards the next
update; vLLM keeps loaded tensors until their layer is complete, so a bucket's memory must not be reused; and on a CPU a tied LM
head keeps using the old weights, which its kernel object has packed.
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

from nft_megatron.rollout.fleet.broadcast import Group, Slot, open_bucket
from nft_megatron.weights.fingerprint import combine_digests, tensor_digest
from nft_megatron.weights.hf_reader import HFReader

_HASH_THREADS = 4
_READ_AHEAD = 4  # tensors


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where the trainer's group meets; this server's workers get consecutive ranks starting at ``first_rank``."""

    host: str
    port: int
    first_rank: int
    num_ranks: int
    seconds: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A ``folder`` to read, or the ``slots`` of the next bucket of the broadcast."""

    folder: str | None = None
    slots: list[dict[str, Any]] = field(default_factory=list)
    num_bytes: int = 0


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The receiving end, one per worker."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    model: Any  # vLLM's class of the model

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.digests: dict[str, str] = {}
        self._group: Group | None = None
        self._hashers = ThreadPoolExecutor(_HASH_THREADS)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        rank = self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
        deadline = timedelta(seconds=init_info.seconds)
        store = dist.TCPStore(init_info.host, init_info.port, is_master=False, timeout=deadline)
        self._group = Group(store, init_info.first_rank + rank, init_info.num_ranks, self.device, init_info.seconds)

    def start_weight_update(self) -> None:
        self.digests = {}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except BaseException:
            self.shutdown()
            self.discard_update()
            raise

    def discard_update(self) -> None:
        """After a failure, make layers discard what they have collected. Their weights are undefined until the next update."""
        with contextlib.suppress(Exception):
            finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.folder is not None:
            self._load(self._read(Path(update_info.folder)))
            return
        flat = torch.empty(update_info.num_bytes, dtype=torch.uint8, device=self.device)
        assert self._group is not None, "a bucket arrived before its group"
        self._group.broadcast(flat)
        slots = [Slot(**{**slot, "shape": tuple(slot["shape"])}) for slot in update_info.slots]
        self._load(open_bucket(slots, flat))

    def finish_weight_update(self) -> None:
        self.shutdown()  # the next version gets its own group
        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        if self.device.type == "cpu" and self.model.config.tie_word_embeddings and head is not None:
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand tensors to the model while other threads hash them."""
        digests = {}

        def hashed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                digests[name] = self._hashers.submit(tensor_digest, name, tensor)
                yield name, tensor.to(self.device)

        self.model.load_weights(hashed())
        self.digests |= {name: digest.result() for name, digest in digests.items()}

    def _read(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """A folder's tensors in file order, read slightly ahead."""
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
    WeightTransferEngineFactory.register_engine("nft_broadcast", WeightReceiver)


class WorkerExtension:
    """Methods that ``/collective_rpc`` can call on every vLLM worker."""

    weight_transfer_engine: WeightReceiver
    _weight_update_active: bool  # of vLLM's worker

    def nft_abort_update(self) -> dict[str, Any]:
        """End an update that never finished because its sender died or stopped waiting."""
        if self._weight_update_active:
            self._weight_update_active = False
            self.weight_transfer_engine.discard_update()
        return {}

    def nft_fingerprint(self) -> dict[str, Any]:
        """What the last update loaded: ``{"fingerprint": …, "num_tensors": …}``."""
        digests = self.weight_transfer_engine.digests
        return {"fingerprint": combine_digests(digests.values()), "num_tensors": len(digests)}

    @torch.no_grad()
    def nft_compare_model(self) -> dict[str, Any]:
        """Compare the model's parameters, split into Hugging Face's tensors, with what the last update loaded.

        Returns ``{"wrong": names, "num_compared": n}``. Shards of a tensor cannot be compared, so nothing is on several GPUs.
        """
        engine = self.weight_transfer_engine
        if engine.parallel_config.world_size > 1:
            return {"wrong": [], "num_compared": 0}
        wrong, num_compared = [], 0
        for name, tensor in model_tensors(engine.model):
            if name in engine.digests:
                num_compared += 1
                if tensor_digest(name, tensor) != engine.digests[name]:
                    wrong.append(name)
        return {"wrong": wrong, "num_compared": num_compared}


def model_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors an unsharded vLLM model computes with, under Hugging Face's names; a tied LM head under the embedding's."""
    parts_of = getattr(model, "packed_modules_mapping", {})
    tied = getattr(model.config, "tie_word_embeddings", False)
    for path, layer in model.named_modules():
        parent, _, kind = path.rpartition(".")
        for field_name in ("weight", "bias"):
            tensor = _in_use(layer, field_name)
            if tensor is None:
                continue
            names = [f"{parent}.{part}.{field_name}" for part in parts_of.get(kind, [])] or [f"{path}.{field_name}"]
            sizes = list(getattr(layer, "output_sizes", [])) if len(names) > 1 else [len(tensor)]
            if hasattr(layer, "org_vocab_size"):
                sizes = [layer.org_vocab_size, len(tensor) - layer.org_vocab_size]  # rows of padding
            if tied and names == ["lm_head.weight"]:
                names = ["model.embed_tokens.weight"]
            yield from zip(names, tensor.split(sizes), strict=False)


def _in_use(layer: Any, field_name: str) -> torch.Tensor | None:
    """A parameter of this layer itself. On a CPU a kernel object holds it packed; multiplying by the identity unpacks it."""
    parameter = layer._parameters.get(field_name)
    if parameter is None or field_name != "weight" or not hasattr(layer, "cpu_linear"):
        return parameter
    num_inputs = getattr(layer, "input_size", None) or layer.embedding_dim
    identity = torch.eye(num_inputs, dtype=parameter.dtype)
    return layer.cpu_linear(identity, parameter, None).T.contiguous()
