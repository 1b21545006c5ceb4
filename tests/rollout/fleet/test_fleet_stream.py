"""A stream over servers without a model, and over an engine that takes turns: questions are asked while others are answered."""

import threading

import numpy as np
import pytest
from fake_vllm import Process, StaticFleet, expected_answer, sampling
from waiting import until

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Completion, Request, Sampling
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.rollout.exclusive import ExclusiveEngine
from nft_megatron.rollout.fleet.engine import FleetEngine

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
        server.behave(version="3", hold=-1, fault="")
    return processes


@pytest.fixture
def engine(folder, servers):
    engine = FleetEngine(StaticFleet(servers), folder, silence_seconds=600.0, servers_seconds=120.0)
    engine.load([], 3)
    yield engine
    engine.close()


def request(number, answers=4):
    return Request(number, np.array([1, 2, 3], dtype=np.int32), tuple(1000 * number + i for i in range(answers)))


def take(stream, num):
    got = []
    until(lambda: ((completion := stream.next(0.1)) and got.append(completion)) or len(got) == num)
    return got


def check(completions, requests, version=3, max_tokens=MAX_TOKENS):
    seeds = {each.request_id: each.seeds for each in requests}
    assert sorted((c.request_id, c.index) for c in completions) == [(i, k) for i in sorted(seeds) for k in range(len(seeds[i]))]
    for c in completions:
        tokens, _, reason = expected_answer(seeds[c.request_id][c.index], max_tokens)
        assert (c.tokens.tolist(), c.finish_reason, c.weight_version) == (tokens, reason, version)


def test_questions_are_asked_while_others_are_answered(engine, servers):
    for server in servers:
        server.behave(hold=1, version="3")
    stream = engine.open_stream(sampling(MAX_TOKENS))
    assert stream.next(0.0) is None
    stream.ask([request(0), request(1)])
    until(lambda: sum(server.seen["held"] for server in servers))
    stream.ask([request(2)])
    for server in servers:
        server.behave(hold=-1, version="3")
    first = take(stream, 12)
    stream.ask([request(3)])
    check([*first, *take(stream, 4)], [request(i) for i in range(4)])
    until(lambda: not stream._call.requests)  # nothing is remembered of answered requests
    assert stream.next(0.0) is None
    stream.close()


def test_answers_outlive_new_weights_and_later_ones_have_these(engine, servers):
    stream = engine.open_stream(sampling(1000))
    old = Request(0, np.array([1], dtype=np.int32), tuple(range(0, 110, 11)))  # all of full length
    for server in servers:
        server.behave(hold=300, version="3")
    stream.ask([old])
    until(lambda: sum(server.seen["held"] for server in servers))
    assert stream.version == 3
    engine.load([], 4)
    assert stream.version == 4
    new = Request(1, np.array([1], dtype=np.int32), (5, 6))
    stream.ask([new])
    for server in servers:
        server.behave(hold=-1, version="4")
    completions = take(stream, 12)
    check([c for c in completions if c.request_id == 0], [old], 3, 1000)
    check([c for c in completions if c.request_id == 1], [new], 4, 1000)
    stream.close()


def test_closing_a_stream_aborts_what_is_in_progress(engine, servers):
    for server in servers:
        server.behave(hold=1, version="3")
    stream = engine.open_stream(sampling(MAX_TOKENS))
    stream.ask([request(0), request(1)])
    until(lambda: sum(server.seen["held"] for server in servers))
    stream.close()
    until(lambda: not engine._request_loop._streams and not engine._request_loop._calls)


def test_what_ends_an_engine_ends_its_stream(engine, servers):
    stream = engine.open_stream(sampling(MAX_TOKENS))
    with pytest.raises(UserError, match="vocabulary"):
        stream.ask([Request(0, np.array([77], dtype=np.int32), (1,))])
    for server in servers:
        server.behave(fault="refuse", version="3")
    stream.ask([request(1)])
    with pytest.raises(EngineFault, match="refuse a request"):
        take(stream, 1)


class Turns:
    """An engine whose answers are numbered by call; while ``may_end`` is not set, none ends."""

    overlaps = False

    def __init__(self):
        self.calls, self.may_end, self.fault = [], None, None

    def load(self, tensors, version):
        self.calls.append(f"load {version}")
        return "fingerprint"

    def generate(self, requests, sampling, given_up=frozenset()):
        self.calls.append([each.request_id for each in requests])
        if self.may_end is not None:
            assert self.may_end.wait(120)
        if self.fault:
            raise self.fault
        for each in requests:
            for index, seed in enumerate(each.seeds):
                yield Completion(each.request_id, index, np.array([seed]), np.zeros(1, np.float32), "stop", 0, 0.0)

    def close(self): ...


def test_an_engine_that_takes_turns_answers_in_waves():

    turns = Turns()
    turns.may_end = threading.Event()
    engine = ExclusiveEngine(turns, deadline_seconds=120.0)
    engine.load([], 5)
    stream = engine.open_stream(Sampling())
    assert stream.version == 5
    stream.ask([request(0, 2)])
    assert stream.next(0.0) is None
    until(lambda: len(turns.calls) == 2)
    stream.ask([request(1, 2)])
    stream.ask([request(2, 2)])
    assert stream.next(0.0) is None
    load = threading.Thread(target=engine.load, args=([], 6))
    load.start()
    until(lambda: engine._num_loads_waiting)
    turns.may_end.set()
    load.join(120)  # although nobody has read the first wave
    assert stream.version == 6
    got = take(stream, 6)
    assert [(c.request_id, c.index, int(c.tokens[0])) for c in got] == [
        (i, k, 1000 * i + k) for i in range(3) for k in range(2)
    ]
    assert turns.calls == ["load 5", [0], "load 6", [1, 2]]
    turns.fault = EngineFault("it fails")
    stream.ask([request(3)])
    with pytest.raises(EngineFault, match="it fails"):
        take(stream, 1)
    stream.close()
