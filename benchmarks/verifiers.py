"""The training verifier against math-verify on the whole text, one answer after the other, as scripts often use it.

    python benchmarks/verifiers.py [--stress | --beside FOLDER]

1. Fast path: time for one long answer with an integer gold, every answer another, from `Verifier.submit` to its verdict.
2. A rollout step in small: 64 prompts x 16 answers of 6,000 to 26,000 characters, some cut off, some without a box, some
   wrong; all golds integers, as in DAPO-Math-17k, or one gold in eight, or in three, an expression. CPU time of this process
   and all graders, against CPU time of serial math-verify. The start of the graders (imports) is given apart: a run of many
   hours pays it once. Verdicts of both are compared.
3. --stress: 20,000 comparisons, and a grader killed at every 400th: lost, swapped, unknown verdicts; and the longest that any
   of a few endless answers keeps its grader.

4. --beside: time of strict mode's own decisions, without any grader, in this checkout and in the one in FOLDER, in turns:
   answers to integer golds; to expressions, as in part 2; to every gold of tests/own_answers.py; 16 answers to a gold.

CPU time, not wall-clock, and both ways take turns: other load on the machine hits both alike.

Goals: fast path <= 20 us; CPU time <= 1/8.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from nft_megatron.base.records import FinishReason
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify.reasons import reason_of
from nft_megatron.verify.service import Verifier
from nft_megatron.verify.worker import judge_math_verify

Answer = tuple[str, str, FinishReason]

SENTENCES = [
    r"Let $x_{%d}=\frac{%d}{%d}$ and consider \[ \sqrt{x^{2}+%d} = y, \] so that $y>%d$. ",
    r"By symmetry we may assume $a \le b$, which gives $a+b=%d$, $ab=%d$ and $a^2+b^2=%d^2-%d$ for $n \geq %d$. ",
    r"Wait, that can't be right, because \(\binom{%d}{%d}\) has to be divisible by %d, unless $p=%d$ or $p = %d$. ",
    r"There are %d ways to choose the first and %d for the second; together %d, of which %d were counted twice (case %d). ",
    r"\begin{align*} f(%d) &= %d + \frac{1}{%d} \\ &= %d - g(%d). \end{align*} ",
]
# Gold, right answers, wrong answers; a and b are other numbers for every prompt.
EXPRESSIONS = [
    (r"\frac{\sqrt{A}}{B}", [r"\frac{\sqrt{A}}{B}", r"\sqrt{A}/B"], [r"\frac{\sqrt{B}}{A}", r"\sqrt{A}"]),
    ("x^2-A^2", ["(x-A)(x+A)", "x^2-A^2"], ["(x-A)^2", "x^2-B^2"]),
    (r"(A, \frac{\pi}{B})", [r"\left(A,\frac{\pi}{B}\right)"], [r"(A, \pi)", r"(B, \frac{\pi}{B})"]),
    (r"\frac{A}{B}", [r"\frac{A}{B}", "A/B"], [r"\frac{B}{A}", r"\frac{A}{BA}"]),
    ("An-B", ["An - B", "-B+An"], ["An+B", "Bn-A"]),
    ("y = Ax-B", ["y = Ax - B", "y=-B+Ax"], ["y=Bx-A", "y=Ax+B"]),  # these two only computer algebra tells apart
    (r"[\frac{1}{A}, B)", [r"\left[\frac{1}{A},B\right)"], [r"[\frac{1}{A}, B]", r"(\frac{1}{A}, B)"]),
]


def expression(rng: random.Random, kind: int) -> tuple[str, list[str], list[str]]:
    a, b = (str(number) for number in rng.sample([2, 3, 5, 7, 11, 13, 17, 19, 23], 2))
    gold, right, wrong = EXPRESSIONS[kind % len(EXPRESSIONS)]
    return fill(gold, a, b), [fill(text, a, b) for text in right], [fill(text, a, b) for text in wrong]


def fill(text: str, a: str, b: str) -> str:
    return text.replace("A", a).replace("B", b)


def long_text(rng: random.Random) -> str:
    length, parts = rng.randint(6000, 26000), []
    while length > 0:
        parts.append(rng.choice(SENTENCES) % tuple(rng.randint(2, 99) for _ in range(5)))
        length -= len(parts[-1])
    return "".join(parts)


def rollout_step(rng: random.Random, one_expression_in: int, num_prompts: int = 64, num_answers: int = 16) -> list[Answer]:
    answers: list[Answer] = []
    for prompt in range(num_prompts):
        if not one_expression_in or prompt % one_expression_in:
            number = rng.randint(1, 999)
            gold, right, wrong = str(number), [str(number), f"{number}.0"], [str(number + k) for k in (1, 2, 7)]
        else:
            gold, right, wrong = expression(rng, prompt // one_expression_in)
        for _ in range(num_answers):
            text, fate = long_text(rng), rng.random()
            if fate < 0.08:
                answers.append((text, gold, "length"))
            elif fate < 0.1:
                answers.append((text, gold, "stop"))
            else:
                boxed = rng.choice(right if rng.random() < 0.5 else wrong)
                answers.append((f"{text}\n\nSo the final answer is $\\boxed{{{boxed}}}$.", gold, "stop"))
    return answers


def fast_path(rng: random.Random, repeats: int = 5, count: int = 1000) -> None:
    micros = []
    with Verifier() as verifier:
        for _ in range(repeats):
            texts = [long_text(rng) for _ in range(50)]
            answers = [(rf"{texts[i % 50]}\boxed{{{rng.randint(1, 10**6)}}}", str(rng.randint(1, 10**6))) for i in range(count)]
            started = time.process_time()
            for text, gold in answers:
                verifier.submit(text, gold, "stop").result()
            micros.append((time.process_time() - started) / count * 1e6)
    print(f"1. fast path: {statistics.median(micros):.1f} us an answer of 6-26k characters (goal <= 20)", flush=True)


def children() -> list[Path]:
    """Folders of the graders under /proc."""
    return [path for path in Path("/proc").glob("[0-9]*") if fields_of(path)[1:2] == [str(os.getpid())]]


def fields_of(path: Path) -> list[str]:
    """State, parent and so on from /proc/PID/stat, without the name; nothing for a process that is gone."""
    try:
        return (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def graders_cpu() -> float:
    ticks = sum(int(tick) for path in children() for tick in fields_of(path)[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def warm_up(rounds: int = 8) -> list[Answer]:
    """Comparisons of all kinds with numbers that do not come again: the first of a kind takes a hundred times as long."""
    return [
        (rf"\boxed{{{fill(answer, str(29 + i), '31')}}}", fill(gold, str(29 + i), "31"), "stop")
        for i in range(rounds)
        for gold, right, wrong in EXPRESSIONS
        for answer in right + wrong
    ]


def by_service(answers: list[Answer]) -> tuple[float, float, list[str], int]:
    """CPU seconds for the answers and for the start of the graders, verdicts, comparisons that reached a grader."""
    with Verifier(VerifyConfig(workers=2, soft_seconds=20.0, hard_seconds=120.0)) as verifier:
        list(verifier.verify_many(warm_up()))
        start = -1.0
        while graders_cpu() > start:  # until the spares, which nobody waits for, have started too
            start = graders_cpu()
            time.sleep(2)
        own = time.process_time()
        verdicts = list(verifier.verify_many(answers))
        seconds = time.process_time() - own + graders_cpu() - start
    num_compared = len({id(verdict) for verdict in verdicts if "math-verify" in verdict.verifier})
    return seconds, start, [verdict.label for verdict in verdicts], num_compared


def by_math_verify(answers: list[Answer]) -> tuple[float, list[str]]:
    started, labels = time.process_time(), []
    for text, gold, finish_reason in answers:
        reason = "truncated" if finish_reason == "length" else judge_math_verify(gold, text)[0]
        labels.append("correct" if reason == "equal" else "wrong")
    return time.process_time() - started, labels


def rollout(rng: random.Random, one_expression_in: int, repeats: int = 3) -> None:
    by_math_verify(warm_up())
    ours, starts, naive = [], [], []
    num_differ = 0
    for _ in range(repeats):
        answers = rollout_step(rng, one_expression_in)
        seconds, start, labels, num_compared = by_service(answers)
        serial, expected = by_math_verify(answers)
        ours.append(seconds)
        starts.append(start)
        naive.append(serial)
        num_differ += sum(label != other for label, other in zip(labels, expected, strict=True))
    median = statistics.median
    ratio = median(a / b for a, b in zip(naive, ours, strict=True))
    kind = f"one gold in {one_expression_in} an expression" if one_expression_in else "all golds integers"
    print(
        f"2. {len(answers)} answers, {kind}, CPU seconds, medians of {repeats} turns ({num_compared} comparisons in the last)"
    )
    print(f"   math-verify on each whole text, serial  {median(naive):7.2f}")
    print(f"   the service                             {median(ours):7.2f}   1/{ratio:.1f} (goal <= 1/8)")
    print(f"   the start of its graders, once a run    {median(starts):7.2f}")
    print(f"   verdicts that differ: {num_differ}", flush=True)


def stress(rng: random.Random, count: int) -> None:
    expected, answers = [], []
    for number in range(2, count + 2):  # every task another: nothing comes from the cache
        is_right = rng.random() < 0.5
        answers.append((rf"\boxed{{\sqrt[2]{{{number * number}}}}}", str(number if is_right else number + 1), "stop"))
        expected.append("correct" if is_right else "wrong")
    is_over, num_done, num_killed = threading.Event(), 0, 0

    def kill_now_and_then() -> None:
        nonlocal num_killed
        while not is_over.wait(0.05):
            if num_done >= 400 * (num_killed + 1):
                os.kill(int(rng.choice(children()).name), signal.SIGKILL)
                num_killed += 1

    verdicts = []
    settings = VerifyConfig(workers=2, soft_seconds=60.0, hard_seconds=120.0)
    killer = threading.Thread(target=kill_now_and_then)
    with Verifier(settings, tasks_per_worker=2000) as verifier:
        killer.start()
        for verdict in verifier.verify_many(answers):
            verdicts.append(verdict)
            num_done += 1
        is_over.set()
        killer.join()
    unknown = [reason_of(verdict) for verdict in verdicts if verdict.label == "unknown"]
    swapped = sum(v.label not in (label, "unknown") for v, label in zip(verdicts, expected, strict=True))
    print(
        f"3. {count:,} comparisons, {num_killed} workers killed: {count - len(verdicts)} lost, {swapped} swapped, "
        f"{len(unknown)} unknown {sorted(set(unknown))}"
    )
    endless = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(x+y+z)^{60}}", r"\boxed{\binom{200000}{100000}}", r"\boxed{((10!)!)!}"]
    with Verifier() as verifier:
        slow = list(verifier.verify_many((text, "x+1", "stop") for text in endless))
    print(
        f"   endless answers: {[verdict.reason for verdict in slow]}, at most "
        f"{max(verdict.seconds for verdict in slow):.2f} s after dispatch (limit 3)",
        flush=True,
    )


# Prints the microseconds of a decision for each set of (text, gold) pairs on the standard input; in either checkout.
_DECIDE = """
import json, sys, time
from nft_megatron.verify import grade
for line in sys.stdin:
    pairs = json.loads(line)
    for text, gold in pairs[:50]:
        grade.grade(text, gold, "stop")
    for name, module in list(sys.modules.items()):
        if name.startswith("nft_megatron.verify"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    started = time.process_time()
    for text, gold in pairs:
        grade.grade(text, gold, "stop")
    print((time.process_time() - started) / len(pairs) * 1e6)
"""


def decisions(rng: random.Random, folder: Path, repeats: int = 9) -> None:
    """Compare with the checkout in ``folder``, in turns."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from own_answers import GENERAL_GOLDS

    opening = "We collect the terms, and so $x^{2}+%d=%d$. "
    sets: dict[str, list[tuple[str, str]]] = {"integer golds": [], "expressions": [], "golds of every kind": []}
    for prompt in range(64):
        number = rng.randint(1, 10**6)
        given = [(str(number), [str(number), f"{number}.0"], [str(number + 1), str(number + 7)])]
        given += [expression(rng, prompt), GENERAL_GOLDS[prompt % len(GENERAL_GOLDS)][1:]]
        for pairs, (gold, right, wrong) in zip(sets.values(), given, strict=True):
            for answer in range(16):
                start = opening % (prompt, answer)
                pairs.append((rf"{start}Hence $\boxed{{{rng.choice([*right, gold] if answer % 2 else wrong)}}}$.", gold))
    lines = "".join(json.dumps(pairs) + "\n" for pairs in sets.values())
    micros: dict[Path, list[list[float]]] = {Path(__file__).parents[1]: [], folder.absolute(): []}
    for _ in range(repeats):
        for checkout, rounds in micros.items():
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            command = [sys.executable, "-c", _DECIDE]
            outcome = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, env=environment)
            rounds.append([float(line) for line in outcome.stdout.splitlines()])
    ours, others = micros.values()
    print(f"4. decisions of strict mode, us an answer, the least of {repeats} turns, beside {folder}")
    for i, (name, pairs) in enumerate(sets.items()):
        mine, other = (min(turn[i] for turn in rounds) for rounds in (ours, others))
        print(f"   {name:20} {len(pairs):5} answers   {mine:6.1f}  beside {other:6.1f}   ratio {mine / other:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stress", action="store_true", help="part 3 alone (minutes)")
    parser.add_argument("--comparisons", type=int, default=20000, help="in part 3 (%(default)s)")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="part 4 alone, beside another checkout")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    rng = random.Random(0)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    if options.stress:
        stress(rng, options.comparisons)
        return
    if options.beside:
        decisions(rng, options.beside)
        return
    fast_path(rng)
    for one_expression_in in (0, 8, 3):
        rollout(rng, one_expression_in)


if __name__ == "__main__":
    main()
