"""Random combinations of the ways in which models write an integer: the strict route against the integer and math-verify.

NFT_MEGATRON_FUZZ sets how many forms are tried (10000 takes about a minute on an idle core).
"""

import logging
import os
import random
from collections.abc import Iterator

from nft_megatron.verify.grade import Undecided, grade
from nft_megatron.verify.worker import judge_math_verify

NUM_FORMS = int(os.environ.get("NFT_MEGATRON_FUZZ", "600"))

SPELLINGS = [
    lambda n: str(n),
    lambda n: f"{n:+d}" if n > 0 else str(n),
    lambda n: f"{n}.0",
    lambda n: f"{n}.",
    lambda n: f"{n}.000",
    lambda n: f"{n:05d}" if 0 <= n < 10000 else str(n),
    lambda n: f"{n:,}",
    lambda n: f"{n:,}".replace(",", "{,}"),
    lambda n: f"{n:,}".replace(",", r"\,"),
    lambda n: f"{n:,}".replace(",", ",\\!"),
    lambda n: f"{n:,}.00",
    lambda n: rf"\frac{{{3 * n}}}{{3}}",
    lambda n: rf"\dfrac{{{2 * n}}}{{2}}",
    lambda n: rf"-\frac{{{-n * 7}}}{{7}}" if n < 0 else rf"\tfrac{{{7 * n}}}{{7}}",
    lambda n: f"{4 * n}/4",
]
DECORATIONS = [
    "{}",
    "{}",
    " {} ",
    "${}$",
    r"\({}\)",
    r"\text{{{}}}",
    r"\mathbf{{{}}}",
    r"\textbf{{{}}}",
    "{{{}}}",
    r"\left({}\right)",
    "({})",
    r"\boxed{{{}}}",
    r"\displaystyle {}",
    "n = {}",
    "m+n={}",
    "x_1 = {}",
    "f(2) = {}",
    r"|S| = {}",
    r"\angle ABC = {}",
    r"{}^\circ",
    r"{}^{{\circ}}",
    r"{} \text{{ cm}}",
    r"{}\text{{ degrees}}",
    r"{} \mathrm{{~km/h}}",
    r"{}\text{{ ways}}",
    r"{} \mbox{{ inches}}",
]
FRAMES = [
    r"\boxed{{{}}}",
    r"So $\boxed{{{}}}$.",
    r"\[\boxed{{{}}}\]",
    r"**Answer:** \(\boxed{{{}}}\)",
    r"\boxed {{{}}}",
    r"\fbox{{{}}}",
    "Let $x=7$. Then $y^2=12$ and so\n\n\\[\n\\boxed{{{}}}\n\\]\nas claimed.",
]


def forms(count: int) -> Iterator[tuple[int, str]]:
    """An integer and an answer that states it."""
    rng = random.Random(20250518)
    for _ in range(count):
        number = rng.choice([rng.randint(-20, 20), rng.randint(0, 999), rng.randint(-(10**7), 10**7), rng.randint(0, 10**13)])
        yield number, rng.choice(FRAMES).format(rng.choice(DECORATIONS).format(rng.choice(SPELLINGS)(number)))


def label(text: str, gold: int) -> str:
    verdict = grade(text, str(gold), "stop")
    return "undecided" if isinstance(verdict, Undecided) else verdict.label


def test_integer_forms() -> None:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    num_read_by_math_verify = 0
    for number, text in forms(NUM_FORMS):
        assert label(text, number) == "correct", (number, text)
        assert label(text, number + 1) == "wrong", (number, text)
        assert label(text, -number) == ("wrong" if number else "correct"), (number, text)
        num_read_by_math_verify += judge_math_verify(str(number), text)[0] == "equal"
    assert num_read_by_math_verify > NUM_FORMS / 2, "math-verify reads most of the forms"
