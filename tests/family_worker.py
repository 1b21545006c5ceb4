"""What each rank runs in tests/model/test_families.py: logits, gradients, updates and checkpoints of tiny models."""

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_families import VOCAB
from torch import Tensor

from nft_megatron.config.sections import OptimizerConfig
from nft_megatron.model.build import NO_TOKEN_COUNT, build_model, run_schedule, zero_gradients
from nft_megatron.model.checkpoint import load_checkpoint, save_checkpoint
from nft_megatron.model.export import hf_tensors
from nft_megatron.model.load import load_weights
from nft_megatron.model.logprob import token_logprobs
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.packed_sequences import pack_sequences
from nft_megatron.model.policy import lm_head_weight
from nft_megatron.model.topology import Topology, init_topology, shutdown
from nft_megatron.weights import read_shape

LENGTHS = [
    [100, 7, 33],
    [60, 60, 4, 4],
    [64],
    [40, 8],
]  # of each micro-batch; sums divisible by 4 for sequence parallelism


@dataclass(frozen=True)
class Layout:
    num_processes: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1


@dataclass(frozen=True)
class Pack:
    """Sequences of random tokens, with a random weight for the log-prob of every token except each first one."""

    lengths: list[int]
    ids_T: Tensor
    weights_N: Tensor

    @property
    def bounds(self) -> list[tuple[int, int]]:
        stops = torch.tensor(self.lengths).cumsum(0).tolist()
        return [(stop - length, stop) for length, stop in zip(self.lengths, stops, strict=True)]

    @property
    def loss_positions_N(self) -> Tensor:
        return torch.cat([torch.arange(start, stop - 1) for start, stop in self.bounds])

    @property
    def targets_N(self) -> Tensor:
        return self.ids_T[self.loss_positions_N + 1]


def make_packs() -> list[Pack]:
    generator = torch.Generator().manual_seed(3)
    return [
        Pack(
            lengths,
            torch.randint(0, VOCAB, (sum(lengths),), generator=generator),
            torch.randn(sum(lengths) - len(lengths), generator=generator),
        )
        for lengths in LENGTHS
    ]


class Lab:
    """A model on this rank and one pass over this data rank's packs, with the loss Σ weight · log-prob."""

    def __init__(self, folder: Path, topology: Topology) -> None:
        self.topology, self.shape = topology, read_shape(folder)
        self.chunks = build_model(self.shape, topology)
        load_weights(self.chunks, topology, self.shape, folder)

    def run(self, look_at: Callable[[int, Tensor], float] = lambda number, logits_NV: 0.0) -> list[float]:
        """What ``look_at`` returns for each pack's number and this tensor rank's logits; gradients stay in the model chunks."""

        def forward_step(data, chunk):
            number, pack = next(data)
            position_ids_T = torch.cat([torch.arange(length) for length in pack.lengths])
            packed = pack_sequences(pack.lengths, self.topology.device)
            hidden_NH = chunk(pack.ids_T[None], position_ids_T[None], packed, pack.loss_positions_N)

            def loss_function(hidden_NH):
                weight_VH = lm_head_weight(chunk)
                logprob_N = token_logprobs(
                    hidden_NH, weight_VH, pack.targets_N, temperature=1.0, vocab_size=VOCAB, group=self.topology.tensor_group
                ).logprob_N
                seen = look_at(number, (hidden_NH @ weight_VH.T).detach())
                return (pack.weights_N * logprob_N).sum(), NO_TOKEN_COUNT, seen

            return hidden_NH, loss_function

        packs = list(enumerate(make_packs()))[self.topology.data_rank :: self.topology.data_size]
        zero_gradients(self.chunks)
        return run_schedule(self.chunks, forward_step, packs, forward_only=False)

    def export(self) -> dict[str, Tensor]:
        """Whole tensors on rank 0, nothing elsewhere."""
        return {name: tensor.clone() for name, tensor in hf_tensors(self.chunks, self.topology, self.shape)}

    def put_gradients_in_place_of_weights(self) -> None:
        for chunk in self.chunks:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                group = buffer.data_parallel_group  # the distributed optimizer leaves a shard of the sum on each of these ranks
                for bucket in buffer.buckets:
                    shards = list(bucket.grad_data.chunk(group.size()))
                    dist.all_gather(shards, shards[group.rank()].clone(), group=group)
            for parameter in chunk.parameters():
                parameter.data = parameter.main_grad


def measure(folders: dict[str, Path], out: Path, layout: Layout) -> None:
    """Write every model's largest logit error and export faults to ``out/<name>.json``, with gradients next to it."""

    def measure_one(name: str, folder: Path, topology: Topology) -> None:
        lab = Lab(folder, topology)
        expected = load_file(folder / "logits.safetensors")

        def error(number: int, logits_NV: Tensor) -> float:
            first = topology.tensor_rank * logits_NV.shape[1]
            theirs_NV = expected[str(number)][:, first : first + logits_NV.shape[1]]
            return float((logits_NV[:, : theirs_NV.shape[1]] - theirs_NV).abs().max())

        errors = lab.run(error)
        of_ranks: list = [None] * topology.world_size
        dist.all_gather_object(of_ranks, errors, group=topology.control_group)
        exported = lab.export()
        lab.put_gradients_in_place_of_weights()
        gradients = lab.export()
        if topology.is_main:
            save_file(gradients, out / f"{name}.safetensors")
            stored = load_file(folder / "model.safetensors")
            differs = [key for key in stored.keys() | exported.keys() if not torch.equal(stored[key], exported[key])]
            result = {"logits": [error for errors in of_ranks for error in errors], "export_differs": differs}
            (out / f"{name}.json").write_text(json.dumps(result))

    def measure_all(topology: Topology) -> None:
        for name, folder in folders.items():
            measure_one(name, folder, topology)

    _within(layout, measure_all)


def train(folder: Path, out: Path, layout: Layout, checkpoint: Path | None) -> None:
    """Run three updates; write the weights to ``out/third.safetensors`` and the gradient norms to ``out/norms.json``.

    If ``checkpoint`` is given, it replaces the first two. Otherwise ``out/checkpoint`` is written after them and restored after
    the third, which is then repeated; ``out/again.safetensors`` has the weights after that.
    """

    def run(topology: Topology) -> None:
        lab = Lab(folder, topology)
        optimizer = PolicyOptimizer(lab.chunks, OptimizerConfig(learning_rate=1e-3, warmup_updates=0))
        norms = []

        def update(name: str | None = None) -> None:
            lab.run()
            norms.append(optimizer.step().grad_norm)
            weights = lab.export() if name else {}
            if weights:
                save_file(weights, out / f"{name}.safetensors")

        if checkpoint is None:
            update()
            update()
            own = out / "checkpoint"
            if topology.is_main:
                own.mkdir()
            dist.barrier(group=topology.control_group)
            save_checkpoint(own, lab.chunks, optimizer, topology, {})
            update("third")
            load_checkpoint(own, lab.chunks, optimizer, topology)
            update("again")
        else:
            load_checkpoint(checkpoint, lab.chunks, optimizer, topology)
            update("third")
        if topology.is_main:
            (out / "norms.json").write_text(json.dumps(norms))

    _within(layout, run)


def _within(layout: Layout, run: Callable[[Topology], None]) -> None:
    topology = init_topology(layout.tensor, layout.pipeline, expert=layout.expert, timeout_seconds=240, threads=1)
    run(topology)
    del topology
    gc.collect()
    shutdown()
