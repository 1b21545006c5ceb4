"""Two real vLLM servers of a tiny Qwen2, started once for all tests in this folder.

Every test that needs them has ``pytestmark = pytest.mark.xdist_group("vllm")`` or is in one of a few files: a start takes half
a minute, and with ``pytest -n 2`` each worker process that requests the servers starts its own.
"""

import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import WIDE, make_model
from fake_vllm import VOCABULARY
from transformers import Qwen2Config

from nft_megatron.rollout.fleet.server import Server, ServerSettings, new_key

START_SECONDS = 1200.0  # guards only against hanging: the machine may be busy


@pytest.fixture(scope="session")
def fleet_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("fleet_model"), **WIDE)


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
    """Two running servers with the weights of ``fleet_model``: ``[Server, Server]`` with ``url`` and ``headers``.

    A test that stops or reloads them must restore them; one that kills a server must put its successor into the list.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "3600")  # 300 s are too short on a very busy machine
    servers = [Server(server_settings, f"test-{index}", seed=11 + index) for index in range(2)]
    try:
        for server in servers:
            server.wait_until_up(START_SECONDS)
        yield servers
    finally:
        for server in servers:
            server.stop(0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of the model that the fake servers pretend to serve: its config alone."""
    path = tmp_path_factory.mktemp("model")
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=100_000,
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(path)
    return path


@pytest.fixture
def background():
    """Runs calls on a thread; the result is a future."""
    with ThreadPoolExecutor() as pool:
        yield pool
