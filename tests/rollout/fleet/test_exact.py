"""The engine over two real vLLM servers, compared with transformers' forward pass on the same weights."""

from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from conftest import WORDS
from fake_vllm import StaticFleet
from transformers import AutoModelForCausalLM, AutoTokenizer
from waiting import until

from nft_megatron.base.records import Request, Sampling
from nft_megatron.rollout.fleet.engine import FleetEngine
from nft_megatron.rollout.stopping import StopRule

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.timeout(1800)]


def labelled(server):
    """A server whose weights get a label but do not change."""

    def label(version):
        url = f"{server.url}/update_weight_version"
        httpx.post(url, json={"new_version": str(version)}, headers=server.headers, timeout=60).raise_for_status()

    return SimpleNamespace(url=server.url, api_key=server.api_key, headers=server.headers, label=label)


@pytest.fixture(scope="module")
def fleet(vllm_servers):
    servers = [labelled(server) for server in vllm_servers]
    yield StaticFleet(servers)
    for server in servers:
        server.label("default")


@pytest.fixture(scope="module")
def engine(fleet, fleet_model):
    static = StaticFleet(list(fleet.servers.values()))
    engine = FleetEngine(static, fleet_model, silence_seconds=3600.0)
    engine.load([], 5)
    yield engine
    engine.close()
    assert static.reports == []


@pytest.fixture(scope="module")
def model(fleet_model):
    return AutoModelForCausalLM.from_pretrained(fleet_model, dtype=torch.float32).eval()


def make_requests(num=6, answers=16, seed=0):
    """Prompts of 1 to 12 tokens; 63-bit seeds, as in a run."""
    rng, first = np.random.default_rng(seed), 2**63 - 10**6
    return [
        Request(i, rng.integers(2, len(WORDS), length).astype(np.int32), tuple(first + 1000 * i + k for k in range(answers)))
        for i, length in enumerate([1, 12, *rng.integers(2, 12, num - 2)])
    ]


def reference(model, prompt, tokens, temperature):
    """Log-probs of ``tokens`` from one forward pass without a cache, with the softmax in float64."""
    row = torch.tensor([[*prompt.tolist(), *tokens.tolist()]])
    with torch.no_grad():
        logits = model(row).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits / (temperature or 1.0), dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_and_logprobs_are_those_of_the_forward_pass(engine, model, temperature):
    requests = {request.request_id: request for request in make_requests()}
    stops = (1, WORDS.index("\\boxed{3}"))
    sampling = Sampling(temperature=temperature, max_tokens=24, stop_token_ids=stops)
    completions = list(engine.generate(list(requests.values()), sampling))
    assert sorted((c.request_id, c.index) for c in completions) == [(i, k) for i in range(6) for k in range(16)]
    worst = 0.0
    for c in completions:
        expected = reference(model, requests[c.request_id].prompt_tokens, c.tokens, temperature)
        taken = expected[torch.arange(len(c.tokens)), torch.from_numpy(c.tokens).long()].numpy()
        worst = max(worst, float(np.abs(taken - c.logprobs).max()))
        is_stop = np.isin(c.tokens, stops)
        assert not is_stop[:-1].any()  # the first stop token ends it and is kept
        assert c.finish_reason == ("stop" if is_stop[-1] else "length") and (is_stop[-1] or len(c.tokens) == 24)
        assert c.weight_version == 5
    assert worst < 1e-3
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert len({(c.request_id, tuple(c.tokens.tolist())) for c in completions}) > 80  # the answers to a prompt differ


def test_answers_are_drawn_from_the_model(engine, model):
    """First tokens of 512 answers against the model's probabilities, by a chi-square bound that fails once in 10,000."""
    prompt = np.array([2, 3, 6], dtype=np.int32)
    requests = [Request(i, prompt, tuple(range(100_000 * i, 100_000 * i + 16))) for i in range(32)]
    first = np.array([c.tokens[0] for c in engine.generate(requests, Sampling(max_tokens=1))])
    probabilities = reference(model, prompt, np.array([0]), 1.0)[0].exp().numpy()[: len(WORDS)]
    expected = 512 * probabilities
    chi_square = ((np.bincount(first, minlength=len(WORDS)) - expected) ** 2 / expected).sum()
    assert chi_square < 42.6  # 14 degrees of freedom


def test_a_seed_gives_one_answer_on_every_server_alone_or_among_others(engine, fleet, fleet_model):
    requests, sampling = make_requests(num=4), Sampling(max_tokens=20)
    together = {(c.request_id, c.index): c.tokens.tolist() for c in engine.generate(requests, sampling)}
    shuffled = [Request(r.request_id, r.prompt_tokens, r.seeds[::-1]) for r in requests]  # not consecutive: one by one
    for server in fleet.servers.values():
        alone = FleetEngine(StaticFleet([server]), fleet_model, silence_seconds=3600.0)
        try:
            alone.load([], 5)
            for c in alone.generate(shuffled, sampling):
                assert c.tokens.tolist() == together[c.request_id, 15 - c.index]
        finally:
            alone.close()


def test_greedy_is_the_most_likely_token(engine, model):
    requests = make_requests(answers=2)
    for c in engine.generate(requests, Sampling(temperature=0.0, max_tokens=20)):
        expected = reference(model, requests[c.request_id].prompt_tokens, c.tokens, 0.0)
        assert c.tokens.tolist() == expected.argmax(dim=-1).tolist()
        np.testing.assert_allclose(c.logprobs, expected.max(dim=-1).values.numpy(), atol=1e-3)


@pytest.mark.slow
def test_a_greedy_answer_that_is_cut_off_continues_elsewhere(engine, fleet, fleet_model, background):
    """Each answer is cut off once, somewhere after its 16th token: in float32 the rest is what it would have been."""
    requests, sampling = make_requests(answers=1), Sampling(temperature=0.0, max_tokens=240)
    whole = {c.request_id: c for c in engine.generate(requests, sampling)}
    static = StaticFleet(list(fleet.servers.values()))
    cutting = FleetEngine(static, fleet_model, silence_seconds=3600.0, keep_partial=True, max_attempts=20)
    cuts: dict[int, int] = {}

    def cut():
        for task, stream in cutting._request_loop._streams.items():
            request, num_tokens = stream.sub_request.request, stream.partial.total()
            if num_tokens > 16 and request not in cuts:
                cuts[request], stream.fault = num_tokens, "was cut off by a test"
                task.cancel()
        return len(cuts) == len(requests)

    try:
        cutting.load([], 5)
        cutting._request_loop._stream_interval = 16
        answers = background.submit(list, cutting.generate(requests, sampling))
        until(lambda: cutting._do(cut) or answers.done())
        completions = answers.result()
        usage = cutting.take_metrics().total
    finally:
        cutting.close()
    assert cuts and {c.request_id for c in completions} == set(whole)
    for c in completions:
        assert c.tokens.tolist() == whole[c.request_id].tokens.tolist()
        assert c.finish_reason == whole[c.request_id].finish_reason and c.weight_version == 5
        np.testing.assert_allclose(c.logprobs, whole[c.request_id].logprobs, atol=1e-3)
    assert usage.wasted_tokens == 0 and usage.num_retries == len(cuts)


def test_a_stop_text_ends_an_answer_as_in_the_embedded_engine(engine, fleet_model):
    requests, stop = make_requests(), ("\\boxed{2}", "+0")
    plain = {(c.request_id, c.index): c.tokens for c in engine.generate(requests, Sampling(max_tokens=20))}
    sampling = Sampling(max_tokens=20, stop=stop)
    rule = StopRule(sampling, len(WORDS), fleet_model)
    tokenizer = AutoTokenizer.from_pretrained(fleet_model)
    reasons = set()
    for c in engine.generate(requests, sampling):
        unstopped = plain[c.request_id, c.index]
        found = [bool(rule.find(unstopped[None], np.array([count]))[0]) for count in range(1, len(unstopped) + 1)]
        length = found.index(True) + 1 if True in found else 20
        assert c.tokens.tolist() == unstopped[:length].tolist()
        assert c.finish_reason == ("stop" if True in found else "length")
        assert any(text in tokenizer.decode(c.tokens) for text in stop) == (True in found)
        reasons.add(c.finish_reason)
    assert reasons == {"stop", "length"}


def test_abandoned_requests_are_no_longer_generated(engine, fleet):
    given_up: set[int] = set()
    requests = make_requests()
    answers = engine.generate(requests, Sampling(max_tokens=240), given_up)
    next(answers)
    given_up.update(range(1, 6))
    rest = [c.request_id for c in answers]
    assert set(rest) <= {0} and len(rest) >= 15
    answers = engine.generate(requests, Sampling(max_tokens=240))
    next(answers)
    answers.close()
    until(lambda: not sum(num_running(server) for server in fleet.servers.values()))


def num_running(server):
    """As the server reports it."""
    text = httpx.get(f"{server.url}/metrics", headers=server.headers, timeout=60).text
    lines = [line for line in text.splitlines() if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))]
    assert lines
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
