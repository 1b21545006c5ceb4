"""Rows as other programs write them: read as a person would, or refused with file and row."""

import json
from pathlib import Path
from typing import Any

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.data.questions import load_questions

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("text", [json.dumps(CHAT), json.dumps(CHAT, indent=2), repr(CHAT), json.dumps(json.dumps(CHAT))])
def test_a_conversation_written_as_text_is_read(tmp_path: Path, text: str) -> None:
    (question,) = load_questions([write(tmp_path / "a.jsonl", {"prompt": text, "answer": "2"})])
    assert question.messages == tuple(CHAT)


@pytest.mark.parametrize("asked", [CHAT[1], json.dumps(CHAT[1]), [CHAT[1]]])
def test_a_single_message_is_a_conversation(tmp_path: Path, asked: Any) -> None:
    (question,) = load_questions([write(tmp_path / "a.jsonl", {"prompt": asked, "answer": "2"})])
    assert question.messages == (CHAT[1],)


@pytest.mark.parametrize(
    "text",
    [
        '"1+1?"',
        '"[1, 2]" has how many characters?',
        "[1, 2, 3]: what is the sum?",
        "[1, 2]",
        '[{"x": 1}, {"x": 2}]',
        "{x: 1} is a set?",
        "[{",
    ],
)
def test_other_brackets_are_a_question(tmp_path: Path, text: str) -> None:
    (question,) = load_questions([write(tmp_path / "a.jsonl", {"prompt": text, "answer": "2"})])
    assert question.text == text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": [user("1?"), {"role": "assistant", "content": "2"}]}, "ends with the message of role 'assistant'"),
        ({"prompt": json.dumps([user("1?"), {"role": "assistant", "content": "2"}])}, "ends with the message of role 'assist"),
        ({"prompt": [{"role": "system", "content": "1?"}]}, "ends with the message of role 'system'"),
        (
            {"prompt": [{"role": "developer", "content": "x"}, user("1?")]},
            "a message has the role 'developer'; use system, user",
        ),
        ({"prompt": [{"role": "human", "content": "1?"}]}, "a message has the role 'human'"),
        ({"prompt": [user(" ")]}, "the user's message is empty"),
        ({"prompt": "\n "}, "has no question"),
        ({"prompt": "\u200b\ufeff"}, "has no question"),
        ({"prompt": "nan"}, "has no question: the text is 'nan'"),
        ({"prompt": [user("\u200b")]}, "the user's message is empty"),
        ({"prompt": ["1+1?"]}, "neither text nor a list"),
        ({"prompt": [{"role": "user", "content": None}]}, "neither text nor a list"),
        ({"prompt": [{"from": "human", "value": "1+1?"}]}, "neither text nor a list"),
        ({"prompt": [{"role": "tool", "content": "x"}, user("1?")]}, "a message has the role 'tool'"),
        ({"prompt": []}, "has no question"),
        ({"prompt": float("nan")}, "neither text nor a list"),
        ({"prompt": "Let \ud835 be 3."}, r"the question has half a character, \\ud835 at position 4"),
        ({"prompt": "1?", "answer": "\udc00"}, r"the gold has half a character, \\udc00"),
        ({"prompt": [{"role": "system", "content": "\ud800"}, user("1?")]}, "the system message has half a character"),
        ({"prompt": "1?", "answer": float("nan")}, "the gold is not a number"),
        ({"prompt": "1?", "answer": [None]}, "the gold has a null in its list"),
    ],
)
def test_what_is_refused_is_named_with_file_and_row(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "0?", "answer": "1"}, {"answer": "2"} | row)
    with pytest.raises(UserError, match=problem) as caught:
        load_questions([path])
    assert str(caught.value).startswith(f"data.train = {path}, row 1: ")


def test_a_question_knows_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"id": "x", "prompt": "1?", "answer": "2"})
    (question,) = load_questions([path])
    assert question.place == f"{path}, row 0"


def test_an_earlier_assistant_turn_may_stay(tmp_path: Path) -> None:
    chat = [user("1?"), {"role": "assistant", "content": "2"}, user("And 2?")]
    (question,) = load_questions([write(tmp_path / "a.jsonl", {"prompt": chat, "answer": "3"})])
    assert question.messages == tuple(chat)
