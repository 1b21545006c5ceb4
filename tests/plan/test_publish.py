"""The weights' way to the servers, against sums done by hand."""

import pytest

from nft_megatron.plan.layouts import cluster_of
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.publish import Publish, checkpoint_bytes, publish_time, save_time
from nft_megatron.plan.servers import servers_of

SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]
NUMEL = 7_615_616_512
GIGABYTES = 2 * NUMEL / 1e9
LINK = 0.7 * 50e9  # of one network card


def publish(config) -> Publish:
    cluster = cluster_of(config)
    return publish_time(config, SHAPE, cluster, servers_of(config, SHAPE, cluster))


def test_files_are_written_by_one_thread_and_read_by_every_rank(make_config):
    parts = publish(make_config(cluster={"rollout_nodes": 2})).parts
    assert parts == pytest.approx({"write": 2.0 * GIGABYTES, "read": (0.65 + 0.57) * GIGABYTES})


def test_a_slow_file_system_sets_the_pace_of_files_and_each_node_reads_all_of_them(make_config):
    slow = make_config(cluster={"rollout_nodes": 4, "filesystem_gb_per_second": 0.1})
    assert publish(slow).parts == pytest.approx({"write": GIGABYTES / 0.1, "read": 4 * GIGABYTES / 0.1})
    in_memory = make_config(cluster={"filesystem_gb_per_second": 0.1}, fleet={"weights_dir": "/dev/shm/weights"})
    assert publish(in_memory).parts["write"] == pytest.approx(2.0 * GIGABYTES)


def test_a_broadcast_needs_no_disk_unless_it_keeps_a_copy(make_config):
    bare = publish(make_config(fleet={"weights": "transfer", "keep_copy": False}))
    link = 1e9 * GIGABYTES / LINK
    assert bare.parts == pytest.approx({"gather": link, "send": link, "fingerprint": 0.57 * GIGABYTES})
    copied = publish(make_config(fleet={"weights": "transfer"}))
    assert copied.seconds == pytest.approx(2.0 * GIGABYTES)  # the writer is the slower one


def test_a_checkpoint_stops_training_for_its_copy_only_unless_it_is_synchronous(make_config):
    assert checkpoint_bytes(make_config(), SHAPE) == 14 * NUMEL
    assert checkpoint_bytes(make_config(model={"dtype": "float32"}), SHAPE) == 12 * NUMEL
    config = make_config(checkpoint={"every": 5})
    copy = 1e9 / (0.7 * 64e9)
    assert save_time(config, SHAPE, cluster_of(config), 1e9) == pytest.approx(copy / 5)
    config = make_config(checkpoint={"every": 5, "asynchronous": False, "export_every": 20})
    expected = (copy + 14 * NUMEL / 10e9) / 5 + 2.0 * GIGABYTES / 20
    assert save_time(config, SHAPE, cluster_of(config), 1e9) == pytest.approx(expected)
