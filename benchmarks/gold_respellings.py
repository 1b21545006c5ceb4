"""Whether golds verify against their other spellings.

    python benchmarks/gold_respellings.py FILE [FILE …] [--modes strict simplerl]

For each FILE of questions (as for ``eval --benchmarks``), each mode and each kind of spelling: how many golds have such a
spelling, and how many of these are not judged correct. Then all exceptions by name. Kinds: the gold itself, other spaces,
fractions as \\dfrac or with a slash, brackets with \\left and \\right, \\text, the exact decimal or fraction, powers of ten.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.gold_check import grade_spellings, spellings_of
from nft_megatron.data.questions import HELD_OUT_SPLIT, load_questions
from nft_megatron.verify.service import Verifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--modes", nargs="+", default=["strict", "simplerl"])
    options = parser.parse_args()
    names: dict[str, list[str]] = {}
    for path in options.files:
        for question in load_questions([path], "FILE", HELD_OUT_SPLIT):
            names.setdefault(question.gold, []).append(question.question_id)
    spellings = [spelling for gold in names for spelling in spellings_of(gold)]
    for mode in options.modes:
        settings = VerifyConfig.model_validate({"mode": mode, "soft_seconds": 20.0, "hard_seconds": 600.0})
        with Verifier(settings) as verifier:
            verdicts = list(grade_spellings(spellings, verifier))
        missed = [pair for pair in zip(spellings, verdicts, strict=True) if pair[1].label != "correct"]
        counts = Counter(spelling.kind for spelling in spellings for _ in names[spelling.gold])
        wrong = Counter(spelling.kind for spelling, _ in missed for _ in names[spelling.gold])
        print(f"{mode}: {counts['']:,} golds; spellings by kind, and how many of them are not judged correct")
        for kind, count in counts.items():
            print(f"  {kind or 'itself':10} {count:6,} {wrong[kind]:6,}")
        for spelling, verdict in missed:
            where = f"{', '.join(names[spelling.gold])}, {spelling.kind or 'itself'}"
            print(f"  {where}: {spelling.text} for {spelling.gold}: {verdict.reason}", flush=True)


if __name__ == "__main__":
    main()
