"""Two real vLLM servers of a tiny Qwen2, started once for all tests of this folder.

Every test that needs them carries ``pytestmark = pytest.mark.xdist_group("vllm")`` or lies in one of few files: a start takes
half a minute, and with ``pytest -n 2`` each worker process that asks for the servers starts its own.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from conftest import BOXES, WORDS, make_tokenizer

from nft_megatron.rollout.fleet.server import Server, ServerSettings, new_key

START_SECONDS = 180.0

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="run `make vllm`")


def make_model(folder: Path, seed: int) -> Path:
    """A random Qwen2 that vLLM's CPU attention takes (heads of 32), with the tokenizer and end tokens of tests/conftest.py."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
        pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.eos_token_id = [1, *map(WORDS.index, BOXES)]
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def fleet_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("fleet_model"), seed=0)


@pytest.fixture(scope="session")
def server_settings(fleet_model, tmp_path_factory) -> ServerSettings:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("run `make vllm`")
    folder = tmp_path_factory.mktemp("fleet")
    return ServerSettings(
        fleet_model, folder / "fleet", folder / "logs", new_key(), dtype="float32", python=sys.executable, threads=1
    )


@pytest.fixture(scope="session")
def vllm_servers(server_settings):
    """Two servers that answer, on the weights of ``fleet_model``: ``[Server, Server]`` with ``url`` and ``headers``.

    A test that stops, kills or reloads them must leave them as they were, or start its own.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    servers = [Server(server_settings, f"test-{index}", seed=11 + index) for index in range(2)]
    try:
        for server in servers:
            server.wait_until_up(START_SECONDS)
        yield servers
    finally:
        for server in servers:
            server.stop(0)
