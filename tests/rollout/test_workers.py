"""The embedded engine in worker processes: same answers, and nothing lost, stale, hung or left behind if one dies."""

import os
import signal
import subprocess
import sys
from multiprocessing import connection
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from waiting import Clock, until

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Request, Sampling
from nft_megatron.rollout import pool
from nft_megatron.rollout.embedded import EmbeddedEngine
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.weights import read_shape
from nft_megatron.weights.fingerprint import weights_fingerprint

VOCAB = 61
SAMPLING = Sampling(max_tokens=20, stop_token_ids=(5, 6, 7))
REQUESTS = [
    Request(i, np.random.default_rng(i).integers(0, VOCAB, 3 + i).astype(np.int32), tuple(1000 * i + k for k in range(3)))
    for i in range(13)
]


def build(seed):
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    return Qwen2ForCausalLM(config).eval().float()


@pytest.fixture(scope="module")
def models():
    return build(0), build(1)


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    models[0].config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    """One engine with two workers for all tests that leave it usable."""
    engine = EmbeddedEngine(folder, read_shape(folder), num_processes=2, batch_size=8, load_seconds=120, answer_seconds=60)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected(folder, models):
    """Each model's answers, generated in this process."""
    local = EmbeddedEngine(folder, read_shape(folder), num_processes=0, batch_size=16)
    answers = []
    for model in models:
        local.load(model.named_parameters(), version=0)
        answers.append(as_table(local.generate(REQUESTS, SAMPLING)))
    assert answers[0] != answers[1]
    return answers


def as_table(completions):
    return {(c.request_id, c.index): (c.tokens.tolist(), c.finish_reason) for c in completions}


def worker_pids(parent):
    """Process ids of the live engine workers started by ``parent``."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = status.read_text().rpartition(")")[2].split()[:2]
            command = (status.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(ppid) == parent and state != "Z" and "nft_megatron.rollout.worker" in command:
            found.append(int(status.parent.name))
    return sorted(found)


def test_workers_answer_like_one_process(engine, models, expected):
    assert engine.load(models[0].named_parameters(), version=4) == weights_fingerprint(models[0].named_parameters())
    completions = list(engine.generate(REQUESTS, SAMPLING))
    assert as_table(completions) == expected[0]
    assert {c.weight_version for c in completions} == {4}


def test_one_request_is_divided_among_workers(engine, models, folder):
    request = Request(3, np.array([1, 2, 3], dtype=np.int32), tuple(range(11)))
    local = EmbeddedEngine(folder, read_shape(folder), num_processes=0, batch_size=16)
    for each in (local, engine):
        each.load(models[0].named_parameters(), version=4)
    assert as_table(engine.generate([request], SAMPLING)) == as_table(local.generate([request], SAMPLING))
    assert list(engine.generate([], SAMPLING)) == []


def test_new_weights_replace_the_old_ones(engine, models, expected):
    engine.load(models[0].named_parameters(), version=5)
    engine.load(models[1].named_parameters(), version=6)
    completions = list(engine.generate(REQUESTS, SAMPLING))
    assert as_table(completions) == expected[1]
    assert {c.weight_version for c in completions} == {6}


def test_bfloat16_weights_cross_unchanged(engine, models):
    stream = [(name, tensor.detach().bfloat16()) for name, tensor in models[0].named_parameters()]
    assert engine.load(stream, version=7) == weights_fingerprint(stream)


def test_a_rejected_stream_leaves_the_workers_without_weights(engine, models, expected):
    with pytest.raises(UserError, match=r"model\.norm\.weight.*missing"):
        engine.load([(n, t) for n, t in models[0].named_parameters() if n != "model.norm.weight"], version=8)
    with pytest.raises(EngineFault, match="no weights"):
        engine.generate(REQUESTS, SAMPLING)
    engine.load(models[0].named_parameters(), version=9)
    assert as_table(engine.generate(REQUESTS, SAMPLING)) == expected[0]


def test_a_fault_inside_a_worker_is_raised_with_its_cause(engine, models, expected):
    engine.load(((n, t * float("nan")) for n, t in models[0].named_parameters()), version=10)
    with pytest.raises(EngineFault, match="not finite with the weights of version 10"):
        list(engine.generate(REQUESTS, SAMPLING))
    engine.load(models[0].named_parameters(), version=11)
    assert as_table(engine.generate(REQUESTS, SAMPLING)) == expected[0]


def test_an_abandoned_generation_does_not_disturb_the_next(engine, models, expected):
    engine.load(models[0].named_parameters(), version=12)
    given_up = engine.generate(REQUESTS, SAMPLING)
    next(given_up)
    given_up.close()
    assert as_table(engine.generate(REQUESTS, SAMPLING)) == expected[0]


def test_a_killed_worker_aborts_its_answers_and_is_replaced_with_current_weights(engine, models, expected):
    engine.load(models[0].named_parameters(), version=13)
    engine.load(models[1].named_parameters(), version=14)
    before = worker_pids(os.getpid())
    assert len(before) == 2
    long_requests = [Request(i, np.array([1, 2], dtype=np.int32), tuple(range(40))) for i in range(4)]
    completions = engine.generate(long_requests, Sampling(max_tokens=500))
    first = next(completions)  # nothing is read meanwhile: a share of 320 KiB does not fit into the connection's buffer
    for pid in before:  # signals to the trainer reach the whole process group; workers exit with it, not before
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGUSR1)
    os.kill(before[0], signal.SIGKILL)
    answers = [first, *completions]
    assert sorted((c.request_id, c.index) for c in answers) == [(i, k) for i in range(4) for k in range(40)]
    reasons = [c.finish_reason for c in answers]
    assert 0 < reasons.count("abort") <= 80  # no more than one worker's share
    assert all(len(c.tokens) == (0 if c.finish_reason == "abort" else 500) for c in answers)

    completions = list(engine.generate(REQUESTS, SAMPLING))
    assert as_table(completions) == expected[1]
    assert {c.weight_version for c in completions} == {14}
    after = worker_pids(os.getpid())
    assert len(after) == 2
    assert len(set(before) & set(after)) == 1


def test_a_silent_worker_is_replaced_within_the_deadline(folder, models, expected, monkeypatch):
    """A minute passes at once when the engine waits only for the stopped worker."""
    engine = EmbeddedEngine(folder, read_shape(folder), num_processes=2, batch_size=8, load_seconds=120, answer_seconds=60)
    engine.load(models[0].named_parameters(), version=1)
    stopped = engine._engine._workers[1]
    os.kill(stopped.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(pool, "time", clock := Clock())

    def wait(connections, timeout):
        if connections != [stopped.connection]:
            return connection.wait(connections, timeout)
        clock.added += timeout
        return []

    monkeypatch.setattr(pool, "wait", wait)
    answers = list(engine.generate(REQUESTS, SAMPLING))
    assert {c.finish_reason for c in answers} > {"abort"}
    assert len(answers) == len(expected[0])
    assert all(as_table([c]).items() <= expected[0].items() for c in answers if c.finish_reason != "abort")
    assert as_table(engine.generate(REQUESTS, SAMPLING)) == expected[0]
    engine.close()


def test_workers_that_cannot_start_are_a_fault(folder, models, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    engine = EmbeddedEngine(folder, read_shape(folder), num_processes=1, batch_size=8, load_seconds=60)
    with pytest.raises(EngineFault, match=r"exit code 1.*3 times in a row"):
        engine.load(models[0].named_parameters(), version=1)
    engine.close()


@pytest.mark.slow
def test_a_worker_that_keeps_dying_is_a_fault_unless_it_answers_in_between(folder, models, expected):
    others = worker_pids(os.getpid())
    engine = EmbeddedEngine(folder, read_shape(folder), num_processes=1, batch_size=8, load_seconds=120, answer_seconds=60)

    def generate_with_a_dead_worker():
        engine.load(models[0].named_parameters(), version=1)
        (pid,) = set(worker_pids(os.getpid())) - set(others)
        os.kill(pid, signal.SIGKILL)
        return {completion.finish_reason for completion in engine.generate(REQUESTS, SAMPLING)}

    assert generate_with_a_dead_worker() == {"abort"}
    assert as_table(engine.generate(REQUESTS, SAMPLING)) == expected[0]
    assert generate_with_a_dead_worker() == {"abort"}
    assert generate_with_a_dead_worker() == {"abort"}
    with pytest.raises(EngineFault, match=r"signal 9.*3 times in a row without a finished answer"):
        generate_with_a_dead_worker()
    engine.close()


def test_close_leaves_no_process(folder):
    others = worker_pids(os.getpid())
    engine = EmbeddedEngine(folder, read_shape(folder), num_processes=2, batch_size=8)
    assert len(worker_pids(os.getpid())) == len(others) + 2
    engine.close()
    assert worker_pids(os.getpid()) == others


@pytest.mark.slow
def test_workers_die_with_a_killed_parent(folder, models, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file({name: tensor.detach() for name, tensor in models[0].named_parameters()}, weights)
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, numpy as np, safetensors.torch\n"
        "from nft_megatron.base.records import Request, Sampling\n"
        "from nft_megatron.rollout.embedded import EmbeddedEngine\n"
        "from nft_megatron.weights import read_shape\n"
        "engine = EmbeddedEngine(sys.argv[1], read_shape(sys.argv[1]), num_processes=2, batch_size=8)\n"
        "engine.load(safetensors.torch.load_file(sys.argv[2]).items(), version=1)\n"
        "requests = [Request(i, np.array([1]), tuple(range(64))) for i in range(64)]\n"
        "for completion in engine.generate(requests, Sampling(max_tokens=2000)):\n"
        "    print('generating', flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, script, folder, weights], stdout=subprocess.PIPE)
    try:
        assert parent.stdout.readline() == b"generating\n"
        workers = worker_pids(parent.pid)
        assert len(workers) == 2
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not any(is_running(pid) for pid in workers))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
