"""Which texts ask for a box, and what is asked of a question in each place where the request may already be."""

from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from nft_megatron.base.records import Question
from nft_megatron.config.sections import DataConfig
from nft_megatron.data.prompts import make_prompts
from nft_megatron.data.requests import asks_for_box
from nft_megatron.data.wording import worded


@pytest.mark.parametrize(
    "text",
    [
        r"Please reason step by step, and put your final answer within \boxed{}.",
        r"Compute 7*8-9+6. Use \boxed{}.",
        r"Answer: \boxed{$Answer} where $Answer is the answer to the problem.",
        r"Let us think. End with \boxed{<final_answer>}.",
        r"Enclose it in $\boxed{\text{your answer}}$.",
        r"Your response must end in \boxed{...}",
        r"Your response must end in \boxed{\ldots}.",
        r"Use the format \boxed{x}.",
        r"Give your answer as $x=\boxed{}$.",
        r"For example, if it is five, end with \boxed{5}.",
        r"Put the answer in \\boxed{}.",
        r"Put it in \boxed, please.",
        r"Use \fbox{} for it.",
        "Put it in \boxed{}.",  # a backspace, which JSON makes of an unescaped \b
        "End with boxed{answer}.",
        "Box your final answer.",
        "Please box the answer.",
        "Write the final answer in a box.",
        "Your answer should be boxed.",
        "Give a boxed answer.",
        "Draw a box around the final numerical answer.",
        "State the result and box it.",
        r"请将最终答案放在\boxed{}中",
        "把最终答案写在方框里",
        r"Réponds par \boxed{réponse}.",
        "Encadrez votre réponse.",
        "Schreibe die Antwort in ein Kästchen.",
        "Escribe la respuesta en un recuadro.",
        "Заключите ответ в рамку.",
    ],
)
def test_requests(text: str) -> None:
    assert asks_for_box(text)
    assert asks_for_box(f"What is 1+1?\n{text}\nGood luck! The answer is 2.")


@pytest.mark.parametrize(
    "text",
    [
        "What is 1+1?",
        "A box contains 3 red balls. What is the answer?",
        "How many balls are in the box? Give your answer as an integer.",
        "Give the answer as the number of balls in the box.",
        "An answer sheet has 5 boxes.",
        "The chocolates are boxed in sets of 12.",
        "A boxer wins 3 fights. Find the volume of the box, then write it in cm.",
        r"Let $\boxed{N}$ count the divisors of $N$. For example, $\boxed{3}=2$. Find \[\boxed{\boxed{11}\times\boxed{9}}\]",
        r"Fill in: $3+\boxed{}=5$.",
        r"$5\boxed{}4$ is divisible by 9.",
        r"$\boxed{1} \quad \boxed{3}$",
        r"\[ \boxed{\textbf{T A G C}} \ldots \]",
        r"\boxed{\begin{array}{c|c}a&b\\\hline\frac{1}{2}&\frac{\sqrt{2}}{3}\end{array}}",
    ],
)
def test_boxes_that_belong_to_the_question(text: str) -> None:
    assert not asks_for_box(text)


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
ASKS = (
    "{% if messages[0].role != 'system' %}<system>Please put your final answer within \\boxed{}.{% endif %}" + PLAIN
)  # as Qwen2.5-Math's does


def asked(text: str, chat_template: str = PLAIN, system: str | None = None, **settings: Any) -> str:
    """The prompt that the model sees."""
    characters = Tokenizer(WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    characters.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, chat_template=chat_template)
    messages = [{"role": "system", "content": system}] if system else []
    question = Question("q", (*messages, {"role": "user", "content": text}), gold="2")
    (prompt,) = make_prompts([question], tokenizer, DataConfig(train=("unused",), max_prompt_tokens=1000, **settings)).prompts
    assert prompt.question in "".join(map(chr, prompt.tokens))
    return "".join(map(chr, prompt.tokens))


BOXED, LINE = worded("1+1?", "boxed"), worded("1+1?", "answer")
BOXES = r"Put it in \boxed{}."
FAMILY = r"Please reason step by step, and put your final answer within \boxed{}."


def test_any_question_is_asked_for_a_box() -> None:
    assert asked("1+1?") == f"<user>{BOXED}<assistant>"
    assert asked("1+1?", system="Be brief.") == f"<system>Be brief.<user>{BOXED}<assistant>"
    assert asked("1+1?", template="plain") == f"{BOXED}\n"
    assert asked(LINE) == f"<user>{BOXED}<assistant>"
    assert asked(LINE, ASKS).endswith(f"<user>{BOXED}<assistant>")  # the paper's 7B model is asked twice


def test_but_not_where_something_asks_already() -> None:
    assert asked(f"1+1? {BOXES}") == f"<user>1+1? {BOXES}<assistant>"
    assert asked("1+1?", system=BOXES) == f"<system>{BOXES}<user>1+1?<assistant>"
    assert asked("1+1?", system_prompt=BOXES) == f"<system>{BOXES}<user>1+1?<assistant>"
    assert asked("1+1?", **{"template": "qwen2.5-math"}) == f"<system>{FAMILY}<user>1+1?<assistant>"
    assert asked("1+1?", ASKS) == "<system>Please put your final answer within \\boxed{}.<user>1+1?<assistant>"
    assert asked("1+1?", template="plain", plain_format=f"{{question}} {BOXES}:") == f"1+1? {BOXES}:"
    shown = "2+2?\n\\boxed{4}\n\n{question}\n"
    assert asked("1+1?", template="plain", plain_format=shown) == shown.replace("{question}", "1+1?")


def test_what_replaces_a_request_is_what_counts() -> None:
    """The data set's system message, or the template's own, asks for a box, but another one is sent."""
    assert asked("1+1?", system=BOXES, system_prompt="Be brief.") == f"<system>Be brief.<user>{BOXED}<assistant>"
    assert asked("1+1?", ASKS, system="Be brief.") == f"<system>Be brief.<user>{BOXED}<assistant>"
    assert asked("1+1?", system=BOXES, template="plain") == f"{BOXED}\n"  # which leaves system messages out


def test_the_other_instructions() -> None:
    assert asked("1+1?", instruction="answer") == f"<user>{LINE}<assistant>"
    assert asked("1+1? End with 'Answer: 5'.", instruction="answer") == "<user>1+1? End with 'Answer: 5'.<assistant>"
    assert asked(BOXED, instruction="answer") == f"<user>{LINE}<assistant>"
    for text, kept, bare in (("1+1?", "1+1?", "1+1?"), (LINE, LINE, "1+1?")):
        assert asked(text, instruction="keep") == f"<user>{kept}<assistant>"
        assert asked(text, instruction="none") == f"<user>{bare}<assistant>"
