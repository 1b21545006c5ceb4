"""Section ``kernels``: what Megatron is told, and what is refused."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from types import ModuleType, SimpleNamespace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig

from nft_megatron.base.errors import UserError
from nft_megatron.config.kernels import KernelsConfig
from nft_megatron.model import settings, tensor_overlap
from nft_megatron.model.megatron import engine_fuses_gradients
from nft_megatron.model.settings import check_deterministic, transformer_config
from nft_megatron.weights.shape import SHAPE_EXAMPLE, Experts
from nft_megatron.weights.stages import Stages

ONE_STAGE = Stages(1)


@pytest.fixture
def told(monkeypatch):
    """What Megatron would be told on a GPU, with the kernels of Transformer Engine or apex or without."""

    def settings_of(
        *,
        engine: bool = False,
        apex: bool = False,
        dtype=torch.bfloat16,
        context: int = 1,
        shape=SHAPE_EXAMPLE,
        stages=ONE_STAGE,
        **kernels,
    ) -> SimpleNamespace:
        place = SimpleNamespace(
            device=torch.device("cuda"),
            tensor_size=1,
            pipeline_size=1,
            virtual_pipeline=1,
            stages=stages,
            context_size=context,
            expert_size=1,
        )
        monkeypatch.setattr(settings, "TransformerConfig", lambda **fields: SimpleNamespace(**fields))
        monkeypatch.setattr(settings.gpt_layer_specs, "HAVE_TE", engine)
        monkeypatch.setattr(settings, "find_spec", lambda module: object() if apex and module.startswith("fused") else None)
        return transformer_config(shape, place, dtype, True, "none", True, KernelsConfig(**kernels))

    return settings_of


@pytest.mark.parametrize(
    ("installed", "fuses"),
    [
        ({}, False),
        ({"engine": True}, True),
        ({"apex": True}, True),
        ({"engine": True, "dtype": torch.float32}, False),  # local layers, which know apex's kernel alone
        ({"engine": True, "gradient_accumulation_fusion": False}, False),
        ({"apex": True, "gradient_accumulation_fusion": False}, False),
    ],
)
def test_gradients_are_added_by_the_kernel_that_the_layers_have(told, installed, fuses):
    assert told(**installed).gradient_accumulation_fusion is fuses


def test_megatron_builds_an_lm_head_beside_layers_whose_engine_fuses(monkeypatch):
    """Its check for apex's kernel, on the real class, is passed for these layers and comes back afterwards."""
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    for kind, available in (("transformer_engine", True), ("local", False)):
        with engine_fuses_gradients(SimpleNamespace(transformer_impl=kind)):
            assert layers._grad_accum_fusion_available is available
        assert layers._grad_accum_fusion_available is False


def test_heads_are_exchanged_only_where_every_context_rank_gets_one(told):
    assert SHAPE_EXAMPLE.num_query_groups == 4
    assert told(engine=True, context=4, context_communication="a2a").cp_comm_type == "a2a"
    assert told(engine=True, context=8).cp_comm_type == "p2p"
    with pytest.raises(UserError, match="divides the 4 key-value heads of a tensor rank among 8 context ranks") as caught:
        told(engine=True, context=8, context_communication="a2a")
    assert caught.value.field == "kernels.context_communication"


@pytest.mark.parametrize(
    ("setup", "experts"), [({}, False), ({"engine": True, "dtype": torch.float32}, False), ({"engine": True}, True)]
)
def test_overlapped_tensor_communication_is_refused_without_dense_layers_of_transformer_engine(told, setup, experts):
    assert told(engine=True, overlap_tensor_communication=True).tp_comm_overlap is True
    assert told(engine=True).tp_comm_overlap is False
    shape = replace(SHAPE_EXAMPLE, experts=Experts(8, 2, 64, True)) if experts else SHAPE_EXAMPLE
    with pytest.raises(UserError, match="is for the dense layers of Transformer Engine") as caught:
        told(shape=shape, overlap_tensor_communication=True, **setup)
    assert caught.value.field == "kernels.overlap_tensor_communication"


def test_buffers_of_overlapped_communication_hold_a_context_rank_s_part_of_a_pack(monkeypatch):
    """With the arguments that Transformer Engine 2.8 to 2.20 know, bound to the installed one's if there is one."""

    def initialize_ub(shape, tp_size, use_fp8=False, dtype=torch.bfloat16, ub_cfgs=None, bootstrap_backend=None):
        calls.append((shape, tp_size, use_fp8, dtype, bootstrap_backend))
        base._ub_communicators = {}

    def destroy_ub():
        calls.append("closed")
        base._ub_communicators = None

    place, calls = SimpleNamespace(context_size=2, tensor_size=4), []
    names = [tensor_overlap._MODULE.rsplit(".", depth)[0] for depth in (3, 2, 1)] + [tensor_overlap._MODULE]
    if find_spec("transformer_engine"):
        from transformer_engine.pytorch.module import base as real

        signature(real.initialize_ub).bind(**tensor_overlap.buffer_arguments(place, 1, 1, torch.bfloat16))
    base = ModuleType(names[-1])
    base.initialize_ub, base.destroy_ub, base._ub_communicators = initialize_ub, destroy_ub, None
    modules = {name: ModuleType(name) for name in names[:-1]}
    modules[names[-2]].base = base
    for name, module in (modules | {names[-1]: base}).items():
        monkeypatch.setitem(sys.modules, name, module)

    tensor_overlap.close_buffers()
    tensor_overlap.open_buffers(place, 16384, 5120, torch.bfloat16)
    tensor_overlap.close_buffers()
    tensor_overlap.close_buffers()
    assert calls == [([8192, 5120], 4, False, torch.bfloat16, "nccl"), "closed"]


def test_uneven_stages_and_overlaps_are_megatron_s(told):
    config = told(stages=Stages(4, last=7))
    assert (config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage) == (None, 7)


def test_determinism_is_refused_where_attention_would_store_every_score(monkeypatch, told):
    config = told(engine=True, deterministic=True)
    assert config.deterministic_mode is True
    monkeypatch.setattr(settings, "find_spec", lambda module: None)
    assert SHAPE_EXAMPLE.num_attention_heads == 28
    check_deterministic(config, 4096, 9362)  # 28 × 4096 × 9362 < 2^30
    with pytest.raises(UserError, match="no deterministic attention of its own for 28 heads and packs of 9363 tokens"):
        check_deterministic(config, 4096, 9363)
    monkeypatch.setattr(settings, "find_spec", lambda module: object() if module == "flash_attn" else None)
    check_deterministic(config, 16384, 16384)
    monkeypatch.setattr(settings, "find_spec", lambda module: None)
    check_deterministic(told(deterministic=True), 16384, 16384)  # torch's flash kernel has a deterministic backward pass
    check_deterministic(told(engine=True), 16384, 16384)


def test_megatron_knows_all_of_these_fields():
    known = TransformerConfig.__dataclass_fields__
    assert {"gradient_accumulation_fusion", "cp_comm_type", "deterministic_mode", "tp_comm_overlap"} <= known.keys()
    assert "overlap_param_gather" in DistributedDataParallelConfig.__dataclass_fields__
