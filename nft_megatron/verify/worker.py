"""The program of one judge, a process that :mod:`nft_megatron.verify.service` starts, kills and replaces.

    python -m nft_megatron.verify.worker JUDGE RULES SOCKET_FD PARENT_PID SOFT_SECONDS KERNEL_SECONDS MEMORY_BYTES

It reads one JSON object per line, {"gold", "text", "question"}, and writes one, {"reason", "detail", "seconds"}. JUDGE is one
of ``JUDGES``, or the import path of a user's function, whose source must be that of RULES. The first line that it writes is {}
when it is ready, or {"problem"} if that function cannot be loaded.

The judge runs in the main thread with math-verify's own alarms off: those count whole seconds of wall-clock time and restart
with every call, whereas here one timer covers the comparison. It counts the worker's own processor time, so that a busy machine
delays a verdict but does not change it. Where Python cannot interrupt itself (a power of huge integers), the kernel ends the
process after KERNEL_SECONDS of processor time, even if nobody is left to kill it; and it dies with its parent.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any

from nft_megatron.base.errors import UserError
from nft_megatron.base.imported import import_object, is_import_path, source_hash
from nft_megatron.verify.program import judge_program
from nft_megatron.verify.sandbox import Limits, probe

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The first task of a kind costs up to a third of a second in imports and parser tables: paid before any task arrives.
_FIRST_TASKS = (
    (r"\frac{\sqrt{2}}{2}", r"\frac{\sqrt{3}}{2}"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"(3,\frac{\pi}{2})", r"(\frac{\pi}{2},3)"),
    (r"\{1,2\}", "2, 1"),
    ("y=2x", "2x-y=0"),
    ("[0,1)", r"x \ge 0"),
)


class SoftLimit(BaseException):
    """The comparison used up the soft limit. Not an ``Exception``: math-verify catches all of those."""


Judge = Callable[[str, str, str], tuple[str, str]]
"""Gold, text and question in, reason and detail out."""


def judge_math_verify(gold: str, text: str, question: str = "") -> tuple[str, str]:
    """Reason and detail, compared as the authors' code does for questions in the style of MATH, but with three labels.

    The gold is read as LaTeX in a box, the text as an expression or LaTeX. A gold that math-verify cannot read, or
    anything that makes it crash, is unknown, never wrong.
    """
    from math_verify.grader import verify

    return _compare(gold, text, lambda expected, given: verify(expected, given, timeout_seconds=None, raise_on_error=True))


def judge_strict(gold: str, text: str, question: str = "") -> tuple[str, str]:
    """Like :func:`judge_math_verify` on a box alone, but equations are compared as such, and equality is confirmed."""
    from math_verify.grader import verify

    from nft_megatron.verify.algebra import are_equal_complex, are_equal_factorials, compare_equations, is_confirmed

    def are_equal(expected: Any, given: Any) -> bool:
        if verify(expected, given, timeout_seconds=None, raise_on_error=True):
            return is_confirmed(expected, given)
        return are_equal_complex(expected, given) or are_equal_factorials(expected, given)

    if (same := compare_equations(gold, text)) is not None:
        return ("equal" if same else "not equal"), ""
    return _compare(gold, text, are_equal)


def _compare(gold: str, text: str, are_equal: Callable[[Any, Any], bool]) -> tuple[str, str]:
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig, parse

    golds = _read_gold(gold)
    if not golds:
        return "unreadable gold", ""
    answers = parse(text, (ExprExtractionConfig(), LatexExtractionConfig()), parsing_timeout=None, raise_on_error=True)
    if not answers:
        return "no answer found", ""
    error = ""
    for expected, given in itertools.product(golds, answers):
        try:
            if are_equal(expected, given):
                return "equal", ""
        except Exception as raised:  # another pair may still be equal
            error = type(raised).__name__
    return ("crash", error) if error else ("not equal", "")


@functools.lru_cache(256)  # the answers to a question arrive one after another
def _read_gold(gold: str) -> list[Any]:
    from math_verify.parser import LatexExtractionConfig, parse

    return parse(rf"\boxed{{{gold}}}", (LatexExtractionConfig(),), parsing_timeout=None, raise_on_error=True)


def judge_simplerl(gold: str, text: str, question: str = "") -> tuple[str, str]:
    """Reason and detail from :func:`nft_megatron.verify.simplerl.grade`."""
    from nft_megatron.verify.simplerl import grade

    return grade(text, gold).reason, ""


JUDGES: dict[str, Judge] = {
    "strict": judge_strict,
    "math-verify": judge_math_verify,
    "simplerl": judge_simplerl,
}


_OF_LABEL = {"correct": "accepted", "wrong": "rejected", "unknown": "undecided"}
_MOST_SHOWN = 200


def judge_of(path: str, rules: str) -> Judge:
    """The judge that calls the user's function at ``path`` as ``function(answer, gold, question)``.

    The function returns "correct", "wrong" or "unknown", or True, False or None for these. Anything else is *no verdict*, an
    exception a *crash*.

    Raises:
        UserError: the function cannot be loaded, or its source is no longer that of ``rules``.
    """
    if (now := f"{path}/{source_hash(path, 'verify.mode')}") != rules:
        raise UserError("verify.mode", path, f"its source has changed while it was in use: {rules} is now {now}", "start again")
    function = import_object(path, "verify.mode")
    if not callable(function):
        raise UserError("verify.mode", path, f"is no function but {type(function).__name__}", "name a function")

    def judge(gold: str, text: str, question: str) -> tuple[str, str]:
        try:
            return reason_of_label(function(text, gold, question))
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            return "crash", type(error).__name__ if isinstance(error, MemoryError) else _shown(error)

    return judge


def reason_of_label(label: object) -> tuple[str, str]:
    """Reason and detail for what a user's verifier returned.

    >>> reason_of_label("wrong"), reason_of_label(True), reason_of_label(None), reason_of_label(0.7)
    (('rejected', ''), ('accepted', ''), ('undecided', ''), ('no verdict', '0.7'))
    """
    if isinstance(label, bool) or label is None:
        return {True: "accepted", False: "rejected", None: "undecided"}[label], ""
    if isinstance(label, str) and label in _OF_LABEL:
        return _OF_LABEL[label], ""
    return "no verdict", repr(label)[:_MOST_SHOWN]


def _shown(error: BaseException) -> str:
    try:
        text = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:  # its own __str__
        text = type(error).__name__
    return text[:_MOST_SHOWN]


@contextmanager
def limits(soft_seconds: float, kernel_seconds: float) -> Iterator[None]:
    """Raise :class:`SoftLimit` after ``soft_seconds`` of processor time in the body; die after ``kernel_seconds`` of it."""

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise SoftLimit

    signal.signal(signal.SIGVTALRM, give_up)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        signal.setitimer(signal.ITIMER_PROF, kernel_seconds)
        signal.setitimer(signal.ITIMER_VIRTUAL, soft_seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _die_with_parent(parent: int) -> None:
    # Ctrl-C and the scheduler's signals reach every process of a job; the parent decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)


def main(arguments: Sequence[str]) -> None:
    """Serve until the socket closes or memory runs out."""
    name, rules, descriptor, parent, soft_seconds, kernel_seconds, memory_bytes = arguments
    _die_with_parent(int(parent))
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    logging.disable(logging.CRITICAL)
    with socket.socket(fileno=int(descriptor)) as connection, connection.makefile("rw", encoding="utf-8") as stream:
        try:
            judge = _prepared(name, rules, Limits(float(soft_seconds), int(memory_bytes)))
        except UserError as error:
            _write(stream, {"problem": [error.field, str(error.value), error.problem, error.remedy]})
            return
        _write(stream, {})
        me = os.getpid()
        for line in stream:
            task = json.loads(line)
            started = time.perf_counter()
            try:
                with limits(float(soft_seconds), float(kernel_seconds)):
                    reason, detail = judge(task["gold"], task["text"], task["question"])
            except SoftLimit:
                reason, detail = "soft limit", ""
            except Exception as error:
                reason, detail = "crash", type(error).__name__
            if os.getpid() != me:  # a user's function has forked, and this is the child: it may not answer too
                os._exit(1)
            _write(stream, {"reason": reason, "detail": detail, "seconds": time.perf_counter() - started})
            if detail == MemoryError.__name__:
                return


def _prepared(name: str, rules: str, limits_of_programs: Limits) -> Judge:
    """The judge, its imports done."""
    if is_import_path(name):
        return judge_of(name, rules)
    if name == "program":
        try:
            probe(limits_of_programs)
        except OSError as error:
            remedy = "allow user namespaces, or grade with a service elsewhere (verify.url)"
            raise UserError("verify.mode", name, f"programs cannot be isolated here: {error}", remedy) from error
        return lambda gold, text, question: judge_program(gold, text, limits_of_programs)
    judge = JUDGES[name]
    for gold, answer in _FIRST_TASKS:
        judge(gold, rf"\boxed{{{answer}}}", "")
    return judge


def _write(stream: IO[str], message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
