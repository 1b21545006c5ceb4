"""Conversations to token ids, by a tokenizer's chat template or by ``data.plain_format``.

A template may print the date. It gets the one given here, so that a resumed run asks what its first start asked.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta

from nft_megatron.base.bounded import BoundError, bounded
from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Question
from nft_megatron.config.sections import DataConfig
from nft_megatron.data.templates import TEMPLATES

_Chat = list[dict[str, str]]
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # tags that transformers adds to the language
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    BoundError,
)
_SECONDS, _SECONDS_EACH, _BYTES = 60.0, 0.02, 1 << 30
"""What rendering all questions may take: a template is a program. A usual one takes 0.0002 s a question."""
_MOST_CHARACTERS = 1 << 24
"""Of one prompt, in which 2^24 characters are at least a million tokens."""


def prompt_texts(questions: Sequence[Question], tokenizer: Any, settings: DataConfig, field: str, now: datetime) -> list[str]:
    """Each question as the model sees it, as text.

    Raises :class:`UserError` if the tokenizer has no chat template but needs one, if the template refuses a question or does
    not use an argument of ``data.chat_template_kwargs``, or if ``plain`` would lose a turn of the assistant.
    """
    if not questions:
        return []
    if TEMPLATES[settings.template].uses_chat:
        return _rendered(questions, tokenizer, settings, field, now)
    for question in questions:
        if any(message["role"] == "assistant" for message in question.messages):
            problem = "has an earlier turn of the assistant, which data.template=plain cannot show"
            raise UserError(field, _name(question), problem, "use data.template=chat, or write the turns into one question")
    # Not str.format: a question or a format with LaTeX is full of braces.
    return [settings.plain_format.replace("{question}", question.text) for question in questions]


def token_ids_of(
    questions: Sequence[Question], texts: Sequence[str], tokenizer: Any, settings: DataConfig, field: str
) -> list[list[int]]:
    """The tokens of ``texts``, special ones included. An end-of-text token after a plain prompt is removed.

    Raises :class:`UserError` with the question if a text has no tokens.
    """
    if not texts:
        return []
    token_ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # a chat template writes them itself
    if not TEMPLATES[settings.template].uses_chat:
        token_ids = [_open_ended(*pair) for pair in zip(tokenizer(list(texts))["input_ids"], token_ids, strict=True)]
    for question, text, ids in zip(questions, texts, token_ids, strict=True):
        if not ids:
            problem = f"the prompt {text[:60]!r} has no tokens for this tokenizer"
            raise UserError(field, _name(question), problem, "remove the row, or use the model's own tokenizer")
    return token_ids


def _open_ended(token_ids: list[int], without: list[int]) -> list[int]:
    """``token_ids`` without special tokens added at the end: a prompt is to be continued. ``without`` has none at all."""
    for start in range(len(token_ids) - len(without) + 1):
        if token_ids[start : start + len(without)] == without:
            return token_ids[: start + len(without)]
    return token_ids


def _rendered(questions: Sequence[Question], tokenizer: Any, settings: DataConfig, field: str, now: datetime) -> list[str]:
    if not tokenizer.chat_template:
        raise UserError("data.template", settings.template, "the tokenizer has no chat template", "set data.template=plain")
    _check_arguments(tokenizer, settings)
    family_prompt = TEMPLATES[settings.template].system_prompt
    system_prompt = family_prompt if settings.system_prompt is None else settings.system_prompt

    def render(chat: _Chat) -> str:
        return tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, strftime_now=now.strftime, **settings.chat_template_kwargs
        )

    try:
        with bounded(_SECONDS + _SECONDS_EACH * len(questions), _BYTES):
            return _texts(questions, render, system_prompt, settings, field)
    except BoundError as error:
        problem = f"the tokenizer's chat template {error}"
        raise UserError("data.template", settings.template, problem, "correct it, or set data.template=plain") from error


def _texts(
    questions: Sequence[Question],
    render: Callable[[_Chat], str],
    system_prompt: str | None,
    settings: DataConfig,
    field: str,
) -> list[str]:
    """Every question rendered, and shown to be complete."""
    texts: list[str] = []
    for question in questions:
        chat = _with_system(question.messages, system_prompt)
        try:
            texts.append(render(chat))
            if len(texts[-1]) > _MOST_CHARACTERS:
                raise ValueError(f"the prompt has {len(texts[-1]):,} characters")
        except _FAILURES as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            if _without_system(chat) != chat and _rendered_or_none(render, _without_system(chat)) is not None:
                raise _system_refused(question, settings, field, f"it fails on {_name(question)}: {said}") from error
            roles = ", ".join(message["role"] for message in chat)
            problem = f"the tokenizer's chat template fails on {_name(question)} with messages of {roles}: {said}"
            remedy = "correct that row or the template, or set data.template=plain"
            raise UserError("data.template", settings.template, problem, remedy) from error
    seen: set[tuple[str, ...]] = set()
    for question, text in zip(questions, texts, strict=True):
        chat = _with_system(question.messages, system_prompt)
        if (kind := tuple(message["role"] for message in chat)) not in seen:  # a template treats all of a kind alike
            seen.add(kind)
            if (lost := _left_out(chat, text, render)) == "system":
                raise _system_refused(question, settings, field, f"it leaves out that of {_name(question)}")
            if lost:
                problem = f"the tokenizer's chat template leaves out a message of the {lost} in {_name(question)}"
                raise UserError("data.template", settings.template, problem, "correct the template, or set data.template=plain")
    return texts


def _without_system(chat: _Chat) -> _Chat:
    return [message for message in chat if message["role"] != "system"]


def _left_out(chat: _Chat, text: str, render: Callable[[_Chat], str]) -> str:
    """The role of a message that ``text`` lacks, whatever it says; empty if there is none."""
    for number, message in enumerate(chat):
        other = [*chat[:number], {**message, "content": message["content"] + " ?"}, *chat[number + 1 :]]
        if message["content"].strip() not in text and _rendered_or_none(render, other) == text:
            return message["role"]
    return ""


def _rendered_or_none(render: Callable[[_Chat], str], chat: _Chat) -> str | None:
    try:
        return render(chat)
    except BoundError:
        raise
    except _FAILURES:
        return None


def _system_refused(question: Question, settings: DataConfig, field: str, said: str) -> UserError:
    problem = f"the tokenizer's chat template takes no system message; {said}"
    if settings.system_prompt is not None:
        return UserError(
            "data.system_prompt", repr(settings.system_prompt), problem, "leave it out, or set data.template=plain"
        )
    if TEMPLATES[settings.template].system_prompt is not None:
        return UserError("data.template", settings.template, problem, "set data.template=chat or plain")
    return UserError(field, _name(question), problem, "move the system message of that row into its question")


def _check_arguments(tokenizer: Any, settings: DataConfig) -> None:
    field = "data.chat_template_kwargs"
    if not settings.chat_template_kwargs:
        return
    own = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages", "strftime_now"} - {"kwargs"}
    if taken := sorted(own & settings.chat_template_kwargs.keys()):
        raise UserError(field, taken[0], "is set by the program itself", "remove it")
    templates = tokenizer.chat_template
    text = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    text = _GENERATION.sub("", text)
    extensions = ["jinja2.ext.loopcontrols"]
    try:
        used = jinja2.meta.find_undeclared_variables(jinja2.Environment(extensions=extensions).parse(text))
    except (jinja2.TemplateSyntaxError, RecursionError):  # an extension of transformers, or a mistake that rendering will name
        return
    if unused := sorted(settings.chat_template_kwargs.keys() - used):
        known = ", ".join(sorted(used - own - {"raise_exception", *tokenizer.special_tokens_map})) or "none"
        raise UserError(
            field, unused[0], f"the tokenizer's chat template does not use it (it uses {known})", "correct the name"
        )


def _name(question: Question) -> str:
    return question.place or f"question {question.question_id!r}"


def _with_system(messages: Sequence[dict[str, str]], system_prompt: str | None) -> _Chat:
    """``messages`` after ``system_prompt``, which replaces the data set's system message; None leaves them unchanged."""
    if system_prompt is None:
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *(message for message in messages if message["role"] != "system")]
