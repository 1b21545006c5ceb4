"""Against enumeration: every choice of k answers, every way to break a tie."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nft_megatron.evaluate.statistics import Judged, average, majority, pass_at, standard_error

# Few votes, so that ties and agreement are common; "" stands for no vote.
ANSWERS = st.lists(st.tuples(st.booleans(), st.sampled_from(["3", "4", "5", ""])), min_size=1, max_size=7)


def judged(answers: list[tuple[bool, str]]) -> Judged:
    return Judged(tuple(right for right, _ in answers), tuple(vote or None for _, vote in answers))


@given(ANSWERS, st.integers(1, 8))
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(answers: list[tuple[bool, str]], k: int) -> None:
    choices = [any(right for right, _ in choice) for choice in itertools.combinations(answers, k)]
    if choices:
        assert judged(answers).pass_at(k) == pytest.approx(sum(choices) / len(choices))
    else:
        assert math.isnan(judged(answers).pass_at(k))


@given(ANSWERS)
def test_maj_is_a_vote_with_random_ties(answers: list[tuple[bool, str]]) -> None:
    """Draw a winner among the most frequent votes, then one of the answers that gave it: the chance that it is right."""
    votes = [vote for _, vote in answers if vote]
    chance = 0.0
    if votes:
        winners = [vote for vote in sorted(set(votes)) if votes.count(vote) == max(map(votes.count, votes))]
        for winner in winners:
            given_by = [right for right, vote in answers if vote == winner]
            for right in given_by:
                chance += right / len(winners) / len(given_by)
    assert judged(answers).majority == pytest.approx(chance)


def test_maj_examples() -> None:
    assert judged([(True, "3"), (False, "4"), (True, "3")]).majority == 1
    assert judged([(True, "3"), (False, "4")]).majority == 0.5
    assert judged([(True, "3"), (False, "4"), (False, "5"), (False, "")]).majority == pytest.approx(1 / 3)
    assert judged([(True, ""), (False, "4")]).majority == 0
    assert judged([(False, ""), (False, "")]).majority == 0


@given(st.lists(ANSWERS, min_size=2, max_size=6))
def test_the_error_is_that_of_independent_questions(questions: list[list[tuple[bool, str]]]) -> None:
    shares = [sum(right for right, _ in answers) / len(answers) for answers in questions]
    mean = sum(shares) / len(shares)
    variance = sum((share - mean) ** 2 for share in shares) / (len(shares) - 1)
    all_judged = [judged(answers) for answers in questions]
    assert average(all_judged) == pytest.approx(mean)
    assert standard_error(all_judged) == pytest.approx(math.sqrt(variance / len(shares)))


def test_the_error_covers_the_truth() -> None:
    """Questions drawn from a population with answers that agree within a question: about 95 % of ± 1.96 s.e. hold its mean."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        chances = rng.beta(0.3, 0.3, size=60)  # mean 0.5; most questions are nearly always right or nearly always wrong
        questions = [judged([(bool(right), "") for right in rng.random(8) < chance]) for chance in chances]
        hits += abs(average(questions) - 0.5) <= 1.96 * standard_error(questions)
    assert 0.92 <= hits / 400 <= 0.98


def test_means_are_over_questions() -> None:
    questions = [judged([(True, "3")] * 4), judged([(False, "4")])]
    assert average(questions) == majority(questions) == pass_at(questions, 1) == 0.5
    assert pass_at(questions, 4) == 1  # of the one question with four judged answers
    for statistic in (average([]), majority([]), pass_at(questions, 5), standard_error(questions[:1])):
        assert math.isnan(statistic)
