"""Templates against texts written by hand, the order of prompts against its definition."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Prompt, Question
from nft_megatron.config.sections import DataConfig
from nft_megatron.data.prompts import PromptOrder, PromptSet, make_prompts
from nft_megatron.data.wording import instruct, reword

DAPO_TEXT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\nWhat is $1+1$?\nIs it {2}?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
BOXED_TEXT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "\\boxed{$Answer} where $Answer is the answer to the problem.\n\nWhat is $1+1$?\nIs it {2}?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def question(text: str, question_id: str = "q", system: str | None = None) -> Question:
    messages = [{"role": "system", "content": system}] if system else []
    return Question(question_id, (*messages, {"role": "user", "content": text}), gold="2")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: its id is the code point."""
    characters = Tokenizer(WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    characters.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, chat_template=CHAT_TEMPLATE)


def settings(**fields: Any) -> DataConfig:
    return DataConfig(train=("unused",), **{"max_prompt_tokens": 1000, "instruction": "keep", **fields})


def text_of(prompt: Prompt) -> str:
    assert prompt.tokens.dtype == np.int32
    return "".join(map(chr, prompt.tokens))


def test_reword() -> None:
    asked = question(DAPO_TEXT)
    assert reword(asked, "keep") is asked
    assert reword(asked, "none").text == "What is $1+1$?\nIs it {2}?"
    assert reword(asked, "boxed").text == BOXED_TEXT
    assert reword(question(BOXED_TEXT), "none").text == "What is $1+1$?\nIs it {2}?"
    assert reword(question(BOXED_TEXT), "answer").text == DAPO_TEXT
    assert reword(question("What is $1+1$?"), "boxed").text == "What is $1+1$?"  # instruct() is for these


def test_instruct_words_what_has_no_wording_too() -> None:
    for text in (DAPO_TEXT, BOXED_TEXT, "What is $1+1$?\nIs it {2}?"):
        assert instruct(question(text, system="Be brief."), "boxed").text == BOXED_TEXT
        assert instruct(question(text), "answer").text == DAPO_TEXT
    assert instruct(question("1?", system="Be brief."), "boxed").messages[0] == {"role": "system", "content": "Be brief."}


def test_of_several_turns_the_last_is_worded() -> None:
    turns = ({"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "2?"})
    *before, last = instruct(Question("q", turns, gold="2"), "boxed").messages
    assert tuple(before) == turns[:2]
    assert last == {"role": "user", "content": BOXED_TEXT.replace("What is $1+1$?\nIs it {2}?", "2?")}


def test_plain_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chosen = settings(template="plain", plain_format="Q {x}: {question}\nA:")
    (prompt,) = make_prompts([question("1+1?")], tokenizer, chosen).prompts
    assert text_of(prompt) == "Q {x}: 1+1?\nA:"
    assert (prompt.question_id, prompt.question, prompt.gold) == ("q", "1+1?", "2")


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [question("1+1?"), question("2+2?", system="Be brief.")]
    plain = make_prompts(asked, tokenizer, settings()).prompts
    assert [text_of(p) for p in plain] == ["<user>1+1?<assistant>", "<system>Be brief.<user>2+2?<assistant>"]
    told = make_prompts(asked, tokenizer, settings(system_prompt="Box it.")).prompts
    assert [text_of(p) for p in told] == ["<system>Box it.<user>1+1?<assistant>", "<system>Box it.<user>2+2?<assistant>"]
    assert told[0].tokens.tolist() == tokenizer.apply_chat_template(
        [{"role": "system", "content": "Box it."}, {"role": "user", "content": "1+1?"}],
        add_generation_prompt=True,
        return_dict=False,
    )


def test_the_family_template_has_a_system_message_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    (asked,) = make_prompts([question("1+1?")], tokenizer, settings(template="qwen2.5-math")).prompts
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    assert text_of(asked) == f"<system>{system}<user>1+1?<assistant>"
    (told,) = make_prompts([question("1+1?")], tokenizer, settings(template="qwen2.5-math", system_prompt="Box it.")).prompts
    assert text_of(told) == "<system>Box it.<user>1+1?<assistant>"


def test_conflicting_questions_are_left_out_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    one, other = question("1+1?", "one"), Question("other", question("1 + 1").messages, gold="3")
    rest = question("2+2?", "rest")
    left = make_prompts([one, rest, other], tokenizer, settings())
    assert [prompt.question_id for prompt in left.prompts] == ["rest"]
    assert left.left_out == {"questions_conflicting": 2, "questions_overlong": 0}
    kept = make_prompts([one, rest, other], tokenizer, settings(conflicting="keep"))
    assert [prompt.question_id for prompt in kept.prompts] == ["one", "rest", "other"]
    with pytest.raises(UserError, match=r"data\.train = 2 questions: all conflict, like 'one' and 'other'"):
        make_prompts([one, other], tokenizer, settings())
    assert make_prompts([], tokenizer, settings()) == PromptSet()


def test_chat_template_missing() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
    with pytest.raises(UserError, match=r"data\.template = chat: the tokenizer has no chat template; set data\.template=plain"):
        make_prompts([question("1+1?")], bare, settings())


def test_overlong(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [question("x" * 10, "short"), question("x" * 11, "long"), question("x" * 12, "longest")]
    chosen = {"template": "plain", "plain_format": "{question}", "max_prompt_tokens": 10}
    with pytest.raises(UserError, match=r"max_prompt_tokens = 10: 2 of 3 .* 'longest', has 12 tokens; raise it to 12, or set"):
        make_prompts(asked, tokenizer, settings(**chosen))
    kept = make_prompts(asked, tokenizer, settings(**chosen, overlong="drop"))
    assert [prompt.question_id for prompt in kept.prompts] == ["short"]
    assert (kept.num_overlong, kept.num_conflicting, kept.num_questions) == (2, 0, 3)
    with pytest.raises(UserError, match="2 of 2 questions"):
        make_prompts(asked[1:], tokenizer, settings(**chosen, overlong="drop"))


@given(num=st.integers(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_every_epoch_has_each_prompt_once(num: int, seed: int, epoch: int) -> None:
    order = PromptOrder(prompts=range(num), seed=seed)  # type: ignore[arg-type]
    assert Counter(order.take(epoch * num, num)) == Counter(range(num))


@given(
    num=st.integers(1, 20), seed=st.integers(0, 99), cursor=st.integers(0, 100), parts=st.lists(st.integers(0, 30), max_size=5)
)
def test_taking_in_parts_is_taking_at_once(num: int, seed: int, cursor: int, parts: list[int]) -> None:
    order = PromptOrder(prompts=range(num), seed=seed)  # type: ignore[arg-type]
    taken, position = [], cursor
    for part in parts:
        taken += PromptOrder(prompts=range(num), seed=seed).take(position, part)  # type: ignore[arg-type]
        position += part
    assert taken == order.take(cursor, sum(parts))


def test_order_is_pinned() -> None:
    """A resumed run must find the order that the interrupted one used, whatever was installed in between."""
    order = PromptOrder(prompts=range(8), seed=7)  # type: ignore[arg-type]
    first, second = [0, 6, 7, 2, 4, 5, 1, 3], [6, 3, 1, 0, 2, 4, 7, 5]
    assert order.take(0, 16) == first + second
    assert order.take(0, 8) != PromptOrder(prompts=range(8), seed=8).take(0, 8)  # type: ignore[arg-type]
