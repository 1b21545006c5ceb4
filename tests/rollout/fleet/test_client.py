"""One request to a server: what is sent, what is read, and every way in which a server can fail."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from fake_vllm import STOP, VOCABULARY, Process, expected_answer, sampling
from server_faults import ANSWERS, STREAMS

from nft_megatron.base.records import Request, Sampling
from nft_megatron.rollout.answer_rule import AnswerRule
from nft_megatron.rollout.fleet import client
from nft_megatron.rollout.fleet.access import Credentials
from nft_megatron.rollout.fleet.client import Finished, Progress, Refused, make_body
from nft_megatron.rollout.fleet.session import ServerFault, open_session

PROMPT = np.array([1, 2, 3], dtype=np.int32)


@pytest.fixture(scope="module")
def server():
    process = Process()
    yield process
    process.kill()


@pytest.fixture(autouse=True)
def healthy(server):
    server.behave(version="0", fault="", only_seed=-1, reordered=False, server_id="")


def ask(server, *, seed=5, num_answers=4, max_tokens=600, server_id=None):
    """All events of one request."""
    rule = AnswerRule(sampling(max_tokens), VOCABULARY, Path("unused"))

    async def run():
        async with open_session() as session:
            body = make_body(PROMPT, seed, num_answers, sampling(max_tokens))
            request, indices = Request(3, PROMPT, tuple(range(seed, seed + num_answers))), range(10, 10 + num_answers)
            events = client.generate(session, server.url, Credentials("key", server_id), body, request, indices, rule)
            return [event async for event in events]

    return asyncio.run(run())


@pytest.mark.parametrize("reordered", [False, True], ids=["as vLLM 0.32.0 writes it", "any other JSON"])
def test_answers_are_those_of_their_seeds(server, reordered):
    server.behave(reordered=reordered, version="7")
    events = ask(server, seed=8, num_answers=6)
    answers = {event.completion.index - 10: event.completion for event in events if isinstance(event, Finished)}
    assert sorted(answers) == list(range(6))
    assert {event.versions for event in events if isinstance(event, Finished)} == {(7,)}
    for index, answer in answers.items():
        tokens, logprobs, reason = expected_answer(8 + index, 600)
        assert answer.tokens.tolist() == tokens and answer.tokens.dtype == np.int32
        np.testing.assert_array_equal(answer.logprobs, np.array(logprobs, dtype=np.float32))
        assert (answer.request_id, answer.finish_reason, answer.weight_version) == (3, reason, 7)
        progress = [event.num_tokens for event in events if isinstance(event, Progress) and event.index == 10 + index]
        assert sum(progress) == len(tokens) and max(progress) <= client.STREAM_INTERVAL
    assert {answer.finish_reason for answer in answers.values()} == {"stop", "length"}
    assert all(answer.tokens[-1] == STOP for answer in answers.values() if answer.finish_reason == "stop")


def test_an_answer_arrives_when_it_ends_not_with_the_last_one(server):
    events = ask(server, seed=11, num_answers=3, max_tokens=2000)
    finished_at = [number for number, event in enumerate(events) if isinstance(event, Finished)]
    assert finished_at[0] < len(events) - 3


def test_no_setting_is_left_to_a_servers_defaults():
    sampling = Sampling(temperature=0.7, top_p=1.0, max_tokens=9, stop_token_ids=(4, 6), stop=("\\boxed",))
    body = json.loads(make_body(PROMPT, 2**62, 3, sampling))
    assert body["token_ids"] == [1, 2, 3] and body["stream"] is True
    assert (
        body["sampling_params"].items()
        >= {
            "n": 3,
            "seed": 2**62,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": 9,
            "min_tokens": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": True,
            "skip_special_tokens": False,
        }.items()
    )
    assert body["sampling_params"]["stop_token_ids"] == [4, 6] and body["sampling_params"]["stop"] == ["\\boxed"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("drop", "ClientPayloadError"),
        ("error", "dead"),
        ("garbage", "not an answer"),
        ("fail", "500"),
        ("nan", "log-prob"),
        ("repeat", "had ended"),
    ],
)
def test_a_failing_server(server, fault, message):
    server.behave(fault=fault)
    with pytest.raises(ServerFault, match=message) as raised:
        ask(server)
    assert not raised.value.is_abort


def test_an_aborted_answer_is_nobodys_fault(server):
    server.behave(fault="abort")
    with pytest.raises(ServerFault) as raised:
        ask(server)
    assert raised.value.is_abort


def test_an_invalid_request_is_rejected(server):
    server.behave(fault="refuse")
    with pytest.raises(Refused, match="too long"):
        ask(server)


def test_no_server_is_listening():
    class Nowhere:
        url = "http://127.0.0.1:9"

    with pytest.raises(ServerFault, match="ClientConnectorError"):
        ask(Nowhere)


def test_an_answer_without_named_weights_has_no_versions(server):
    server.behave(fault="hide")
    found = [(event.versions, event.completion.weight_version) for event in ask(server) if isinstance(event, Finished)]
    assert found == [((), -1)] * 4


@pytest.mark.parametrize("fault", ANSWERS)
def test_an_answer_that_is_not_one_to_the_request_is_the_servers_fault(server, fault):
    """Weights that nobody published are recognised by the engine: here those of the fake's answers are."""
    server.behave(fault=fault)
    message = ANSWERS[fault][1]
    if fault in ("weights of too few tokens", "no weights", "an unpublished version", "newer weights before older ones"):
        assert {event.versions for event in ask(server) if isinstance(event, Finished)} in ({()}, {(77,)}, {(3, 2)})
        return
    with pytest.raises(ServerFault, match=message) as raised:
        ask(server)
    assert not raised.value.is_abort and len(str(raised.value)) < 800


@pytest.mark.parametrize("fault", STREAMS)
def test_a_stream_that_is_none_is_the_servers_fault(server, fault):
    server.behave(fault=fault)
    message = STREAMS[fault][1]
    if message.startswith("refuses"):
        with pytest.raises(Refused, match=message.partition(": ")[2]):
            ask(server)
        return
    with pytest.raises(ServerFault, match=message) as raised:
        ask(server)
    assert not raised.value.is_abort and len(str(raised.value)) < 800


def test_a_server_of_the_run_proves_itself_and_never_sees_the_key(server):
    server.behave(server_id="5a")
    shown = server.seen["shown the key"]
    assert sum(isinstance(event, Finished) for event in ask(server, server_id="5a")) == 4
    with pytest.raises(ServerFault, match="answered 200 without proof"):
        ask(server, server_id="5b")  # another start of it, or another server with the same key
    server.behave(server_id="")
    with pytest.raises(ServerFault, match="answered 200 without proof"):
        ask(server, server_id="5a")
    assert server.seen["shown the key"] == shown
    ask(server)  # a server that someone else runs gets it
    assert server.seen["shown the key"] == shown + 1


@pytest.mark.parametrize(
    ("spans", "versions"),
    [
        ([("3", 0, 4), ("4", 4, 6)], (3, 4)),
        ([("3", 0, 4)], ()),  # nobody vouches for the last two tokens
        ([("3", 0, 4), ("4", 5, 6)], ()),
        ([("3", 1, 6)], ()),
        ([], ()),
    ],
)
def test_versions_count_only_if_they_cover_all_tokens(spans, versions):
    spans = [{"version": version, "start": start, "end": end} for version, start, end in spans]
    choice, _, _ = client._parse(event(weight_versions=spans))
    assert client._versions(choice.weight_versions, 6) == versions


@pytest.mark.parametrize("label", ["default", "-3"])  # "default" is vLLM's own, before it got any weights
def test_weights_that_no_step_published_are_the_servers_fault(label):
    spans = [{"version": version, "start": start, "end": end} for version, start, end in [("3", 0, 4), (label, 4, 6)]]
    choice, _, _ = client._parse(event(weight_versions=spans))
    with pytest.raises(ServerFault, match=f"weights of version {label}, which no step has published"):
        client._versions(choice.weight_versions, 6)


def event(**changes):
    """An event as vLLM sends it, with some parts changed, or left out if None."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": [3],
        "weight_versions": [],
        "logprobs": {"content": [{"token_id": 3, "logprob": -0.5, "rank": 1, "top_logprobs": []}]},
    }
    for name, value in changes.items():
        choice[name] = value
        if value is None:
            del choice[name]
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"index": None},
        {"token_ids": None},
        {"finish_reason": None},
        {"weight_versions": None},
        {"logprobs": None},
        {"token_ids": [2**31]},
        {"token_ids": ["x"]},
        {"weight_versions": [{"version": "3", "start": 0}]},
        {"weight_versions": [3]},
        {"weight_versions": 5},
        {"logprobs": {"content": [{"token_id": 3, "logprob": None}]}},
        {"logprobs": {"content": [{"token_id": 3}]}},
        {"logprobs": {"content": [{"token_id": 3, "logprob": float("nan")}]}},
    ],
)
def test_a_malformed_event_is_the_servers_fault(changes):
    choice, tokens, logprobs = client._parse(event())
    assert (choice.index, tokens.tolist(), logprobs.tolist()) == (0, [3], [-0.5])
    with pytest.raises(ServerFault, match="not an answer"):
        client._parse(event(**changes))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [1]}', event()[:-1], event() + b"}", b"\xff"]
)
def test_data_that_is_not_an_event_is_the_servers_fault(data):
    with pytest.raises(ServerFault, match="not an answer"):
        client._parse(data)


def test_an_event_for_two_answers_is_the_servers_fault():
    both = json.loads(event())["choices"] * 2
    with pytest.raises(ServerFault, match="not an answer"):
        client._parse(json.dumps({"choices": both}).encode())


def test_an_error_in_the_stream_is_reported():
    with pytest.raises(ServerFault, match=r"reports .*out of memory"):
        client._parse(b'{"error": {"message": "out of memory", "code": 500}}')
