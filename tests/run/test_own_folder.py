"""Where ``nft-megatron train`` may write, what it may delete, and whose answers it trains on."""

import errno
import shutil

import pytest
from faults import train_without_locks
from launcher import Ranks
from waiting import until

from nft_megatron.base.run_folder import RunFolder


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def message(done) -> str:
    """The one message of a command that was refused."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("nft-megatron: ")]
    return line


def test_an_empty_run_dir_is_refused_and_nothing_is_written(run_config, command, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused = message(command("train", run_config(), "run_dir=''"))
    assert refused.startswith("nft-megatron: run_dir = : is empty, which would mean the current folder; ")
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("where", ["", "run", "link"])
def test_the_model_folder_is_no_run_folder(run_config, command, tmp_path, model_folder, where):
    model = shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    run_dir = tmp_path / "link" if where == "link" else model / where
    before = content(tmp_path)
    refused = message(command("train", run_config(), f"model.path={model}", f"run_dir={run_dir}"))
    assert f"run_dir = {run_dir}: " in refused and f"model.path = {model}; choose a folder" in refused
    assert {path: data for path, data in content(tmp_path).items() if path.suffix != ".yaml"} == before


def test_a_disk_without_locks_is_refused(run_config, tmp_path):
    config = run_config(train={"num_steps": 1})
    refused = message(Ranks(train_without_locks, (str(config), errno.ENOSYS), 1, tmp_path).wait())
    assert f"run_dir = {tmp_path / 'run'}: cannot be locked: Function not implemented; mount its file system" in refused
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_ledger_of_another_step_is_not_trained_on(run_config, run_once, command, tmp_path):
    run = RunFolder(shutil.copytree(run_once(), tmp_path / "run"))
    shutil.copy(run.ledger(3), run.ledger(4))
    refused = message(command("train", run_config(), "train.num_steps=4"))
    assert f"ledger = {run.ledger(4)}: holds the answers of step 3, not of step 4; restore" in refused
    assert run.latest_step() == 3
    refused = message(command("replay", run.root, "--step", "4"))
    assert "holds the answers of step 3, not of step 4" in refused


def test_a_checkpoint_that_is_a_link_is_used_and_its_target_stays(run_config, command, tmp_path):
    config, run = run_config(checkpoint={"keep": 1}, evaluate={"data": []}), RunFolder(tmp_path / "run")
    assert command("train", config, "train.num_steps=1").returncode == 0
    run.checkpoint(1).rename(tmp_path / "elsewhere")
    run.checkpoint(1).symlink_to(tmp_path / "elsewhere")
    before = content(tmp_path / "elsewhere")
    assert command("train", config, "train.num_steps=2").returncode == 0
    assert [path.name for path in run.checkpoints.glob("step_*")] == ["step_000002"]
    assert content(tmp_path / "elsewhere") == before


def test_a_run_whose_lock_another_process_has_taken_ends_and_writes_no_more(run_config, start, tmp_path):
    """As if somebody had deleted the lock of a run that he believed dead, and started it again."""
    process, run = start("train", run_config(train={"num_steps": 1_000_000}, evaluate={"data": []})), tmp_path / "run"
    until((run / "checkpoints" / "latest").exists, process=process)
    (run / "lock").unlink()
    with RunFolder(run).open():
        ended = process.wait()
        assert ended.returncode == 75 and "the same command" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
        rows = (run / "metrics.jsonl").read_text().splitlines()
        newest = RunFolder(run).latest_step()
        assert newest is not None and len(rows) - 1 <= newest <= len(rows)
