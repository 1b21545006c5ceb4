"""What a server has sent of an answer when it dies, falls silent or aborts continues on another one."""

from contextlib import contextmanager

import numpy as np
import pytest
from fake_vllm import STOP, VOCABULARY, Process, StaticFleet, expected_answer, sampling
from waiting import Clock, until

from nft_megatron.base.records import Request, Sampling
from nft_megatron.rollout.fleet import request_loop
from nft_megatron.rollout.fleet.dispatch import Dispatcher
from nft_megatron.rollout.fleet.engine import FleetEngine

MAX_TOKENS = 3000


@pytest.fixture
def servers():
    processes = [Process(version="3"), Process(version="3")]
    yield processes
    for process in processes:
        process.kill()


@contextmanager
def opened(folder, servers, **options):
    fleet = StaticFleet(servers)
    options = {"silence_seconds": 600.0, "servers_seconds": 120.0, "keep_partial": True, "max_attempts": 20, **options}
    engine = FleetEngine(fleet, folder, **options)
    try:
        engine.load([], 3)
        yield engine, fleet
    finally:
        engine.close()


def greedy_request(first_token):
    """The servers' greedy answer is that of the seed ``first_token``; the prompt ends with the stop token."""
    return Request(first_token, np.array([first_token, 5, STOP], dtype=np.int32), seeds=(first_token,))


def greedy(max_tokens=MAX_TOKENS):
    return Sampling(temperature=0.0, max_tokens=max_tokens, stop_token_ids=(STOP,))


def held(engine, num_tokens, num_answers):
    """All answers have grown to ``num_tokens``."""
    streams = list(engine._request_loop._streams.values())
    return [stream.partial[0] for stream in streams] == [num_tokens] * num_answers


def check(completion, seed, max_tokens=MAX_TOKENS):
    tokens, logprobs, reason = expected_answer(seed, max_tokens)
    assert (completion.tokens.tolist(), completion.finish_reason, completion.weight_version) == (tokens, reason, 3)
    np.testing.assert_array_equal(completion.logprobs, np.array(logprobs, dtype=np.float32))


LONG = [seed for seed in range(VOCABULARY - 1) if len(expected_answer(seed, MAX_TOKENS)[0]) > 1200][:6]


@pytest.mark.parametrize("fault", ["kill", "drop", "error", "stall"])
def test_a_greedy_answer_continues_as_if_uninterrupted(folder, servers, background, monkeypatch, fault):
    """Each server in turn is at fault after 513 tokens of all its answers; the other one has the rest to generate."""
    monkeypatch.setattr(request_loop, "time", clock := Clock())
    for server in servers:
        server.behave(hold=513, version="3")
    with opened(folder, servers) as (engine, fleet):
        answers = background.submit(list, engine.generate([greedy_request(seed) for seed in LONG], greedy()))
        until(lambda: held(engine, 513, len(LONG)))
        bad, good = servers
        num_bad = sum(stream.member.name == "s0" for stream in list(engine._request_loop._streams.values()))
        good.behave(hold=-1, version="3")
        if fault == "kill":
            bad.kill()
        elif fault == "stall":
            until(lambda: len(engine._request_loop._streams) == num_bad)
            clock.added += 601
        else:
            bad.behave(hold=-1, fault=fault, version="3")
        completions = answers.result()
        usage = engine.take_metrics()
    for completion in completions:
        check(completion, completion.request_id)
    assert usage.total.wasted_tokens == 0 and usage.total.num_retries >= num_bad > 0
    assert usage.total.tokens == sum(len(completion.tokens) for completion in completions), "no token twice"
    assert {name for name, _ in fleet.reports} == {"s0"}


def test_an_answer_may_be_cut_again_and_again(folder, servers, background):
    """Six cuts, at either server."""
    seed = LONG[0]
    with opened(folder, servers) as (engine, _):
        for server in servers:
            server.behave(hold=1, version="3")
        answers = background.submit(list, engine.generate([greedy_request(seed)], greedy()))
        for _ in range(6):
            until(lambda: held(engine, 1, 1))
            (stream,) = engine._request_loop._streams.values()
            number = int(stream.member.name[1:])
            servers[number].behave(hold=-1, fault="drop", version="3")
            until(lambda ended=stream: ended not in list(engine._request_loop._streams.values()))
            servers[number].behave(hold=1, fault="", version="3")
        for server in servers:
            server.behave(hold=-1, fault="", version="3")
        (completion,) = answers.result()
    check(completion, seed)


def test_without_keeping_an_answer_begins_again_with_its_seed(folder, servers, background):
    request = Request(0, np.array([1, 2], dtype=np.int32), seeds=tuple(range(0, 88, 11)))  # all of full length
    for server in servers:
        server.behave(hold=513, version="3")
    with opened(folder, servers, keep_partial=False) as (engine, _):
        answers = background.submit(list, engine.generate([request], sampling(MAX_TOKENS)))
        until(lambda: sum(s.partial.total() for s in list(engine._request_loop._streams.values())) == 8 * 513)
        servers[0].kill()
        servers[1].behave(hold=-1, version="3")
        completions = answers.result()
        wasted = engine.take_metrics().total.wasted_tokens
    for completion in completions:
        check(completion, request.seeds[completion.index])
    assert wasted == 4 * 513


def test_a_sampled_answer_continues_with_a_seed_of_its_own(folder, servers, background):
    """The fake's answer to the new seed follows the 513 tokens that were kept."""
    request = Request(0, np.array([1, 2], dtype=np.int32), seeds=(11,))
    for server in servers:
        server.behave(hold=513, version="3")
    with opened(folder, servers) as (engine, _):
        answers = background.submit(list, engine.generate([request], sampling(MAX_TOKENS)))
        until(lambda: held(engine, 513, 1))
        (stream,) = engine._request_loop._streams.values()
        call = engine._request_loop._calls[stream.sub_request.call]
        bad = servers[int(stream.member.name[1:])]
        bad.behave(hold=-1, fault="drop", version="3")
        until(lambda: call.partial)
        seed = call.partial[0, 0].seed(11)
        for server in servers:
            server.behave(hold=-1, fault="", version="3")
        (completion,) = answers.result()
    rest = expected_answer(seed, MAX_TOKENS - 513)
    first = expected_answer(11, MAX_TOKENS)
    assert completion.tokens.tolist() == first[0][:513] + rest[0]
    np.testing.assert_array_equal(completion.logprobs, np.array(first[1][:513] + rest[1], dtype=np.float32))
    assert completion.finish_reason == rest[2]


@pytest.mark.parametrize("fault", ["garbage", "nan"])
def test_what_a_lying_server_sent_before_is_not_kept(folder, servers, background, fault):
    for server in servers:
        server.behave(hold=513, version="3")
    with opened(folder, servers) as (engine, _):
        answers = background.submit(list, engine.generate([greedy_request(seed) for seed in LONG], greedy()))
        until(lambda: held(engine, 513, len(LONG)))
        num_bad = sum(stream.member.name == "s0" for stream in list(engine._request_loop._streams.values()))
        servers[0].behave(hold=-1, fault=fault, version="3")
        servers[1].behave(hold=-1, version="3")
        completions = answers.result()
        wasted = engine.take_metrics().total.wasted_tokens
    for completion in completions:
        check(completion, completion.request_id)
    assert wasted >= num_bad * 513


def test_the_dispatcher_counts_kept_tokens_as_prompt():
    dispatcher = Dispatcher(budget_tokens=10_000, max_attempts=3)
    dispatcher.add(0, 7, range(4), prompt_tokens=10, hint=100, max_tokens=200)
    (sub,) = dispatcher.assign(["a"])
    assert dispatcher.outstanding("a") == 410
    assert dispatcher.failed(sub.ticket, {1: 60, 2: 130}) == []
    again = dispatcher.assign(["b"])
    assert sorted((each.indices.start, each.indices.stop) for each in again) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert dispatcher.outstanding("b") == (10 + 100) * 2 + (10 + 60 + 40) + (10 + 130 + 1)
