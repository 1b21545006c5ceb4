import numpy as np
import pytest

from nft_megatron.base.records import Answer, Completion, Prompt, Verdict
from nft_megatron.evaluate.run import Evaluation


def answer(label: str, length: int = 2, finish: str = "stop") -> Answer:
    tokens = np.ones(length, dtype=np.int32)
    return Answer(Completion(0, 0, tokens, -tokens.astype(np.float32), finish, 0, 0.0), "", Verdict(label, "", ""))


def evaluation(*labels: str) -> Evaluation:
    """One question for each word of c(orrect), w(rong) and u(nknown) letters."""
    names = {"c": "correct", "w": "wrong", "u": "unknown"}
    prompt = Prompt("q", "", "", np.array([1], dtype=np.int32))
    return Evaluation((prompt,) * len(labels), tuple(tuple(answer(names[letter]) for letter in word) for word in labels))


def test_accuracy_is_the_mean_over_questions_of_the_share_of_judged_answers():
    # (1 + 1/2 + 1/1) / 3; the last question was never judged
    assert evaluation("cc", "cw", "cu", "uu").accuracy == pytest.approx((1 + 0.5 + 1) / 3)


def test_standard_error_is_that_of_independent_questions():
    # 1, 0, 1, 0: variance 1/3 with n − 1, error sqrt(1/3 / 4)
    assert evaluation("c", "w", "c", "w").standard_error == pytest.approx((1 / 3 / 4) ** 0.5)


def test_nothing_judged_is_not_zero():
    assert np.isnan(evaluation("u", "u").accuracy)
    assert np.isnan(evaluation("c").standard_error)


def test_lengths_and_shares_are_over_answers():
    prompt = Prompt("q", "", "", np.array([1], dtype=np.int32))
    answers = ((answer("correct", 3), answer("wrong", 9, "length")), (answer("unknown", 6, "abort"), answer("wrong", 2)))
    result = Evaluation((prompt, prompt), answers)
    assert result.answer_length_mean == 5
    assert result.truncated_rate == 0.25
    assert result.unknown_rate == 0.25


def test_some_questions_can_be_left_out():
    prompts = tuple(Prompt(name, "", "", np.array([1], dtype=np.int32)) for name in "abc")
    result = Evaluation(prompts, ((answer("correct"),), (answer("wrong"),), (answer("wrong"),)))
    assert result.without(frozenset("bx")).accuracy == 0.5
    assert result.without(frozenset()).accuracy == pytest.approx(1 / 3)
