"""Tables as plain aligned text, which looks the same in a terminal, a log and a pipe."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as text, the first column aligned left and the others right.

    >>> print(aligned([("", "n"), ("all", "12"), ("some", "3")]))
           n
    all   12
    some   3
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))]
        ).rstrip()
        for first, *rest in rows
    )
