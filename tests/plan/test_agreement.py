"""What the arithmetic must repeat, because it may not import Megatron, is what the trainer does."""

from types import SimpleNamespace

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.model import lm_head, settings
from nft_megatron.plan import memory
from nft_megatron.plan.layouts import check_layout
from nft_megatron.plan.models import PUBLIC_MODELS
from nft_megatron.plan.workload import batching_rules
from nft_megatron.run import build

SHAPE = PUBLIC_MODELS["Qwen2.5-7B"]


def place(layout) -> SimpleNamespace:
    """As much of a topology as the checks need."""
    return SimpleNamespace(
        data_size=layout.data,
        tensor_size=layout.tensor,
        context_size=layout.context,
        pipeline_size=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        expert_size=1,
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
    ],
)
def test_a_layout_is_refused_where_the_trainer_refuses_it(make_layout, fields: dict):
    def refusal(check) -> str | None:
        try:
            check()
        except UserError as error:
            return str(error)
        return None

    layout = make_layout(**fields)
    assert refusal(lambda: check_layout(SHAPE, layout)) == refusal(lambda: settings._check_layout(SHAPE, place(layout), True))
