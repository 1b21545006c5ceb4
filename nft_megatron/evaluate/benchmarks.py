r"""The six benchmarks of the paper as a table, and how to find them on disk.

AIME and AMC questions are asked 32 times each in the wording of the training data, since their answers are integers like those
of DAPO-Math-17k; the other three once, as they stand (section 5.1 and appendix B.3). All are sampled with top-p 0.7, at
temperature 1.0 for the 7B model and 0.6 for the 32B model, with the context length of training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nft_megatron.base.errors import UserError

TOP_P = 0.7
_LARGE = 20e9  # parameters; between the paper's 7B and 32B


@dataclass(frozen=True)
class Benchmark:
    """``samples`` is the k of avg@k. ``training_wording``: asked like training questions, not as it stands. ``num_questions``
    is None for a file that is none of the paper's benchmarks.
    """

    name: str
    title: str
    num_questions: int | None
    samples: int
    training_wording: bool
    aliases: tuple[str, ...] = ()


BENCHMARKS = (
    Benchmark("aime24", "AIME 2024", 30, 32, True, ("aime24", "aime2024")),
    Benchmark("aime25", "AIME 2025", 30, 32, True, ("aime25", "aime2025")),
    Benchmark("amc23", "AMC 2023", 40, 32, True, ("amc23", "amc2023")),
    Benchmark("math500", "MATH500", 500, 1, False, ("math500",)),
    Benchmark("olympiadbench", "OlympiadBench", 675, 1, False, ("olympiadbench", "olympiad")),
    Benchmark("minerva_math", "Minerva Math", 272, 1, False, ("minervamath", "minerva")),
)


def temperature_for(num_parameters: int) -> float:
    """The paper's temperature for the nearer of its models: 1.0 for 7B, 0.6 for 32B.

    >>> temperature_for(7_600_000_000), temperature_for(32_800_000_000)
    (1.0, 0.6)
    """
    return 0.6 if num_parameters >= _LARGE else 1.0


def benchmark_named(path: Path) -> Benchmark | None:
    """The benchmark that a file or folder is named after.

    >>> benchmark_named(Path("data/AIME_2024.parquet")).title, benchmark_named(Path("MATH-500")).title
    ('AIME 2024', 'MATH500')
    """
    key = re.sub("[^a-z0-9]", "", (path.name if path.is_dir() else path.stem).lower())
    return next((benchmark for benchmark in BENCHMARKS if key in benchmark.aliases), None)


def find_benchmarks(paths: Sequence[Path], field: str = "--benchmarks") -> list[tuple[Benchmark, Path]]:
    """The benchmarks among ``paths`` with their files or folders: those of the table in its order, then others by name.

    A folder with files or folders named after benchmarks stands for these; anything else in it is ignored. Any other path is a
    benchmark of its own, named after the file or folder and asked as it stands.
    Raises :class:`UserError` if a path does not exist, or if two paths lead to one benchmark.
    """
    found: dict[str, tuple[Benchmark, Path]] = {}
    for path in paths:
        if not path.exists():
            raise UserError(field, path, "no such file or folder", "check the path")
        inside = sorted(path.iterdir()) if path.is_dir() and benchmark_named(path) is None else [path]
        named = [(benchmark, item) for item in inside if (benchmark := benchmark_named(item))]
        for benchmark, item in named or [(_own(path), path)]:
            if benchmark.name in found:
                other = found[benchmark.name][1]
                raise UserError(
                    field, item, f"is {benchmark.title} again, besides {other}", "name one of the two, or rename it"
                )
            found[benchmark.name] = benchmark, item
    known = [benchmark.name for benchmark in BENCHMARKS]
    return [found[name] for name in [*(name for name in known if name in found), *sorted(found.keys() - set(known))]]


def _own(path: Path) -> Benchmark:
    """A benchmark that is none of the paper's.

    >>> _own(Path("data/GSM8K (test).jsonl")).name
    'GSM8K_test'
    """
    title = path.resolve().name if path.is_dir() else path.stem
    name = re.sub(r"\W+", "_", title).strip("_") or "questions"
    return Benchmark(name, title, None, 1, False)
