"""Servers that are killed, stopped or cut off while they generate: every answer comes, once, and with the right weights."""

import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from conftest import WORDS
from fake_vllm import VOCABULARY, Process, StaticFleet, expected_answer
from tcp_proxy import Proxy
from transformers import AutoModelForCausalLM, Qwen2Config

from nft_megatron.base.records import Request, Sampling
from nft_megatron.rollout.fleet.engine import FleetEngine

FAULTS = ("kill", "stop", "cut")
SILENCE_SECONDS, FAULT_SECONDS = 0.6, 1.5


class Place:
    """A server behind a proxy. One that is killed has a successor at once, on its first weights for a while."""

    def __init__(self):
        self.process = Process(token_seconds=0.002)
        self.proxy = Proxy(self.port)
        self.url, self.api_key = self.proxy.url, "key"
        self.version = 0

    @property
    def port(self):
        return int(self.process.url.rsplit(":", 1)[1])

    def label(self, version):
        self.version = version
        self.process.label(version)

    def strike(self, fault):
        """Returns when it is over."""
        if fault == "cut":
            self.proxy.pause()
            time.sleep(FAULT_SECONDS)
            self.proxy.resume()
        elif fault == "stop":
            os.kill(self.process.process.pid, signal.SIGSTOP)
            time.sleep(FAULT_SECONDS)
            os.kill(self.process.process.pid, signal.SIGCONT)
        else:
            self.process.kill()
            self.process = Process(token_seconds=0.002)
            self.proxy.backend = self.port
            time.sleep(0.3)  # meanwhile it answers, with weights that nobody published
            self.label(self.version)

    def close(self):
        self.proxy.close()
        self.process.kill()


@pytest.fixture
def places():
    found = [Place() for _ in range(3)]
    yield found
    for place in found:
        place.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=10_000,
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(path)
    return path


def test_random_faults(places, folder):
    """Six faults at random moments, one server at a time."""
    rng = random.Random(0)
    requests = [Request(i, np.array([1]), tuple(range(1000 * i, 1000 * i + 8))) for i in range(60)]
    fleet = StaticFleet(places)
    engine = FleetEngine(fleet, folder, silence_seconds=SILENCE_SECONDS, budget_tokens=10_000, max_attempts=30)
    ended = threading.Event()
    struck = []

    def strike():
        for fault in rng.sample(FAULTS * 2, 6):
            ended.wait(rng.uniform(0.05, 0.5))
            if ended.is_set():
                return
            struck.append(fault)
            rng.choice(places).strike(fault)

    try:
        engine.load([], 4)
        thread = threading.Thread(target=strike)
        thread.start()
        completions = list(engine.generate(requests, Sampling(max_tokens=900)))
        ended.set()
        thread.join(30)
    finally:
        engine.close()
    assert len(struck) >= 4, "the call was over before the faults"
    assert sorted((c.request_id, c.index) for c in completions) == [(i, k) for i in range(60) for k in range(8)]
    for c in completions:
        tokens, logprobs, reason = expected_answer(1000 * c.request_id + c.index, 900)
        assert (c.tokens.tolist(), c.finish_reason, c.weight_version) == (tokens, reason, 4)
        np.testing.assert_array_equal(c.logprobs, np.array(logprobs, dtype=np.float32))
    assert fleet.reports


@pytest.mark.xdist_group("vllm")
@pytest.mark.parametrize("fault", ["stop", "cut"])
def test_real_servers_that_are_stopped_or_cut_off(vllm_servers, fleet_model, fault):
    """One has sent the first token of an answer of 300. A killed one would take half a minute to come back:
    benchmarks/fleet_faults.py does that, twenty times."""

    def behind(proxy, server):
        def label(version):
            url = f"{server.url}/update_weight_version"
            httpx.post(url, json={"new_version": str(version)}, headers=server.headers, timeout=30).raise_for_status()

        return SimpleNamespace(url=proxy.url, api_key=server.api_key, label=label)

    victim = vllm_servers[0].process.pid

    def strike():
        proxies[0].pause() if fault == "cut" else os.killpg(victim, signal.SIGSTOP)

    actions = (strike, None)
    proxies = [Proxy(int(s.url.rsplit(":", 1)[1]), action) for s, action in zip(vllm_servers, actions, strict=True)]
    servers = [behind(*pair) for pair in zip(proxies, vllm_servers, strict=True)]
    fleet = StaticFleet(servers)
    engine = FleetEngine(fleet, fleet_model, silence_seconds=8.0, max_attempts=10)
    rng = np.random.default_rng(0)
    requests = [
        Request(i, rng.integers(2, len(WORDS), 10).astype(np.int32), tuple(range(1000 * i, 1000 * i + 16))) for i in range(8)
    ]
    try:
        engine.load([], 6)
        completions = list(engine.generate(requests, Sampling(max_tokens=300)))
    finally:
        os.killpg(victim, signal.SIGCONT)
        engine.close()
        for proxy in proxies:
            proxy.close()
        for server in servers:
            server.label("default")
    assert sorted((c.request_id, c.index) for c in completions) == [(i, k) for i in range(8) for k in range(16)]
    assert {c.weight_version for c in completions} == {6}
    assert "s0" in {name for name, _ in fleet.reports}
    model = AutoModelForCausalLM.from_pretrained(fleet_model, dtype=torch.float32).eval()
    for c in completions:
        row = torch.tensor([[*requests[c.request_id].prompt_tokens.tolist(), *c.tokens.tolist()]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(row).logits[0, 9:-1].double(), dim=-1)
        taken = logprobs.gather(1, torch.from_numpy(c.tokens).long()[:, None])[:, 0].numpy()
        np.testing.assert_allclose(c.logprobs, taken, atol=1e-3)
