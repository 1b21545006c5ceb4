"""Host memory and disk, against sums done by hand, and the two ends of a step."""

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.plan.estimate import Plan, make_plan
from nft_megatron.plan.layouts import cluster_of, layout_of
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.report import report
from nft_megatron.plan.storage import check_host
from nft_megatron.plan.workload import Assumptions

SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]
NUMEL = 7_615_616_512


def plan(config) -> Plan:
    cluster = cluster_of(config)
    return make_plan(config, SHAPE, cluster, layout_of(config, cluster), Assumptions(answer_tokens=900))


def test_a_node_holds_the_copies_of_all_its_ranks(make_config):
    config = make_config(parallel={"tensor": 4}, optimizer={"cpu_offload": 0.5})
    host = plan(config).host
    part = NUMEL / 4
    assert host.copy == pytest.approx((2 + 12) * part / 2, rel=1e-3)  # of two replicas; norms are in each tensor rank
    assert host.checkpoint == 8 * host.copy
    assert host.offloaded == pytest.approx(8 * 0.5 * 12 * part / 2, rel=1e-3)  # two replicas
    assert host.processes == host.rollout_node == 8 * 6e9
    check_host(config, host)
    with pytest.raises(UserError, match=r"needs \d\d\d GB of host memory: 107 for a checkpoint's copies, 46 for the offloaded"):
        check_host(make_config(cluster={"node_memory_gb": 190}), host)


@pytest.mark.parametrize(("dtype", "per_parameter"), [("bfloat16", 14), ("float32", 12)])
def test_all_ranks_together_copy_a_checkpoint_once(make_config, dtype, per_parameter):
    config = make_config(parallel={"tensor": 1}, model={"dtype": dtype})
    host = plan(config).host
    assert 8 * host.copy == pytest.approx(per_parameter * NUMEL, rel=1e-6)
    assert report(plan(config), "m").count(f"each rank copies {per_parameter * NUMEL / 8e9:,.0f} GB to host memory") == 1


def test_disk_grows_by_ledgers_and_exports_and_holds_what_is_kept(make_config):
    checkpoint = {"keep": 3, "export_every": 4}
    disk = plan(make_config(parallel={"tensor": 4}, checkpoint=checkpoint)).disk
    tokens = 64 * 8 * (900 + 128)
    assert disk.ledger == pytest.approx(9.8 * tokens, rel=0.01)
    assert (disk.export, disk.checkpoints, disk.weights) == (2 * NUMEL, 4 * 14 * NUMEL, 3 * 2 * NUMEL)
    assert disk.per_100_steps == pytest.approx(100 * disk.ledger + 25 * 2 * NUMEL)
    assert disk.whole_run == pytest.approx(10 * disk.ledger + 2 * 2 * NUMEL + disk.checkpoints + disk.weights)
    bare = plan(make_config(parallel={"tensor": 4}, fleet={"weights": "transfer", "keep_copy": False})).disk
    assert bare.weights == 0
    assert bare.per_100_steps == 100 * bare.ledger  # the last step's export alone
    assert bare.whole_run == pytest.approx(10 * bare.ledger + 2 * NUMEL + bare.checkpoints)


def test_limits_of_ledgers_and_exports_bound_the_disk(make_config):
    checkpoint = {"keep": 1, "every": 2, "export_every": 2, "keep_exports": 3, "keep_ledgers": 1}
    disk = plan(make_config(parallel={"tensor": 4}, checkpoint=checkpoint)).disk
    assert disk.per_100_steps == 0
    fixed = disk.checkpoints + disk.weights
    assert disk.whole_run == pytest.approx(4 * disk.ledger + 3 * disk.export + fixed)  # 4 since the oldest checkpoint


def test_stale_answers_are_generated_while_training(make_config):
    alternating = plan(make_config(parallel={"tensor": 4}))
    ahead = plan(make_config(parallel={"tensor": 4}, rollout={"max_staleness": 1}))
    rest = ahead.publish.seconds + ahead.save
    collect, train = ahead.generate + ahead.verify, ahead.training.time.total
    assert alternating.step_seconds == pytest.approx(collect + train + rest)
    assert ahead.step_seconds == pytest.approx(max(collect, train) + rest)
    embedded = {"engine": "embedded", "max_staleness": 1}
    beside = plan(make_config(parallel={"tensor": 4}, rollout=embedded, cluster={"rollout_nodes": 0}))
    assert not beside.overlaps
