"""How the time of every regular expression, and of the graders that run in the trainer, grows over four doublings of a text.

The texts are made from each pattern's automaton (tests/regexes.py): what leads to a loop, what goes around it again and again,
and an end that does not fit. A pattern's growth is the factor per doubling of the time of what its module does with it: 2 is
linear, 4 quadratic. The structure of a pattern forbids more within a match (tests/test_regexes.py); a search may still begin at
every position. Patterns that see at most 1,000 characters (the box, the gold) may be quadratic.

    python benchmarks/regex_growth.py [--base 500] [--only verify]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nft_megatron.verify.boxes import MAX_BOX_CHARS
from nft_megatron.verify.grade import grade, grade_dapo

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from regexes import compiled_patterns, growth

DOUBLINGS = 4
_MEASURABLE = 2e-4  # seconds
_DEADLINE = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=int, default=500, help="characters of the first text (%(default)s)")
    parser.add_argument("--only", default="", help="patterns whose name begins with this")
    arguments = parser.parse_args()
    rows, worst_grade = [], (0.0, "")
    for name, pattern in compiled_patterns().items():
        if name.startswith(arguments.only):
            strings = growth(pattern.pattern, pattern.flags & ~re.UNICODE).strings
            rows.append((*measure(uses(name, pattern), strings, arguments.base), name))
            worst_grade = max(worst_grade, slowest_grade(strings))
    longest = arguments.base * 2**DOUBLINGS
    print(f"{len(rows)} patterns, texts of {arguments.base} to {longest} characters")
    print(f"{'factor per doubling':>20}{f'ms at {longest}':>14}  pattern")
    for factor, seconds, name in sorted(rows, reverse=True)[:15]:
        print(f"{factor:20.2f}{1000 * seconds:14.2f}  {name}")
    print(f"slowest of the graders at {MAX_BOX_CHARS} characters: {1000 * worst_grade[0]:.1f} ms, {worst_grade[1]!r}")


def uses(name: str, pattern: re.Pattern[str]) -> Callable[[str], object]:
    """Calls the pattern as its module does: at the beginning, or by a search. Both if that cannot be told."""
    module, _, variable = name.partition("[")[0].rpartition(".")
    source = inspect.getsource(importlib.import_module(f"nft_megatron.{module}"))
    methods = set(re.findall(rf"\b{variable}\.(\w+)\(", source)) or {"fullmatch", "search"}
    chosen = [pattern.search] if methods - {"match", "fullmatch"} else []
    chosen += [getattr(pattern, method) for method in ("match", "fullmatch") if method in methods]
    return lambda text: [call(text) for call in chosen]


def measure(use: Callable[[str], object], strings: list[tuple[str, str]], base: int) -> tuple[float, float]:
    """The largest growth per doubling over all texts that take long enough to measure, and the longest time."""
    worst_factor, worst_seconds = 1.0, 0.0
    for before, repeated in strings:
        for end in ("", "\0", "x"):
            times = []
            for doubling in range(DOUBLINGS + 1):
                text = before + repeated * (base * 2**doubling // len(repeated)) + end
                times.append(fastest(lambda text=text: use(text)))
            worst_seconds = max(worst_seconds, times[-1])
            if times[-2] > _MEASURABLE:
                long = [seconds for seconds in times if seconds > _MEASURABLE / 8]
                worst_factor = max(worst_factor, (long[-1] / long[0]) ** (1 / max(len(long) - 1, 1)))
    return worst_factor, worst_seconds


def slowest_grade(strings: list[tuple[str, str]]) -> tuple[float, str]:
    """The longest time of a grader in the trainer's process for these strings in a box, against several golds."""
    worst = (0.0, "")
    for text in texts_of(strings):
        for gold in ("34", r"\frac{1}{2}", "x+1", text):
            for judge in (grade, grade_dapo):
                seconds = fastest(
                    lambda judge=judge, text=text, gold=gold: judge(rf"\boxed{{{text}}}", gold, "stop"), repeats=1
                )
                worst = max(worst, (seconds, f"{text[:20]}… for {gold[:20]}"))
    return worst


def texts_of(strings: list[tuple[str, str]]) -> Iterator[str]:
    for before, repeated in strings:
        yield (before + repeated * (MAX_BOX_CHARS // len(repeated)))[: MAX_BOX_CHARS - len(r"\boxed{}")]


def fastest(call: Callable[[], object], repeats: int = 3) -> float:
    """Processor time. More than ``_DEADLINE`` ends the process: something explodes."""
    seconds: list[float] = []
    signal.setitimer(signal.ITIMER_VIRTUAL, _DEADLINE)
    while len(seconds) < repeats and sum(seconds) < 0.1:
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return min(seconds)


if __name__ == "__main__":
    main()
