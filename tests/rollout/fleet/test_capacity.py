"""What a server's memory holds, and what it is given at a time when the configuration leaves that open."""

from types import SimpleNamespace

import pytest
import torch

from nft_megatron.base.errors import UserError
from nft_megatron.config.schema import Config
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.rollout.fleet.capacity import kv_tokens, max_requests, option
from nft_megatron.rollout.fleet.settings import outstanding_tokens

SHAPE = PUBLIC_MODELS["Qwen2.5-32B"]
WEIGHTS = 2 * 32_763_876_352
TOKEN = 2 * 2 * 64 * 8 * 128  # bytes of a token's keys and values


def config_of(**fleet) -> Config:
    return Config.model_validate(
        {
            "run_dir": "run",
            "model": {"path": "model"},
            "data": {"train": "questions.jsonl", "max_prompt_tokens": 2048},
            "rollout": {"engine": "vllm", "max_answer_tokens": 14336},
            "train": {"num_steps": 1},
            "fleet": fleet,
        }
    )


@pytest.mark.parametrize(("size", "share"), [(2, 0.9), (8, 0.9), (4, 0.6)])
def test_keys_and_values_have_what_weights_and_engine_leave(size: int, share: float):
    tokens = kv_tokens(SHAPE, gpu_bytes=80e9, tensor_parallel=size, arguments=(f"--gpu-memory-utilization={share}",))
    assert tokens == int((size * (share * 80e9 - 5e9) - WEIGHTS) / TOKEN)


def test_weights_that_do_not_fit_leave_nothing():
    assert kv_tokens(SHAPE, gpu_bytes=80e9, tensor_parallel=1, arguments=("--gpu-memory-utilization=0.8",)) == 0


def test_gpus_beyond_the_key_value_heads_hold_copies():
    eight, sixteen = (kv_tokens(SHAPE, gpu_bytes=1e12, tensor_parallel=size, arguments=()) for size in (8, 16))
    assert sixteen == int((16 * (0.9e12 - 5e9) - WEIGHTS) / (2 * TOKEN))
    assert sixteen < 1.01 * eight


def test_a_cache_in_eight_bits_holds_twice_as_many():
    two, one = (
        kv_tokens(SHAPE, gpu_bytes=80e9, tensor_parallel=4, arguments=flags) for flags in ((), ("--kv-cache-dtype=fp8",))
    )
    assert abs(one - 2 * two) <= 1


def test_the_last_flag_counts_in_either_spelling():
    assert option(("--max-num-seqs=8", "--max_num_seqs", "16"), "--max-num-seqs") == "16"
    assert option(("--max-num-seqs",), "--max-num-seqs") is None
    assert [max_requests((), 79.1 * 2**30, gpu) for gpu in ("h100", "a100-80gb")] == [1024, 256]
    assert max_requests((), 40e9) == 256
    with pytest.raises(UserError, match=r"fleet.arguments = --max-num-seqs=many: is not a positive number"):
        max_requests(("--max-num-seqs=many",), 80e9)


def test_what_the_configuration_says_is_used(capsys: pytest.CaptureFixture):
    assert outstanding_tokens(config_of(outstanding_tokens=77), SHAPE) == 77
    assert capsys.readouterr().err == ""


def test_on_a_cpu_the_cache_size_counts_and_is_printed(capsys: pytest.CaptureFixture):
    assert outstanding_tokens(config_of(kv_cache_gib=10), SHAPE) == 10 * 2**30 // TOKEN == 40_960
    assert "fleet.outstanding_tokens = 40,960: a server's room for keys and values (fleet.kv_cache_gib = 10)" in (
        capsys.readouterr().err
    )


def test_a_sequence_of_maximal_length_always_has_room():
    assert outstanding_tokens(config_of(kv_cache_gib=1), SHAPE) == 2048 + 14336


def test_on_gpus_their_memory_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80_000_000_000))
    tokens = outstanding_tokens(config_of(tensor_parallel=8), SHAPE)
    assert tokens == int((8 * (0.9 * 80e9 - 5e9) - WEIGHTS) / TOKEN)
    assert f"= {tokens:,}: a server's room for keys and values (8 × 80 GB)" in capsys.readouterr().err
