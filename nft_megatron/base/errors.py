"""The ways a run can end early, each with its exit code.

Everything a user can cause is a ``UserError``: the command prints its one message, without a traceback, and exits with 2.
``StoppedEarly`` means that all finished work is saved and the same command resumes from it: exit code 75.
A hung rank is ended by its watchdog with 70. Any other exception is a fault of the program or the machine and keeps its
traceback.
"""

from __future__ import annotations

_MOST_SHOWN = 1000
EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_STALLED = 70
EXIT_STOPPED_EARLY = 75


class UserError(ValueError):
    """The user's input is wrong: a config, a file, a checkpoint.

    The message names the field, the value and the remedy.

    >>> str(UserError("data.train", "questions.parquet", "no such file", "check the path, or run `make quickstart`"))
    'data.train = questions.parquet: no such file; check the path, or run `make quickstart`'
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(_one_line(f"{field} = {_shown(value)}: {problem}; {remedy}"))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:
        # Ranks exchange their errors: pickle would call the class with only the message.
        return type(self), (self.field, self.value, self.problem, self.remedy)


def _shown(value: object) -> str:
    try:
        text = str(value)
    except (RecursionError, ValueError):  # nested too deeply; a number of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _one_line(text: str) -> str:
    r"""``text`` with every character escaped that a terminal would obey instead of showing.

    >>> _one_line("a\nb\x1b[31m")
    'a\\nb\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class StoppedEarly(Exception):
    """The run stopped before its last step with everything saved; the same command resumes it."""

    exit_code = EXIT_STOPPED_EARLY
