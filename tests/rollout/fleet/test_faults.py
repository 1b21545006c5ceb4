"""Servers that are killed, stopped or cut off while they generate: every answer arrives once, from the right weights."""

import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from conftest import WORDS
from fake_vllm import Process, StaticFleet, expected_answer, sampling
from tcp_proxy import Proxy
from transformers import AutoModelForCausalLM
from waiting import Clock, until

from nft_megatron.base.records import Request, Sampling
from nft_megatron.rollout.fleet import request_loop
from nft_megatron.rollout.fleet.engine import FleetEngine

FAULTS = ("kill", "stop", "cut")


class Place:
    """A server behind a proxy. A killed one is replaced at once, by a server with its first weights until it is repaired."""

    def __init__(self, name):
        self.name, self.version, self.to_strike, self.struck = name, 0, [], []
        self.process = Process()
        self.proxy = Proxy(self.port, on_bytes=self._strike)
        self.url, self.api_key = self.proxy.url, "key"

    @property
    def port(self):
        return int(self.process.url.rsplit(":", 1)[1])

    def label(self, version):
        self.version = version
        self.process.label(version)

    def _strike(self):
        """Strike in the middle of what it sends if a fault is left in ``to_strike``, which all servers share."""
        try:
            fault = self.to_strike.pop()
        except IndexError:
            return
        if fault == "cut":
            self.proxy.pause()
        elif fault == "stop":
            os.kill(self.process.process.pid, signal.SIGSTOP)
        else:
            self.process.kill()
            self.process = Process()
            self.proxy.backend = self.port
        self.struck.append(fault)

    def is_noticed(self, reports):
        """Silence was reported, or a successor got requests, which it answers with unpublished weights."""
        if self.struck[-1] == "kill":
            return self.process.seen["requests"] > 0
        return any(name == self.name for name, _ in reports)

    def mend(self):
        fault = self.struck.pop()
        if fault == "cut":
            self.proxy.resume()
        elif fault == "stop":
            os.kill(self.process.process.pid, signal.SIGCONT)
        else:
            self.label(self.version)

    def close(self):
        self.proxy.close()
        self.process.kill()


@pytest.fixture
def places():
    found = [Place(f"s{index}") for index in range(3)]
    yield found
    for place in found:
        place.close()


@pytest.mark.slow
def test_random_faults(places, folder, monkeypatch):
    """Six faults, each after a random number of answers, in the middle of whatever a server sends next.

    Reading waits while a silent server has work and is not yet reported, so that every fault finds work in progress.
    """
    monkeypatch.setattr(request_loop, "_MAX_UNREAD", 20)
    rng = random.Random(0)
    moments, faults, to_strike, num_struck = sorted(rng.sample(range(20, 300), 6)), rng.sample(FAULTS * 2, 6), [], 0
    for place in places:
        place.to_strike = to_strike
    requests = [Request(i, np.array([1]), tuple(range(1000 * i, 1000 * i + 8))) for i in range(60)]
    fleet = StaticFleet(places, rest_seconds=0.05)
    engine = FleetEngine(fleet, folder, silence_seconds=1.0, budget_tokens=10_000, max_attempts=100_000)
    completions, num_reports = [], {place.name: 0 for place in places}
    try:
        engine.load([], 4)
        for completion in engine.generate(requests, sampling(900)):
            completions.append(completion)
            if moments and len(completions) >= moments[0] and not to_strike:
                moments.pop(0)
                to_strike.append(faults.pop())
            for place in [place for place in places if place.struck]:

                def is_noticed(place=place):
                    return place.is_noticed(fleet.reports[num_reports[place.name] :])

                def is_idle(place=place):
                    return all(asked.member.name != place.name for asked in list(engine._request_loop._streams.values()))

                if place.struck[-1] != "kill":
                    until(lambda is_noticed=is_noticed, is_idle=is_idle: is_noticed() or is_idle())
                elif not is_noticed():
                    continue
                place.mend()
                num_struck += 1
                num_reports[place.name] = len(fleet.reports)
    finally:
        engine.close()
    assert num_struck + sum(len(place.struck) for place in places) == 6
    assert sorted((c.request_id, c.index) for c in completions) == [(i, k) for i in range(60) for k in range(8)]
    for c in completions:
        tokens, logprobs, reason = expected_answer(1000 * c.request_id + c.index, 900)
        assert (c.tokens.tolist(), c.finish_reason, c.weight_version) == (tokens, reason, 4)
        np.testing.assert_array_equal(c.logprobs, np.array(logprobs, dtype=np.float32))
    assert fleet.reports


@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(1800)
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stop", "cut"])
def test_real_servers_that_are_stopped_or_cut_off(vllm_servers, fleet_model, monkeypatch, fault):
    """One server has sent the first of an answer's 300 tokens; it is silent for ten minutes while the other is idle.

    A killed one would take half a minute to come back: benchmarks/fleet_faults.py does that, twenty times.
    """
    monkeypatch.setattr(request_loop, "time", clock := Clock())
    struck = threading.Event()

    def behind(proxy, server):
        def label(version):
            url = f"{server.url}/update_weight_version"
            httpx.post(url, json={"new_version": str(version)}, headers=server.headers, timeout=60).raise_for_status()

        return SimpleNamespace(url=proxy.url, api_key=server.api_key, label=label)

    victim = vllm_servers[0].process.pid

    def strike():
        if not struck.is_set():
            proxies[0].pause() if fault == "cut" else os.killpg(victim, signal.SIGSTOP)
            struck.set()

    actions = (strike, lambda: None)
    proxies = [Proxy(int(s.url.rsplit(":", 1)[1]), action) for s, action in zip(vllm_servers, actions, strict=True)]
    servers = [behind(*pair) for pair in zip(proxies, vllm_servers, strict=True)]
    fleet = StaticFleet(servers, rest_seconds=1e9)
    engine = FleetEngine(fleet, fleet_model, silence_seconds=600.0)
    rng = np.random.default_rng(0)
    requests = [
        Request(i, rng.integers(2, len(WORDS), 10).astype(np.int32), tuple(range(1000 * i, 1000 * i + 16))) for i in range(8)
    ]
    try:
        engine.load([], 6)
        with ThreadPoolExecutor() as pool:
            answers = pool.submit(list, engine.generate(requests, Sampling(max_tokens=300)))
            until(struck.is_set)
            until(lambda: {asked.member.name for asked in list(engine._request_loop._streams.values())} == {"s0"}, 240)
            clock.added += 601
            completions = answers.result(240)
    finally:
        os.killpg(victim, signal.SIGCONT)
        engine.close()
        for proxy in proxies:
            proxy.close()
        for server in servers:
            server.label("default")
    assert sorted((c.request_id, c.index) for c in completions) == [(i, k) for i in range(8) for k in range(16)]
    assert {c.weight_version for c in completions} == {6}
    assert {name for name, _ in fleet.reports} == {"s0"}
    model = AutoModelForCausalLM.from_pretrained(fleet_model, dtype=torch.float32).eval()
    for c in completions:
        row = torch.tensor([[*requests[c.request_id].prompt_tokens.tolist(), *c.tokens.tolist()]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(row).logits[0, 9:-1].double(), dim=-1)
        taken = logprobs.gather(1, torch.from_numpy(c.tokens).long()[:, None])[:, 0].numpy()
        np.testing.assert_allclose(c.logprobs, taken, atol=1e-3)
