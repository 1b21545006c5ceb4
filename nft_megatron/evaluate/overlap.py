"""``nft-megatron overlap``: which evaluation questions are in the training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from nft_megatron.base.errors import UserError
from nft_megatron.data.overlap import find_overlaps, num_comparable, write_overlaps
from nft_megatron.data.questions import HELD_OUT_SPLIT, load_questions
from nft_megatron.evaluate.table import aligned


def report_overlap(train: Sequence[Path], against: Sequence[Path], *, n: int, threshold: float, out: Path | None) -> None:
    """Print how many questions of each file in ``against`` are in ``train``; write them to ``out`` too.

    Each file is read by itself, as in ``eval``, so that questions without an id get the same one.
    """
    if n < 1:
        raise UserError("--n", n, "is not positive", "use 13, or another positive number")
    if not 0 < threshold <= 1:
        raise UserError("--threshold", threshold, "must be in (0, 1]", "use 0.5, or 1 for whole questions only")
    trained = load_questions(train, "TRAIN")
    evaluations = [(path, load_questions([path], "--against", HELD_OUT_SPLIT)) for path in against]
    lines: list[tuple[str, ...]] = [("", "questions", "too short", "overlapping", "same answer")]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training questions", total=len(trained))
        everything = [question for _, questions in evaluations for question in questions]
        overlaps = find_overlaps(trained, everything, n=n, threshold=threshold, advance=lambda: bar.advance(task))
    first = 0
    for path, questions in evaluations:
        found = [overlap for position, overlap in overlaps.items() if first <= position < first + len(questions)]
        too_short = len(questions) - num_comparable(questions, n)
        counts = (len(questions), too_short, len(found), sum(bool(overlap.same_gold) for overlap in found))
        lines.append((path.name, *map(str, counts)))
        first += len(questions)
    print(aligned(lines))
    print(
        f"\nOverlapping: one of the {len(trained)} training questions has at least {threshold:.0%} of the question's word "
        f"{n}-grams. Too short: fewer than {n} words, so never found."
    )
    if out is not None:
        write_overlaps(out, overlaps.values())
        print(out)
