"""What each rank does in tests/model/test_families.py: logits and gradients of tiny models under one layout."""

import gc
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from nft_megatron.model.attention import pack_sequences
from nft_megatron.model.build import NO_TOKEN_COUNT, build_model, lm_head_weight, run_schedule, zero_gradients
from nft_megatron.model.export import hf_tensors
from nft_megatron.model.load import load_weights
from nft_megatron.model.logprob import token_logprobs
from nft_megatron.model.topology import Topology, init_topology, shutdown
from nft_megatron.weights import read_shape

LENGTHS = [[100, 7, 33], [60, 60, 4, 4]]  # two micro-batches; their totals divide by 4, as sequence parallelism asks
VOCAB = 131


@dataclass(frozen=True)
class Pack:
    """Sequences of random tokens and a random weight of each next token's log-prob. ``starts`` has their number more one."""

    ids_T: Tensor
    starts: list[int]
    weights_N: Tensor

    @property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False)]

    @property
    def loss_positions_N(self) -> Tensor:
        return torch.cat([torch.arange(start, stop - 1) for start, stop in zip(self.starts, self.starts[1:], strict=False)])


def make_packs() -> list[Pack]:
    generator = torch.Generator().manual_seed(3)
    packs = []
    for lengths in LENGTHS:
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        ids_T = torch.randint(0, VOCAB, (starts[-1],), generator=generator)
        packs.append(Pack(ids_T, starts, torch.randn(starts[-1] - len(lengths), generator=generator)))
    return packs


def measure(folders: dict[str, Path], out: Path, tensor: int, pipeline: int) -> None:
    """Write every model's largest error of a logit to ``out/<name>.json`` and gradients to ``out/<name>.safetensors``."""
    topology = init_topology(tensor, pipeline, timeout_seconds=60, threads=1)
    for name, folder in folders.items():
        _measure(name, folder, out, topology)
    del topology
    gc.collect()
    shutdown()


def _measure(name: str, folder: Path, out: Path, topology: Topology) -> None:
    shape = read_shape(folder)
    chunks = build_model(shape, topology)
    load_weights(chunks, topology, shape, folder)
    expected = load_file(folder / "logits.safetensors")

    def forward_step(data, chunk):
        number, pack = next(data)
        position_ids_T = torch.cat([torch.arange(length) for length in pack.lengths])
        packed = pack_sequences(pack.lengths, topology.device)
        hidden_NH = chunk(pack.ids_T[None], position_ids_T[None], packed, pack.loss_positions_N)

        def loss_function(hidden_NH):
            weight_VH = lm_head_weight(chunk)
            first = topology.tensor_rank * len(weight_VH)
            theirs_NV = expected[str(number)][:, first : first + len(weight_VH)]
            ours_NV = (hidden_NH @ weight_VH.T).detach()[:, : theirs_NV.shape[1]]
            logprob_N = token_logprobs(
                hidden_NH, weight_VH, pack.ids_T[pack.loss_positions_N + 1], temperature=1.0, vocab_size=VOCAB,
                group=topology.tensor_group,
            ).logprob_N  # fmt: skip
            error = float((ours_NV - theirs_NV).abs().max()) if theirs_NV.numel() else 0.0
            return (pack.weights_N * logprob_N).sum(), NO_TOKEN_COUNT, error

        return hidden_NH, loss_function

    packs = list(enumerate(make_packs()))[topology.data_rank :: topology.data_size]
    zero_gradients(chunks)
    errors = run_schedule(chunks, forward_step, packs, forward_only=False)
    of_ranks: list = [None] * topology.world_size
    dist.all_gather_object(of_ranks, errors, group=topology.control_group)
    exported = {name: tensor.clone() for name, tensor in hf_tensors(chunks, topology, shape)}
    for chunk in chunks:
        for buffer in chunk.buffers:  # the distributed optimizer leaves each replica its shard of the sum
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad
    gradients = {name: tensor.clone() for name, tensor in hf_tensors(chunks, topology, shape)}
    if topology.is_main:
        save_file(gradients, out / f"{name}.safetensors")
        stored = load_file(folder / "model.safetensors")
        differs = [key for key in stored.keys() | exported.keys() if not torch.equal(stored[key], exported[key])]
        result = {"logits": [error for errors in of_ranks for error in errors], "export_differs": differs}
        (out / f"{name}.json").write_text(json.dumps(result))
