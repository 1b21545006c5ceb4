"""The log-prob probe: answers to fixed questions that show the trainer whether the engine serves the weights it was given.

An engine may accept new weights and still serve others: an older version, half-loaded ones, another precision, or a stale
cache. The log-probs of its answers then differ from the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nft_megatron.base.records import Answer, Group, Prompt, Request, Sampling, Verdict
from nft_megatron.collect.generate_and_grade import answer_seed
from nft_megatron.data.ledger import write_ledger
from nft_megatron.rollout.engine import Engine

_ANY = Verdict("correct", reason="gate", verifier="none")  # any judged verdict makes Trainer.mismatch count the answer


@dataclass(frozen=True)
class LogprobProbe:
    """Requests one answer to each of ``prompts`` from ``engine`` and writes them to ``path``, a ledger file."""

    engine: Engine
    prompts: Sequence[Prompt]
    sampling: Sampling
    max_tokens: int
    path: Path
    seed: int

    def ask(self, version: int) -> Path:
        """Write the answers of weights ``version``, sampled as in training but with at most ``max_tokens`` tokens each."""
        sampling = replace(self.sampling, max_tokens=min(self.max_tokens, self.sampling.max_tokens))
        requests = [Request(i, prompt.tokens, (answer_seed(self.seed, "gate", i, 0),)) for i, prompt in enumerate(self.prompts)]
        groups = [
            Group(completion.request_id, version, self.prompts[completion.request_id], (Answer(completion, "", _ANY),))
            for completion in self.engine.generate(requests, sampling)
        ]
        write_ledger(self.path, groups, fates=["train"] * len(groups), meta={})
        return self.path
