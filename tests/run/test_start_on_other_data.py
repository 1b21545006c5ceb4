"""The start on rows of one's own that docs/data.md shows: its commands are run, and what it prints is compared."""

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HENS = "Mia has {0} hens. Each lays {1} eggs. How many eggs is that?"
SOLVED = "Each hen lays {1}, so all lay {0}*{1}=<<{0}*{1}={2}>>{2} eggs.\n#### {2}"
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


def shown() -> list[tuple[list[str], list[str]]]:
    """The page's commands, each with the lines that it shows below it."""
    page = (ROOT / "docs" / "data.md").read_text().splitlines()
    starts = [i for i, line in enumerate(page) if line.startswith("    $ nft-megatron ")]
    ends = [next(j for j in range(i, len(page)) if page[j] and not page[j].startswith("    ")) for i in starts]
    texts = [
        "\n".join(line.removeprefix("    ") for line in page[i + 1 : j]).rstrip() for i, j in zip(starts, ends, strict=True)
    ]
    return [(page[i].split()[2:], text.splitlines()) for i, text in zip(starts, texts, strict=True)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page says is there: the quickstart's kind of model, and a configuration small enough for a test."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "quickstart"))
    import prepare

    rows = [(hens, eggs, hens * eggs) for hens in range(2, 8) for eggs in (3, 4)]
    for name in ("main", "socratic"):
        (tmp_path / "eggs" / name).mkdir(parents=True)
        lines = (json.dumps({"question": HENS.format(*row), "answer": SOLVED.format(*row)}) + "\n" for row in rows)
        (tmp_path / "eggs" / name / "train.jsonl").write_text("".join(lines))
    tokenizer = prepare.make_tokenizer([HENS.format(*row) + SOLVED.format(*row) for row in rows])
    tokenizer.chat_template, tokenizer.model_max_length = THINKING, 512
    tokenizer.save_pretrained(tmp_path / "model")
    model = prepare.make_model(tokenizer, hidden_size=32)
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path / "model")
    tree = {
        "run_dir": "run",
        "model": {"path": "model", "dtype": "float32"},
        "rollout": {"questions_per_step": 2, "group_size": 2, "max_answer_tokens": 4, "processes": 0},
        "algorithm": {"name": "grpo"},  # trains on questions of any kind: a random model gets none right
        "train": {"num_steps": 1, "updates_per_step": 1, "micro_batch_tokens": 1024},
        "data": {"train": "eggs", "max_prompt_tokens": 400},
        "parallel": {"threads": 1, "timeout_seconds": 60.0},
        "observe": {"tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_the_commands_of_the_page_print_what_it_shows(folder, command, monkeypatch):
    monkeypatch.chdir(folder)
    (refused, refusal), (started, table), (changed, difference) = shown()
    first = command(*refused)
    assert (first.returncode, first.stderr.splitlines()) == (2, refusal)
    assert not (folder / "run" / "prompts.parquet").exists()

    run = command(*started)
    assert run.returncode == 0, run.stderr
    begin = run.stderr.splitlines().index(table[0])
    assert run.stderr.splitlines()[begin : begin + len(table)] == table
    assert "step 1, round 1: no right answer (0 right, 4 wrong, 0 unknown; " in run.stderr

    # Whatever the template has become since, the run asks what it began with
    (folder / "model" / "chat_template.jinja").write_text("{{ strftime_now('%S') }} {{ enable_thinking }}")
    again = command(*started, "train.num_steps=2")
    assert again.returncode == 0, again.stderr
    assert [line for line in again.stderr.splitlines() if line in table] == table

    other, (cut,) = command(*changed), difference
    assert other.returncode == 2 and other.stderr.startswith(cut.removesuffix("…"))
