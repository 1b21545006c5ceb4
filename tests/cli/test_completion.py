"""The scripts of ``nft-megatron completion``, run by the shells that they are for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nft_megatron.algorithms import ALGORITHMS
from nft_megatron.cli.main import COMMANDS
from nft_megatron.config.load import override_values
from nft_megatron.config.schema import Config

PROGRAM = [sys.executable, "-m", "nft_megatron", "completion"]
COMPLETE_IN_BASH = f"""
source <({" ".join(PROGRAM)} bash) || exit
[[ $(complete -p nft-megatron) == "complete -o bashdefault -F _nft_megatron nft-megatron" ]] || exit
while IFS= read -r line; do
  read -ra COMP_WORDS <<< "$line"
  [[ $line != *" " ]] || COMP_WORDS+=("")
  COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )) COMPREPLY=()
  _nft_megatron nft-megatron "${{COMP_WORDS[COMP_CWORD]}}"
  echo "${{COMPREPLY[*]}}"
done
"""
CASES = {
    "nft-megatron ": list(COMMANDS),
    "nft-megatron co": ["convert", "completion"],
    "nft-megatron plan --g": ["--gpus", "--gpu"],
    "nft-megatron train mine/c": ["mine/config.yaml"],
    "nft-megatron eval MODEL mine/config.yaml --out mi": ["mine"],
    "nft-megatron slurm st": ["status", "stop"],
    "nft-megatron slurm rollouts --add 3 RUN slurm.pre": [
        "slurm.preflight=",
        "slurm.preflight_seconds=",
        "slurm.preflight_command=",
    ],
    "nft-megatron convert to-hf --dtype ": ["bfloat16", "float16", "float32"],
    "nft-megatron completion ": ["bash", "zsh", "fish"],
    # bash gives a word with "=" as three
    "nft-megatron train mine/config.yaml seed = 3 train.num_": ["train.num_steps="],
    "nft-megatron train mine/config.yaml rollout.engine =": ["embedded", "vllm"],
    "nft-megatron train mine/config.yaml rollout.engine = v": ["vllm"],
    "nft-megatron train mine/config.yaml train.num_steps =": [],
    "nft-megatron train mine/config.yaml rollout.max_mismatch = 0.1 slurm.pla": ["slurm.plan="],
    "nft-megatron train mine/config.yaml slurm.plan =": ["true", "false"],
}
"""Each line, as far as it is typed, and what bash offers after it."""


def test_bash_completes_commands_options_files_keys_and_values(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE_IN_BASH],
        input="".join(f"{line}\n" for line in CASES),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert dict(zip(CASES, (line.split() for line in done.stdout.splitlines()), strict=True)) == CASES


@pytest.mark.parametrize(
    ("shell", "check"),
    [
        ("bash", ["bash", "-n"]),
        pytest.param("zsh", ["zsh", "-n"], marks=pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")),
        pytest.param("fish", ["fish", "-n"], marks=pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")),
    ],
)
def test_each_shell_can_read_its_script(tmp_path: Path, shell, check):
    script = subprocess.run([*PROGRAM, shell], capture_output=True, text=True, check=True, timeout=120).stdout
    assert all(f"{key}=" in script for key in ("run_dir", "train.num_steps", "algorithm.name"))
    (tmp_path / "script").write_text(script)
    assert subprocess.run([*check, str(tmp_path / "script")], capture_output=True, text=True, timeout=60).stderr == ""


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("nft-megatron co", ["completion", "convert"]),
        ("nft-megatron train a.yaml seed=3 train.num_", ["train.num_steps="]),
        ("nft-megatron train a.yaml rollout.engine=", ["rollout.engine=embedded", "rollout.engine=vllm"]),
    ],
)
def test_fish_completes(line, offered):
    script = f"{' '.join(PROGRAM)} fish | source; complete -C '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert sorted(found.split("\t")[0] for found in done.stdout.splitlines()) == offered


def test_the_keys_are_those_of_the_configuration():
    words = override_values()
    assert set(Config.model_fields) == {key.partition(".")[0] for key in words}
    assert set(words["algorithm.name"]) == set(ALGORITHMS)
    assert words["train.denominator"] == ["tokens", "sequences"]
    assert words["train.num_steps"] == []
