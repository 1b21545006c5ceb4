r"""Word questions of arithmetic with small whole numbers, and the worked examples that every prompt begins with.

A question is a *story* with two or three numbers, hence one or two operations. Stories to train on and held-out stories are
different ones, and no held-out question shares its operations and numbers with one to train on, so a higher accuracy is neither
a story nor a result learnt by heart.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Story:
    """``text`` has a place for every number, a to c; ``operations`` are applied from left to right.

    >>> Story("{a} pens and {b} more, minus {c}?", "+-").results((5, 4, 2))
    [9, 7]
    """

    text: str
    operations: str

    def results(self, numbers: tuple[int, ...]) -> list[int]:
        """The result after each operation; the last one is the gold answer."""
        found = [numbers[0]]
        for operation, number in zip(self.operations, numbers[1:], strict=True):
            found.append(_apply(operation, found[-1], number))
        return found[1:]


def _apply(operation: str, left: int, right: int) -> int:
    return left * right if operation == "*" else left + right if operation == "+" else left - right


TRAIN = (
    Story("Tom has {a} apples and buys {b} more. How many apples does he have?", "+"),
    Story("There are {a} birds on a roof. {b} of them fly away. How many birds are left?", "-"),
    Story("Ann fills {a} boxes with {b} pens each. How many pens are in the boxes?", "*"),
    Story("Sam is {a} years old. His sister is {b} years older. How old is she?", "+"),
    Story("Ben had {a} coins and spent {b} of them. How many coins does he have?", "-"),
    Story("Kim reads {a} pages a day. How many pages does she read in {b} days?", "*"),
    Story("Tim has {a} cards. He wins {b} and then loses {c}. How many cards does he have?", "+-"),
    Story("A bus carries {a} people. {b} get off and {c} get on. How many people are on the bus?", "-+"),
    Story("A shop has {a} shelves with {b} toys each, and {c} more toys. How many toys is that?", "*+"),
    Story("Lea scores {a} points, then {b} points, then {c} points. How many points does she have?", "++"),
)
HELD_OUT = (
    Story("Lena has {a} shells. She picks up {b} more. How many shells does she have?", "+"),
    Story("A farmer has {a} cows. {b} of them are sold. How many cows are left?", "-"),
    Story("A room has {a} rows of {b} chairs. How many chairs are there?", "*"),
    Story("Nina has {a} stamps. She gets {b} and gives away {c}. How many stamps does she have?", "+-"),
    Story("A baker makes {a} trays of {b} rolls, and {c} more rolls. How many rolls are there?", "*+"),
)


@dataclass(frozen=True)
class Question:
    """A story with its numbers."""

    story: Story
    numbers: tuple[int, ...]

    @property
    def text(self) -> str:
        """What is asked."""
        return self.story.text.format(**dict(zip("abc", self.numbers, strict=False)))

    @property
    def sum(self) -> tuple[str, tuple[int, ...]]:
        """What has to be computed, whatever the story."""
        return self.story.operations, self.numbers

    @property
    def result(self) -> int:
        """The gold answer."""
        return self.story.results(self.numbers)[-1]


def worked_answer(question: Question) -> str:
    r"""One operation per line, then the result in a box.

    >>> worked_answer(Question(TRAIN[6], (5, 4, 2))).split("\n")
    ['5 + 4 = 9', '9 - 2 = 7', '\\boxed{7}']
    """
    lefts = [question.numbers[0], *question.story.results(question.numbers)]
    steps = zip(lefts, question.story.operations, question.numbers[1:], lefts[1:], strict=False)
    lines = [f"{left} {operation} {right} = {result}" for left, operation, right, result in steps]
    return "\n".join([*lines, f"\\boxed{{{lefts[-1]}}}"])


EXAMPLES = (
    Question(Story("Joe has {a} books and sells {b} of them. How many books are left?", "-"), (9, 6)),
    Question(Story("Mia buys {a} bags of {b} sweets and gets {c} for free. How many sweets is that?", "*+"), (2, 4, 5)),
)
"""Shown before every question, with their worked answers."""


def messages(question: Question) -> list[dict[str, str]]:
    """The chat: the examples with their answers, then ``question``."""
    shown = [
        {"role": role, "content": content}
        for example in EXAMPLES
        for role, content in (("user", example.text), ("assistant", worked_answer(example)))
    ]
    return [*shown, {"role": "user", "content": question.text}]


def draw_distinct(
    rng: random.Random, count: int, stories: tuple[Story, ...], avoid: Collection[Question] = ()
) -> list[Question]:
    """``count`` different questions about ``stories``, equally many of each; none asks for a sum that one in ``avoid`` does."""
    taken = {question.sum for question in avoid} | {example.sum for example in EXAMPLES}
    drawn: dict[Question, None] = {}
    for _ in range(1000 * count):
        if len(drawn) == count:
            return list(drawn)
        story = stories[len(drawn) % len(stories)]
        question = Question(story, (rng.randint(2, 20), *(rng.randint(2, 9) for _ in story.operations)))
        if question.sum not in taken and all(0 <= result < 100 for result in story.results(question.numbers)):
            drawn[question] = None
    raise ValueError(f"there are fewer than {count} questions of small numbers about {len(stories)} stories")
