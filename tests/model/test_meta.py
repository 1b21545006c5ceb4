"""The plan's closed form against the real model built on the meta device, for every rank of a fake process group."""

from collections import defaultdict

import meta_worker
import pytest

from nft_megatron.plan.memory import padded_vocab, stage_numel
from nft_megatron.weights import weight_table
from nft_megatron.weights.table import Layout


@pytest.fixture(scope="module")
def built(world) -> dict:
    return world(1)(meta_worker.count)


@pytest.mark.parametrize("name", meta_worker.CASES)
def test_the_plan_knows_every_rank_to_the_byte(built: dict, name: str):
    shape, layout = meta_worker.CASES[name]
    ranks = built[name]
    assert len(ranks) == layout.num_gpus
    for rank in ranks:
        assert rank["num_bytes"] == 2 * stage_numel(shape, layout, rank["pipeline_rank"], on_gpu=True), rank["rank"]


@pytest.mark.parametrize("name", meta_worker.CASES)
def test_the_ranks_of_a_replica_hold_the_model_once(built: dict, name: str):
    """Every element of every Hugging Face tensor: on one rank, or where tensor ranks share it whole, on each of them."""
    shape, layout = meta_worker.CASES[name]
    table, rows = weight_table(shape), padded_vocab(shape, layout.tensor, on_gpu=True)
    entries = table.by_name
    held = defaultdict(list)  # (replica, tensor rank or None, Hugging Face tensor) → ranges of rows, or of columns
    for rank in built[name]:
        replica = (rank["context_rank"], rank["data_rank"])
        for parameter, size in rank["shapes"].items():
            entry = entries[parameter]
            assert tuple(size) == entry.local_shape(layout.tensor, rows), parameter
            if not entry.exported:
                assert (rank["pipeline_rank"], layout.pipeline > 1) == (layout.pipeline - 1, True), "a tied head's second copy"
                continue
            whole = entry.layout is Layout.WHOLE
            for piece in entry.pieces(layout.tensor, rank["tensor_rank"], rows):
                holders = replica if entry.expert is None else _expert_replica(replica, layout)
                key = (holders, rank["tensor_rank"] if whole else None, entry.sources[piece.source])
                held[key].append((piece.start, piece.stop))

    axes = {source: entry.axis for entry in table.entries if entry.exported for source in entry.sources}
    wholes = {source for entry in table.entries if entry.layout is Layout.WHOLE for source in entry.sources}
    of_experts = {source for entry in table.entries if entry.expert is not None for source in entry.sources}
    replicas = [(context, data) for context in range(layout.context) for data in range(layout.data)]
    expert_replicas = sorted({_expert_replica(replica, layout) for replica in replicas})
    for source, size in table.shapes.items():
        for replica in expert_replicas if source in of_experts else replicas:
            for tensor_rank in range(layout.tensor) if source in wholes else [None]:
                ranges = sorted(held.pop((replica, tensor_rank, source)))
                assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])], (source, ranges)
                assert ranges[-1][1] == size[axes[source]], source
    assert not held


def _expert_replica(replica: tuple[int, int], layout) -> tuple[int, int]:
    """The ranks that hold a layer's experts together: ``layout.expert`` consecutive ones of data × context."""
    context, data = replica
    return -1, (data * layout.context + context) // layout.expert


@pytest.mark.parametrize("name", ["32B interleaved", "32B interleaved, uneven", "tiny, uneven"])
def test_stages_and_parts_are_where_the_plan_says(built: dict, name: str):
    shape, layout = meta_worker.CASES[name]
    for rank in built[name]:
        layers = {int(name.split(".")[2]) for name in rank["shapes"] if name.startswith("decoder.layers.")}
        assert layers == {
            layer
            for layer in range(shape.num_layers)
            if layout.stages.stage_of(layer, shape.num_layers) == rank["pipeline_rank"]
        }
