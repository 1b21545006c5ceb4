"""Questions in flight: asked one by one, each closed once all its answers are generated and judged."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nft_megatron.base.records import Answer, Prompt, Request, Sampling
from nft_megatron.collect.generate_and_grade import QuestionInProgress, RolloutClient, answer_seed
from nft_megatron.rollout.engine import EngineFault, StreamingEngine

_MAX_BROKEN = 8
"""Groups in a row that may lose most of their answers before the engine counts as faulty."""


@dataclass(eq=False)
class _InFlight:
    question: QuestionInProgress
    version: int


class GroupStream:
    """``group_size`` answers to each question, on rank 0; ``purpose`` as in :meth:`RolloutClient.stream`.

    A question keeps its seeds however often it is asked. An answer that the engine cut off is *unknown*.
    """

    def __init__(self, client: RolloutClient, group_size: int, sampling: Sampling, purpose: str) -> None:
        assert isinstance(client.engine, StreamingEngine)
        self._client, self._group_size, self._purpose = client, group_size, purpose
        self._answers = client.engine.open_stream(sampling)
        self._in_flight: dict[int, _InFlight] = {}
        self._generated: deque[int] = deque()  # ids whose verdicts are awaited
        self._num_broken = 0
        self.num_unfinished = 0
        """Answers that are still being generated."""

    @property
    def version(self) -> int:
        """The engine's weights: no token of a question that is asked now comes from older ones."""
        return self._answers.version

    @property
    def in_flight(self) -> dict[int, int]:
        """The ids in flight, and the version that the engine held when each was asked."""
        return {prompt_id: each.version for prompt_id, each in self._in_flight.items()}

    def __len__(self) -> int:
        return len(self._in_flight)

    def ask(self, prompt_id: int, prompt: Prompt, expected_tokens: int | None) -> None:
        seeds = tuple(answer_seed(self._client.seed, self._purpose, prompt_id, index) for index in range(self._group_size))
        self._in_flight[prompt_id] = _InFlight(QuestionInProgress(prompt), self.version)
        self.num_unfinished += self._group_size
        self._answers.ask([Request(prompt_id, prompt.tokens, seeds, expected_tokens)])

    def next(self, timeout: float) -> tuple[int, Prompt, tuple[Answer, ...]] | None:
        """A closed group: its id, its prompt, its answers in index order. None if none closes within ``timeout`` seconds.

        Raises :class:`EngineFault` if several groups in a row lost most of their answers, and what the engine raises.
        """
        if (completion := self._answers.next(0.0 if self._is_judged() else timeout)) is not None:
            question = self._in_flight[completion.request_id].question
            self._client.take(question, completion)
            self.num_unfinished -= 1
            if len(question.answers) == self._group_size:
                self._generated.append(completion.request_id)
        return self._close(self._generated.popleft()) if self._is_judged() else None

    def close(self) -> None:
        self._answers.close()

    def _is_judged(self) -> bool:
        return bool(self._generated) and self._in_flight[self._generated[0]].question.is_judged()

    def _close(self, prompt_id: int) -> tuple[int, Prompt, tuple[Answer, ...]]:
        question = self._in_flight.pop(prompt_id).question
        self._num_broken = self._num_broken + 1 if question.broken_off() > self._group_size / 2 else 0
        if self._num_broken == _MAX_BROKEN:
            raise EngineFault(f"the engine cut off most answers to {_MAX_BROKEN} questions in a row")
        return prompt_id, question.prompt, question.judged(self._client.deadline_seconds)
