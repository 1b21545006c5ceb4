r"""What data sets have in the gold's column, and the gold that a person reads there."""

from decimal import Decimal
from typing import Any

import pytest

from nft_megatron.data.golds import GoldError, is_whole_text, read_gold


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        ("Ann has 3+4=<<3+4=7>>7 eggs.\n#### 7", "7"),
        ("She sells 9.\n#### 1,234\n", "1,234"),
        ("First #### 1\nthen\n####72\nThe answer is: 72", "72"),
        ("Half, 5/2.  #### 2.50\n\n", "2.50"),
        ("#### Step 1\nAdd.\n#### Step 2\nThus $\\boxed{7}$.", "7"),  # headings
        ('["34"]', "34"),
        ("['1', '$2$']", "1, $2$"),
        (r'["\frac{1}{2}"]', r"\frac{1}{2}"),
        (r"['\\frac{1}{2}']", r"\frac{1}{2}"),
        (r'["90\u00b0"]', "90°"),
        ("[1, 2]", "[1, 2]"),  # an interval, or a list of numbers
        ("[a]", "[a]"),
        ([["1"], ["2"]], "1, 2"),
        (True, "True"),
        ("inf", "inf"),
        (r"So $x = 3$. The answer is $\boxed{3}$.", "3"),
        (r"We get $\boxed{\frac{1}{2}}$ and thus \boxed{\frac{\pi}{2}}", r"\frac{\pi}{2}"),
        (r"Either \boxed{2} or \boxed{3}.", "2, 3"),
        (r"\boxed{1} sheet of paper and $\boxed{2}$ bins", "1, 2"),
        (r"\boxed{1} bin, \boxed{2} pens, and \boxed{3} cups.", "1, 2, 3"),
        (r"First \boxed{1} = 1, \boxed{2}", "2"),
        (r"x \in \boxed{\{-1\} \cup [0,7)}.", r"\{-1\} \cup [0,7)"),
        (r"\boxed{5}", "5"),
        (1e-07, "0.0000001"),
        (1.5e300, "15" + "0" * 299),
        (27.0, "27"),
        (-0.0, "0"),
        (-2.50, "-2.5"),
        (Decimal("1.20"), "1.20"),
        (Decimal("3.00"), "3"),
        (72, "72"),
        (["$1$", 2.0], "$1$, 2"),
        ("1e-07", "1e-07"),
        ("none", "none"),
        ("  x  \n", "x"),
        (None, ""),
        ("", ""),
        ([], ""),
    ],
)
def test_golds(value: Any, gold: str) -> None:
    assert read_gold(value) == gold


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (float("nan"), "not a number"),
        (float("-inf"), "infinite"),
        ("nan", "written as the text 'nan'"),
        ("<NA>", "missing value"),
        ("#N/A", "missing value"),
        ("[]", "missing value"),
        ("['1', '']", "empty text in its list"),
        ([["1"], [None]], "null in its list"),
        ("Add.\n####\nThe answer is: 5", "no answer after"),
        (r"Thus \boxed{3", "box that is not closed"),
        (["1", None], "null in its list"),
        (["1", " "], "empty text in its list"),
        (["1", float("nan")], "not a number"),
        ({"value": "1"}, "neither text nor a number but dict"),
        ("Add them.\n####", "no answer after"),
        (r"Thus \boxed{ }.", "empty box"),
    ],
)
def test_what_is_no_gold(value: Any, problem: str) -> None:
    with pytest.raises(GoldError, match=problem):
        read_gold(value)


def test_whole_texts() -> None:
    assert is_whole_text("We add 3 and 4.\nThis is 7.") == "several lines"
    assert is_whole_text("\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}") == is_whole_text("$$\n7\n$$") == is_whole_text("7") == ""
    prose = "We first add the two numbers that Ann has got and then take away those which she gave to Ben so it is"
    assert is_whole_text(f"{prose} 7") == "a whole text"
    assert is_whole_text(r"\text{the set of all primes that are congruent to one modulo four}") == ""
