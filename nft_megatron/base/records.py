"""The records that cross room boundaries. Frozen; their numpy arrays are never written to.

A question becomes a ``Prompt``; an engine answers a ``Request`` with ``Completion`` records; the verifier adds a ``Verdict``
and makes each an ``Answer``; the K answers to one question are a ``Group``; the groups of a rollout step are a ledger file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
Label = Literal["correct", "wrong", "unknown"]


@dataclass(frozen=True)
class Question:
    """One row of a dataset, before any template. ``place`` names its file and row in messages.

    >>> Question("dapo/0", ({"role": "user", "content": "What is 2+2?"},), gold="4", source="math_dapo").text
    'What is 2+2?'
    """

    question_id: str
    messages: tuple[dict[str, str], ...]
    gold: str
    source: str = ""
    place: str = field(default="", compare=False, repr=False)

    @property
    def text(self) -> str:
        """What the user asks, as one text."""
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question as the model reads it: the answer begins right after ``tokens`` (int32).

    >>> prompt = Prompt("dapo/0", "What is 2+2?", gold="4", tokens=np.array([3923, 374, 220, 17], dtype=np.int32))
    >>> len(prompt.tokens)
    4
    """

    question_id: str
    question: str
    gold: str
    tokens: np.ndarray


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. ``temperature`` 0 is greedy. ``max_tokens`` counts the end-of-answer token.

    Generation ends after any of ``stop_token_ids`` (kept in the answer: the model must learn to stop) or as soon as the
    decoded answer contains any of the texts in ``stop``.

    >>> Sampling(max_tokens=4096, stop_token_ids=(151643, 151645)).temperature
    1.0
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Request:
    """A request for ``len(seeds)`` answers to one prompt. Answer k depends only on the weights, the prompt and ``seeds[k]``.

    ``expected_tokens``, a guess at the length of one answer, affects only which requests an engine starts first.

    >>> request = Request(7, np.array([3923, 374], dtype=np.int32), seeds=tuple(range(100, 116)))
    >>> len(request.seeds)
    16
    """

    request_id: int
    prompt_tokens: np.ndarray
    seeds: tuple[int, ...]
    expected_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Completion:
    """Answer ``index`` to request ``request_id``.

    ``tokens`` (int32) and ``logprobs`` (float32, ≤ 0, under the distribution that was sampled from) have one entry per
    generated token. ``finish_reason``: ``stop``, ``length`` (truncated at ``max_tokens``) or ``abort`` (an engine fault;
    such an answer is judged *unknown*).

    >>> logprobs = np.array([-0.1, -0.02], dtype=np.float32)
    >>> completion = Completion(7, 0, np.array([19, 151645]), logprobs, "stop", weight_version=11, seconds=0.4)
    >>> completion.tokens.shape == completion.logprobs.shape
    True
    """

    request_id: int
    index: int
    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    weight_version: int
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """The verifier's judgement of one answer, its reason, and the verifier's version.

    >>> Verdict("wrong", reason="truncated", verifier="strict/1 math-verify/0.9.0").label
    'wrong'
    """

    label: Label
    reason: str
    verifier: str
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Answer:
    """A completion with its text and its verdict.

    >>> completion = Completion(7, 0, np.array([19, 151645]), np.array([-0.1, -0.02]), "stop", weight_version=11, seconds=0.4)
    >>> Answer(completion, "4", Verdict("correct", reason="exact", verifier="strict/1")).verdict.label
    'correct'
    """

    completion: Completion
    text: str
    verdict: Verdict


class AnswerTokens(NamedTuple):
    """An answer as the trainer reads it: token ids of its prompt (at least one) and its own, int32; the engine's log-prob of
    each of its own, float32.

    >>> tokens = AnswerTokens(np.array([5, 6]), np.array([7, 8, 2]), np.array([-0.1, -0.7, -0.2], dtype=np.float32))
    >>> len(tokens.prompt_tokens), len(tokens.answer_tokens)
    (2, 3)
    """

    prompt_tokens: np.ndarray
    answer_tokens: np.ndarray
    behaviour_logprobs: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """The K answers to one question. ``group_id`` is the question's position in the run's seeded order of prompts.

    >>> completion = Completion(7, 0, np.array([19, 151645]), np.array([-0.1, -0.02]), "stop", weight_version=11, seconds=0.4)
    >>> labels = ("correct", "wrong", "unknown", "wrong")
    >>> answers = tuple(Answer(completion, "4", Verdict(label, "", "strict/1")) for label in labels)
    >>> group = Group(7, 12, Prompt("dapo/0", "What is 2+2?", "4", np.array([3923])), answers)
    >>> group.num_judged, round(group.correct_rate, 3), group.is_mixed
    (3, 0.333, True)
    """

    group_id: int
    step: int
    prompt: Prompt
    answers: tuple[Answer, ...]

    @property
    def num_judged(self) -> int:
        """Answers whose verdict is not *unknown*."""
        return sum(answer.verdict.label != "unknown" for answer in self.answers)

    @property
    def num_correct(self) -> int:
        return sum(answer.verdict.label == "correct" for answer in self.answers)

    @property
    def correct_rate(self) -> float:
        """r̂_q, the mean of r over the judged answers; NaN when none was judged."""
        return self.num_correct / self.num_judged if self.num_judged else float("nan")

    @property
    def is_mixed(self) -> bool:
        """0 < r̂_q < 1: the prompt filter of Algorithm 1."""
        return 0 < self.num_correct < self.num_judged
