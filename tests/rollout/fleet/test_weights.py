"""Weights of real vLLM servers after a sync, compared with transformers' model with the same weights."""

import contextlib
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM
from waiting import until

from nft_megatron.base.deadline import Deadline
from nft_megatron.base.errors import StoppedEarly
from nft_megatron.config.fleet import FleetConfig
from nft_megatron.rollout.fleet import broadcast, versions
from nft_megatron.rollout.fleet.control import Control
from nft_megatron.rollout.fleet.fleet import Fleet
from nft_megatron.rollout.fleet.refresh import WrongWeights, load_folder, verify_and_resume
from nft_megatron.rollout.fleet.versions import Published
from nft_megatron.weights.fingerprint import weights_fingerprint

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.timeout(1800)]

PATIENCE = 240.0
PROMPT = [2, 3, 5, 4, 6, *[7, 8, 9, 5] * 40]  # longer than a block of the prefix cache
NUM_TOKENS = 24
NUM_ANSWERS, ANSWER_TOKENS = 4, 1000


@pytest.fixture(scope="session")
def first_weights(fleet_model):
    return load_file(fleet_model / "model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def given_back(vllm_servers, fleet_model, first_weights):
    """Puts the servers back on the weights of ``fleet_model`` for the tests in other files."""
    yield
    published = Published(0, weights_fingerprint(first_weights.items()), 0, fleet_model)
    for server in vllm_servers:
        control = Control(server.url, server.api_key)
        load_folder(control, published, "finish", Deadline.of(PATIENCE))
        verify_and_resume(control, published, 15, True, Deadline.of(PATIENCE))
        label = {"new_version": "default"}
        httpx.post(
            f"{server.url}/update_weight_version", json=label, headers=server.headers, timeout=PATIENCE
        ).raise_for_status()


def other_weights(first_weights, seed):
    """Different enough to make other tokens the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in first_weights.items()}


@pytest.fixture
def open_fleet(vllm_servers, server_settings, tmp_path):
    """Opens a fleet over the two servers, given by their URLs."""
    fleets = []

    def begin(**fields):
        (tmp_path / "key").write_text(server_settings.api_key)
        fields = {"min_servers": 2, "sync_seconds": PATIENCE, "wait_seconds": PATIENCE, **fields}
        section = FleetConfig(urls=tuple(server.url for server in vllm_servers), key_file=tmp_path / "key", **fields)
        settings = server_settings.__class__(**{**vars(server_settings), "folder": tmp_path / "fleet"})
        fleets.append(Fleet(section, settings, tmp_path / "weights"))
        fleets[-1].start()
        return fleets[-1]

    yield begin
    for fleet in fleets:
        fleet.close()


def transformers_model(folder, weights):
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def greedy_tokens(model):
    tokens = list(PROMPT)
    for _ in range(NUM_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@torch.no_grad()
def logprobs_of(model, prompt, answer):
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def bearer(member):
    return {"Authorization": f"Bearer {member.api_key}"}


def greedy_answer(member):
    body = {
        "model": "policy",
        "prompt": PROMPT,
        "max_tokens": NUM_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    reply = httpx.post(f"{member.url}/v1/completions", json=body, headers=bearer(member), timeout=PATIENCE)
    return reply.json()["choices"][0]["token_ids"]


@pytest.mark.parametrize("way", ["folder", "transfer"])
def test_after_a_sync_every_server_answers_like_transformers_with_the_new_weights(
    fleet_model, first_weights, open_fleet, tmp_path, way
):
    fleet = open_fleet(weights=way, bucket_bytes=100_000)
    answers = []
    for version in (1, 2):
        weights = other_weights(first_weights, seed=version)
        assert fleet.publish(weights.items(), version) == weights_fingerprint(weights.items())
        members = fleet.serving()
        assert [member.weight_version for member in members] == [version] * 2
        expected = greedy_tokens(transformers_model(fleet_model, weights))
        assert [greedy_answer(member) for member in members] == [expected] * 2
        answers.append(expected)
    assert answers[0] != answers[1]
    num_bytes = sum(tensor.nbytes for tensor in first_weights.values())
    assert [(stats.sync_bytes, stats.sync_seconds > 0) for stats in fleet.stats()] == [(num_bytes, True)] * 2


@pytest.mark.slow
def test_a_broadcast_works_without_files(fleet_model, first_weights, open_fleet, tmp_path):
    fleet = open_fleet(weights="transfer", keep_copy=False)
    wait_until_reachable(fleet)
    weights = other_weights(first_weights, seed=3)
    fleet.publish(weights.items(), 1)
    assert list((tmp_path / "weights").glob("version_*")) == []
    expected = greedy_tokens(transformers_model(fleet_model, weights))
    assert [greedy_answer(member) for member in fleet.serving()] == [expected] * 2


@pytest.mark.slow
def test_a_trainer_fault_during_a_broadcast_is_raised_in_the_trainer(fleet_model, first_weights, open_fleet, tmp_path):
    fleet = open_fleet(weights="transfer", bucket_bytes=100_000)
    wait_until_reachable(fleet)
    fleet.publish(first_weights.items(), 1)

    def stream():
        yield from list(other_weights(first_weights, seed=5).items())[:-1]
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        fleet.publish(stream(), 2)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version_000001"]
    wait_for_both(fleet)  # on the last good version, from its files
    expected = greedy_tokens(transformers_model(fleet_model, first_weights))
    assert [(member.weight_version, greedy_answer(member)) for member in fleet.serving()] == [(1, expected)] * 2


@pytest.mark.parametrize("fault", [pytest.param("broken off", marks=pytest.mark.slow), "tampered"])
def test_after_a_failed_broadcast_servers_read_the_files(fleet_model, first_weights, open_fleet, monkeypatch, fault):
    fleet = open_fleet(weights="transfer", bucket_bytes=100_000)
    wait_until_reachable(fleet)
    num_buckets, send_bucket = 0, broadcast.Group.broadcast

    def faulty(group, flat):
        nonlocal num_buckets
        num_buckets += 1
        if num_buckets == 3 and fault == "broken off":
            raise RuntimeError("connection closed by peer")
        if num_buckets == 3:
            flat = flat.clone()
            flat[-1] ^= 1
        send_bucket(group, flat)

    monkeypatch.setattr(broadcast.Group, "broadcast", faulty)
    weights = other_weights(first_weights, seed=6)
    fingerprint = fleet.publish(weights.items(), 1)
    assert num_buckets == 3 if fault == "broken off" else num_buckets > 3
    assert {member.health.fingerprint for member in fleet.serving()} == {fingerprint}
    expected = greedy_tokens(transformers_model(fleet_model, weights))
    assert [greedy_answer(member) for member in fleet.serving()] == [expected] * 2


def wait_for_both(fleet):
    until(lambda: len(fleet.serving()) == 2, PATIENCE)


def wait_until_reachable(fleet):
    until(lambda: not any(stats.state == "starting" for stats in fleet.stats()), PATIENCE)


@pytest.mark.slow
def test_every_server_rejects_a_tampered_tensor(first_weights, open_fleet, monkeypatch):
    fleet = open_fleet(wait_seconds=0.1)
    publish = versions.VersionWriter.publish

    def tampered(writer):
        folder = publish(writer)
        (path,) = folder.glob("*.safetensors")
        with path.open("r+b") as file:  # one bit of the last number
            file.seek(-1, os.SEEK_END)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        return folder

    monkeypatch.setattr(versions.VersionWriter, "publish", tampered)
    with pytest.raises(StoppedEarly, match=r"0 of fleet\.min_servers = 2"):
        fleet.publish(first_weights.items(), 1)
    until(lambda: all("loaded weights" in stats.reason for stats in fleet.stats()), PATIENCE)
    assert fleet.serving() == []
    monkeypatch.undo()
    with contextlib.suppress(StoppedEarly):  # they may have to abandon what they have started
        fleet.publish(first_weights.items(), 2)
    wait_for_both(fleet)


def test_a_missing_tensor_or_truncated_file_leaves_a_server_paused_until_good_weights_arrive(
    vllm_servers, fleet_model, first_weights, tmp_path
):
    server = vllm_servers[0]
    control = Control(server.url, server.api_key)
    incomplete = {name: tensor for name, tensor in first_weights.items() if name != "model.layers.1.self_attn.k_proj.weight"}
    good = Published(7, weights_fingerprint(first_weights.items()), 0, tmp_path / "good")
    for path, weights in (("good", first_weights), ("incomplete", incomplete), ("truncated", first_weights)):
        (tmp_path / path).mkdir()
        save_file(weights, tmp_path / path / "model.safetensors", metadata={"format": "pt"})
    with (tmp_path / "truncated" / "model.safetensors").open("r+b") as file:
        file.truncate(300_000)

    bad = Published(6, good.fingerprint, 0, tmp_path / "incomplete")
    load_folder(control, bad, "finish", Deadline.of(PATIENCE))  # vLLM finds nothing wrong with it
    with pytest.raises(WrongWeights, match="loaded weights"):
        verify_and_resume(control, bad, 15, True, Deadline.of(PATIENCE))
    with pytest.raises(RuntimeError, match="500"):
        load_folder(control, Published(6, good.fingerprint, 0, tmp_path / "truncated"), "finish", Deadline.of(PATIENCE))
    assert httpx.get(f"{server.url}/is_paused", headers=server.headers).json()["is_paused"]

    load_folder(control, good, "finish", Deadline.of(PATIENCE))
    verify_and_resume(control, good, 15, True, Deadline.of(PATIENCE))
    assert greedy_answer(server) == greedy_tokens(transformers_model(fleet_model, first_weights))


@pytest.mark.slow
def test_a_stopped_server_gets_no_work_until_it_is_refreshed(vllm_servers, fleet_model, first_weights, open_fleet):
    fleet = open_fleet(min_servers=1, silence_seconds=5.0)
    fleet.publish(first_weights.items(), 1)
    wait_for_both(fleet)
    stopped = vllm_servers[0]
    os.killpg(stopped.process.pid, signal.SIGSTOP)
    try:
        weights = other_weights(first_weights, seed=4)
        fleet.publish(weights.items(), 2)
        expected = [(vllm_servers[1].url, 2)]
        until(lambda: [(member.url, member.weight_version) for member in fleet.serving()] == expected, PATIENCE)
    finally:
        os.killpg(stopped.process.pid, signal.SIGCONT)
    wait_for_both(fleet)
    expected = greedy_tokens(transformers_model(fleet_model, weights))
    assert [(member.weight_version, greedy_answer(member)) for member in fleet.serving()] == [(2, expected)] * 2


def ask(member, num_held, pause):
    """Tokens, log-probs and weight spans of ``NUM_ANSWERS`` answers. ``pause`` is called once each has ``num_held`` tokens."""
    parameters = {
        "n": NUM_ANSWERS,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 1.0,
        "logprobs": 0,
        "ignore_eos": True,
        "seed": 5,
        "stream_interval": 10,
    }
    body = {"model": "policy", "token_ids": PROMPT[:40], "sampling_params": parameters, "stream": True}
    answers = [([], [], []) for _ in range(NUM_ANSWERS)]
    with httpx.stream(
        "POST", f"{member.url}/inference/v1/generate", json=body, headers=bearer(member), timeout=PATIENCE
    ) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                tokens, logprobs, spans = answers[choice["index"]]
                tokens += choice["token_ids"]
                logprobs += [entry["logprob"] for entry in choice["logprobs"]["content"]]
                spans[:] = choice["weight_versions"] or []
            if pause is not None and min(len(tokens) for tokens, *_ in answers) >= num_held:
                pause = pause()
    return answers


def hold_answers(member, pool):
    """Requests answers and returns once all have started and none has finished, with the server paused between two tokens.

    If a server finishes some of them before the pause reaches it, they are requested again. With its cache cleared, vLLM 0.32.0
    would count them among the requests that have not started, and a pause that lets answers finish would skip them.
    """
    while True:
        paused = threading.Event()

        def pause(paused=paused):
            params = {"mode": "keep", "clear_cache": "false"}
            httpx.post(f"{member.url}/pause", params=params, headers=bearer(member), timeout=PATIENCE).raise_for_status()
            paused.set()

        asked = pool.submit(ask, member, 10, pause)
        until(lambda paused=paused, asked=asked: paused.is_set() or asked.done(), PATIENCE)
        if num_running(member) == NUM_ANSWERS:
            return asked
        Control(member.url, member.api_key).resume()
        asked.result(PATIENCE)


def num_running(member):
    """The number of answers that the server reports as started and unfinished."""
    text = httpx.get(f"{member.url}/metrics", headers=bearer(member), timeout=PATIENCE).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("vllm:num_requests_running"))


@pytest.mark.parametrize("in_flight", [pytest.param("finish", marks=pytest.mark.slow), "continue"])
def test_answers_in_progress_during_a_sync_say_which_weights_each_token_came_from(
    fleet_model, first_weights, open_fleet, in_flight
):
    """Log-probs of every span are those of its version's weights given all earlier tokens, whichever weights computed those."""
    fleet = open_fleet(in_flight=in_flight)
    weights = {version: other_weights(first_weights, seed=version) for version in (1, 2)}
    fleet.publish(weights[1].items(), 1)
    with ThreadPoolExecutor() as pool:
        asked = hold_answers(fleet.serving()[0], pool)
        fleet.publish(weights[2].items(), 2)  # its own pause lets them finish, or takes over while they are held
        answers = asked.result(PATIENCE)
    models = {version: transformers_model(fleet_model, weights[version]) for version in weights}
    for tokens, logprobs, spans in answers:
        assert (spans[0]["start"], spans[-1]["end"], len(tokens)) == (0, ANSWER_TOKENS, ANSWER_TOKENS)
        assert [int(span["version"]) for span in spans] == ([1, 2] if in_flight == "continue" else [1])
        for span in spans:
            expected = logprobs_of(models[int(span["version"])], PROMPT[:40], tokens)[span["start"] : span["end"]]
            assert torch.tensor(logprobs[span["start"] : span["end"]]).sub(expected).abs().max() < 1e-3
