"""Which evaluations are compared, pooled, or left apart; tests/evaluate/test_measure.py has the command."""

import json
from pathlib import Path
from typing import Any

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.evaluate.beside import Answered, Comparison, Scores, answered, differences, pooled, read_scores, scores_of

SETTINGS = {"grader": "strict", "rules": "strict/4", "sampling": {"temperature": 1.0, "stop_token_ids": [1]}}


def summary(name: str, right: dict[str, str], *, seed: int = 0, questions: str = "same", **settings: Any) -> dict[str, Any]:
    counts = Answered.from_json({"questions": questions, "right": right})
    score, error = counts.scores
    return {
        "name": name,
        "seed": seed,
        **SETTINGS,
        **settings,
        "scores": {"math500": score},
        "benchmarks": {"math500": {"standard_error": error / 100}},
        "by_question": {"math500": counts.to_json()},
    }


def row(*args: Any, **options: Any) -> Scores:
    return scores_of(json.loads(json.dumps(summary(*args, **options))))


def test_one_answer_each_is_mcnemar_several_are_the_t_test():
    one = row("one", {"a": "1/1", "b": "1/1", "c": "0/1"})
    other = row("other", {"a": "0/1", "b": "0/1", "c": "0/1"})
    assert differences(one, other)["math500"].test == "McNemar"
    assert differences(one, other)["math500"].p_value == pytest.approx(0.5)  # two of two coins on one side
    several = row("several", {"a": "2/4", "b": "4/4", "c": "0/4"})
    assert differences(several, other)["math500"].test == "paired t"
    assert differences(several, other)["math500"].difference == pytest.approx(0.5)


def test_a_question_that_one_model_has_no_verdict_on_is_left_out():
    one, other = row("one", {"a": "1/1", "b": "0/0", "c": "0/1"}), row("other", {"a": "0/1", "b": "1/1", "c": "0/0"})
    pair = differences(one, other)["math500"]
    assert (pair.questions, pair.difference, pair.test) == (1, 1.0, "McNemar")


def test_other_questions_and_published_scores_are_not_compared():
    one = row("one", {"a": "1/1", "b": "1/1"})
    other = row("other", {"a": "1/1", "b": "1/1"}, questions="other golds")
    published = scores_of({"name": "published", "scores": {"math500": 83.2}})
    assert differences(one, other) == differences(one, published) == {}
    told = Comparison.of(one, [other, published])
    assert [model["differences"] for model in told.to_json()["models"]] == [{}, {}]
    assert "on the same questions" not in told.tables() and "83.2" in told.tables()


def test_seeds_are_pooled_only_where_nothing_else_differs():
    seeds = [row("m", {"a": "3/4", "b": "0/4"}, seed=0), row("m", {"a": "1/4", "b": "2/4"}, seed=1)]
    (both,) = pooled(seeds)
    assert both.seeds == (0, 1) and both.answers["math500"].counts == {"a": (4, 8), "b": (2, 8)}
    assert both.scores["math500"] == pytest.approx(37.5)
    assert both.errors["math500"] == pytest.approx(100 * (0.25 / 2**0.5) / 2**0.5)  # sd of 1/2 and 1/4, of two questions
    assert len(pooled([seeds[0], row("another", {"a": "1/4", "b": "2/4"}, seed=1)])) == 2
    assert len(pooled([seeds[0], row("m", {"a": "1/4", "b": "2/4"}, seed=1, grader="dapo")])) == 2
    (once,) = pooled([seeds[0], seeds[0]])
    assert once == seeds[0], "the same evaluation twice adds nothing"
    (apart,) = pooled([seeds[0], row("m", {"a": "1/4"}, seed=1, questions="others")])
    assert apart.answers == {}


def test_what_ends_an_answer_is_no_difference_in_settings():
    one = row("one", {"a": "1/1", "b": "0/1"})
    other = row("other", {"a": "1/1", "b": "0/1"}, sampling={"temperature": 0.6, "stop_token_ids": [2]}, rules="strict/5")
    (found,) = Comparison.of(one, [other]).to_json()["models"]
    assert found["differing"] == ["rules strict/4 and strict/5", "temperature 1.0 and 0.6"]


def test_the_hash_is_that_of_ids_and_golds():
    golds = [("q0", "1"), ("q1", "2")]
    assert answered(golds, {}).questions == answered(golds[::-1], {}).questions
    assert len({answered(each, {}).questions for each in (golds, [("q0", "1")], [("q0", "1"), ("q1", "3")])}) == 3


@pytest.mark.parametrize("right", [{"a": "2/1"}, {"a": "-1/2"}, {"a": "x"}, {"a": None}, {"a": "1/2/3"}, ["a"], None])
def test_a_summary_with_impossible_counts_is_refused(tmp_path: Path, right: Any):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"name": "m", "scores": {}, "by_question": {"math500": {"questions": "q", "right": right}}}))
    with pytest.raises(UserError, match="holds no scores"):
        read_scores(path)


def test_a_summary_of_an_earlier_version_still_shows_its_scores(tmp_path: Path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({key: value for key, value in summary("m", {"a": "1/2"}).items() if key != "by_question"}))
    (read,) = read_scores(path)
    assert read.scores == {"math500": 50.0} and read.seeds == (0,)
    assert "50.0" in Comparison.of(row("n", {"a": "1/1"}), [read]).tables()
