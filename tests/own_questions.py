r"""The project's own questions in the formats of the public ones: DAPO-Math-17k's Parquet, and each benchmark's columns.

Every gold answer follows from its question, so tests know it independently of the code under test.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from own_answers import GENERAL_GOLDS

# Word for word as published; nft_megatron.data.wording must recognise it.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'
DAPO_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct([("index", pa.string())])),
    ]
)


def dapo_row(index: str | None, question: str, gold: str | None) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": question, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": gold, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def write_dapo(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=DAPO_SCHEMA), path)
    return path


class Asked(NamedTuple):
    question_id: str
    text: str
    gold: str


def _sum(i: int) -> tuple[str, int]:
    return f"A farmer from village {i} sells ${i}$ eggs on Monday and ${i * i}$ on Tuesday. How many is that?", i + i * i


TRAINING = [
    *(Asked(f"sum-{i}", *map(str, _sum(i))) for i in range(1, 201)),  # from 100 on at least 10,000
    *(Asked(f"debt-{i}", f"What is ${i} - {3 * i}$?", str(-2 * i)) for i in range(1, 6000, 1000)),
    Asked("nothing", r"How many real $x$ have $x^2 = -1$?", "0"),
    Asked("power", r"Compute \[2^{64}.\]", str(2**64)),
    # Identical except for the sign: two questions.
    Asked("near-minus", "What is $17 - 9$?", "8"),
    Asked("near-plus", "What is $17 + 9$?", "26"),
    # One question twice, with one gold answer in two spellings.
    Asked("agree-1", "How many milligrams are there in a gram?", "1000"),
    Asked("agree-2", "How many  milligrams are there in a gram ?", "1,000"),
    # One question with two gold answers, verbatim and typeset differently.
    Asked("letter-1", "How many corners has a cube?", "8"),
    Asked("letter-2", "How many corners has a cube?", "12"),
    Asked("letter-3", r"Find $n$ if $\frac{n}{2} = 6$.", "12"),
    Asked("letter-4", r"Find $n$ if $\frac{n}{2} = 6$.", "3"),
    Asked("letter-5", r"Find $n$ if $\frac{n}{2} = 6$.", "12"),
    Asked("typeset-1", "Initially the jar holds $3$ beads, then twice as many. How many now?", "6"),
    Asked("typeset-2", "Initially, the jar holds \\(3\\) beads,\nthen twice as many. How many now?", "9"),
    Asked("typeset-3", r"Let $a, b$ be the legs $5, 12$. Find the third side.", "13"),
    Asked("typeset-4", r"Let $a,b$ be the legs $5,\, 12$.  Find the third side", "17"),
]
LETTER_CONFLICTS = [["letter-1", "letter-2"], ["letter-3", "letter-4", "letter-5"]]
CONFLICTS = [*LETTER_CONFLICTS, ["typeset-1", "typeset-2"], ["typeset-3", "typeset-4"]]


def write_training(path: Path, repeats: int = 3) -> Path:
    """``TRAINING`` as DAPO-Math-17k is published: in its wording, with every row repeated (there a hundred times)."""
    rows = [dapo_row(asked.question_id, DAPO_PREFIX + asked.text + DAPO_SUFFIX, asked.gold) for asked in TRAINING]
    return write_dapo(path, *rows * repeats)


def write_benchmarks(folder: Path) -> dict[str, tuple[Path, list[Asked]]]:
    """Each benchmark by name: a file or folder named and laid out as on the Hub, as long as published, and its questions."""
    writers = {
        "aime24": _write_aime24,
        "aime25": _write_aime25,
        "amc23": _write_amc23,
        "math500": _write_math500,
        "olympiadbench": _write_olympiadbench,
        "minerva_math": _write_minerva,
    }
    return {name: write(folder) for name, write in writers.items()}


def _written(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _last_digit(i: int) -> str:
    return f"What is the last digit of ${7 * i + 3}$?"


def _write_aime24(folder: Path) -> tuple[Path, list[Asked]]:
    """Capitalised columns; answers are integers."""
    asked = [Asked(f"own-24-{i}", _last_digit(i), str((7 * i + 3) % 10)) for i in range(30)]
    rows = [{"ID": q.question_id, "Problem": q.text, "Solution": "Divide by 10.", "Answer": int(q.gold)} for q in asked]
    _written(folder / "AIME_2024" / "aime_2024_problems.parquet", rows)
    return folder / "AIME_2024", asked


def _write_aime25(folder: Path) -> tuple[Path, list[Asked]]:
    """Answers are three-digit strings."""
    asked = [Asked(f"own-25-{i}", _last_digit(i + 30), f"{(7 * (i + 30) + 3) % 10:03d}") for i in range(30)]
    _written(folder / "aime2025.jsonl", [{"problem": q.text, "answer": q.gold, "id": q.question_id} for q in asked])
    return folder / "aime2025.jsonl", asked


def _write_amc23(folder: Path) -> tuple[Path, list[Asked]]:
    """Answers are floats, ids count rows."""
    file = "amc23/test-00000-of-00001.parquet"
    asked = [
        Asked(f"{file}/{i}", f"How many of the first {i} positive integers are divisible by 5?", str(i // 5)) for i in range(40)
    ]
    rows = [{"id": i, "problem": q.text, "answer": float(q.gold), "url": ""} for i, q in enumerate(asked)]
    _written(folder / file, rows)
    return folder / "amc23", asked


def _write_math500(folder: Path) -> tuple[Path, list[Asked]]:
    """Gold answers of all kinds; ``unique_id`` is the Hub's own."""
    file = "MATH-500/test.jsonl"
    asked = [
        Asked(
            f"{file}/{i}",
            f"Copy number {i}: ${GENERAL_GOLDS[i % len(GENERAL_GOLDS)][1]}$",
            GENERAL_GOLDS[i % len(GENERAL_GOLDS)][1],
        )
        for i in range(500)
    ]
    rows = [
        {
            "problem": q.text,
            "solution": "",
            "answer": q.gold,
            "subject": "Algebra",
            "level": 1 + i % 5,
            "unique_id": f"own/{i}.json",
        }
        for i, q in enumerate(asked)
    ]
    _written(folder / file, rows)
    return folder / "MATH-500", asked


def _write_olympiadbench(folder: Path) -> tuple[Path, list[Asked]]:
    """Answers are lists of formulas, with one or two members."""
    file = "OlympiadBench.parquet"
    lists = [[f"${i}$", f"$-{i}$"] if i % 7 == 0 else [rf"$\frac{{{i}}}{{{i + 1}}}$"] for i in range(1, 676)]
    asked = [
        Asked(f"{file}/{i}", f"Which {len(answers)} did I write on sheet {i}: {answers[0]}?", ", ".join(answers))
        for i, answers in enumerate(lists)
    ]
    rows = [
        {
            "id": 1600 + i,
            "question": q.text,
            "solution": ["…"],
            "final_answer": answers,
            "context": None,
            "is_multiple_answer": len(answers) > 1,
            "unit": None,
            "answer_type": "Numerical",
            "error": None,
        }
        for i, (q, answers) in enumerate(zip(asked, lists, strict=True))
    ]
    _written(folder / file, rows)
    return folder / file, asked


def _write_minerva(folder: Path) -> tuple[Path, list[Asked]]:
    """Measurements and formulas; rows without an id."""
    file = "minerva_math.jsonl"
    shapes = [
        "{i}.6",
        "{i}.5e33",
        "-{i}.3e-7",
        r"x_{{0}} \cos (\omega t) + {i}",
        r"{i} \text{{ km}}",
        "y={i}x+2",
        r"\frac{{{i}}}{{s^2}}",
    ]
    golds = [shapes[i % len(shapes)].format(i=i) for i in range(1, 273)]
    asked = [Asked(f"{file}/{i}", f"What does gauge {i} show: {gold}?", gold) for i, gold in enumerate(golds)]
    _written(folder / file, [{"question": q.text, "answer": q.gold} for q in asked])
    return folder / file, asked
