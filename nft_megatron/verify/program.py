"""``verify.mode: program``: an answer is a Python program, and its gold the tests that it must pass, in a sandbox.

The program is the last fenced block of the answer. A gold is one of

    {"inputs": ["3 4\\n", …], "outputs": ["7\\n", …]}      the program is run once per input, and must print the output
    assert add(3, 4) == 7                                 Python that is run after the program, in the same process

Outputs are compared line by line, without white space at the ends of lines and of the text. The second kind stops a program
that is wrong, or that leaves early with ``sys.exit``. It cannot stop one written to deceive, since whatever runs in a process
can change what else does. Outputs never enter the sandbox.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from nft_megatron.verify.sandbox import Limits, Outcome, run

PROGRAM = "program/1"
_FENCE = "```"
_MOST_TESTS = 1000
_ALONE = """\
import os, sys
with os.fdopen(3, encoding="utf-8") as file:
    program = compile(file.read(), "program.py", "exec")
del os, file
exec(program, sys.modules["__main__"].__dict__)
"""
_THEN_ASSERTS = """\
import os, sys
scope = {"__name__": "program", "__file__": "program.py"}
try:
    exec(compile(sys.stdin.read(), "program.py", "exec"), scope)
except SystemExit as end:
    if end.code:
        raise
with os.fdopen(3, encoding="utf-8") as file:
    token, tests = file.read().split("\\n", 1)
exec(compile(tests, "tests.py", "exec"), scope)
sys.stdout.flush()
os.write(1, token.encode())
os._exit(0)
"""


def program_of(text: str) -> str | None:
    r"""The last fenced block of ``text``; None if there is none.

    >>> program_of("First\n```python\na = 1\n```\nor rather\n```python\na = 2\n```\nDone.")
    'a = 2\n'
    """
    found: str | None = None
    block: list[str] | None = None
    for line in text.split("\n"):
        rest = line.lstrip()
        if block is None:
            block = [] if rest.startswith(_FENCE) and "`" not in rest.removeprefix(_FENCE) else None
        elif rest.startswith(_FENCE):
            found, block = "".join(block), None
        else:
            block.append(f"{line}\n")
    return found


def tests_of(gold: str) -> list[tuple[str, str]] | str | None:
    """Pairs of input and output, or Python; None if ``gold`` is neither.

    >>> tests_of('{"inputs": ["1"], "outputs": ["2"]}'), tests_of("assert f(1) == 2"), tests_of("f(1) = = 2")
    ([('1', '2')], 'assert f(1) == 2', None)
    """
    if gold.lstrip().startswith("{"):
        try:
            tests: Any = json.loads(gold)
            inputs, outputs = tests["inputs"], tests["outputs"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        is_list = isinstance(inputs, list) and isinstance(outputs, list) and 0 < len(inputs) == len(outputs) <= _MOST_TESTS
        return list(zip(inputs, outputs, strict=True)) if is_list and all(map(_is_text, inputs + outputs)) else None
    try:
        parsed = compile(gold, "tests.py", "exec")
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return gold if parsed.co_names or "assert" in gold else None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def judge_program(gold: str, text: str, limits: Limits) -> tuple[str, str]:
    """Reason and detail. Raises :class:`~nft_megatron.verify.sandbox.IsolationError` if it cannot run a program."""
    tests = tests_of(gold)
    if tests is None:
        return "unreadable gold", ""
    program = program_of(text)
    if program is None:
        return "no answer found", ""
    source = program.encode("utf-8", errors="replace")
    if isinstance(tests, str):
        token = secrets.token_hex(16)
        outcome = run(_THEN_ASSERTS, source, limits, beside=f"{token}\n{tests}".encode())
        passed = outcome.status == 0 and outcome.output.endswith(token.encode())
        return ("accepted", "") if passed else _failed(outcome, "")
    for number, (given, expected) in enumerate(tests, start=1):
        outcome = run(_ALONE, given.encode("utf-8", errors="replace"), limits, beside=source)
        if outcome.status != 0 or _lines(outcome.output.decode(errors="replace")) != _lines(expected):
            return _failed(outcome, f"test {number} of {len(tests)}")
    return "accepted", ""


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _failed(outcome: Outcome, which: str) -> tuple[str, str]:
    """A program that was lost, not by its own doing, says nothing about the answer."""
    if outcome.status is None:
        return "crash", "the program was lost"
    how = "another result" if outcome.status == 0 else f"exit code {outcome.status}"
    return "tests failed", f"{which}, {how}".strip(", ")
