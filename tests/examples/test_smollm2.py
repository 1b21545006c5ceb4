"""SmolLM2's word questions, without the model, which is 98 MB from PyPI."""

import importlib.util
import random
import re
import sys
from pathlib import Path

import pytest

from nft_megatron.config.load import load_config
from nft_megatron.data.questions import load_questions
from nft_megatron.verify.grade import grade

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


def _load(name: str):
    """A module of the example, whose names other examples have too."""
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.append(str(EXAMPLE))
by_transformers, prepare = _load("by_transformers"), _load("prepare")
word_questions = sys.modules["word_questions"]
EXAMPLES, HELD_OUT, TRAIN = word_questions.EXAMPLES, word_questions.HELD_OUT, word_questions.TRAIN


@pytest.fixture(scope="module")
def drawn():
    rng = random.Random(3)
    held_out = word_questions.draw_distinct(rng, 100, HELD_OUT)
    return held_out, word_questions.draw_distinct(rng, 400, TRAIN, avoid=held_out)


def test_no_held_out_question_shares_a_story_or_a_sum_with_training(drawn):
    held_out, train = drawn
    assert not {question.story.text for question in held_out} & {question.story.text for question in (*train, *EXAMPLES)}
    assert not {question.sum for question in held_out} & {question.sum for question in train}
    assert len({question.text for question in (*held_out, *train)}) == 500
    assert len({question.story for question in held_out}) == len(HELD_OUT)


def test_every_line_of_a_worked_answer_is_true_and_the_box_holds_the_last_result(drawn):
    for question in (*drawn[0], *drawn[1]):
        *lines, box = word_questions.worked_answer(question).split("\n")
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left) == int(right)
        assert box == f"\\boxed{{{right}}}" and int(right) == question.result
        assert set(map(str, question.numbers)) <= set(re.findall("[0-9]+", question.text))
        gold = str(question.result)
        assert grade(box, gold, "stop").label == "correct" and by_transformers.is_right(box, gold)


def test_too_many_questions_are_refused():
    with pytest.raises(ValueError, match="there are fewer than 1000 questions"):
        word_questions.draw_distinct(random.Random(0), 1000, TRAIN[:2])


def test_the_files_hold_the_examples_and_the_question(drawn, tmp_path):
    prepare.write_questions(tmp_path / "train.parquet", drawn[0])
    questions = load_questions([tmp_path / "train.parquet"])
    assert [question.gold for question in questions] == [str(question.result) for question in drawn[0]]
    for loaded, question in zip(questions, drawn[0], strict=True):
        assert list(loaded.messages) == word_questions.messages(question)
        assert [message["role"] for message in loaded.messages] == ["user", "assistant"] * 2 + ["user"]


def test_both_measurements_ask_the_same():
    config = load_config(EXAMPLE / "config.yaml")
    assert config.data.system_prompt == by_transformers._SYSTEM["content"]
    assert config.data.instruction == "keep"
    assert f"default={config.rollout.max_answer_tokens}," in Path(by_transformers.__file__).read_text()
