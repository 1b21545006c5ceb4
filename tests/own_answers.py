r"""Answers with gold answers and mathematically certain verdicts, written for this project, so that any clone can test them.

``INTEGER`` has integers in every form of answer that models give; ``GENERAL`` has gold answers of every other kind. If
math-verify on the whole text departs from strict mode, ``difference`` names the class in docs/verification.md.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Case(NamedTuple):
    kind: str
    text: str
    gold: str
    is_right: bool
    difference: str = ""


# <n> is the gold answer, <n+1> and so on are close to it, <n,> has a thousands separator.
_INTEGER_RIGHT = {
    "percent": r"\boxed{<n>\%}",
    "box": "... so the total is $<n>$.\n\n\\boxed{<n>}",
    "answer line": r"Answer: \boxed{<n>}",
    "sentence": r"Therefore $m+n = \boxed{<n>}$.",
    "period inside math": r"The answer is $\boxed{<n>}.$",
    "display": "Hence\n\\[\n\\boxed{<n>}\n\\]",
    "thinking": "<think>maybe <n+1>? no</think>\nThe final answer is \\boxed{<n>}.",
    "spaces": r"\boxed{ <n> }",
    "dollars inside": r"\boxed{$<n>$}",
    "decimal point": r"\boxed{<n>.0}",
    "fraction": r"$\boxed{\frac{<2n>}{2}}$",
    "name": r"$\boxed{n = <n>}$",
    "bold": r"\boxed{\mathbf{<n>}}",
    "text": r"\boxed{\text{<n>}}",
    "degrees": r"$\boxed{<n>^\circ}$",
    "unit": r"$\boxed{<n> \text{ cm}}$",
    "thousands": r"\boxed{<n,>}",
    "more text": "\\boxed{<n>}\n\nLet me check the arithmetic once more: everything is consistent.",
    "twice": "So \\boxed{<n>}.\n\n**Final Answer**\n\\boxed{<n>}",
    "corrected": "First I thought \\boxed{<n-1>}. But that leaves out the empty case.\n\nThe correct answer is \\boxed{<n>}",
    "fbox": r"\fbox{<n>}",
    "space before brace": r"\boxed {<n>}",
    "framebox": r"\framebox{<n>}",
    "bold label": r"\boxed{\textbf{(0<n>) }}",
    "corrected at once": r"\boxed{<n+1>}. Wrong: \boxed{<n>}",
}
_INTEGER_WRONG = {
    "another": r"\boxed{<n+1>}",
    "negative": r"\boxed{-<n>}",
    "not whole": r"\boxed{<n>.4}",
    "last counts": "\\boxed{<n>} hmm, no.\n\n\\boxed{<n+2>}",
    "list": r"\boxed{<n>, <n+1>}",
    "or": r"\boxed{<n> \text{ or } <n-1>}",
    "enumeration": r"\boxed{1,2,3,4,5,6,<n>}",
    "set": r"$\boxed{\{<n+1>,<n>\}}$",
    "interval": r"$\boxed{[<n>,<n+2>]}$",
    "inequality": r"$\boxed{n \le <n>}$",
    "not": r"$\boxed{x \neq <n>}$",
    "plus or minus": r"$\boxed{\pm <n>}$",
    "variable": r"$\boxed{n}$",
    "answers everywhere": "Answer: <n>. Answer: <n+1>. Answer: <n+2>.\n\\boxed{<n+1>}",
    "empty after nested": r"\boxed{\boxed{<n+1>}} \boxed{}",
    "two side by side": r"\boxed{<n+1>}, \boxed{<n>}",
    "two with and": r"$\boxed{<n+1>}$ and $\boxed{<n>}$",
    "empty": r"The answer is $<n>$ but \boxed{}",
    "unclosed": r"I will now write \boxed{<n>",
    "cut in an equation": r"so that $a_{k+1} = <n>$ and then we continue with",
    "cut at a number": r"We compute the terms step by step. Next, the value of $x$ is <n>",
    "one equals": r"\boxed{1 = <n>}",
    "about": r"\boxed{n \approx <n>}",
}
_MATH_VERIFY_DIFFERS = {
    **dict.fromkeys(("fbox", "framebox", "space before brace", "bold label"), "spelling"),
    "corrected at once": "nearby boxes",
    **dict.fromkeys(("empty", "cut in an equation", "cut at a number"), "no box"),
    **dict.fromkeys(("one equals", "about"), "relation"),
}
INTEGER_GOLDS = (7, 34, 204, 1000, 12345, 105717501)


def _filled(pattern: str, n: int) -> str:
    for name, value in {"n": n, "n+1": n + 1, "n+2": n + 2, "n-1": n - 1, "2n": 2 * n, "n,": f"{n:,}"}.items():
        pattern = pattern.replace(f"<{name}>", str(value))
    return pattern


INTEGER = [
    Case(kind, _filled(pattern, n), str(n), is_right, _MATH_VERIFY_DIFFERS.get(kind, ""))
    for patterns, is_right in ((_INTEGER_RIGHT, True), (_INTEGER_WRONG, False))
    for kind, pattern in patterns.items()
    for n in INTEGER_GOLDS
] + [
    Case("thousands apart", rf"\boxed{{{n:,}}}".replace(",", space), str(n), True, "spelling")
    for space in (" ", r"\,")
    for n in (1000, 12345, 105717501)
]

# kind: gold answer, what equals it, what does not
GENERAL_GOLDS = [
    ("fraction", r"\frac{3}{4}", [r"\frac34", r"\dfrac{3}{4}", "3/4", r"\frac{6}{8}", "0.75"], [r"\frac{4}{3}", "0.74", "3"]),
    ("negative fraction", r"-\frac{5}{6}", [r"\frac{-5}{6}", r"-\dfrac{5}{6}", "-5/6"], [r"\frac{5}{6}", r"-\frac{6}{5}"]),
    ("decimal", "2.5", ["2.50", r"\frac{5}{2}", "+2.5"], ["2.6", "25", r"\frac{2}{5}"]),
    ("surd", r"2\sqrt{3}", [r"2\sqrt3", r"\sqrt{12}", r"\frac{6}{\sqrt{3}}"], [r"3\sqrt{2}", r"\sqrt{13}", "3.46"]),
    ("sum of surds", r"1+\sqrt{2}", [r"\sqrt{2}+1", r"\frac{1}{\sqrt{2}-1}"], [r"1-\sqrt{2}", r"1+\sqrt{3}", r"\sqrt{3}"]),
    ("pi", r"\frac{\pi}{6}", [r"\dfrac{\pi}{6}", r"\frac{1}{6}\pi"], [r"\frac{\pi}{3}", r"\frac{6}{\pi}", "30"]),
    ("power", "2^{-3}", [r"\frac{1}{8}", "0.125"], ["2^{3}", r"\frac{1}{6}"]),
    ("logarithm", r"\ln 2", [r"\ln(2)", r"\frac{1}{2}\ln 4"], [r"\ln 3", r"\ln 4"]),
    ("complex", "3+4i", ["4i+3", "3 + 4i"], ["3-4i", "4+3i", "7i"]),
    ("polynomial", "x^2-4", ["(x-2)(x+2)", "x^{2} - 4", "-4+x^2"], ["x^2+4", "(x-2)^2", "x-4"]),
    ("rational function", r"\frac{1}{x-1}", [r"\dfrac{1}{x - 1}", r"\frac{x+1}{x^2-1}"], [r"\frac{1}{x+1}", "x-1"]),
    ("two variables", "p - q", ["p-q", "-q+p"], ["q-p", "p+q"]),
    ("half-open interval", "[0,1)", [r"\left[0, 1\right)", "[0, 1)"], ["[0,1]", "(0,1)", "[0,2)"]),
    ("unbounded interval", r"(-\infty,3]", [r"\left(-\infty, 3\right]"], [r"(-\infty,3)", r"(-\infty,4]"]),
    ("union", r"(-\infty,-2)\cup(2,\infty)", [r"(-\infty, -2) \cup (2, \infty)"], [r"(-2,2)", r"(-\infty,-2)\cup(3,\infty)"]),
    ("set", r"\{1,2,5\}", [r"\{5, 2, 1\}", r"\{1, 2, 5\}"], [r"\{1,2\}", r"\{1,2,6\}", "5"]),
    ("list", "1,-2", ["-2, 1", "1, -2"], ["1,2", "1"]),
    ("point", "(3,-4)", ["(3, -4)", r"\left(3,-4\right)"], ["(-4,3)", "(3,4)", "(3,-4,0)"]),
    (
        "polar point",
        r"\left(2, \frac{\pi}{3}\right)",
        [r"(2,\frac{\pi}{3})", r"(2,\dfrac{\pi}{3})"],
        [r"(2,\frac{\pi}{6})", "(2,3)"],
    ),
    ("line", "y=2x+1", ["y = 2x + 1", "y=1+2x"], ["y=2x-1", "y=3x+1"]),
    ("inequality", "x>2", ["x > 2", r"x \gt 2"], ["x<2", "x>3"]),
    (
        "matrix",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"],
        [r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"],
    ),
    (
        "vector",
        r"\begin{pmatrix} -1 \\ 6 \end{pmatrix}",
        [r"\begin{pmatrix}-1\\6\end{pmatrix}"],
        [r"\begin{pmatrix} 1 \\ 6 \end{pmatrix}"],
    ),
    ("word", r"\text{Tuesday}", ["Tuesday", r"\text{ Tuesday}"], [r"\text{Friday}", r"\text{Thursday}"]),
    ("choice", r"\text{(B)}", [r"\text{(B)}", r"\text{B}"], [r"\text{(D)}", "A"]),
    ("length", r"12.5 \text{ cm}", [r"12.5\text{ cm}", "12.5", r"\frac{25}{2}"], [r"13.5 \text{ cm}", "1.25"]),
    ("angle", r"22.5^\circ", ["22.5", r"22.5^{\circ}"], ["25.2", r"45^\circ"]),
    ("percentage", r"17.5\%", [r"17.5\%", r"17.5 \%"], [r"15.7\%", r"25\%"]),
    ("money", r"\$7.50", ["7.50", r"\$7.5"], [r"\$5.70", "75"]),
    ("arithmetic for an integer", "120", ["5!", r"2^{7}-8", r"\binom{16}{2}"], ["4!", r"2^{7}", r"\binom{10}{3}+1"]),
]
_FRAMES = [
    "\\boxed{{{}}}",
    "We collect the terms and obtain $\\boxed{{{}}}$.",
    "Step 1. Write down what is given. Step 2. Solve for what is asked.\n\nHence\n\\[\n\\boxed{{{}}}\n\\]",
    "**Answer:** \\(\\boxed{{{}}}\\)",
]


def _general() -> Iterator[Case]:
    for kind, gold, right, wrong in GENERAL_GOLDS:
        for i, (answer, is_right) in enumerate([(gold, True), *((a, True) for a in right), *((a, False) for a in wrong)]):
            yield Case(kind, _FRAMES[i % len(_FRAMES)].format(answer), gold, is_right)


GENERAL = list(_general())


def chain_of_thought(num_steps: int) -> str:
    """Prose of about 200 characters per step that boxes some of its sums and continues long after the last box."""
    steps = []
    for i in range(num_steps):
        result = rf"\boxed{{{2 * i + 1}}}" if i < num_steps / 2 and i % 5 == 0 else str(2 * i + 1)
        steps.append(
            f"Step {i + 1}. Adding the next term we see that ${i} + {i + 1} = {result}$, which fits the pattern that was found "
            "above; the difference between neighbours does not change, so let us look at the one after it and compare."
        )
    return "\n\n".join(steps)


LONG = [
    *(Case("long", f"{chain_of_thought(80)}\n\nSo it is {case.text}", *case[2:]) for case in GENERAL[::9]),
    Case("long", f"{chain_of_thought(80)}\n\n**Final Answer**\n\\boxed{{6400}}", "6400", True),
    Case("long", f"{chain_of_thought(80)}\n\n**Final Answer**\n\\boxed{{6401}}", "6400", False),
    Case("long, cut", f"{chain_of_thought(80).replace('boxed', 'mbox')}\n\nso the sum is 6400", "6400", False, "no box"),
    Case("long, cut in the box", f"{chain_of_thought(80).replace('boxed', 'mbox')} \\boxed{{64", "6400", False),
]
CASES = [*INTEGER, *GENERAL, *LONG]
