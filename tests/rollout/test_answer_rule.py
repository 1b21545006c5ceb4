"""Which answers are answers to a request; that stop texts count as vLLM counts them is in fleet/test_exact.py."""

from pathlib import Path

import numpy as np
import pytest

from nft_megatron.base.records import Sampling
from nft_megatron.rollout.answer_rule import AnswerRule

STOPS = Sampling(max_tokens=5, stop_token_ids=(8, 9))


def judge(tokens, reason, logprobs=None, sampling=STOPS):
    rule = AnswerRule(sampling, 10, Path("unused"))
    values = [-0.5] * len(tokens) if logprobs is None else logprobs
    return rule.problem(np.array(tokens, dtype=np.int32), np.array(values, dtype=np.float32), reason)


@pytest.mark.parametrize(
    ("tokens", "reason"), [([9], "stop"), ([1, 8], "stop"), ([0, 1, 2, 3, 9], "stop"), ([0, 1, 2, 3, 4], "length")]
)
def test_answers(tokens, reason):
    assert judge(tokens, reason) is None


@pytest.mark.parametrize(
    ("tokens", "reason", "problem"),
    [
        ([], "stop", "0 tokens, not of 1 to 5"),
        ([1, 2, 3, 4, 5, 9], "stop", "6 tokens, not of 1 to 5"),
        ([1, 10], "stop", "outside the vocabulary of 10"),
        ([-1, 9], "stop", "outside the vocabulary of 10"),
        ([1, 2], "stop", "no stop token or text ends"),
        ([9, 1], "stop", "its token 1 of 2"),
        ([1, 8, 2, 3, 4], "length", "its token 2 of 5"),
        ([9, 9], "stop", "its token 1 of 2"),
        ([1, 2, 3, 4, 9], "length", "calls an answer truncated"),
        ([1, 2, 3, 4], "length", "after 4 tokens, although 5 were allowed"),
        ([1, 9], "abort", "with 'abort'"),
        ([1, 9], "x" * 1000, "with 'xxx"),
    ],
)
def test_no_answers(tokens, reason, problem):
    found = judge(tokens, reason)
    assert problem in found and len(found) < 200


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-6, -9999.0, -1e30])
def test_every_log_prob_is_finite_and_at_most_0(value):
    assert "log-prob" in judge([1, 2, 9], "stop", [-0.5, value, -0.5])


@pytest.mark.parametrize("value", [0.0, -0.0, -1e-30, -9998.0])
def test_log_probs(value):
    assert judge([1, 2, 9], "stop", [-0.5, value, -0.5]) is None


@pytest.mark.parametrize("values", [[], [-0.5], [-0.5] * 4])
def test_there_are_as_many_log_probs_as_tokens(values):
    assert "log-prob" in judge([1, 2, 9], "stop", values)


def test_without_a_stop_rule_only_the_length_ends_an_answer():
    free = Sampling(max_tokens=2)
    assert judge([9, 9], "length", sampling=free) is None
    assert "no stop token or text ends" in judge([9], "stop", sampling=free)


@pytest.mark.parametrize(
    ("answer", "reason", "problem"),
    [
        ("so 7. END", "stop", None),
        ("so 7. END.", "stop", "continued after an answer had ended with its token 9 of 10"),
        ("END and more than that END", "stop", "continued after an answer had ended with its token 3 of 26"),
        ("so 7. EN", "stop", "no stop token or text ends"),
        ("答えは", "stop", None),
        ("so 7. END", "length", "calls an answer truncated"),
        ("x" * 40, "length", None),
        ("x" * 36 + " END", "length", "calls an answer truncated"),
    ],
)
def test_stop_texts(byte_tokenizer, tmp_path, answer, reason, problem):
    rule = AnswerRule(Sampling(max_tokens=40, stop=("END", "えは")), len(byte_tokenizer), tmp_path)
    tokens = np.array(byte_tokenizer(answer)["input_ids"], dtype=np.int32)
    logprobs = np.full(len(tokens), -0.5, dtype=np.float32)
    found = rule.problem(tokens, logprobs, reason, np.array(byte_tokenizer("END? E")["input_ids"]))
    assert found is None if problem is None else problem in found


def test_a_stop_tokens_own_text_and_the_prompts_are_not_searched(byte_tokenizer, tmp_path):
    dot = byte_tokenizer(".")["input_ids"][0]
    rule = AnswerRule(Sampling(max_tokens=40, stop_token_ids=(dot,), stop=(". ", ".")), len(byte_tokenizer), tmp_path)
    tokens = np.array(byte_tokenizer("so 7.")["input_ids"], dtype=np.int32)
    prompt = np.array(byte_tokenizer("Think. ")["input_ids"], dtype=np.int32)
    assert rule.problem(tokens, np.full(len(tokens), -0.5, dtype=np.float32), "stop", prompt) is None
