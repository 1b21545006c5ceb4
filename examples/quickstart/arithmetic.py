r"""The toy task: small sums such as ``7*8-9+6``, worked out line by line and answered in ``\boxed{}``.

A *careless* answer stops after two operations: right for three numbers, wrong for more. The cold start shows the model mostly
careless ones, so that its greedy answer is right on less than half of the questions and the better habit is within reach.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

NUM_NUMBERS = (3, 3, 3, 4, 4, 4, 5, 5)  # the number of numbers in a question is sampled from here
CARELESS_OPERATIONS = 2


@dataclass(frozen=True)
class Sum:
    """Numbers from 2 to 9 and the operations between them; only the first may be a product, so left to right is right.

    >>> Sum((7, 8, 9, 6), "*-+").expression
    '7*8-9+6'
    >>> Sum((7, 8, 9, 6), "*-+").values
    (7, 56, 47, 53)
    """

    numbers: tuple[int, ...]
    operations: str

    @property
    def expression(self) -> str:
        """As it is written in the question."""
        return str(self.numbers[0]) + "".join(f"{o}{n}" for o, n in zip(self.operations, self.numbers[1:], strict=True))

    @property
    def values(self) -> tuple[int, ...]:
        """The first number, then the result after each operation."""
        values = [self.numbers[0]]
        for operation, number in zip(self.operations, self.numbers[1:], strict=True):
            values.append(_apply(operation, values[-1], number))
        return tuple(values)

    @property
    def result(self) -> int:
        """The gold answer."""
        return self.values[-1]


def _apply(operation: str, left: int, right: int) -> int:
    return left * right if operation == "*" else left + right if operation == "+" else left - right


def question_text(task: Sum) -> str:
    """What the user asks."""
    return f"Compute {task.expression}. Use \\boxed{{}}."


def answer_text(task: Sum, careless: bool = False) -> str:
    r"""One operation per line, then the last result in a box. ``careless`` stops after two operations.

    >>> answer_text(Sum((7, 8, 9, 6), "*-+")).split("\n")
    ['7*8=56', '56-9=47', '47+6=53', '\\boxed{53}']
    >>> answer_text(Sum((7, 8, 9, 6), "*-+"), careless=True).split("\n")
    ['7*8=56', '56-9=47', '\\boxed{47}']
    """
    values = task.values
    num_lines = CARELESS_OPERATIONS if careless else len(task.operations)
    lines = [f"{values[i]}{task.operations[i]}{task.numbers[i + 1]}={values[i + 1]}" for i in range(num_lines)]
    return "\n".join([*lines, f"\\boxed{{{values[num_lines]}}}"])


def draw_sum(rng: random.Random) -> Sum:
    """Three to five numbers, every intermediate result between 0 and 99."""
    count = rng.choice(NUM_NUMBERS)
    while True:
        first = rng.choice("**+-")
        rest = "".join(rng.choice("+-") for _ in range(count - 2))
        task = Sum(tuple(rng.randint(2, 9) for _ in range(count)), first + rest)
        if all(0 <= value <= 99 for value in task.values):
            return task


def draw_distinct(rng: random.Random, count: int, avoid: Collection[Sum] = ()) -> list[Sum]:
    """``count`` different sums, none of them in ``avoid``."""
    avoided = set(avoid)
    drawn: dict[Sum, None] = {}
    while len(drawn) < count:
        task = draw_sum(rng)
        if task not in avoided:
            drawn[task] = None
    return list(drawn)
