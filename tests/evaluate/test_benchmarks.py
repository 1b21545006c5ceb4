"""Finding the benchmarks' files and reading them, in every layout that they are published in."""

import json
from pathlib import Path

import pytest
from bench_data import BENCH, recorded
from own_questions import Asked, write_benchmarks

from nft_megatron.base.errors import UserError
from nft_megatron.data.questions import HELD_OUT_SPLIT, load_questions
from nft_megatron.evaluate.benchmarks import BENCHMARKS, find_benchmarks, temperature_for


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n")
    return path


def names(paths: list[Path]) -> list[tuple[str, Path]]:
    return [(benchmark.name, path) for benchmark, path in find_benchmarks(paths)]


def test_a_folder_of_files_and_folders(tmp_path: Path) -> None:
    minerva, aime = write(tmp_path / "minerva_math.jsonl"), write(tmp_path / "AIME_2024.jsonl")
    math500 = write(tmp_path / "MATH-500" / "test.jsonl").parent
    for other in ("dapo_math_17k.jsonl", "aime.jsonl", "amc23_old.jsonl", ".gitignore"):
        write(tmp_path / other)
    assert names([tmp_path]) == [("aime24", aime), ("math500", math500), ("minerva_math", minerva)]
    assert names([math500, minerva]) == [("math500", math500), ("minerva_math", minerva)]


def test_mistakes(tmp_path: Path) -> None:
    aime = write(tmp_path / "aime24.jsonl")
    other = write(tmp_path / "other" / "aime2024.jsonl")
    with pytest.raises(UserError, match=r"--benchmarks = .*missing: no such file"):
        find_benchmarks([tmp_path / "missing"])
    with pytest.raises(UserError, match=r"AIME 2024 again, besides .*aime24\.jsonl"):
        find_benchmarks([aime, other])
    one, two = write(tmp_path / "gsm8k.jsonl"), write(tmp_path / "other" / "gsm8k.parquet")
    with pytest.raises(UserError, match=r"is gsm8k again, besides .*gsm8k\.jsonl; name one of the two, or rename it"):
        find_benchmarks([one, two])


def test_any_other_file_or_folder_that_is_named_is_a_benchmark_too(tmp_path: Path) -> None:
    gsm8k, aime = write(tmp_path / "GSM8K (test).jsonl"), write(tmp_path / "aime24.jsonl")
    folder = write(tmp_path / "my questions" / "test.jsonl").parent
    found = find_benchmarks([gsm8k, folder, aime])
    assert [(benchmark.name, path) for benchmark, path in found] == [
        ("aime24", aime),
        ("GSM8K_test", gsm8k),
        ("my_questions", folder),
    ]
    assert [(b.title, b.num_questions, b.samples, b.training_wording) for b, _ in found[1:]] == [
        ("GSM8K (test)", None, 1, False),
        ("my questions", None, 1, False),
    ]
    assert names([tmp_path]) == [("aime24", aime)], "in a folder with benchmarks, what is not named is not meant"


def test_layouts_of_the_hub(tmp_path: Path) -> None:
    """Own questions, as many as published, under the columns, file names and ids of each benchmark."""
    written = write_benchmarks(tmp_path)
    assert find_benchmarks([tmp_path]) == [(benchmark, written[benchmark.name][0]) for benchmark in BENCHMARKS]
    for benchmark in BENCHMARKS:
        path, asked = written[benchmark.name]
        loaded = load_questions([path], splits=HELD_OUT_SPLIT)
        assert [Asked(question.question_id, question.text, question.gold) for question in loaded] == asked
        assert len(loaded) == benchmark.num_questions


@recorded(*(f"{benchmark.name}.jsonl" for benchmark in BENCHMARKS))
@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_recorded_benchmarks(benchmark) -> None:
    path = BENCH / f"{benchmark.name}.jsonl"
    assert find_benchmarks([path]) == [(benchmark, path)]
    questions = load_questions([path])
    assert len(questions) == benchmark.num_questions
    if benchmark.training_wording:  # only questions with integer answers suit the training wording
        assert all(question.gold.removeprefix("-").isdecimal() for question in questions)


def test_temperatures() -> None:
    assert [temperature_for(round(size * 1e9)) for size in (0.5, 7.6, 14, 32.8, 72)] == [1.0, 1.0, 1.0, 0.6, 0.6]
