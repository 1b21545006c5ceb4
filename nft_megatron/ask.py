"""Ask an engine, judge what comes back: the part that collecting and evaluating share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from nft_megatron.observe.metrics import PhaseTimer
from nft_megatron.observe.progress import Progress
from nft_megatron.records import Answer, Completion, Prompt, Request, Sampling, Verdict
from nft_megatron.rollout.engine import Engine, EngineFault
from nft_megatron.verify.service import Verifier


def answer_seed(run_seed: int, purpose: str, prompt_id: int, index: int) -> int:
    """The seed of one answer: the same for the same run, prompt and index, whatever else is asked beside it.

    >>> answer_seed(0, "train", 7, 0) == answer_seed(0, "train", 7, 0) != answer_seed(0, "train", 7, 1)
    True
    """
    digest = hashlib.blake2b(f"{run_seed}/{purpose}/{prompt_id}/{index}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1  # 63 bits: fits a signed 64-bit integer everywhere


@dataclass(frozen=True)
class Asker:
    """Engine, tokenizer and verifier as one: prompts in, judged answers out. Lives on rank 0."""

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
        answers_per_prompt: int,
        sampling: Sampling,
        *,
        purpose: str,
        first_id: int = 0,
        label: str | None = None,
    ) -> list[tuple[Answer, ...]]:
        """``answers_per_prompt`` judged answers to each prompt, in order. Prompt i has the id ``first_id + i``.

        ``purpose`` sets its seeds apart from those of other purposes; ``label`` is what the progress display says. Answers are
        verified while others are still being generated; the time under ``verify`` is what is waited for after that. An answer
        that an engine fault cut off is *unknown*.

        Raises :class:`~nft_megatron.rollout.engine.EngineFault` when most of the answers were cut off.
        """
        requests = [
            Request(
                first_id + offset,
                prompt.tokens,
                tuple(answer_seed(self.seed, purpose, first_id + offset, index) for index in range(answers_per_prompt)),
            )
            for offset, prompt in enumerate(prompts)
        ]
        pending: dict[tuple[int, int], tuple[Completion, str, Future[Verdict]]] = {}
        self.progress.phase(label or purpose, total=len(prompts) * answers_per_prompt)
        with self.timer.phase("generate"):
            for completion in self.engine.generate(requests, sampling):
                text = self.tokenizer.decode(completion.tokens.tolist(), skip_special_tokens=True)
                gold = prompts[completion.request_id - first_id].gold
                pending[completion.request_id, completion.index] = (completion, text, self._judge(text, gold, completion))
                self.progress.advance()
        num_aborted = sum(completion.finish_reason == "abort" for completion, _, _ in pending.values())
        if num_aborted > len(pending) / 2:
            raise EngineFault(f"the engine broke off {num_aborted} of {len(pending)} answers")
        with self.timer.phase("verify"):
            answers = {
                key: Answer(completion, text, verdict.result(timeout=self.deadline_seconds))
                for key, (completion, text, verdict) in pending.items()
            }
        return [tuple(answers[first_id + i, k] for k in range(answers_per_prompt)) for i in range(len(prompts))]

    def _judge(self, text: str, gold: str, completion: Completion) -> Future[Verdict]:
        if completion.finish_reason != "abort":
            return self.verifier.submit(text, gold, completion.finish_reason)
        aborted: Future[Verdict] = Future()
        aborted.set_result(Verdict("unknown", reason="engine fault", verifier="none"))
        return aborted
