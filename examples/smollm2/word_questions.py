r"""Word questions of arithmetic with whole numbers, and the worked examples that every prompt begins with.

A question is a *story* with numbers: three numbers, two operations. Stories to train on and held-out stories are different
ones, and no held-out question shares its operations and numbers with one to train on, so a higher accuracy is neither a story
nor a result learnt by heart.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Story:
    """``text`` has places for a, b and c; the answer is (a ``first`` b) ``second`` c.

    >>> Story("{a} pens and {b} more, minus {c}?", "+", "-").result((5, 4, 2))
    7
    """

    text: str
    first: str
    second: str

    def steps(self, numbers: tuple[int, int, int]) -> tuple[int, int]:
        """Both results."""
        a, b, c = numbers
        between = _apply(self.first, a, b)
        return between, _apply(self.second, between, c)

    def result(self, numbers: tuple[int, int, int]) -> int:
        """The gold answer."""
        return self.steps(numbers)[1]


def _apply(operation: str, left: int, right: int) -> int:
    return left * right if operation == "*" else left + right if operation == "+" else left - right


TRAIN = (
    Story("Tom has {a} apples. He buys {b} more and then eats {c}. How many apples does he have now?", "+", "-"),
    Story("There are {a} birds on a roof. {b} fly away and {c} come. How many birds are on the roof?", "-", "+"),
    Story("Ann fills {a} boxes with {b} pens each and finds {c} more pens. How many pens does she have?", "*", "+"),
    Story("A shop has {a} shelves with {b} toys each. It sells {c} toys. How many toys are left?", "*", "-"),
    Story("Sam scores {a} points, then {b} points, then {c} points. How many points does he have?", "+", "+"),
    Story("A bus carries {a} people. {b} get off, and then {c} get off. How many people are on the bus?", "-", "-"),
    Story("Kim reads {a} pages a day for {b} days and {c} pages on Sunday. How many pages does she read?", "*", "+"),
    Story("Ben saves {a} coins, spends {b} of them and finds {c}. How many coins does he have?", "-", "+"),
)
HELD_OUT = (
    Story("Lena has {a} shells. She picks up {b} more and gives {c} to a friend. How many shells are left?", "+", "-"),
    Story("A farmer has {a} cows. {b} are sold and {c} calves are born. How many animals are there?", "-", "+"),
    Story("A room has {a} rows of {b} chairs and {c} more chairs at the wall. How many chairs are there?", "*", "+"),
    Story("A baker makes {a} trays of {b} rolls and burns {c} of the rolls. How many good rolls are there?", "*", "-"),
)


@dataclass(frozen=True)
class Question:
    """A story with its numbers."""

    story: Story
    numbers: tuple[int, int, int]

    @property
    def text(self) -> str:
        """What is asked."""
        a, b, c = self.numbers
        return self.story.text.format(a=a, b=b, c=c)

    @property
    def sum(self) -> tuple[str, str, int, int, int]:
        """What has to be computed, whatever the story."""
        return (self.story.first, self.story.second, *self.numbers)

    @property
    def result(self) -> int:
        """The gold answer."""
        return self.story.result(self.numbers)


def worked_answer(question: Question) -> str:
    r"""One operation per line, then the result in a box.

    >>> worked_answer(Question(TRAIN[0], (5, 4, 2))).split("\n")
    ['5 + 4 = 9', '9 - 2 = 7', '\\boxed{7}']
    """
    (a, b, c), story = question.numbers, question.story
    between, result = story.steps(question.numbers)
    return f"{a} {story.first} {b} = {between}\n{between} {story.second} {c} = {result}\n\\boxed{{{result}}}"


EXAMPLES = (
    Question(Story("Joe has {a} cards. He wins {b} and loses {c}. How many cards does he have?", "+", "-"), (6, 5, 3)),
    Question(Story("Mia buys {a} bags of {b} sweets and gets {c} for free. How many sweets is that?", "*", "+"), (2, 4, 5)),
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
    while len(drawn) < count:
        question = Question(stories[len(drawn) % len(stories)], _draw_numbers(rng))
        if question.sum not in taken and min(question.story.steps(question.numbers)) >= 0:
            drawn[question] = None
    return list(drawn)


def _draw_numbers(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(2, 20), rng.randint(2, 12), rng.randint(2, 12)
