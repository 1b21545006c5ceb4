"""The command line without running anything: its list of commands, their help, what is imported for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nft_megatron import __version__, cli
from nft_megatron.cli.main import COMMANDS, main

HEAVY = {"torch", "transformers", "megatron", "sympy", "pyarrow", "numpy", "matplotlib"}
TEACHES = {
    "init": ("MODEL", "DATA", "data.answer_field=final"),
    "fork": ("--step", "its weights, its optimizer", "section.key=value"),
    "train": ("torchrun --nproc-per-node N", "optimizer", "learning_rate"),
    "plan": ("nft-megatron plan CONFIG --gpus 256", "TFLOP/s", "--layouts"),
    "eval": ("nft-megatron eval RUN/hf/step_000320", "--benchmarks PATH", "section.key=value"),
    "doctor": ("Exits with 2 if something required is missing",),
    "overlap": ("13-grams", "--against EVAL"),
    "verify": ("strict, math-verify, dapo, simplerl, published-boxed, published-answer", "--gold-field"),
    "report": ("--png",),
    "replay": ("--step", "--against", "section.key=value"),
    "serve": ("--name", "--devices"),
    "slurm": ("render", "submit", "status", "logs", "attach", "checkpoint", "stop", "rollouts"),
    "slurm attach": ("attach --node n3 RUN -- nvidia-smi",),
    "convert": ("to-megatron", "to-hf", "check"),
    "completion": ("bash, zsh, fish", "source <(nft-megatron completion bash)"),
    "convert to-hf": ("mp_rank_XX_YYY", "--max-shard-bytes"),
}


def output_of(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return (ended.value.code or 0, *capsys.readouterr())


def test_every_command_has_its_file_and_its_line(capsys):
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__", "arguments", "main", "outcome"}
    assert files == set(COMMANDS)
    code, listed, _ = output_of(capsys, "--help")
    assert code == 0
    assert all(f"    {name}" in listed for name in COMMANDS)
    assert {name.split()[0] for name in TEACHES} == set(COMMANDS)


@pytest.mark.parametrize("command", TEACHES)
def test_the_help_of_a_command_teaches(capsys, command):
    code, text, _ = output_of(capsys, *command.split(), "--help")
    assert code == 0
    assert text.startswith(f"usage: nft-megatron {command} ")
    flowing = " ".join(text.split())
    assert [piece for piece in TEACHES[command] if piece not in flowing] == []


def test_mistakes_in_the_command_line(capsys):
    code, _, message = output_of(capsys, "trian", "config.yaml")
    assert code == 2 and "invalid choice: 'trian'" in message and "train" in message
    code, _, message = output_of(capsys)
    assert code == 2 and "COMMAND" in message
    code, _, message = output_of(capsys, "completion", "bash", "now")
    assert code == 2 and "unrecognized arguments: now" in message
    code, _, message = output_of(capsys, "plan", "config.yaml", "--gpus", "two")
    assert code == 2 and "invalid int value: 'two'" in message


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([*name.split(), "--help"] for name in TEACHES)], ids=" ".join)
def test_help_imports_nothing_heavy(words):
    program = f"""
import contextlib, io, json, sys
from nft_megatron.cli.main import main
output = io.StringIO()
with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
    main({words})
print(json.dumps([output.getvalue(), sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    said, modules = json.loads(done.stdout)
    assert __version__ in said if words == ["--version"] else said.startswith("usage: nft-megatron ")
    assert not (HEAVY | {"yaml", "ruamel", "shtab"}) & set(modules)
    if len(words) == 1:
        assert not {"pydantic", "logging", "nft_megatron.base.errors"} & set(modules)
