"""Which checkpoint a run goes on from."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def damaged_run(run_config, command, metrics_of, tmp_path, finished):
    """The config of a run of 4 steps with checkpoints 2 to 4, and the metrics of one of 5 that nothing disturbed."""
    config = run_config(train={"num_steps": 5}, checkpoint={"keep": 3})
    if not (finished / "whole").exists():  # once for all cases
        assert command("train", config).returncode == 0
        shutil.move(tmp_path / "run", finished / "whole")
        assert command("train", config, "train.num_steps=4").returncode == 0
        shutil.move(tmp_path / "run", finished / "four")
    shutil.copytree(finished / "four", tmp_path / "run")
    return config, metrics_of(finished / "whole")


def truncate(folder: Path) -> None:
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(content)


def delete_half(folder: Path) -> None:
    for path in sorted(folder.iterdir())[::2]:
        path.unlink()


def damage_collector(folder: Path) -> None:
    (folder / "collector.parquet").write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete_half, damage_collector, shutil.rmtree])
def test_a_damaged_newest_checkpoint_is_stepped_over_loudly(damaged_run, command, metrics_of, tmp_path, damage):
    config, undisturbed = damaged_run
    run = tmp_path / "run"
    damage(run / "checkpoints" / "step_000004")
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    assert "trying the checkpoint before it" in done.stderr and "step_000004" in done.stderr
    assert metrics_of(run) == undisturbed, "steps 4 and 5 as if nothing had happened"
    assert (run / "checkpoints" / "latest").read_text() == "step_000005"


def test_the_newest_good_one_is_taken_however_far_back(damaged_run, command, metrics_of, tmp_path):
    config, undisturbed = damaged_run
    for step, damage in ((4, truncate), (3, flip_a_bit)):
        damage(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    done = command("train", config, ranks=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trying the checkpoint before it") == 2
    assert metrics_of(tmp_path / "run") == undisturbed


def test_without_any_good_checkpoint_the_run_is_refused(damaged_run, command, tmp_path):
    config, _ = damaged_run
    for step in (2, 3, 4):
        truncate(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    before = sorted((tmp_path / "run").rglob("*"))
    done = command("train", config)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("nft-megatron: ")]
    assert "step_000004: __0_0.distcp is damaged" in line
    assert sorted((tmp_path / "run").rglob("*")) == before, "nothing is lost"
