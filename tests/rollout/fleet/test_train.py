"""A whole run whose answers come from real vLLM servers."""

import numpy as np
import pytest
from greedy import greedy_accuracy

from nft_megatron.data.ledger import read_groups, read_index
from nft_megatron.rollout.fleet.fleet import Fleet
from nft_megatron.weights import read_shape, weight_table
from nft_megatron.weights.hf_reader import HFReader


@pytest.fixture
def fleet_of(vllm_servers, server_settings, fleet_model, tmp_path):
    """The section ``fleet`` for the two servers, which get their first weights back afterwards."""
    key = tmp_path / "key"
    key.write_text(server_settings.api_key)
    key.chmod(0o600)
    fields = {"urls": [server.url for server in vllm_servers], "key_file": str(key), "min_servers": 2, "wait_seconds": 600.0}
    yield fields
    from nft_megatron.config.fleet import FleetConfig

    fleet = Fleet(
        FleetConfig(**{**fields, "urls": tuple(fields["urls"]), "key_file": key}), server_settings, tmp_path / "weights"
    )
    fleet.start()
    with HFReader(fleet_model) as reader:
        shapes = weight_table(read_shape(fleet_model)).shapes
        fleet.publish(((name, reader.read(name, 0, 0, shape[0])) for name, shape in shapes.items()), version=0)
    fleet.close()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("staleness", "in_flight", "stream"),
    [
        pytest.param(0, "finish", False, marks=pytest.mark.slow),
        (1, "continue", False),
        pytest.param(1, "continue", True, marks=pytest.mark.slow),
    ],
)
def test_a_run_with_vllm(run_config, command, metrics_of, fleet_model, fleet_of, tmp_path, staleness, in_flight, stream):
    config = run_config(
        model={"path": str(fleet_model)},
        fleet={**fleet_of, "in_flight": in_flight},
        rollout={"engine": "vllm", "max_staleness": staleness, "stream": stream, "oversample": 4.0},
        train={"num_steps": 4},
        checkpoint={"export_every": 2},
    )
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    rows, run = metrics_of(tmp_path / "run"), tmp_path / "run"
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 < row["gate_mean"] <= row["gate_max"] < 1e-4, "the servers have the weights of this step"
        assert row["mismatch_max"] < 1e-4
        index = read_index(run / "ledger" / f"step_{row['step']:06d}.parquet")
        behind = row["step"] - 1 - index.weight_version[index.fate == "train"]
        assert behind.min() >= 0 and behind.max() == row["staleness_max"] <= staleness
    groups = [group for path in sorted((run / "ledger").glob("step_*")) for group, fate in read_groups(path) if fate == "train"]
    assert len({group.group_id for group in groups}) == len(groups) == sum(row["groups_trained"] for row in rows)
    assert len(groups) == 16 or (stream and len(groups) > 16), "a step of a stream trains every group that is due"
    assert {len(group.answers) for group in groups} == {8}
    texts = [tuple(answer.completion.tokens.tolist()) for group in groups for answer in group.answers]
    assert len(set(texts)) > len(texts) / 4, "each answer has a seed of its own"
    accuracy = {row.get("eval_step", row["step"]): row["eval_accuracy"] for row in rows if "eval_accuracy" in row}
    assert accuracy.keys() == {2, 4}
    for step, measured in accuracy.items():
        assert measured == pytest.approx(greedy_accuracy(run / "hf" / f"step_{step:06d}"))
    for name in ("url-0", "url-1"):
        spent = [row for row in read_all(run) if f"server/{name}/tokens_per_second" in row]
        assert spent and np.all([row["fleet/healthy"] == 2 for row in spent])


def read_all(run):
    """The metrics, including those that depend on time."""
    from nft_megatron.observe.metrics import read_metrics

    return read_metrics(run)
