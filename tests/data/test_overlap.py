"""Overlaps: of small texts by hand, of many against a search by substrings, of recorded data against another program's list."""

import json
import random
from fractions import Fraction
from pathlib import Path

import pytest
from bench_data import BENCH, bench_rows, recorded
from own_questions import DAPO_PREFIX, DAPO_SUFFIX

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Question
from nft_megatron.data.overlap import Overlap, find_overlaps, ngrams, num_comparable, read_overlapping_ids, write_overlaps
from nft_megatron.data.questions import load_questions
from nft_megatron.data.wording import worded

BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "minerva_math", "olympiadbench")


def question(name: str, text: str, gold: str = "1") -> Question:
    return Question(name, ({"role": "user", "content": text},), gold)


def words(first: int, last: int) -> str:
    """One word a number: "w0" would be two."""
    return " ".join("abcdefghijklmnopqrstuvwxyz"[i] for i in range(first, last))


def test_ngrams_ignore_typesetting_and_instructions() -> None:
    assert ngrams("Let $x_{12} = \\frac{1}{2}$.", 3) == ngrams("let \\(x_12=\\frac 1 2\\)", 3) != set()
    assert ngrams("A b c", 3) == {("a", "b", "c")}
    assert ngrams("A b", 3) == set()
    assert ngrams(worded(words(0, 14), "answer")) == ngrams(words(0, 14)) == ngrams(worded(words(0, 14), "boxed"))
    assert len(ngrams(words(0, 14))) == 2


def test_share_of_one_training_question() -> None:
    # 26 letters have 14 13-grams. The first half holds 13 words, one 13-gram; "b…z" holds 25, so 13 of the 14.
    asked = [question("whole", words(0, 26), "7"), question("short", words(0, 12))]
    train = [
        question("half", words(0, 13)),
        question("most", words(1, 26), "7.0"),
        question("all", "0 " + words(0, 26), "8"),
        question("short", words(0, 12)),
    ]
    advanced: list[int] = []
    found = find_overlaps(train, asked, advance=lambda: advanced.append(1))
    assert found == {0: Overlap("whole", 1.0, ("all", "most"), ("most",))}
    assert len(advanced) == 4
    assert find_overlaps(train, asked, threshold=1 / 14)[0].train_ids == ("all", "most", "half")
    assert find_overlaps([question("x", words(0, 20))], asked) == {0: Overlap("whole", 8 / 14, ("x",), ())}
    # Two training questions that hold a half each are no copy.
    assert find_overlaps([question("x", words(0, 18)), question("y", words(8, 26))], asked, threshold=0.6) == {}
    assert num_comparable(asked) == 1


def test_file(tmp_path: Path) -> None:
    overlaps = [Overlap("amc/3", 1.0, ("t1", "t2"), ("t2",)), Overlap("ä", 0.5, ("t1",), ())]
    write_overlaps(tmp_path / "o.jsonl", overlaps)
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert rows[0] == {"bench_id": "amc/3", "overlap": 1.0, "train_ids": ["t1", "t2"], "same_gold": ["t2"]}
    assert read_overlapping_ids(tmp_path / "o.jsonl", "--overlap") == {"amc/3", "ä"}
    for content in ("{", "[1]\n", '{"id": 1}'):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(UserError, match=r"--overlap = .*nft-megatron overlap --out"):
            read_overlapping_ids(tmp_path / "bad", "--overlap")


def typeset(rng: random.Random, text: list[str]) -> str:
    """The same words in other typography."""
    return "".join(
        rng.choice([word, word.upper(), f"${word}$", f"({word})"]) + rng.choice([" ", ", ", "\n", " -- "]) for word in text
    )


def test_spliced_questions() -> None:
    """300 training questions of pieces of 60 others, some in DAPO's wording; shares by looking for substrings."""
    rng = random.Random(20250518)
    syllables = ["ba", "de", "fi", "go", "hu", "ky", "lo", "mi"]
    vocabulary = [a + b + c for a in syllables for b in syllables for c in syllables]
    asked = [[rng.choice(vocabulary) for _ in range(rng.randint(8, 60))] for _ in range(60)]
    spliced = []
    for _ in range(300):
        pieces = [
            text[start : start + rng.randint(5, 60)] for text in rng.choices(asked, k=2) for start in [rng.randint(0, 10)]
        ]
        spliced.append([*pieces[0], rng.choice(vocabulary), *pieces[1]])
    golds = [str(rng.randint(1, 3)) for _ in range(300)]

    expected = {}
    for i, text in enumerate(asked):
        grams = [f" {' '.join(text[start : start + 13])} " for start in range(len(text) - 12)]
        found = [sum(gram in f" {' '.join(words)} " for gram in grams) for words in spliced]
        holders = sorted((j for j in range(300) if grams and found[j] * 2 >= len(grams)), key=lambda j: (-found[j], j))
        if holders:
            expected[i] = (Fraction(max(found), len(grams)), holders, [j for j in holders if golds[j] == "2"])

    frames = ["{}", DAPO_PREFIX.replace("{", "{{") + "{}" + DAPO_SUFFIX]
    train = [question(str(j), rng.choice(frames).format(typeset(rng, text)), golds[j]) for j, text in enumerate(spliced)]
    overlaps = find_overlaps(train, [question(f"e{i}", typeset(rng, text), "2.0") for i, text in enumerate(asked)])
    assert len(expected) > 40
    assert {
        i: (Fraction(overlap.overlap).limit_denominator(100), [*map(int, overlap.train_ids)], [*map(int, overlap.same_gold)])
        for i, overlap in overlaps.items()
    } == expected


@recorded("dapo_overlap.jsonl", "dapo_math_17k.jsonl", *(f"{name}.jsonl" for name in BENCHMARKS))
def test_recorded_overlaps() -> None:
    """``dapo_overlap.jsonl`` was made by another program; shares there have two decimals."""
    expected = {row["bench_id"]: row for row in bench_rows("dapo_overlap.jsonl")}
    train = load_questions([BENCH / "dapo_math_17k.jsonl"])
    asked = [question for name in BENCHMARKS for question in load_questions([BENCH / f"{name}.jsonl"])]
    found = find_overlaps(train, asked)
    assert {overlap.bench_id for overlap in found.values()} == expected.keys()
    assert len(found) == 22 + 18 + 51
    for overlap in found.values():
        row = expected[overlap.bench_id]
        assert round(overlap.overlap, 2) == row["overlap"]
        assert set(overlap.train_ids) == set(row["dapo_ids"])
        assert set(overlap.same_gold) >= set(row["same_answer"])
