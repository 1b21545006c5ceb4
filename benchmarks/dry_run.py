"""Every rank of a large run, one after the other: do their parts fit together?

In each rank's place the real code runs, with tensors that have shapes but no memory (torch's meta device) and a process
group without peers: it builds its part of the model and the distributed optimizer; reads its row groups of a made-up ledger of
--answers answers, and packs what it trains on; plans what it writes of a checkpoint; goes through the stream of weights to
publish. Then their plans are put together:

  ledger      every answer is read by one rank, and trained on by one data-parallel rank, whose context ranks share its tokens
  checkpoint  no two ranks write the same element, all together write every element, and ranks of a replica group about equally
              much; under the same layout a rank reads back what it wrote and what it shares with tensor ranks or stages
  publishing  whatever a rank sends is received by whom it is sent to, in the shape that is expected; rank 0 yields every
              Hugging Face tensor once, whole

    python benchmarks/dry_run.py [--model Qwen2.5-32B] [--processes 2] [--data 8 …]
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import platform
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is computed, and a GPU would be used

import numpy as np
import torch
import torch.distributed as dist
from ledger_rows import write_step
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica as is_written
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nft_megatron.algorithms import build_algorithm
from nft_megatron.batching.batch import pack_minibatches, plan_step
from nft_megatron.batching.minibatches import BatchingRules
from nft_megatron.config.sections import OptimizerConfig
from nft_megatron.data.ledger import open_ledger
from nft_megatron.model import checkpoint, cpu, export
from nft_megatron.model.build import Chunks, build_model
from nft_megatron.model.meta import fake_place
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.topology import Topology
from nft_megatron.plan.layouts import ParallelLayout
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.weights import ModelShape, weight_table

UNEVEN = 1.1
"""Most bytes that a rank writes, / its share of the bytes of its pipeline stage and tensor rank."""

Message = tuple[str, int, int, tuple[int, ...]]
"""Kind, sender, receiver, shape."""


@dataclass(frozen=True)
class Rank:
    """What one rank would do.

    ``place``: pipeline, data, context and tensor rank. ``rows``: of the ledger that it reads. ``trained``: rows on which it
    trains; ``num_loss_tokens``: of all its packs. ``plan``: of the checkpoint's tensors; ``objects``: keys of what else it
    writes; ``wanted``: the boxes of each tensor that it reads back. ``messages``: of publishing. ``published``: names and
    shapes.
    """

    place: tuple[int, int, int, int]
    rows: np.ndarray
    trained: np.ndarray
    num_loss_tokens: int
    plan: SavePlan
    objects: list[str]
    wanted: dict[str, list[ChunkStorageMetadata]]
    messages: list[Message]
    published: list[tuple[str, tuple[int, ...]]]


def dry_run(rank: int, shape: ModelShape, layout: ParallelLayout, rules: BatchingRules, ledger: Path) -> Rank:
    with fake_place(rank, layout, torch.device("meta")) as topology:
        rows, trained, num_loss_tokens = read_and_pack(topology, rules, ledger)
        with _without_memory():
            chunks = build_model(shape, topology, dtype=torch.bfloat16)
            optimizer = PolicyOptimizer(chunks, OptimizerConfig())
            plan, objects, wanted = plan_checkpoint(chunks, optimizer, topology)
            messages, published = publish(chunks, topology, shape)
        place = topology.pipeline_rank, topology.data_rank, topology.context_rank, topology.tensor_rank
    return Rank(place, rows, trained, num_loss_tokens, plan, objects, wanted, messages, published)


@contextmanager
def _without_memory() -> Iterator[None]:
    """Tensors have shapes alone. What objects ranks exchange while they build is the same on all of them."""

    def all_gather_object(objects: list, own: object, group: dist.ProcessGroup | None = None) -> None:
        objects[:] = [own] * len(objects)

    def type_of(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """As on the accelerator, which Megatron compares (optimizer/distrib_optimizer.py:361-433)."""
        found = of_tensor(tensor, *arguments, **options)
        return found.replace("cuda.meta.", "") if isinstance(found, str) else found

    meta, of_tensor = torch.device("meta"), torch.Tensor.type
    with (
        meta,
        mock.patch.object(cpu, "CPU", meta),  # where Megatron believes its accelerator to be
        mock.patch.object(torch.Tensor, "type", type_of),
        mock.patch.object(dist, "all_gather_object", all_gather_object),
    ):
        yield


def read_and_pack(topology: Topology, rules: BatchingRules, ledger: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows read, rows trained on, tokens with a loss. What other ranks would send is read from the ledger instead."""
    algorithm = build_algorithm("nft")
    with open_ledger(ledger) as opened:
        plan = plan_step(opened.index(), 1, algorithm, rules)
        every = np.sort(np.concatenate([plan.positions_of(rank) for rank in range(rules.num_ranks)]))
        own = plan.index.row[every][opened.share_out(plan.index.row[every], topology.world_size) == topology.rank]
        opened.tokens(own)
        positions = plan.positions_of(topology.data_rank)
        tokens = dict(zip(positions.tolist(), opened.tokens(plan.index.row[positions]), strict=True))
    place = topology.data_rank, topology.context_rank, torch.device("cpu")
    minibatches = pack_minibatches(plan, tokens, algorithm, rules, *place)
    packs = [micro_batch for minibatch in minibatches for micro_batch in minibatch.micro_batches]
    return own, plan.index.row[positions], sum(len(each.packed.targets_N) for each in packs)


def plan_checkpoint(
    chunks: Chunks, optimizer: PolicyOptimizer, topology: Topology
) -> tuple[SavePlan, list[str], dict[str, list[ChunkStorageMetadata]]]:
    state = checkpoint.sharded_state(chunks, optimizer, topology)
    shards = [each for each in nested_values(state) if isinstance(each, ShardedBase)]
    tensors = [each for each in shards if isinstance(each, ShardedTensor)]
    by_key: dict[str, list[ShardedTensor]] = defaultdict(list)
    wanted = defaultdict(list)
    for each in tensors:
        wanted[each.key].append(ChunkStorageMetadata(torch.Size(each.global_offset), torch.Size(each.local_shape)))
        if is_written(each.replica_id):
            by_key[each.key].append(each)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(dict(by_key)), None, topology.is_main)
    objects = [each.unique_key for each in shards if not isinstance(each, ShardedTensor) and is_written(each.replica_id)]
    return planner.create_local_plan(), objects, dict(wanted)


def publish(chunks: Chunks, topology: Topology, shape: ModelShape) -> tuple[list[Message], list[tuple[str, tuple[int, ...]]]]:
    messages: list[Message] = []
    with _recorded(topology.rank, messages):
        published = [(name, tuple(tensor.shape)) for name, tensor in export.hf_tensors(chunks, topology, shape)]
    return messages, published


@contextmanager
def _recorded(rank: int, messages: list[Message]) -> Iterator[None]:
    """Collectives of the export note who sends what to whom."""

    def member(group: dist.ProcessGroup, group_rank: int) -> int:
        return dist.get_global_rank(group, group_rank)

    def gather(tensor: torch.Tensor, parts: list | None = None, *, group: dist.ProcessGroup, group_dst: int) -> None:
        messages.append(("gather", rank, member(group, group_dst), tuple(tensor.shape)))
        for peer, part in enumerate(parts or ()):
            messages.append(("gathered", member(group, peer), rank, tuple(part.shape)))

    def send(tensor: torch.Tensor, *, group: dist.ProcessGroup, group_dst: int) -> None:
        messages.append(("send", rank, member(group, group_dst), tuple(tensor.shape)))

    def recv(tensor: torch.Tensor, *, group: dist.ProcessGroup, group_src: int) -> None:
        messages.append(("sent", member(group, group_src), rank, tuple(tensor.shape)))

    with mock.patch.multiple(export.dist, gather=gather, send=send, recv=recv):
        yield


# ------------------------------------------------------------------------------------------------------ put together


def check_ledger(ranks: list[Rank], layout: ParallelLayout, lengths: np.ndarray) -> str:
    read = np.concatenate([rank.rows for rank in ranks])
    assert np.array_equal(np.sort(read), np.arange(len(lengths))), "every answer is read by one rank"
    trained = {rank.place[1]: rank.trained for rank in ranks}
    assert np.array_equal(np.sort(np.concatenate(list(trained.values()))), np.arange(len(lengths))), "and trained on by one"
    tokens: dict[tuple[int, int], int] = {}
    for rank in ranks:
        _, data, context, _ = rank.place
        assert np.array_equal(rank.trained, trained[data]), "all ranks of a data-parallel rank train on the same answers"
        assert tokens.setdefault((data, context), rank.num_loss_tokens) == rank.num_loss_tokens, "and the same packs"
    for data, rows in trained.items():
        of_contexts = sum(tokens[data, context] for context in range(layout.context))
        assert of_contexts == lengths[rows].sum(), "context ranks share the tokens of its answers"
    most = max(len(rank.rows) for rank in ranks)
    return f"ledger: {len(lengths):,} answers, each read by one rank (at most {most}) and trained on by one data-parallel rank"


def check_checkpoint(ranks: list[Rank], layout: ParallelLayout) -> str:
    """``create_global_plan`` drops equal boxes, and raises if others overlap or tensors are incomplete."""
    first = [(item.index.fqn, tuple(item.index.offset)) for rank in ranks for item in rank.plan.items]
    assert len(set(first)) == len(first), "no two ranks write the same box"
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    _, metadata = planner.create_global_plan([rank.plan for rank in ranks])
    keys = [key for rank in ranks for key in rank.objects]
    assert len(set(keys)) == len(keys), "no object twice"
    written = [sum(_num_bytes(item) for item in rank.plan.items) for rank in ranks]
    total = sum(math.prod(tensor.size) * tensor.properties.dtype.itemsize for tensor in metadata.state_dict_metadata.values())
    assert sum(written) == total, "the union is complete"
    parts: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, num_bytes in zip(ranks, written, strict=True):
        parts[rank.place[0], rank.place[3]].append(num_bytes)
    uneven = max(max(part) * len(part) / sum(part) for part in parts.values())
    assert all(len(part) == layout.replicas for part in parts.values())
    assert uneven <= UNEVEN, "ranks of a replica group write about equally much"
    read = []
    for rank, num_bytes in zip(ranks, written, strict=True):
        items = [
            (math.prod(item.lengths), metadata.state_dict_metadata[key].properties.dtype.itemsize)
            for key, boxes in rank.wanted.items()
            for item in create_read_items_for_chunk_list(key, metadata.state_dict_metadata[key], boxes)
        ]
        read.append(sum(numel * size for numel, size in items))
        assert read[-1] >= num_bytes, "what a rank wrote it reads"
    return (
        f"checkpoint: {total / 1e9:,.1f} GB in {len(metadata.state_dict_metadata):,} tensors, written once; a rank writes "
        f"{min(written) / 1e9:.3f} to {max(written) / 1e9:.3f} GB, at most {uneven:.3f} of its share, and all together read "
        f"{sum(read) / total:.4f} of the files"
    )


def _num_bytes(item: Any) -> int:
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def check_publishing(ranks: list[Rank], shape: ModelShape) -> str:
    messages = Counter(message for rank in ranks for message in rank.messages)
    for sent, received in (("gather", "gathered"), ("send", "sent")):
        outgoing = {message[1:]: count for message, count in messages.items() if message[0] == sent}
        incoming = {message[1:]: count for message, count in messages.items() if message[0] == received}
        assert outgoing == incoming, "whatever is sent is received, in its shape"
    expected = {
        name: tuple(size)
        for entry in weight_table(shape).entries
        if entry.exported
        for name, size in zip(entry.sources, entry.shapes, strict=True)
    }
    published = ranks[0].published
    assert not any(rank.published for rank in ranks[1:])
    assert len(published) == len(expected), "no tensor twice"
    assert dict(published) == expected, "every tensor, whole"
    return f"publishing: {len(published)} tensors on rank 0, {sum(messages.values()):,} messages, each sent and received"


def all_ranks(
    shape: ModelShape, layout: ParallelLayout, num_answers: int, mean: float, num_processes: int = 1
) -> tuple[list[Rank], np.ndarray]:
    """What every rank of ``layout`` would do, and the length of every answer of the ledger."""
    rules = BatchingRules(
        num_updates=16,
        num_ranks=layout.data,
        token_budget=layout.micro_batch_tokens,
        hidden_size=shape.hidden_size,
        denominator="tokens",
        seed=0,
        tensor_size=layout.tensor,
        context_size=layout.context,
        count_multiple=layout.pipeline if layout.virtual_pipeline > 1 else 1,
        pad_to_budget=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "step_000001.parquet"
        write_step(ledger, num_answers, mean)
        work = partial(dry_run, shape=shape, layout=layout, rules=rules, ledger=ledger)
        if num_processes == 1:
            ranks = [work(rank) for rank in range(layout.num_gpus)]
        else:  # forked from this process, which has imported everything, and anew now and then: torch keeps some of each group
            with multiprocessing.get_context("fork").Pool(num_processes, maxtasksperchild=16) as pool:
                ranks = pool.map(work, range(layout.num_gpus), chunksize=1)
        with open_ledger(ledger) as opened:
            return ranks, opened.index().answer_length


def check(ranks: list[Rank], shape: ModelShape, layout: ParallelLayout, lengths: np.ndarray) -> list[str]:
    """A sentence for each part. Raises :class:`AssertionError`, or torch's :class:`ValueError` for overlapping tensors."""
    return [check_ledger(ranks, layout, lengths), check_checkpoint(ranks, layout), check_publishing(ranks, shape)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-32B", choices=list(PUBLIC_MODELS))
    for name, size in {"tensor": 4, "pipeline": 4, "virtual-pipeline": 4, "context": 2, "data": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--answers", type=int, default=8192)
    parser.add_argument("--mean", type=float, default=200.0, help="tokens of an answer")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    layout = ParallelLayout(
        tensor=options.tensor,
        pipeline=options.pipeline,
        virtual_pipeline=options.virtual_pipeline,
        context=options.context,
        data=options.data,
        sequence_parallel=True,
        recompute="none",
        micro_batch_tokens=16_384,
    )
    torch.set_num_threads(1)
    start = time.monotonic()
    shape = PUBLIC_MODELS[options.model]
    ranks, lengths = all_ranks(shape, layout, options.answers, options.mean, options.processes)
    found = check(ranks, shape, layout, lengths)
    print(f"# python benchmarks/dry_run.py · {platform.machine()}, torch {torch.__version__}")
    print(f"{options.model}, {layout.num_gpus} ranks: {layout}")
    print("\n".join(found))
    print(f"{time.monotonic() - start:.0f} s on {options.processes} processes")


if __name__ == "__main__":
    main()
