r"""Golds that the verifier does not match, found before anything is graded.

A gold is tried in a box as it is, and in other spellings of the same meaning: with other spaces, ``\dfrac``, a slash, as a
fraction, a decimal or a power of ten. Where one is not matched, right answers would be graded wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import NamedTuple

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Verdict
from nft_megatron.data.golds import is_whole_text
from nft_megatron.verify.numbers import is_digits
from nft_megatron.verify.reasons import reason_of
from nft_megatron.verify.respellings import respellings
from nft_megatron.verify.service import Verifier

MAX_UNMATCHED = 0.01
"""Share of the questions whose golds may be unmatched."""
_TRIED = ("spaces", "dfrac", "slash", "fraction", "decimal", "times", "power")


class Unmatched(NamedTuple):
    """A gold's ``reason``; ``spelling`` is the one that is not matched, empty if it is the gold itself.

    >>> Unmatched("not equal", "0.5").kind, Unmatched("several lines").kind
    ('not equal, respelled', 'several lines')
    """

    reason: str
    spelling: str = ""

    @property
    def kind(self) -> str:
        """For counting."""
        return f"{self.reason}, respelled" if self.spelling else self.reason


def unmatched_golds(golds: Iterable[str], verifier: Verifier) -> dict[str, Unmatched]:
    """The ``golds`` that ``verifier`` does not match in every spelling.

    A comparison that takes too long says nothing about the gold. Plain integers are not tried: every mode reads them however
    they are spelled, and a data set has tens of thousands. Nor are tests of programs and
    what a user's verifier reads.
    """
    if verifier.is_free:
        return {}
    different = [gold for gold in dict.fromkeys(golds) if not is_digits(gold.removeprefix("-"))]
    found = {gold: Unmatched(reason) for gold in different if (reason := is_whole_text(gold))}
    spellings = [spelling for gold in different if gold not in found for spelling in spellings_of(gold, _TRIED)]
    for spelling, verdict in zip(spellings, grade_spellings(spellings, verifier), strict=True):
        reason = reason_of(verdict)
        if verdict.label == "wrong" or reason in ("unreadable gold", "crash"):
            found.setdefault(spelling.gold, Unmatched(reason, spelling.text if spelling.kind else ""))
    return found


class Spelling(NamedTuple):
    """One ``text`` for a ``gold``; ``kind`` is empty if it is the gold itself, else one of :func:`respellings`."""

    gold: str
    kind: str
    text: str


def spellings_of(gold: str, kinds: Container[str] | None = None) -> list[Spelling]:
    """The gold itself and its other spellings, all or those of ``kinds``."""
    others = respellings(gold).items()
    return [Spelling(gold, "", gold), *(Spelling(gold, kind, text) for kind, text in others if kinds is None or kind in kinds)]


def grade_spellings(spellings: Iterable[Spelling], verifier: Verifier) -> Iterator[Verdict]:
    """The verdict on each, as the content of a box."""
    return verifier.verify_many((rf"\boxed{{{spelling.text}}}", spelling.gold, "stop") for spelling in spellings)


def refuse_unmatched(
    golds: Iterable[tuple[str, str]], unmatched: Mapping[str, Unmatched], field: str, mode: str, remedy: str
) -> None:
    """Raise :class:`UserError` if more than 1 % of the questions have an ``unmatched`` gold, with counts and the first one.

    ``golds``: the gold of each question, and where it is. ``mode``: the option that names the verifier, with its value.
    """
    num_golds, concerned, first = 0, list[Unmatched](), ("", "")
    for gold, place in golds:
        num_golds += 1
        if gold in unmatched:
            first = first if concerned else (gold, place)
            concerned.append(unmatched[gold])
    if len(concerned) <= MAX_UNMATCHED * num_golds:
        return
    gold, place = first
    spelling = f" (written as {_short(unmatched[gold].spelling)!r})" if unmatched[gold].spelling else ""
    raise UserError(
        field,
        f"{len(concerned)} of {num_golds} questions",
        f"have a gold that right answers may not match under {mode} ({counts_of(concerned)}); "
        f"the first is {_short(gold)!r}{spelling} in {place}",
        remedy,
    )


def by_themselves(unmatched: Mapping[str, Unmatched]) -> dict[str, Unmatched]:
    """Those that are not matched even as they are: no answer at all is right."""
    return {gold: reason for gold, reason in unmatched.items() if not reason.spelling}


def counts_of(golds: Iterable[Unmatched]) -> str:
    """How many there are of each kind.

    >>> counts_of([Unmatched("not equal", "0.5"), Unmatched("several lines"), Unmatched("not equal", "1/2")])
    'not equal, respelled: 2, several lines: 1'
    """
    return ", ".join(f"{kind}: {count}" for kind, count in Counter(gold.kind for gold in golds).most_common())


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
