"""Plans to check, and what torch counts on the real model."""

import functools

import plan_worker
import pytest

from nft_megatron.config.schema import Config
from nft_megatron.plan.layouts import ParallelLayout


@pytest.fixture(scope="session")
def counted(world):
    """Runs :func:`plan_worker.count` on as many processes as it needs, once for each layout."""

    @functools.cache
    def run(tensor: int, context: int, sequence_parallel: bool) -> dict:
        return world(tensor * context)(plan_worker.count, tensor, context, sequence_parallel)

    return lambda tensor=1, context=1, sequence_parallel=True: run(tensor, context, sequence_parallel)


@pytest.fixture
def make_layout():
    """A layout of one GPU, with other fields where they are given."""

    def make(**fields) -> ParallelLayout:
        return ParallelLayout(
            **{
                "tensor": 1,
                "pipeline": 1,
                "virtual_pipeline": 1,
                "context": 1,
                "data": 1,
                "sequence_parallel": True,
                "recompute": "none",
                "micro_batch_tokens": 4096,
                **fields,
            }
        )

    return make


@pytest.fixture
def make_config():
    """Qwen2.5-7B on two nodes of H100s, of which one generates, with other fields in the sections that are given."""

    def make(**sections) -> Config:
        tree = {
            "run_dir": "run",
            "model": {"path": "Qwen2.5-7B"},
            "data": {"train": "questions.parquet", "max_prompt_tokens": 512},
            "rollout": {"engine": "vllm", "questions_per_step": 64, "group_size": 8, "max_answer_tokens": 3584},
            "train": {"num_steps": 10, "updates_per_step": 4, "micro_batch_tokens": 8192},
            "cluster": {"trainer_nodes": 1, "rollout_nodes": 1},
        }
        for section, fields in sections.items():
            tree[section] = {**tree.get(section, {}), **fields}
        return Config.model_validate(tree)

    return make
