"""Every row group of a ledger is read once in the world, and each rank gets its answers bit for bit."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from parity_worker import Run, shared_reads
from recorded_step import Layout, write_config, write_step
from slow import slow_beside

from nft_megatron.data import ledger as ledgers

LAYOUTS = {
    "alone": Layout(1),
    "data 4": Layout(4),
    "tensor 2 × data 2": Layout(4, {"tensor": 2}),
    "pipeline 2 × context 2 × data 2": Layout(8, {"pipeline": 2, "context": 2}),
}


@pytest.fixture(scope="module")
def small_row_groups(tmp_path_factory) -> Path:
    """30 answers in 15 row groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledgers, "_ROW_GROUP_ROWS", 2)
        return write_step(tmp_path_factory.mktemp("rows") / "step_000001.parquet")


@pytest.mark.parametrize("name", slow_beside(LAYOUTS, ["alone", "tensor 2 × data 2"]))
@pytest.mark.parametrize("algorithm", ["nft", "rft"])
def test_each_row_is_read_once_and_reaches_the_ranks_that_train_on_it(
    world, models, small_row_groups, tmp_path, name, algorithm
):
    layout = LAYOUTS[name]
    config = write_config(tmp_path / "run", models["tied"], layout, algorithm)
    world(layout.num_processes)(shared_reads, Run(config, small_row_groups, tmp_path / "out"))
    ranks = [json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in range(layout.num_processes)]
    assert [rank["differs"] for rank in ranks] == [[]] * layout.num_processes
    read = [row for rank in ranks for row in rank["rows"]]
    assert sorted(read) == sorted({row for rank in ranks for row in rank["own"]})
    row_groups = [{row // 2 for row in rank["rows"]} for rank in ranks]
    assert sum(map(len, row_groups)) == len(set.union(*row_groups))
    assert max(map(len, row_groups)) <= -(-len(set.union(*row_groups)) // layout.num_processes) + 1
    if layout.num_processes > 1:
        assert any(set(rank["own"]) - set(rank["rows"]) for rank in ranks)  # some came from other ranks


def test_if_one_rank_cannot_read_all_ranks_say_so(world, models, small_row_groups, tmp_path):
    config = write_config(tmp_path / "run", models["tied"], Layout(4))
    world(4)(shared_reads, Run(config, small_row_groups, tmp_path / "out"), 2)
    ranks = [json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert all("is damaged: stale file handle" in rank["error"] for rank in ranks)


def test_a_length_that_is_not_true_is_damage(world, models, small_row_groups, tmp_path):
    """It would shift all that the rank receives."""
    table = pq.read_table(small_row_groups)
    place = table.schema.get_field_index("answer_length")
    lengths = table["answer_length"].to_pylist()
    lengths[16] += 1
    wrong = table.set_column(place, "answer_length", [lengths]).cast(table.schema)
    pq.write_table(wrong, tmp_path / "wrong.parquet", row_group_size=2)
    config = write_config(tmp_path / "run", models["tied"], Layout(2))
    world(2)(shared_reads, Run(config, tmp_path / "wrong.parquet", tmp_path / "out"))
    for rank in range(2):
        error = json.loads((tmp_path / "out" / f"rank{rank}.json").read_text())["error"]
        assert "row 16 does not have as many tokens as it says" in error
