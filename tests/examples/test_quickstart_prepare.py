"""The quickstart's toy task, tokenizer, files and model, made with two updates of cold start instead of 1200."""

import ast
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from nft_megatron.config.load import load_config
from nft_megatron.data.prompts import make_prompts
from nft_megatron.data.questions import load_questions
from nft_megatron.verify.grade import grade

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def run_prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(QUICKSTART / "prepare.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "start"
    run_prepare("--out", folder, "--seed", 5, "--updates", 2)
    return folder


@pytest.fixture(scope="module")
def rows(start: Path) -> dict[str, list[dict]]:
    return {name: pq.read_table(start / f"{name}.parquet").to_pylist() for name in ("train", "held_out")}


def expression_of(row: dict) -> str:
    (message,) = row["prompt"]
    match = re.fullmatch(r"Compute ([0-9+*-]+)\. Use \\boxed\{\}\.", message["content"])
    assert match is not None
    return match[1]


def value_of(expression: str) -> int:
    """By Python's own parser and precedence, not from left to right as the example computes it."""
    return eval(compile(ast.parse(expression, mode="eval"), "question", "eval"), {"__builtins__": {}})


def test_schema_is_that_of_dapo(start: Path) -> None:
    schema = pq.read_schema(start / "train.parquet")
    assert schema.names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert {field.name for field in schema.field("prompt").type.value_type} == {"role", "content"}
    assert {field.name for field in schema.field("reward_model").type} == {"ground_truth", "style"}
    assert [field.name for field in schema.field("extra_info").type] == ["index"]


def test_golds_are_the_values_of_the_expressions(rows: dict[str, list[dict]]) -> None:
    assert len(rows["train"]) == 3000
    assert len(rows["held_out"]) == 400
    for row in rows["train"] + rows["held_out"]:
        assert row["reward_model"]["ground_truth"] == str(value_of(expression_of(row)))


def test_questions_are_distinct_and_the_held_out_ones_apart(rows: dict[str, list[dict]]) -> None:
    train, held_out = ([expression_of(row) for row in rows[name]] for name in ("train", "held_out"))
    assert len(set(train)) == len(train)
    assert len(set(held_out)) == len(held_out)
    assert not set(train) & set(held_out)


def test_three_number_questions_are_fewer_than_half(rows: dict[str, list[dict]]) -> None:
    # Careless answers are right on exactly these: that is what puts the cold start between 30 and 50 %.
    share = sum(len(re.findall(r"\d", expression_of(row))) == 3 for row in rows["held_out"]) / len(rows["held_out"])
    assert 0.3 < share < 0.45


def test_demonstrations_do_each_step_right_and_share_the_stated_slip(start: Path, rows: dict[str, list[dict]]) -> None:
    """Drawn in a process of its own, where the example's modules can be imported by name."""
    held_out = [expression_of(row) for row in rows["held_out"]]
    script = (
        "import random, prepare, arithmetic\n"
        "held_out = arithmetic.draw_distinct(random.Random(5), prepare.NUM_HELD_OUT)\n"
        "for task in held_out: print(task.expression)\n"
        "print()\n"
        "for task, answer in prepare.draw_demonstrations(random.Random(1), 4000, set(held_out)):\n"
        "    print(task.expression, answer.replace(chr(10), ' '))\n"
    )
    output = subprocess.run([sys.executable, "-c", script], cwd=QUICKSTART, check=True, capture_output=True, text=True).stdout
    shown_held_out, demonstrations = (part.split("\n") for part in output.strip().split("\n\n"))
    assert shown_held_out == held_out

    num_long = num_careless = 0
    for line in demonstrations:
        expression, *steps, box = line.split(" ")
        assert expression not in held_out
        for step in steps:
            left, right = step.split("=")
            assert value_of(left) == int(right)
            assert 0 <= int(right) <= 99
        num_operations = len(re.findall(r"[+*-]", expression))
        is_careless = len(steps) < num_operations
        answered = re.match(r"\d[+*-]\d[+*-]\d", expression)[0] if is_careless else expression
        assert len(steps) == (2 if is_careless else num_operations)
        assert grade(box, str(value_of(answered)), "stop").label == "correct"
        assert steps[-1].endswith("=" + box[len("\\boxed{") : -1])
        num_long += num_operations > 2
        num_careless += is_careless
    assert num_careless / num_long == pytest.approx(0.7, abs=0.04)


def test_tokenizer_round_trip(start: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    for text in ("7*8=56\n56-9=47\n\\boxed{47}", "Compute 7*8-9+6. Use \\boxed{}.", "Was ist π² − 1?\t«naïve»\r\n  ok"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("56-9")["input_ids"]) == ["5", "6", "-", "9"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|endoftext|>")
    assert len(tokenizer) <= 320
    chat = [{"role": "user", "content": "1+1?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>1+1?<|assistant|>"
    with_answer = [*chat, {"role": "assistant", "content": "\\boxed{2}"}]
    assert tokenizer.apply_chat_template(with_answer, tokenize=False) == text + "\\boxed{2}<|end|>"


def test_tokenizer_is_the_same_with_and_without_qwen2s_class(start: Path, rows: dict[str, list[dict]]) -> None:
    # AutoTokenizer rebuilds the tokenizer of a qwen2 folder from its vocabulary; tokenizer.json alone must agree with it.
    from tokenizers import Tokenizer

    plain, auto = Tokenizer.from_file(str(start / "model" / "tokenizer.json")), AutoTokenizer.from_pretrained(start / "model")
    for row in random.Random(0).sample(rows["train"], 50):
        text = row["prompt"][0]["content"] + "<|assistant|>7*8=56\n\\boxed{56}<|end|>"
        assert plain.encode(text).ids == auto(text)["input_ids"]


def test_model_is_a_qwen2_that_loads(start: Path) -> None:
    model, info = Qwen2ForCausalLM.from_pretrained(start / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    config = model.config
    assert (config.model_type, config.tie_word_embeddings, config.vocab_size) == ("qwen2", True, 320)
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_config_fits_the_questions(start: Path) -> None:
    config = load_config(QUICKSTART / "config.yaml", [f"data.train={start}/train.parquet"])
    assert config.data.instruction == load_config(QUICKSTART.parent / "paper" / "config.yaml").data.instruction == "keep"
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    asked = make_prompts(load_questions(config.data.train), tokenizer, config.data)
    assert (len(asked.prompts), asked.left_out) == (3000, {"questions_conflicting": 0, "questions_overlong": 0})
    longest = "\n".join(["8*9=72", "72+9=81", "81+9=90", "90+9=99", "\\boxed{99}<|end|>"])  # five numbers, two digits
    assert len(tokenizer(longest)["input_ids"]) <= config.rollout.max_answer_tokens
    train, held_out = (
        path.relative_to("runs/quickstart/start")
        for path in (*load_config(QUICKSTART / "config.yaml").data.train, *config.evaluate.data)
    )
    assert (start / train).is_file()
    assert (start / held_out).is_file()


@pytest.mark.slow
def test_cold_start_learns_and_follows_the_seed(start: Path, tmp_path: Path) -> None:
    script = (
        "import random, torch, prepare, arithmetic\n"
        "rng = random.Random(0); torch.manual_seed(0)\n"
        "tasks = arithmetic.draw_distinct(rng, 200)\n"
        "tokenizer = prepare.make_tokenizer([arithmetic.answer_text(task) for task in tasks])\n"
        "batch = prepare.make_batch(tokenizer, [(task, arithmetic.answer_text(task)) for task in tasks])\n"
        "model = prepare.make_model(tokenizer)\n"
        "with torch.no_grad(): print(model(**batch).loss.item())\n"
        "prepare.cold_start(model, tokenizer, rng, set(tasks), 40)\n"
        "with torch.no_grad(): print(model(**batch).loss.item())\n"
    )
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, cwd=QUICKSTART, check=True, capture_output=True, text=True).stdout.split("\n")
    losses = [float(line) for line in output if re.fullmatch(r"[0-9.]+", line)]
    assert len(losses) == 2
    assert losses[0] > 4.0  # about log 320 from random weights
    assert losses[1] < 2.5  # after 40 updates it knows which tokens answers are made of
    run_prepare("--out", tmp_path / "again", "--seed", 5, "--updates", 2)
    for name in ("train.parquet", "held_out.parquet", "model/model.safetensors", "model/tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (start / name).read_bytes()


def test_what_is_there_is_left_alone(start: Path) -> None:
    weights = start / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert "already exists" in run_prepare("--out", start, "--seed", 6, "--updates", 1).stdout
    assert weights.stat().st_mtime_ns == before
