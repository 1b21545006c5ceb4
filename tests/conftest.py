"""A complete task that is interesting without training: a random model that already gets some answers right.

The vocabulary has one token for each boxed number, and that token ends an answer, so a random model is right about one time in
five: the K answers to a question are mixed, verdicts are real, and a few NFT steps improve the model.
"""

import contextlib
import hashlib
import json
import os
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import settings
from launcher import Ranks, World
from small_disk import mounted

from nft_megatron.cli.main import main
from nft_megatron.observe.metrics import is_wall_clock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("any machine", deadline=None)  # a busy machine may take any time for an example
settings.load_profile("any machine")

collect_ignore = ["lm_head_kernel_worker.py", "rehearsal_engine.py", "rehearsal_engine_worker.py"]
"""Without doctests; importable only with Triton and Transformer Engine."""

BOXES = [f"\\boxed{{{number}}}" for number in range(5)]
WORDS = ["<pad>", "<eos>", "What", "is", "+", *"01234", *BOXES]


def make_tokenizer(folder: Path) -> None:
    """Every word is an added token, because ``AutoTokenizer`` splits all other text of a Qwen2 folder in Qwen2's own way."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


SHARED = {"vllm_servers": "vllm", "cluster": "slurm", "counted": "plan"}
"""Fixtures that are dear to build, each with the name of the group that shares it."""
LONGEST = (
    "vllm",
    "slurm",
    "tests/model/",
    "tests/run/",
    "tests/lifecycle/",
    "tests/verify/test_own",
    "tests/convert/",
    "tests/collect/",
    "plan",
)
"""Groups, and beginnings of files that are a group, that take the longest."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With ``pytest -n 2 --dist loadgroup`` a file's tests stay in one process, as do all tests that share one of ``SHARED``.

    With ``--no-loadscope-reorder`` the two processes start groups in this order, so that they end at about the same time.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            shared = [group for name, group in SHARED.items() if name in getattr(item, "fixturenames", ())]
            item.add_marker(pytest.mark.xdist_group(shared[0] if shared else item.nodeid.partition("::")[0]))
    items.sort(key=_order)


def _order(item: pytest.Item) -> int:
    group = item.get_closest_marker("xdist_group").args[0]
    return next((number for number, start in enumerate(LONGEST) if group.startswith(start)), len(LONGEST))


WIDE = {"hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 2048, "initializer_range": 0.1}
"""Sizes of a model that vLLM takes, whose attention on the CPU wants heads of 32."""


def make_model(folder: Path, seed: int = 0, **sizes: float) -> Path:
    """A random 2-layer Qwen2 with grouped-query attention, tied embeddings and non-zero biases."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64, **sizes}
    config = Qwen2Config(
        vocab_size=len(WORDS),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **sizes,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.eos_token_id = [1, *map(WORDS.index, BOXES)]
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """Quick: a few thousand parameters."""
    return make_model(tmp_path_factory.mktemp("model"))


def write_questions(path: Path) -> Path:
    """15 sums in DAPO-Math-17k's schema."""
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"What is {a} + {b}"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(a + b), "style": "rule"},
            "extra_info": {"index": f"{a}+{b}"},
        }
        for a in range(5)
        for b in range(5 - a)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="session")
def question_file(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data") / "sums.parquet")


@pytest.fixture
def small_disk(tmp_path):
    """Creates a file system of the given size ("64k") for one test; skips the test if that is not possible."""
    with contextlib.ExitStack() as stack:

        def make(size: str) -> Path:
            try:
                return stack.enter_context(mounted(tmp_path / "disk", size))
            except OSError as error:
                pytest.skip(str(error))

        yield make


@pytest.fixture
def run_config(tmp_path, model_folder, question_file):
    """Writes the config file of a small run. Keyword arguments replace fields in sections: ``train={"num_steps": 2}``."""

    def write(run_dir: Path | str = "run", **sections) -> Path:
        tree = {
            "run_dir": str(tmp_path / run_dir),
            "model": {"path": str(model_folder), "dtype": "float32"},
            "data": {"train": str(question_file), "template": "plain", "max_prompt_tokens": 8, "instruction": "keep"},
            "rollout": {
                "questions_per_step": 4,
                "group_size": 8,
                "max_answer_tokens": 4,
                "processes": 0,
                "oversample": 2.0,
            },
            "optimizer": {"learning_rate": 1.0e-3, "warmup_updates": 2},
            "train": {"num_steps": 3, "updates_per_step": 2, "micro_batch_tokens": 64},
            "parallel": {"threads": 1, "timeout_seconds": 60.0},
            "checkpoint": {"every": 1},
            "evaluate": {"data": str(question_file), "every": 2},
            "observe": {"tensorboard": False},
        }
        for section, fields in sections.items():
            tree[section] = {**tree.get(section, {}), **fields} if isinstance(fields, dict) else fields
        path = tmp_path / f"{Path(run_dir).name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """``world(4)(function, *arguments)``: what rank 0 of four processes returns; see :class:`launcher.World`."""
    folder = tmp_path_factory.mktemp("world")
    return lambda size: World(size, folder)


@pytest.fixture
def start(tmp_path_factory):
    """Starts ``nft-megatron`` with the given arguments on ``ranks`` processes; see :mod:`launcher`."""
    commands = []

    def begin(*arguments, ranks: int = 1) -> Ranks:
        commands.append(Ranks(main, ([str(argument) for argument in arguments],), ranks, tmp_path_factory.mktemp("output")))
        return commands[-1]

    yield begin
    for command in commands:
        command.signal(signal.SIGKILL)


@pytest.fixture
def command(start):
    """Runs ``nft-megatron`` to the end and returns its exit code and output."""
    return lambda *arguments, ranks=1: start(*arguments, ranks=ranks).wait()


@pytest.fixture(scope="session")
def runs_of_the_session(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_once(run_config, command, tmp_path, runs_of_the_session):
    """The folder of an undisturbed run, for reading only: ``run_config``'s sections on ``ranks`` processes.

    Tests that request the same run share it.
    """

    def trained(ranks: int = 1, **sections) -> Path:
        key = f"{ranks} {json.dumps(sections, sort_keys=True)}"
        folder = runs_of_the_session / hashlib.sha256(key.encode()).hexdigest()[:16]
        if not folder.exists():
            done = command("train", run_config(folder.name, **sections), ranks=ranks)
            assert done.returncode == 0, done.stderr
            (tmp_path / folder.name).rename(folder)
        return folder

    return trained


@pytest.fixture
def metrics_of():
    """A run's rows without the values that depend on the machine's speed."""

    def read(run_dir: Path) -> list[dict]:
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not is_wall_clock(k)} for row in rows]

    return read
