r"""Which answers each mode of the verifier judges wrongly, by kind, beside plain math-verify and the published toolkit.

    python benchmarks/verdict_kinds.py [--toolkit FOLDER [FOLDER …]] [--mistakes GRADER]

The answers are the project's own (tests/own_answers.py, tests/strict_answers.py), each with a verdict that mathematics or
docs/verification.md decides. A cell has right answers missed / wrong answers accepted, and unknown verdicts if there are any.

* plain math-verify: ``verify(parse(gold), parse(answer))``, with its own limits.
* published toolkit: the grader of simpleRL (github.com/hkust-nlp/simpleRL-reason, examples/simplelr_math_eval): its grader.py
  and parser.py in the first FOLDER; further ones have packages that it needs, for instance antlr4 4.11. Without --toolkit this
  column is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify.modes import MODES
from nft_megatron.verify.service import Verifier

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from own_answers import CASES, INTEGER, LONG, Case
from strict_answers import ADVERSARIAL, REPORTED, STRICT

# Kinds of GENERAL in own_answers, and where they belong.
_KINDS = {
    "fraction": "fractions and decimals",
    "negative fraction": "fractions and decimals",
    "decimal": "fractions and decimals",
    "surd": "roots",
    "sum of surds": "roots",
    "complex": "complex numbers",
    "line": "equations",
    "inequality": "intervals",
    "half-open interval": "intervals",
    "unbounded interval": "intervals",
    "union": "intervals",
    "set": "listings",
    "list": "listings",
    "point": "listings",
    "polar point": "listings",
    "matrix": "matrices",
    "vector": "matrices",
    "word": "words",
    "choice": "words",
    "length": "units",
    "angle": "units",
    "percentage": "units",
    "money": "units",
    "arithmetic for an integer": "exact numbers",
    "power": "exact numbers",
    "thinking": "boxes",
}
# The published toolkit reads one JSON pair a line and answers with true, false or null (too slow), as evaluate.py would.
_TOOLKIT = """
import json, os, signal, sys, types
sys.modules["utils"] = types.ModuleType("utils")
sys.set_int_max_str_digits(0)
from grader import math_equal
from parser import extract_answer, strip_string
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # it prints
class TooSlow(BaseException): pass
def stop(*_): raise TooSlow
signal.signal(signal.SIGALRM, stop)
for line in sys.stdin:
    text, gold = json.loads(line)
    signal.alarm(3)
    try:
        same = bool(math_equal(extract_answer(text, "math"), strip_string(gold)))
    except TooSlow:
        same = False
    except Exception:
        same = False
    signal.alarm(0)
    print(json.dumps(same), file=out, flush=True)
"""


def kind_of(case: Case) -> str:
    if case in INTEGER:
        return "integers"
    if case in LONG:
        return "long texts"
    return _KINDS.get(case.kind, case.kind if case.kind in {other.kind for other in STRICT + REPORTED} else "expressions")


def by_mode(mode: str) -> Callable[[Sequence[Case]], list[str]]:
    def labels(cases: Sequence[Case]) -> list[str]:
        settings = VerifyConfig.model_validate({"mode": mode, "soft_seconds": 10.0, "hard_seconds": 120.0})
        with Verifier(settings) as verifier:
            return [verdict.label for verdict in verifier.verify_many((case.text, case.gold, "stop") for case in cases)]

    return labels


def by_plain_math_verify(cases: Sequence[Case]) -> list[str]:
    from math_verify import parse, verify

    return ["correct" if verify(parse(f"${case.gold}$"), parse(case.text)) else "wrong" for case in cases]


def by_toolkit(folders: Sequence[str]) -> Callable[[Sequence[Case]], list[str]]:
    def labels(cases: Sequence[Case]) -> list[str]:
        path = os.pathsep.join([*folders[1:], folders[0]])
        lines = "".join(json.dumps([case.text, case.gold]) + "\n" for case in cases)
        outcome = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _TOOLKIT],
            input=lines,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
        same = [json.loads(line) for line in outcome.stdout.splitlines()]
        if len(same) != len(cases):
            sys.exit(f"the toolkit judged {len(same)} of {len(cases)} answers: {outcome.stderr[-2000:]}")
        return ["correct" if value else "wrong" for value in same]

    return labels


def cell(cases: Sequence[Case], labels: Sequence[str]) -> str:
    """Missed / accepted, and unknown ones.

    >>> cell([Case("", "", "", True), Case("", "", "", False), Case("", "", "", False)], ["wrong", "wrong", "correct"])
    '1 / 1'
    """
    missed = sum(case.is_right and label == "wrong" for case, label in zip(cases, labels, strict=True))
    accepted = sum(not case.is_right and label == "correct" for case, label in zip(cases, labels, strict=True))
    unknown = sum(label == "unknown" for label in labels)
    text = f"{missed} / {accepted}" if missed or accepted else "0"
    return f"{text}, {unknown} unknown" if unknown else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toolkit", nargs="+", metavar="FOLDER", help="the published grader, and packages that it needs")
    parser.add_argument(
        "--mistakes", metavar="GRADER", help="list what this grader judges wrongly instead, by its column's name"
    )
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    modes = [mode for mode in MODES if mode != "published-answer"]  # the answers are in boxes
    graders: dict[str, Callable[[Sequence[Case]], list[str]]] = {mode: by_mode(mode) for mode in modes}
    graders["plain math-verify"] = by_plain_math_verify
    if options.toolkit:
        graders["published toolkit"] = by_toolkit(options.toolkit)
    cases = [*CASES, *STRICT, *REPORTED, *ADVERSARIAL]
    if options.mistakes:
        for case, label in zip(cases, graders[options.mistakes](cases), strict=True):
            if label != ("correct" if case.is_right else "wrong"):
                print(f"{label} ({kind_of(case)}): gold {case.gold!r}, answer {case.text[-200:]!r}")
        return
    labels = {name: grade(cases) for name, grade in graders.items()}
    kinds = Counter(map(kind_of, cases))
    print(f"| kind | answers | {' | '.join(labels)} |\n|---|---|{'---|' * len(labels)}")
    for kind in [*sorted(kinds), ""]:
        chosen = [index for index, case in enumerate(cases) if kind in ("", kind_of(case))]
        cells = [cell([cases[index] for index in chosen], [given[index] for index in chosen]) for given in labels.values()]
        print(f"| {kind or 'all'} | {len(chosen)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
