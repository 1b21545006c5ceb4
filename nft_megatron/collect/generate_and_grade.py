"""Generate answers with an engine and grade them: what collection and evaluation share."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from nft_megatron.base.records import Answer, Completion, Prompt, Request, Sampling, Verdict
from nft_megatron.observe.metrics import PhaseTimer
from nft_megatron.observe.progress import Progress
from nft_megatron.rollout.engine import Engine, EngineFault
from nft_megatron.verify.service import Verifier

_LOOK_SECONDS = 0.5


def answer_seed(run_seed: int, purpose: str, prompt_id: int, index: int) -> int:
    """The seed of one answer: fixed by run, purpose, prompt and index, whatever else is generated alongside it.

    The answers to a prompt have consecutive seeds, so that an engine can request all of them at once.

    >>> answer_seed(0, "train", 7, 0) == answer_seed(0, "train", 7, 0) != answer_seed(0, "train", 8, 0)
    True
    >>> answer_seed(0, "train", 7, 15) - answer_seed(0, "train", 7, 0)
    15
    """
    digest = hashlib.blake2b(f"{run_seed}/{purpose}/{prompt_id}".encode(), digest_size=8)
    return (int.from_bytes(digest.digest(), "little") >> 2) + index  # always fits a signed 64-bit integer


@dataclass(eq=False)
class QuestionInProgress:
    """The answers to one prompt so far: for each its completion, its text and its future verdict."""

    prompt: Prompt
    answers: dict[int, tuple[Completion, str, Future[Verdict]]] = field(default_factory=dict)

    def broken_off(self) -> int:
        return sum(completion.finish_reason == "abort" for completion, _, _ in self.answers.values())

    def is_judged(self) -> bool:
        return all(verdict.done() for _, _, verdict in self.answers.values())

    def is_one_sided(self, num_verdicts: int) -> bool:
        """Whether ``num_verdicts`` or more verdicts are in, all of them right or all of them wrong."""
        labels = [verdict.result().label for _, _, verdict in self.answers.values() if verdict.done()]
        judged = [label for label in labels if label != "unknown"]
        return len(judged) >= num_verdicts and len(set(judged)) == 1

    def judged(self, timeout: float) -> tuple[Answer, ...]:
        """All answers in index order; waits for verdicts."""
        return tuple(
            Answer(completion, text, verdict.result(timeout=timeout))
            for _, (completion, text, verdict) in sorted(self.answers.items())
        )


class _Unwanted(set[int]):
    """Ids of abandoned prompts. It polls ``interrupted``; once that gives a reason, it contains every id.

    An engine looks here while it waits for the next answer, which may take minutes.
    """

    def __init__(self, interrupted: Callable[[], str | None]) -> None:
        super().__init__()
        self._interrupted, self._looked_at, self._is_over = interrupted, time.monotonic(), False

    def __contains__(self, prompt_id: object) -> bool:
        if not self._is_over and time.monotonic() - self._looked_at > _LOOK_SECONDS:
            self._is_over, self._looked_at = self._interrupted() is not None, time.monotonic()
        return self._is_over or super().__contains__(prompt_id)


@dataclass(frozen=True)
class RolloutClient:
    """Engine, tokenizer and verifier combined, on rank 0: prompts in, judged answers out."""

    engine: Engine
    verifier: Verifier
    tokenizer: Any
    seed: int
    deadline_seconds: float
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    progress: Progress = field(default_factory=Progress)

    def ask(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        *,
        purpose: str,
        first_id: int = 0,
        label: str | None = None,
    ) -> list[tuple[Answer, ...]]:
        """Return ``group_size`` judged answers to each prompt, in order. Prompt i has the id ``first_id + i``."""
        numbered = {first_id + offset: prompt for offset, prompt in enumerate(prompts)}
        answers = dict(self.stream(numbered, group_size, sampling, purpose=purpose, label=label))
        return [answers[prompt_id] for prompt_id in numbered]

    def stream(
        self,
        prompts: Mapping[int, Prompt],
        group_size: int,
        sampling: Sampling,
        *,
        purpose: str,
        label: str | None = None,
        expected_tokens: Mapping[str, int] | None = None,
        give_up_after: int | None = None,
        interrupted: Callable[[], str | None] = lambda: None,
    ) -> Generator[tuple[int, tuple[Answer, ...]]]:
        """Yield (id, judged answers) for each of ``prompts`` (keyed by id) as soon as all its answers are judged.

        ``purpose`` separates the seeds from those of other purposes; ``label`` is shown in the progress display. Answers are
        verified while others are still being generated; the phase ``verify`` times only the wait after that. An answer cut off
        by an engine fault is *unknown*; prompts with such answers come last.

        ``expected_tokens``: earlier lengths of answers, by question id; engines may start with the longest. With
        ``give_up_after`` n, a prompt is abandoned once n verdicts are in and all agree: it is not yielded, and its other
        answers are aborted. To stop early, close the iterator. The next answer may take long, so ``interrupted`` is polled:
        once it gives a reason, all unfinished answers are aborted.

        Raises :class:`~nft_megatron.rollout.engine.EngineFault` if most answers were cut off; prompts with such answers have
        then not been yielded.
        """
        lengths = expected_tokens or {}
        requests = [
            Request(
                prompt_id,
                prompt.tokens,
                tuple(answer_seed(self.seed, purpose, prompt_id, index) for index in range(group_size)),
                expected_tokens=lengths.get(prompt.question_id),
            )
            for prompt_id, prompt in prompts.items()
        ]
        questions = {prompt_id: QuestionInProgress(prompt) for prompt_id, prompt in prompts.items()}
        finished: deque[int] = deque()
        broken: list[int] = []
        given_up = _Unwanted(interrupted)
        self.progress.phase(label or purpose, total=len(prompts) * group_size)
        with self.timer.phase("generate"):
            for completion in self.engine.generate(requests, sampling, given_up):
                prompt_id = completion.request_id
                if prompt_id in given_up:  # it finished before the engine saw that it is no longer wanted
                    continue
                question = questions[prompt_id]
                self.take(question, completion)
                self.progress.advance()
                if len(question.answers) == group_size:
                    (broken if question.broken_off() else finished).append(prompt_id)
                elif give_up_after is not None and question.is_one_sided(give_up_after):
                    given_up.add(prompt_id)
                    self.progress.advance(group_size - len(question.answers))
                while finished and questions[finished[0]].is_judged():
                    yield finished[0], questions.pop(finished.popleft()).judged(self.deadline_seconds)
        num_broken = sum(questions[prompt_id].broken_off() for prompt_id in broken)
        if num_broken > len(prompts) * group_size / 2:
            raise EngineFault(f"the engine cut off {num_broken} of {len(prompts) * group_size} answers")
        with self.timer.phase("verify"):
            for prompt_id in [*finished, *broken]:
                yield prompt_id, questions[prompt_id].judged(self.deadline_seconds)

    def take(self, question: QuestionInProgress, completion: Completion) -> None:
        """Add an answer to its question, and have it judged."""
        text = self.tokenizer.decode(completion.tokens.tolist(), skip_special_tokens=True)
        question.answers[completion.index] = (completion, text, self._judge(text, question.prompt, completion))

    def _judge(self, text: str, prompt: Prompt, completion: Completion) -> Future[Verdict]:
        if completion.finish_reason != "abort":
            return self.verifier.submit(text, prompt.gold, completion.finish_reason, prompt.question)
        aborted: Future[Verdict] = Future()
        aborted.set_result(Verdict("unknown", reason="engine fault", verifier="none"))
        return aborted
