"""Chat templates that print the date, refuse messages or take arguments; tokenizers that add tokens of their own."""

import resource
import signal
from datetime import datetime
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Question
from nft_megatron.config.sections import DataConfig
from nft_megatron.data import rendering
from nft_megatron.data.prompts import make_prompts

BODY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
DATE = "{% set day = strftime_now('%d %b %Y') if strftime_now is defined else 'never' %}<{{ day }}>" + BODY
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
THINKING = BODY + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
SLOW = "took more than 0.22 s of processor time"
HOSTILE = {
    "loops in loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", SLOW),
    "a power": ("{{ (messages|length + 8) ** (9 ** 9) }}", SLOW),
    "a power that is constant": ("{{ 9 ** (9 ** 9) }}", SLOW),
    "a long loop": ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    "a long text": ("{{ 'x' * 10 ** 10 }}", "MemoryError"),
    "a text that is too long": ("{{ 'x' * 2 ** 25 }}", "the prompt has 33,554,4"),
    "a doubled list": (
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "MemoryError",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "division by zero": ("{{ 1 // 0 }}", "by zero"),
    "a wide format": ("{{ '%1000000000000d' % 1 }}", "data.template"),
    "attributes of Python": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
}
OTHER_DAY = datetime(2024, 2, 29, 23, 59)


def tokenizer(template: str | None, *, post: TemplateProcessing | None = None) -> PreTrainedTokenizerFast:
    """One token a character, whose id is its code point; ids 1 and 2 begin and end a text where ``post`` adds them."""
    characters = Tokenizer(WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    characters.pre_tokenizer = Split("", "isolated")
    if post:
        characters.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=characters, chat_template=template)


def asked(*roles_and_texts: tuple[str, str], place: str = "train.jsonl, row 7") -> Question:
    return Question("q", tuple({"role": role, "content": text} for role, text in roles_and_texts), "2", place=place)


def prompt_of(question: Question, tokenizer: Any, now: datetime | None = None, **settings: Any) -> str:
    chosen = DataConfig(train=("unused",), max_prompt_tokens=1000, **{"instruction": "keep", **settings})
    (prompt,) = make_prompts([question], tokenizer, chosen, now=now).prompts
    return "".join(map(chr, prompt.tokens))


ONE = asked(("user", "1+1?"))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_is_refused_in_bounded_time_and_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, message = HOSTILE[case]
    if message == SLOW:
        monkeypatch.setattr(rendering, "_SECONDS", 0.2)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match=r"^data\.template = chat: the tokenizer's chat template ") as refused:
        prompt_of(ONE, tokenizer(template + BODY))
    assert message in str(refused.value)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_template_that_only_some_probes_drive_mad_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check for left-out messages renders changed questions, whose failures it forgives."""
    monkeypatch.setattr(rendering, "_SECONDS", 0.2)
    mad = f"{{% if ' ?' in messages[0].content %}}{HOSTILE['loops in loops'][0]}{{% endif %}}"
    with pytest.raises(UserError, match=r"chat template took more than 0\.22 s of processor time"):
        prompt_of(ONE, tokenizer(mad + "<user>"))


def test_the_date_in_a_template_is_the_one_given() -> None:
    assert prompt_of(ONE, tokenizer(DATE), OTHER_DAY) == "<29 Feb 2024><user>1+1?<assistant>"
    assert prompt_of(ONE, tokenizer(DATE)) == f"<{datetime.now():%d %b %Y}><user>1+1?<assistant>"


@pytest.mark.parametrize(
    ("question", "settings", "message"),
    [
        (
            ONE,
            {"system_prompt": "Box it."},
            "data.system_prompt = 'Box it.': the tokenizer's chat template takes no system mess",
        ),
        (
            ONE,
            {"template": "qwen2.5-math"},
            "data.template = qwen2.5-math: the tokenizer's chat template takes no system message",
        ),
        (
            asked(("system", "Be brief."), ("user", "1?")),
            {},
            "data.train = train.jsonl, row 7: the tokenizer's chat template takes",
        ),
    ],
)
def test_a_template_without_system_messages(question: Question, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        prompt_of(question, tokenizer(NO_SYSTEM + BODY), **settings)
    assert str(caught.value).startswith(message)
    assert "train.jsonl, row 7: no system message; " in str(caught.value)
    assert prompt_of(ONE, tokenizer(NO_SYSTEM + BODY)) == "<user>1+1?<assistant>"


def test_a_template_that_leaves_the_system_message_out() -> None:
    """Without a word; but one whose own system message is the same keeps it."""
    users = "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}{% endfor %}<assistant>"
    with pytest.raises(UserError, match=r"data\.system_prompt = 'Box it\.': .* it leaves out that of train"):
        prompt_of(ONE, tokenizer(users), system_prompt="Box it.")
    with pytest.raises(UserError, match=r"data\.train = train\.jsonl, row 7: .* message; it leaves out that of"):
        prompt_of(asked(("system", "Be brief."), ("user", "1?")), tokenizer(users))
    own = "{% if messages[0].role != 'system' %}<system>Be brief.{% endif %}" + BODY
    for question, settings in ((asked(("system", "Be brief."), ("user", "1?")), {}), (asked(("user", "1?")), {})):
        assert prompt_of(question, tokenizer(own), **settings) == "<system>Be brief.<user>1?<assistant>"
    assert prompt_of(asked(("system", ""), ("user", "1?")), tokenizer(users)) == "<user>1?<assistant>"


@pytest.mark.parametrize(
    ("template", "lost"),
    [("Compute.<assistant>", "user"), ("{{ messages[-1].content }}", "user"), ("{{ messages[0].content }}", "assistant")],
)
def test_a_template_that_leaves_out_other_messages(template: str, lost: str) -> None:
    turns = asked(("user", "1?"), ("assistant", "It is 1."), ("user", "2?"))
    with pytest.raises(
        UserError, match=rf"data\.template = chat: .* leaves out a message of the {lost} in train\.jsonl, row 7"
    ):
        prompt_of(turns, tokenizer(template))
    without_thoughts = BODY.replace("m.content", "m.content.split('</think>')[-1] | trim")
    thought = asked(("user", " 1? "), ("assistant", "<think>1</think>It is 1."), ("user", "2?"))
    assert prompt_of(thought, tokenizer(without_thoughts)) == "<user>1?<assistant>It is 1.<user>2?<assistant>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ALTERNATES + BODY, "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[5].content.x }}", "has no element 5"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_fails_names_the_row(template: str, said: str) -> None:
    twice = asked(("user", "1?"), ("user", "2?"))
    with pytest.raises(UserError, match=said) as caught:
        prompt_of(twice, tokenizer(template))
    start = "data.template = chat: the tokenizer's chat template fails on train.jsonl, row 7 with messages of user, user: "
    assert str(caught.value).startswith(start)


def test_arguments_of_a_template() -> None:
    assert prompt_of(ONE, tokenizer(THINKING)) == "<user>1+1?<assistant>"
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert prompt_of(ONE, tokenizer(THINKING), **off) == "<user>1+1?<assistant><think></think>"
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs = enable_thinking: .* does not use it \(it uses none\)"):
        prompt_of(ONE, tokenizer(BODY), **off)
    with pytest.raises(UserError, match=r"= enable_thinkng: .* does not use it \(it uses enable_thinking\); correct the name"):
        prompt_of(ONE, tokenizer(THINKING), chat_template_kwargs={"enable_thinkng": False})
    tagged = "{% generation %}" + BODY + "{%- endgeneration -%}"
    with pytest.raises(UserError, match=r"= enable_thinking: .* does not use it"):
        prompt_of(ONE, tokenizer(tagged), **off)
    assert prompt_of(ONE, tokenizer(tagged)) == "<user>1+1?<assistant>"
    with pytest.raises(UserError, match=r"= tokenize: is set by the program itself"):
        prompt_of(ONE, tokenizer(THINKING), chat_template_kwargs={"tokenize": True})


@pytest.mark.parametrize(("single", "begins"), [("$A \x02", ""), ("\x01 $A \x02", "\x01"), ("\x01 $A", "\x01"), ("$A", "")])
def test_a_plain_prompt_is_never_closed(single: str, begins: str) -> None:
    post = TemplateProcessing(single=single, special_tokens=[("\x01", 1), ("\x02", 2)])
    adds = tokenizer(None, post=post)
    assert adds("1?")["input_ids"] == [ord(c) for c in single.replace("$A", "1?").replace(" ", "")]
    assert prompt_of(asked(("user", "1?")), adds, template="plain", plain_format="{question}:") == f"{begins}1?:"
    assert prompt_of(asked(("user", "1\x02")), adds, template="plain", plain_format="{question}") == f"{begins}1\x02"


def test_plain_prompts_lose_no_turn_of_the_assistant() -> None:
    turns = asked(("user", "1?"), ("assistant", "1"), ("user", "2?"))
    with pytest.raises(UserError, match=r"data\.train = train\.jsonl, row 7: has an earlier turn of the assistant"):
        prompt_of(turns, tokenizer(BODY), template="plain")
    assert prompt_of(turns, tokenizer(BODY)) == "<user>1?<assistant>1<user>2?<assistant>"


def test_a_prompt_without_tokens_is_refused() -> None:
    bare = Tokenizer(BPE({"a": 0}, []))
    bare.pre_tokenizer = Split("", "isolated")
    knows_little = PreTrainedTokenizerFast(tokenizer_object=bare)
    with pytest.raises(UserError, match=r"data\.train = train\.jsonl, row 7: the prompt '1\+1\?' has no tokens"):
        prompt_of(ONE, knows_little, template="plain", plain_format="{question}")
