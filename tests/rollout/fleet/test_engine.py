"""The engine over servers without a model that answer by seed and fail on demand: every answer comes once and is right."""

import re
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from fake_vllm import VOCABULARY, Process, StaticFleet, expected_answer, sampling
from server_faults import ANSWERS, DRIPS, STREAMS
from waiting import Clock, until

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Request, Sampling
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.rollout.fleet import request_loop
from nft_megatron.rollout.fleet.engine import FleetEngine
from nft_megatron.rollout.fleet.request_loop import RequestLoop

MAX_TOKENS = 400


@pytest.fixture(scope="module")
def processes():
    servers = [Process(), Process()]
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def servers(processes):
    for server in processes:
        server.behave(version="0", hold=-1, fault="", only_seed=-1)
    return processes


def behave(servers, **changes):
    for server in servers:
        server.behave(**changes)


def seen(servers, what):
    """The sum over ``servers``."""
    return sum(server.seen[what] for server in servers)


@contextmanager
def opened(folder, servers, version=3, **options):
    fleet = StaticFleet(servers)
    engine = FleetEngine(fleet, folder, **{"silence_seconds": 600.0, "servers_seconds": 120.0, **options})
    try:
        if version is not None:
            assert engine.load([], version) == f"fingerprint {version}"
        yield engine, fleet
    finally:
        engine.close()


def make_requests(num=20, answers=8, first=0):
    """Half of them with consecutive seeds, half without."""
    prompt = np.array([1, 2, 3], dtype=np.int32)
    step = [1, 13]
    return [
        Request(first + i, prompt, tuple(10_000 * (first + i) + step[i % 2] * k for k in range(answers))) for i in range(num)
    ]


def check(completions, requests, max_tokens=MAX_TOKENS, version=3):
    """Each answer to each request comes exactly once and is the one its seed gives."""
    got = sorted((c.request_id, c.index) for c in completions)
    assert got == sorted((r.request_id, k) for r in requests for k in range(len(r.seeds)))
    seeds = {request.request_id: request.seeds for request in requests}
    for c in completions:
        tokens, logprobs, reason = expected_answer(seeds[c.request_id][c.index], max_tokens)
        assert (c.tokens.tolist(), c.finish_reason, c.weight_version) == (tokens, reason, version)
        np.testing.assert_array_equal(c.logprobs, np.array(logprobs, dtype=np.float32))


def test_every_answer_arrives_once_and_both_servers_contribute(folder, servers):
    requests = make_requests()
    with opened(folder, servers) as (engine, fleet):
        completions = list(engine.generate(requests, sampling(MAX_TOKENS)))
        check(completions, requests)
        usage = engine.take_metrics()
    assert fleet.reports == []
    assert usage.total.num_answers == 160 and usage.total.wasted_tokens == usage.total.num_retries == 0
    assert usage.total.tokens == sum(len(c.tokens) for c in completions)
    assert min(server.num_answers for server in usage.servers.values()) > 40
    assert 0 < usage.servers["s0"].busy_seconds <= usage.seconds and usage.servers["s1"].mean_queue > 0


def test_two_calls_at_once(folder, servers, background):
    first, second = make_requests(), make_requests(first=5, answers=3)  # ids overlap: each call has its own
    behave(servers, hold=1)
    with opened(folder, servers) as (engine, _):
        calls = [
            background.submit(list, engine.generate(requests, sampling(length)))
            for requests, length in ((first, MAX_TOKENS), (second, 77))
        ]
        until(lambda: all(seen(servers, f"of {length} tokens") for length in (MAX_TOKENS, 77)))
        behave(servers, hold=-1)
        check(calls[0].result(), first)
        check(calls[1].result(), second, max_tokens=77)


def test_an_abandoned_request_yields_nothing_more_and_is_aborted(folder, servers, background):
    """Half of the answers are short enough to finish; the others are held until a connection is closed."""
    behave(servers, hold=2000)
    requests = make_requests(num=6, answers=8)
    given_up: set[int] = set()
    with opened(folder, servers) as (engine, _):
        answers = engine.generate(requests, sampling(4000), given_up)
        first = next(answers)
        given_up |= {first.request_id, (first.request_id + 1) % 6}
        after = background.submit(list, answers)
        streams = engine._request_loop._streams
        until(lambda: not any(stream.sub_request.request in given_up for stream in list(streams.values())))
        behave(servers, hold=-1)
        assert {c.request_id for c in after.result()} == set(range(6)) - given_up
        usage = engine.take_metrics().total
    assert usage.wasted_tokens == usage.tokens - sum(len(c.tokens) for c in [first, *after.result()])
    assert usage.tokens >= usage.wasted_tokens + sum(len(c.tokens) for c in after.result())
    assert_idle(servers)


def assert_idle(servers):
    """Soon no server generates anything."""
    until(lambda: not seen(servers, "open"))


def test_closing_the_iterator_early_aborts_the_rest(folder, servers):
    behave(servers, hold=2000)
    requests = make_requests()
    with opened(folder, servers) as (engine, _):
        answers = engine.generate(requests, sampling(4000))
        kept = [next(answers), next(answers)]
        answers.close()
        assert_idle(servers)
        until(lambda: not engine._request_loop._streams)
        usage = engine.take_metrics().total
        assert usage.wasted_tokens == usage.tokens - sum(len(c.tokens) for c in kept) > 0
        behave(servers, hold=-1)
        check(list(engine.generate(requests, sampling(MAX_TOKENS))), requests)


@pytest.mark.parametrize("fault", ["drop", "error", "garbage", "fail", "refuse", "nan", "hide", "abort", *ANSWERS, *STREAMS])
def test_one_server_answers_what_the_other_fails(folder, servers, fault):
    """However a server fails or lies, all answers are the other's."""
    requests = make_requests(num=4, answers=4)
    with opened(folder, servers) as (engine, fleet):
        engine.load([], 2)
        engine.load([], 3)
        servers[0].behave(fault=fault)
        check(list(engine.generate(requests, sampling(MAX_TOKENS))), requests)
        usage = engine.take_metrics()
    assert usage.total.num_retries > 0 and usage.servers["s0"].num_answers == 0
    assert usage.servers["s0"].wasted_tokens == usage.servers["s0"].tokens
    assert {name for name, _ in fleet.reports} == ({"s0"} if fault != "abort" else set())
    if message := {**ANSWERS, **STREAMS}.get(fault, (None, None))[1]:
        assert re.search(message, fleet.reports[0][1])


@pytest.mark.parametrize("fault", DRIPS)
def test_a_server_that_drips_is_silent(folder, servers, background, monkeypatch, fault):
    """What it sends are no events. The clock advances only once it alone has work left."""
    monkeypatch.setattr(request_loop, "time", clock := Clock())
    requests = make_requests(num=8)
    with opened(folder, servers) as (engine, fleet):
        servers[0].behave(fault=fault)
        answers = background.submit(list, engine.generate(requests, sampling(MAX_TOKENS)))
        until(lambda: {asked.member.name for asked in list(engine._request_loop._streams.values())} == {"s0"})
        num_drips = servers[0].seen["drips"]
        until(lambda: servers[0].seen["drips"] > num_drips + 10)
        clock.added += 601
        check(answers.result(), requests)
    assert {name for name, _ in fleet.reports} == {"s0"} and "sent nothing for 600 s" in fleet.reports[0][1]


def test_a_server_that_is_never_silent_may_not_take_forever(folder, servers, background, monkeypatch):
    """A sign of life every 500 s, but the whole answer would take hours."""
    monkeypatch.setattr(request_loop, "time", clock := Clock())
    monkeypatch.setattr(request_loop, "_LONGEST_QUEUE", 2.0)
    behave(servers, hold=1)
    request = Request(0, np.array([1], dtype=np.int32), (0,))
    with opened(folder, servers) as (engine, fleet):
        answer = background.submit(list, engine.generate([request], sampling(4000)))

        def grown():
            return [asked.partial[0] for asked in list(engine._request_loop._streams.values())]

        for hold in (1, 257, 513, 769):  # 2 × 600 s in the queue and 4000 tokens at 5 a second: 2,000 s
            behave(servers, hold=hold)
            until(lambda hold=hold: grown() == [hold])
            assert not fleet.reports
            clock.added += 500
        (asked,) = engine._request_loop._streams.values()
        until(lambda: fleet.reports)
        behave(servers, hold=-1)
        check(answer.result(), [request], max_tokens=4000)
    assert fleet.reports[0] == (asked.member.name, "did not finish a request within 2000 s")


def test_a_server_that_is_paused_for_new_weights_and_says_503_is_not_at_fault(folder, servers, background):
    requests, calls = make_requests(num=8), []
    with opened(folder, servers) as (engine, fleet):
        publish, before = fleet.publish, seen(servers, "requests")

        def publish_while_asked(tensors, version):
            behave(servers, fault="paused")
            calls.append(background.submit(list, engine.generate(requests, sampling(MAX_TOKENS))))
            until(lambda: all(server.seen["requests"] for server in servers) and seen(servers, "requests") > before)
            behave(servers, fault="")
            return publish(tensors, version)

        fleet.publish = publish_while_asked
        engine.load([], 4)
        check(calls[0].result(), requests, version=4)
    assert fleet.reports == []


def test_503_from_a_server_that_nobody_paused_is_a_fault(folder, servers):
    requests = make_requests(num=8)
    with opened(folder, servers) as (engine, fleet):
        servers[0].behave(fault="paused")
        check(list(engine.generate(requests, sampling(MAX_TOKENS))), requests)
    assert {name for name, _ in fleet.reports} == {"s0"} and "503" in fleet.reports[0][1]


def test_silence(folder, servers, background, monkeypatch):
    """The clock advances only once the silent server alone has work left."""
    monkeypatch.setattr(request_loop, "time", clock := Clock())
    requests = make_requests(num=8)
    with opened(folder, servers) as (engine, fleet):
        servers[0].behave(fault="stall")
        answers = background.submit(list, engine.generate(requests, sampling(MAX_TOKENS)))
        until(lambda: engine._request_loop._streams and not engine._request_loop._dispatcher.num_waiting)
        until(lambda: {asked.member.name for asked in list(engine._request_loop._streams.values())} == {"s0"})
        clock.added += 601
        check(answers.result(), requests)
    assert {name for name, _ in fleet.reports} == {"s0"} and "sent nothing for 600 s" in fleet.reports[0][1]


@pytest.mark.parametrize("label", ["2", "9", "default"], ids=["older", "never published", "not ours"])
def test_an_answer_from_other_weights_is_discarded(folder, servers, label):
    requests = make_requests(num=8)
    with opened(folder, servers) as (engine, fleet):
        engine.load([], 2)
        engine.load([], 3)  # so that 2 was published but is not what the server is believed to hold
        servers[1].behave(version=label)
        check(list(engine.generate(requests, sampling(MAX_TOKENS))), requests)
        usage = engine.take_metrics()
    assert {name for name, _ in fleet.reports} == {"s1"} and f"version {label}" in fleet.reports[0][1]
    assert usage.servers["s1"].wasted_tokens == usage.servers["s1"].tokens > 0


def test_an_answer_continued_on_new_weights_has_the_older_version(folder, servers, background):
    behave(servers, hold=500)
    request = Request(0, np.array([1], dtype=np.int32), tuple(range(0, 110, 11)))  # all of full length
    with opened(folder, servers) as (engine, _):
        answers = background.submit(list, engine.generate([request], sampling(1000)))
        until(lambda: seen(servers, "held") == 10)
        engine.load([], 4)
        behave(servers, hold=-1)
        old = answers.result()
        new = list(engine.generate([request], sampling(20)))
    assert {c.weight_version for c in old} == {3} and {len(c.tokens) for c in old} == {1000}
    assert {c.weight_version for c in new} == {4}


def test_a_failed_publication_counts_for_nothing(folder, servers, background, monkeypatch):
    """Answers that already carry its version wait until it has ended, and are then requested again."""
    requests = make_requests(num=4)
    begun, arrived, check_versions = threading.Event(), [], RequestLoop._check_versions

    async def noted(self, versions, member):
        arrived.append(versions)
        await check_versions(self, versions, member)

    class Failing(StaticFleet):
        def publish(self, tensors, version):
            if version == 4:
                behave(servers, version="4")
                begun.set()
                until(lambda: arrived)
                behave(servers, version="3")
                raise UserError("weights", "lm_head", "is missing", "send it")
            return super().publish(tensors, version)

    monkeypatch.setattr(RequestLoop, "_check_versions", noted)
    fleet = Failing(servers)
    engine = FleetEngine(fleet, folder, silence_seconds=600.0, max_attempts=20)
    try:
        engine.load([], 3)
        answers = engine.generate(requests, sampling(MAX_TOKENS))
        load = background.submit(engine.load, [], 4)
        assert begun.wait(120)
        check(list(answers), requests)
        with pytest.raises(UserError):
            load.result()
        assert arrived[0] == (4,)
        with pytest.raises(EngineFault, match="no weights"):
            engine.generate(requests, Sampling())
    finally:
        engine.close()


def test_an_answer_that_every_server_fails_comes_back_aborted(folder, servers):
    requests = [Request(i, np.array([1], dtype=np.int32), (100 * i,)) for i in range(5)]
    with opened(folder, servers, max_attempts=3) as (engine, fleet):
        behave(servers, fault="drop", only_seed=200)
        completions = list(engine.generate(requests, sampling(MAX_TOKENS)))
        assert engine.take_metrics().total.num_retries == 2
    lost = [c for c in completions if c.finish_reason == "abort"]
    assert [(c.request_id, c.index, len(c.tokens)) for c in lost] == [(2, 0, 0)]
    check([c for c in completions if c not in lost], [r for r in requests if r.request_id != 2])
    assert len(fleet.reports) == 3


def test_a_request_rejected_by_two_servers_ends_the_call(folder, servers):
    with opened(folder, servers) as (engine, _):
        behave(servers, fault="refuse")
        with pytest.raises(EngineFault, match=r"servers s\d and s\d refuse a request: 400 .*too long.*; 400 .*too long"):
            list(engine.generate(make_requests(), sampling(MAX_TOKENS)))
        behave(servers, fault="")
        requests = make_requests(num=3)
        check(list(engine.generate(requests, sampling(MAX_TOKENS))), requests)


def test_a_request_that_the_only_server_rejects_each_time_ends_the_call(folder, servers):
    with opened(folder, servers[:1], max_attempts=3) as (engine, fleet):
        servers[0].behave(fault="refuse", only_seed=0)
        with pytest.raises(EngineFault, match=r"server s0 refuses a request: 400 .*too long"):
            list(engine.generate([Request(0, np.array([1], dtype=np.int32), (0,))], sampling(MAX_TOKENS)))
    assert len(fleet.reports) == 3


def test_waits_for_a_server(folder, servers, background):
    requests = make_requests(num=2)
    with opened(folder, servers) as (engine, fleet):
        servers_then, fleet.servers, looks = fleet.servers, {}, []
        serving, fleet.serving = fleet.serving, lambda: looks.append(0) or serving()
        answers = background.submit(list, engine.generate(requests, sampling(MAX_TOKENS)))
        until(lambda: looks)
        fleet.servers = servers_then
        check(answers.result(), requests)


def test_waits_for_a_server_but_not_forever(folder, servers):
    with opened(folder, servers, servers_seconds=0.1) as (engine, fleet):
        answers = engine.generate(make_requests(num=2), sampling(MAX_TOKENS))
        fleet.servers = {}
        with pytest.raises(EngineFault, match="no servers"):
            next(answers)


def test_waiting_for_servers_ends_when_all_requests_are_abandoned(folder, servers):
    class GivenUp:
        looks = 0

        def __contains__(self, request_id):
            self.looks += 1
            return self.looks > 3

    with opened(folder, servers) as (engine, fleet):
        fleet.servers = {}
        assert list(engine.generate(make_requests(), Sampling(), GivenUp())) == []


def test_servers_that_vanish_while_there_is_work_are_waited_for(folder, servers):
    with opened(folder, servers, servers_seconds=0.1, max_attempts=100) as (engine, fleet):
        behave(servers, fault="drop")
        fleet.rest_seconds = 3600.0
        with pytest.raises(EngineFault, match="no servers"):
            list(engine.generate(make_requests(num=2), sampling(MAX_TOKENS)))


def test_no_server_gets_more_than_its_budget(folder, background):
    server = Process(hold=1)
    try:
        requests = [
            Request(i, np.array([1], dtype=np.int32), (11 * i,), expected_tokens=100) for i in range(40)
        ]  # 101 tokens each
        with opened(folder, [server], budget_tokens=510) as (engine, _):
            answers = background.submit(list, engine.generate(requests, sampling(100)))
            until(lambda: server.seen["held"] == 5)
            server.behave(hold=-1)
            check(answers.result(), requests, max_tokens=100)
        assert server.seen["most_open"] == 5
    finally:
        server.kill()


def test_a_caller_that_does_not_read_gets_no_more_answers(folder, servers, monkeypatch):
    monkeypatch.setattr(request_loop, "_MAX_UNREAD", 10)
    requests = make_requests(num=200, answers=4)
    begun = seen(servers, "answers")
    with opened(folder, servers, budget_tokens=2000) as (engine, _):
        answers = engine.generate(requests, sampling(MAX_TOKENS))
        first = next(answers)
        (call,) = engine._request_loop._calls.values()
        until(lambda: call.answers.qsize() > 10 and not engine._request_loop._streams)
        engine._do(engine._request_loop.send)
        assert not engine._request_loop._streams and seen(servers, "answers") - begun < 100
        other = make_requests(num=2)
        check(list(engine.generate(other, sampling(MAX_TOKENS))), other)  # no other caller is held up
        check([first, *answers], requests)


def test_a_broken_stream_is_noticed_although_its_server_answers_others(folder, servers, background, monkeypatch):
    """Hours pass, but the server is never silent for ten minutes: another answer grows in between."""
    monkeypatch.setattr(request_loop, "time", clock := Clock())
    monkeypatch.setattr(request_loop, "_LONGEST_QUEUE", 2.0)
    server = servers[0]
    server.behave(hold=1, only_seed=0)
    with opened(folder, [server], silence_seconds=600.0) as (engine, fleet):
        other = background.submit(list, engine.generate([Request(7, np.array([1]), (11,))], sampling(4000)))
        broken = [Request(0, np.array([1], dtype=np.int32), (0,))]
        answers = background.submit(list, engine.generate(broken, sampling(20)))

        def asked():
            return {asked.sub_request.request: asked.partial[0] for asked in list(engine._request_loop._streams.values())}

        until(lambda: asked() == {0: 1, 7: 1})
        for hold in (257, 513, 769):  # a sign of life every 256 tokens
            assert not fleet.reports
            server.behave(fault="chunk" if hold < 769 else "", hold=hold)
            until(lambda hold=hold: asked()[7] == hold)
            clock.added += 500
        check(answers.result(), broken, max_tokens=20)
        assert not other.done() and "sent nothing" in fleet.reports[0][1]
        engine.close()
        with pytest.raises(EngineFault, match="closed"):
            other.result()


def test_closing_does_not_wait_for_streams_that_never_end(folder, servers):
    behave(servers, fault="linger")
    requests = make_requests(num=2)
    with opened(folder, servers, silence_seconds=60.0) as (engine, fleet):
        check(list(engine.generate(requests, sampling(MAX_TOKENS))), requests)
        engine.close()
        assert fleet.servers == {}


def test_closing_ends_a_call_in_progress(folder, servers, background):
    behave(servers, hold=1)
    with opened(folder, servers) as (engine, _):
        answers = background.submit(list, engine.generate(make_requests(), sampling(MAX_TOKENS)))
        until(lambda: seen(servers, "held"))
        engine.close()
        with pytest.raises(EngineFault, match="closed"):
            answers.result()


def test_rejects_requests_that_cannot_be_answered(folder, servers):
    with opened(folder, servers, version=None) as (engine, _):
        with pytest.raises(EngineFault, match="no weights"):
            engine.generate(make_requests(), Sampling())
        engine.load([], 0)
        with pytest.raises(UserError, match="vocabulary"):
            engine.generate([Request(0, np.array([VOCABULARY]), (1,))], Sampling())
        assert list(engine.generate([], Sampling())) == []
        requests = [Request(0, np.array([1], dtype=np.int32), ()), Request(1, np.array([1], dtype=np.int32), (5,))]
        check(list(engine.generate(requests, sampling(MAX_TOKENS))), requests, version=0)
