"""Every reason for a verdict. Its share among a step's answers is a metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from nft_megatron.base.records import Label, Verdict

REASONS: dict[str, tuple[Label, str]] = {
    "exact": ("correct", "answer and gold are the same text or the same number"),
    "equal": ("correct", "computer algebra found answer and gold equal"),
    "accepted": ("correct", "the user's verifier says so"),
    "truncated": ("wrong", "cut at the length limit"),
    "no closed box": ("wrong", r"no \boxed{} that is closed"),
    "empty box": ("wrong", "the last box is empty"),
    "box too long": ("wrong", "the last box is too long to be an answer"),
    "several answers": ("wrong", "different boxes side by side when the gold is one number"),
    "another number": ("wrong", "the answer is a number other than the gold"),
    "not a number": ("wrong", "the gold is an integer, but the answer is neither a number nor arithmetic"),
    "no answer found": ("wrong", "the text has nothing that could be an answer"),
    "not equal": ("wrong", "answer and gold differ"),
    "tests failed": ("wrong", "the program does not pass its tests"),
    "rejected": ("wrong", "the user's verifier says so"),
    "engine fault": ("unknown", "the engine aborted the answer"),
    "unmatched gold": ("unknown", "the grader does not even match the gold with itself"),
    "unreadable gold": ("unknown", "the grader cannot read the gold"),
    "undecided": ("unknown", "the user's verifier says so"),
    "no verdict": ("unknown", "the user's verifier returned none of the three verdicts"),
    "no reply": ("unknown", "the service at verify.url gave no reply within verify.hard_seconds"),
    "soft limit": ("unknown", "the grader gave up after verify.soft_seconds of processor time"),
    "hard limit": ("unknown", "the grader was stuck twice, the second time alone (verify.hard_seconds)"),
    "crash": ("unknown", "the grader raised an error"),
    "worker died": ("unknown", "the grader's process died, and so did the one that took over"),
    "worker did not start": ("unknown", "no grader process was ready in time"),
    "verifier closed": ("unknown", "the run ended before the answer was judged"),
}
"""Reason → its label and its meaning."""


def verdict(reason: str, verifier: str, *, detail: str = "", seconds: float = 0.0) -> Verdict:
    """The verdict for ``reason``, one of ``REASONS``; a ``detail`` is appended to the reason.

    >>> verdict("crash", "math-verify/0.9.0", detail="ValueError")
    Verdict(label='unknown', reason='crash: ValueError', verifier='math-verify/0.9.0', seconds=0.0)
    """
    return Verdict(REASONS[reason][0], f"{reason}: {detail}" if detail else reason, verifier, seconds)


def reason_of(verdict: Verdict) -> str:
    """The reason of ``verdict`` without its detail, one of ``REASONS``."""
    return verdict.reason.partition(":")[0]


def reason_rates(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Each reason that occurs with its share of the verdicts, in the order of ``REASONS``.

    >>> reason_rates([verdict("not equal", "v"), verdict("exact", "v"), verdict("exact", "v"), verdict("exact", "v")])
    {'exact': 0.75, 'not equal': 0.25}
    """
    counts = Counter(map(reason_of, verdicts))
    return {reason: counts[reason] / counts.total() for reason in REASONS if counts[reason]}
