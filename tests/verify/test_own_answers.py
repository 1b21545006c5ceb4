"""Every mode of the verifier on the project's own answers, whose verdicts are known from mathematics."""

import logging
from typing import Any

import pytest
from own_answers import CASES, GENERAL, GENERAL_GOLDS, INTEGER, Case
from own_questions import TRAINING, write_benchmarks
from pathological_answers import PATHOLOGICAL, RIGHT

from nft_megatron.base.records import Verdict
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify import simplerl
from nft_megatron.verify.expressions import differ
from nft_megatron.verify.grade import Undecided, grade, grade_dapo
from nft_megatron.verify.modes import MODES
from nft_megatron.verify.service import Verifier
from nft_megatron.verify.worker import judge_math_verify

UNHURRIED = {"workers": 1, "soft_seconds": 20.0, "hard_seconds": 600.0}  # starting a grader costs more than its work here
# What strict mode says where math-verify on the whole text says the opposite, by the classes of docs/verification.md.
REASONS = {
    "no box": {"no closed box", "empty box"},
    "nearby boxes": {"exact"},
    "relation": {"not a number"},
    "spelling": {"exact"},
}
# Wrong answers that simplerl takes: it reads the last box or number of any text, strips percent signs and names, and compares
# neither the brackets of intervals nor the direction of inequalities.
FORGIVEN_KINDS = {
    "two side by side",
    "two with and",
    "empty",
    "unclosed",
    "cut in an equation",
    "cut at a number",
    "one equals",
    "about",
    "half-open interval",
    "unbounded interval",
    "inequality",
    "long, cut",
    "long, cut in the box",  # 64 for 6400
}
NEAR_KINDS = {"another", "not whole", "last counts", "answers everywhere"}  # within 1e-4 of a gold that is large


def verdicts_of(mode: str, cases: list[Case]) -> list[Verdict]:
    with Verifier(VerifyConfig.model_validate({"mode": mode, **UNHURRIED})) as verifier:
        return list(verifier.verify_many((case.text, case.gold, "stop") for case in cases))


@pytest.fixture(scope="module")
def by_strict() -> list[Verdict]:
    return verdicts_of("strict", CASES)


@pytest.fixture(scope="module")
def by_math_verify() -> list[Verdict]:
    """On the whole text."""
    return verdicts_of("math-verify", CASES)


def test_strict_mode_is_right_about_every_answer(by_strict: list[Verdict]) -> None:
    mistaken = [
        (case, verdict.reason)
        for case, verdict in zip(CASES, by_strict, strict=True)
        if verdict.label != ("correct" if case.is_right else "wrong")
    ]
    assert mistaken == []


def test_integer_golds_need_no_grader() -> None:
    decided = [grade(case.text, case.gold, "stop") for case in INTEGER]
    assert [verdict for verdict in decided if isinstance(verdict, Undecided)] == []


def test_strict_differs_from_math_verify_only_in_the_classes_of_the_docs(
    by_strict: list[Verdict], by_math_verify: list[Verdict]
) -> None:
    for case, strict, whole in zip(CASES, by_strict, by_math_verify, strict=True):
        assert (strict.label != whole.label) == bool(case.difference), (case, strict, whole)
        if case.difference:
            assert strict.reason in REASONS[case.difference], case


def test_math_verify_mode_agrees_with_the_authors_use_of_it(by_math_verify: list[Verdict]) -> None:
    """verifier.py of the public NFT code, for questions in the style of MATH: math_metric, directly, in the main thread."""
    from math_verify.metric import math_metric
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    metric = math_metric((LatexExtractionConfig(),), (ExprExtractionConfig(), LatexExtractionConfig()))
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for case, verdict in list(zip(CASES, by_math_verify, strict=True))[::3]:
        expected = metric([rf"\boxed{{{case.gold}}}"], [case.text])[0] > 0.5
        assert (verdict.label == "correct") == expected, case


def test_simplerl_misses_no_right_answer_and_forgives_what_its_rules_say() -> None:
    for case, verdict in zip(CASES, verdicts_of("simplerl", CASES), strict=True):
        forgiven = case.kind in FORGIVEN_KINDS or (case.kind in NEAR_KINDS and int(case.gold) > 10_000)
        assert verdict.label in (("correct",) if case.is_right else ("correct", "wrong") if forgiven else ("wrong",)), case


def test_dapo_takes_no_wrong_answer_but_the_last_of_two() -> None:
    for case in CASES:
        if grade_dapo(case.text, case.gold, "stop").label == "correct":
            assert case.is_right or case.kind in ("two side by side", "two with and"), case


def test_other_golds_are_wrong_answers() -> None:
    """Each gold as an answer to the next four questions; what the quick comparison calls different, math-verify does too."""
    golds = [gold for _, gold, _, _ in GENERAL_GOLDS]
    pairs = [(gold, golds[(i + step) % len(golds)]) for i, gold in enumerate(golds) for step in range(1, 5)]
    verdicts = verdicts_of("strict", [Case("", rf"Hence $\boxed{{{answer}}}$.", gold, False) for answer, gold in pairs])
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.label != "wrong"] == []


def test_what_differs_differs_for_mathematics_and_math_verify() -> None:
    """All answers of ``GENERAL``, without the text around them, against their golds."""
    answers = [
        (answer, gold, is_right)
        for _, gold, right, wrong in GENERAL_GOLDS
        for given, is_right in ((right, True), (wrong, False))
        for answer in given
    ]
    assert len(answers) == len(GENERAL) - len(GENERAL_GOLDS)
    different = [(answer, gold, is_right) for answer, gold, is_right in answers if differ(answer, gold)]
    assert len(different) >= 20
    assert [row for row in different if row[2]] == []
    assert [row for row in different if judge_math_verify(row[1], rf"\boxed{{{row[0]}}}")[0] != "not equal"] == []


def test_every_training_gold_is_right_when_echoed() -> None:
    for _, _, gold in TRAINING:
        verdict = grade(rf"So the answer is $\boxed{{{gold}}}$.", gold, "stop")
        assert not isinstance(verdict, Undecided)
        assert verdict.label == "correct", gold


def test_golds_in_the_form_of_every_benchmark_verify_themselves(tmp_path) -> None:
    golds = {asked.gold for _, questions in write_benchmarks(tmp_path).values() for asked in questions}
    assert len(golds) > 900
    assert [gold for gold in golds if simplerl.grade(rf"\boxed{{{gold}}}", gold).label != "correct"] == []


@pytest.mark.timeout(1200)  # a killed grader's successor imports all of SymPy, dozens of times
@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if not mode.is_free])  # test_program.py has programs
def test_pathological_answers(mode: Any) -> None:
    """Each is answered, none but two is right, and the pool survives. All of them in the mode of training, some in others."""
    answers = PATHOLOGICAL[:: 1 if mode in ("strict", "dapo") else 8]
    with Verifier(VerifyConfig(mode=mode, workers=1, soft_seconds=0.2, hard_seconds=0.6)) as verifier:
        futures = [verifier.submit(answer.text, answer.gold, "stop") for answer in answers]
        verdicts = [future.result(120) for future in futures]
        power = r"\boxed{2^{%d}}" if MODES[mode].judge else r"Answer: \boxed{%d}"  # in a grader, where the mode has any
        after = [verifier.submit(power % n, str(2**n if MODES[mode].judge else n), "stop").result(60) for n in range(2, 8)]
    assert {answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict.label == "correct"} <= set(RIGHT)
    assert "correct" in [verdict.label for verdict in after], "the pool survives"
