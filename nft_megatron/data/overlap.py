"""Which evaluation questions are in the training data: the share of a question's word 13-grams found in one training question.

A text's words are its runs of the letters a to z and its runs of digits, in lower case; everything else (spaces, LaTeX's
backslashes and brackets, operators, other scripts) only separates them, so that two typesettings of one problem match. The
instructions around a question are removed first: a data set's own wording would match itself everywhere. A question with
fewer than 13 words has no 13-gram; it cannot be compared and is counted separately.

Lee et al. 2021 and GPT-3 (Brown et al. 2020, appendix C) look for a single shared 13-gram; in mathematics half of them, within
one training question, tells a copied problem from a shared phrase.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Question
from nft_megatron.base.untrusted import parse_json
from nft_megatron.data.conflicts import same_gold
from nft_megatron.data.wording import bare

_WORD = re.compile(r"[a-z]+|[0-9]+")


@dataclass(frozen=True)
class Overlap:
    """An evaluation question and the training questions that hold at least the threshold share of its n-grams, most first.

    ``overlap`` is the largest share; ``same_gold`` are the ``train_ids`` whose gold is also the same.
    """

    bench_id: str
    overlap: float
    train_ids: tuple[str, ...]
    same_gold: tuple[str, ...]


def ngrams(text: str, n: int = 13) -> set[tuple[str, ...]]:
    r"""The word n-grams of a question.

    >>> sorted(ngrams(r"Find $\frac{x}{10}$", n=3))
    [('find', 'frac', 'x'), ('frac', 'x', '10')]
    """
    words = _WORD.findall(bare(text).lower())
    return set(zip(*(words[start:] for start in range(n)), strict=False))


def find_overlaps(
    train: Sequence[Question],
    evaluation: Sequence[Question],
    *,
    n: int = 13,
    threshold: float = 0.5,
    advance: Callable[[], object] = lambda: None,
) -> dict[int, Overlap]:
    """The evaluation questions with at least ``threshold`` of their n-grams in one training question, by position, in order.

    ``advance`` is called after each training question.
    """
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)  # n-gram → evaluation questions that have it
    num_grams = []
    for index, question in enumerate(evaluation):
        grams = ngrams(question.text, n)
        num_grams.append(len(grams))
        for gram in grams:
            holders[gram].append(index)
    found: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for position, question in enumerate(train):
        shared = Counter(index for gram in ngrams(question.text, n) for index in holders.get(gram, ()))
        for index, count in shared.items():
            if count >= threshold * num_grams[index]:
                found[index].append((-count / num_grams[index], position))
        advance()
    overlaps = {}
    for index in sorted(found):
        matches = [(-share, train[position]) for share, position in sorted(found[index])]
        gold = evaluation[index].gold
        overlaps[index] = Overlap(
            evaluation[index].question_id,
            matches[0][0],
            tuple(question.question_id for _, question in matches),
            tuple(question.question_id for _, question in matches if same_gold(question.gold, gold)),
        )
    return overlaps


def num_comparable(questions: Sequence[Question], n: int = 13) -> int:
    """The number of questions that have at least one n-gram."""
    return sum(bool(ngrams(question.text, n)) for question in questions)


def write_overlaps(path: Path, overlaps: Iterable[Overlap]) -> None:
    """Write one JSON object per line, with the fields of :class:`Overlap`."""
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(vars(overlap)) + "\n" for overlap in overlaps), encoding="utf-8")


def read_overlapping_ids(path: Path, field: str) -> frozenset[str]:
    """The ids of the evaluation questions in a file written by :func:`write_overlaps`."""
    try:
        return frozenset(parse_json(line)["bench_id"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            field, path, f"not a list of overlapping questions ({error})", "name a file that `nft-megatron overlap --out` wrote"
        ) from error
