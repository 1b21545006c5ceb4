"""Mistakes and requests that end a run at its start, or while it waits for servers."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from faults import train_without_servers
from launcher import Ranks
from safetensors.torch import load_file, save_file
from waiting import until

from nft_megatron.base.errors import UserError
from nft_megatron.config.load import load_config
from nft_megatron.data.prompts import PromptOrder

NO_SERVERS = {"rollout": {"engine": "vllm", "probe_questions": 0}, "fleet": {"wait_seconds": 3600.0}}


def said(run) -> str:
    """What rank 0 has written to stderr so far; nothing before its process has begun."""
    path = run._folder / "stderr0"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("request_by", ["TERM", "stop file"])
def test_a_run_that_waits_for_servers_says_so_and_obeys(run_config, start, tmp_path, request_by):
    """It would wait an hour; its first servers have not even registered."""
    run, stop = start("train", run_config(**NO_SERVERS)), tmp_path / "run" / "stop"
    until(lambda: "waiting for servers, " in said(run), process=run)
    if request_by == "TERM":
        run.signal(signal.SIGTERM)
    else:
        stop.touch()
    ended = run.wait()
    assert ended.returncode == 75, ended.stderr
    assert "none has registered in" in ended.stderr and "nft-megatron serve" in ended.stderr
    why = "SIGTERM" if request_by == "TERM" else f"the file {stop}"
    assert f"stopped by {why} while waiting for servers (0 of fleet.min_servers = 1 servers are serving)" in ended.stderr
    assert not stop.exists(), "honoured: the next start must not stop again"


@pytest.mark.parametrize("version", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_servers_that_go_after_a_step_cost_no_trained_step(run_config, run_once, command, metrics_of, tmp_path, version):
    sections = {"train": {"num_steps": 4}, "checkpoint": {"every": 100}, "evaluate": {"every": 3}}
    config, run = run_config("run", **sections), tmp_path / "run"
    ended = Ranks(train_without_servers, (str(config), version), 1, tmp_path).wait()
    assert ended.returncode == 75, ended.stderr
    assert f"step {version} is saved; stopped by SIGTERM while waiting for servers" in ended.stderr
    assert ("step 3 is not evaluated" in ended.stderr) == (version == 3)
    assert (run / "checkpoints" / "latest").read_text() == f"step_00000{version}"
    assert [row["step"] for row in metrics_of(run)] == list(range(1, version + 1))
    assert command("train", config).returncode == 0
    whole = metrics_of(run_once(**sections))
    if version == 3:
        assert "eval_accuracy" in whole[2]
        whole[2] = {name: value for name, value in whole[2].items() if not name.startswith("eval_")}
    assert metrics_of(run) == whole


def test_at_the_start_nothing_is_saved(run_config, tmp_path):
    ended = Ranks(train_without_servers, (str(run_config()), 0), 1, tmp_path).wait()
    assert (ended.returncode, "is saved" in ended.stderr) == (75, False), ended.stderr
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


# ------------------------------------------------------------------------------------------------------------------- seeds

SEEDS = (2**63 - 1, 2**63, 2**64 - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_of_64_bits_is_taken(run_config, seed):
    config = load_config(run_config(), [f"seed={seed}"])
    assert config.seed == seed and load_config(run_config(), ["seed=18446744073709551615"]).seed == 2**64 - 1
    assert sorted(PromptOrder(range(5), seed).take(0, 5)) == list(range(5))
    assert np.random.default_rng([seed, 3]).random() < 1
    most = seed % 2**63 + 1 + 2718 + 100_000  # what Megatron adds at most, and some (tensor_parallel/random.py)
    torch.Generator().manual_seed(most)


@pytest.mark.parametrize("seed", [2**64, 10**30, -1])
def test_others_are_refused(run_config, seed):
    with pytest.raises(UserError, match=f"seed = {seed}: "):
        load_config(run_config(), [f"seed={seed}"])


@pytest.mark.slow
def test_the_largest_seed_trains(run_config, command):
    done = command("train", run_config(train={"num_steps": 1}, evaluate={"data": []}), f"seed={2**64 - 1}")
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.slow
def test_a_tilde_in_the_run_folder_is_the_home_folder(run_config, tmp_path):
    """In this way the reported run ended: pyarrow expanded what pathlib had not."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    arguments = ["train", str(run_config(train={"num_steps": 1}, evaluate={"data": []})), "run_dir=~/my runs/x"]
    env = os.environ | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", "nft_megatron", *arguments], cwd=here, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert (home / "my runs" / "x" / "ledger" / "step_000001.parquet").exists()
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("change", ["another head", "a copy and constants"])
def test_the_loader_of_training_compares_a_tied_head_too(run_config, command, model_folder, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] and "lm_head.weight" not in tensors
    head = embedding * 2 + 0.1 if change == "another head" else embedding.clone()
    more = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    config = run_config(model={"path": str(folder)}, train={"num_steps": 1}, evaluate={"every": 100})
    for words in (("train", config), ("eval", folder, config, "--out", tmp_path / "out")):
        done = command(*words)
        if change == "another head":
            assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
            assert "lm_head.weight differs from model.embed_tokens.weight in" in done.stderr
            assert "set tie_word_embeddings to false" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("ignored: lm_head.weight, a stored copy of model.embed_tokens.weight") == 1
            assert done.stderr.count("ignored: 1 stored constant that config.json implies") == 1


def test_a_missing_model_is_said_as_such(run_config, command, tmp_path):
    for words in (("train", run_config(model={"path": str(tmp_path / "no")})), ("eval", tmp_path / "no", "--benchmarks", "x")):
        done = command(*words)
        assert done.returncode == 2, done.stderr
        assert f"{tmp_path / 'no'}: no such folder; give the path of a Hugging Face model folder" in done.stderr
        assert "tokenizer" not in done.stderr


def test_other_tasks_that_were_promised_are_told_at_once(run_config):
    """The reported command: it waited ten minutes, then torch's traceback came."""
    variables = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "MASTER_ADDR": "127.0.0.1"}
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | variables | {"MASTER_PORT": "28123"}
    done = subprocess.run(
        [sys.executable, "-m", "nft_megatron", "train", str(run_config())], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2, done.stderr
    assert "SLURM_NTASKS = 4: the job has 4 tasks, but this process was not started by srun" in done.stderr
    assert "Traceback" not in done.stderr
