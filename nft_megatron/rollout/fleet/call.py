"""What the fleet's event loop knows of a call of ``generate`` and of a request to a server."""

from __future__ import annotations

import queue
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nft_megatron.base.records import Completion, Request, Sampling
from nft_megatron.rollout.answer_rule import AnswerRule
from nft_megatron.rollout.fleet.dispatch import SubRequest
from nft_megatron.rollout.fleet.member import Member
from nft_megatron.rollout.fleet.partial import PartialAnswer


class GenerateCall:
    """One call of ``generate``: its requests, and the queue for its answers, each with the name of its server.

    ``refused``: by which server, and why, requests have been refused so far. ``partial``: the beginnings of answers that
    continue elsewhere, by request and index.
    """

    def __init__(self, number: int, requests: Sequence[Request], sampling: Sampling, rule: AnswerRule) -> None:
        self.number, self.sampling, self.rule = number, sampling, rule
        self.refused: dict[int, tuple[str, str]] = {}
        self.requests = {request.request_id: request for request in requests}
        assert len(self.requests) == len(requests), "two requests have the same id"
        self.partial: dict[tuple[int, int], PartialAnswer] = {}
        self.answers: queue.SimpleQueue[tuple[Completion, str] | Exception] = queue.SimpleQueue()


@dataclass
class Stream:
    """A sub-request in progress, which may take ``longest`` seconds in all.

    ``left``: its unfinished answers; ``partial``: how many tokens of each its server has sent; ``pieces``: these, where they
    may continue elsewhere; ``fault``: why it was aborted; ``refusal``: why its server rejects it; ``is_cut``: it only stopped,
    and what it sent counts.
    """

    sub_request: SubRequest
    member: Member
    sent_at: float
    heard_at: float
    longest: float
    left: set[int]
    partial: Counter[int] = field(default_factory=Counter)
    pieces: defaultdict[int, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=lambda: defaultdict(list))
    fault: str = ""
    refusal: str = ""
    is_cut: bool = False
