"""What the arithmetic must repeat, because it may not import Megatron, is what the trainer does."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.model import lm_head, settings
from nft_megatron.plan import memory
from nft_megatron.plan.layouts import check_layout
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.workload import batching_rules
from nft_megatron.run import build
from nft_megatron.weights.shape import Experts

SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]


def place(layout) -> SimpleNamespace:
    """As much of a topology as the checks need."""
    return SimpleNamespace(
        data_size=layout.data,
        tensor_size=layout.tensor,
        context_size=layout.context,
        pipeline_size=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        stages=layout.stages,
        expert_size=layout.expert,
    )


def test_constants():
    assert memory.VOCABULARY_MULTIPLE == settings.VOCABULARY_MULTIPLE
    assert (memory.LOGITS_BYTES, memory.MIN_CHUNK) == (lm_head.CHUNK_BYTES, lm_head.MIN_CHUNK)
    assert {"cpu": memory.BLOCK_BYTES[False], "cuda": memory.BLOCK_BYTES[True]} == {
        device: 4 * elements for device, elements in lm_head.BLOCK_ELEMENTS.items()
    }


@pytest.mark.parametrize(
    "fields",
    [{}, {"tensor": 2, "context": 2, "data": 4}, {"pipeline": 2, "virtual_pipeline": 7}, {"pipeline": 4}],
)
def test_packs_are_cut_as_by_the_trainer(make_config, make_layout, fields: dict):
    config, layout = make_config(), make_layout(micro_batch_tokens=8192, **fields)
    assert batching_rules(config, layout, SHAPE.hidden_size) == build._batching_rules(config, place(layout), SHAPE)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tensor": 3},
        {"tensor": 7},
        {"tensor": 4},
        {"pipeline": 3},
        {"pipeline": 7},
        {"pipeline": 2, "virtual_pipeline": 7},
        {"pipeline": 2, "virtual_pipeline": 4},
        {"pipeline": 4, "last_stage_layers": 4},
        {"pipeline": 4, "last_stage_layers": 5},
        {"expert": 2, "data": 2},
    ],
)
def test_a_layout_is_refused_where_the_trainer_refuses_it(make_layout, fields: dict):
    layout = make_layout(**fields)
    assert refusal(check_layout, SHAPE, layout) == refusal(settings._check_layout, SHAPE, place(layout), True)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"expert": 8, "data": 8}, None),
        ({"expert": 3, "data": 3}, "parallel.expert"),
        ({"tensor": 2, "sequence_parallel": False}, "parallel.sequence_parallel"),
        ({"tensor": 5}, "parallel.tensor"),
    ],
)
def test_layouts_of_experts_are_refused_where_the_trainer_refuses_them(make_layout, fields: dict, field: str | None):
    experts = Experts(num_experts=16, experts_per_token=2, ffn_hidden_size=24, normalise_topk=True)
    shape = replace(SHAPE, num_attention_heads=20, num_query_groups=20, experts=experts)
    layout = make_layout(**fields)
    found = refusal(check_layout, shape, layout)
    assert found == refusal(settings._check_layout, shape, place(layout), layout.sequence_parallel)
    assert (found is None) if field is None else (found is not None and found.startswith(field))


def refusal(check: Callable[..., None], *arguments: object) -> str | None:
    """The message of a refusal; None if there is none."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return None
