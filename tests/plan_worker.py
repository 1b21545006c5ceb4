"""What the real model stores and computes, counted by torch itself, for tests/plan."""

import gc
from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nft_megatron.model.build import build_model
from nft_megatron.model.packed_sequences import pack_sequences
from nft_megatron.model.policy import lm_head_weight
from nft_megatron.model.token_loss import token_loss_sum
from nft_megatron.model.topology import Topology, init_topology, shutdown
from nft_megatron.weights.shape import Experts, ModelShape

LENGTHS = [128, 128]  # equal, so that no attention row is padding
QK_NORM = {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "qkv_bias": False}

EXPERTS = QK_NORM | {
    "architecture": "Qwen3MoeForCausalLM",
    "experts": Experts(num_experts=8, experts_per_token=2, ffn_hidden_size=48, normalise_topk=True),
}

aten = torch.ops.aten


def small_shape(num_layers: int, **sizes: Any) -> ModelShape:
    """All sizes differ, so that none can be mistaken for another."""
    return ModelShape(
        **{
            "architecture": "Qwen2ForCausalLM",
            "num_layers": num_layers,
            "hidden_size": 64,
            "ffn_hidden_size": 176,
            "num_attention_heads": 8,
            "num_query_groups": 2,
            "head_dim": 16,
            "vocab_size": 320,
            "norm_epsilon": 1e-6,
            "rope_theta": 1e4,
            "max_positions": 4096,
            "tied_embeddings": False,
            "qkv_bias": True,
            **sizes,
        }
    )


def _inputs(topology: Topology) -> tuple:
    num = sum(LENGTHS) // topology.context_size
    packed = pack_sequences(LENGTHS, topology.device, topology.context_rank, topology.context_size)
    return torch.arange(num)[None], torch.arange(num)[None] % 128, packed, torch.arange(num)


def saved_bytes(shape: ModelShape, topology: Topology, **settings: Any) -> int:
    """Bytes that autograd keeps after a forward pass, counting each storage once and no parameters."""
    (chunk,) = build_model(shape, topology, **settings)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}  # keeps the tensors alive, so that no address is reused

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk(*_inputs(topology))
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in parameters)


def flops(shape: ModelShape, topology: Topology, **settings: Any) -> dict[str, int]:
    """FLOPs of matrix products and attention: forward pass, LM head (forward and backward), and backward pass of the rest."""
    (chunk,) = build_model(shape, topology, **settings)
    chunk.zero_grad_buffer()

    def pairs(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
        return 4 * query[0] * query[1] * query[2] * key[2] * query[3]  # all of them: whole squares

    def pairs_backward(_: torch.Size, query: torch.Size, key: torch.Size, *__: Any, **___: Any) -> int:
        return pairs(query, key) * 5 // 2

    own = {
        aten._scaled_dot_product_flash_attention_for_cpu: pairs,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: pairs_backward,
    }

    def counted(function: Any) -> tuple[Any, dict[str, int]]:
        with FlopCounterMode(display=False, custom_mapping=own) as counter:
            result = function()
        each = counter.get_flop_counts()["Global"]
        attention = sum(count for operator, count in each.items() if "attention" in str(operator))
        return result, {"matmul": sum(each.values()) - attention, "attention": attention}

    hidden_NH, forward = counted(lambda: chunk(*_inputs(topology)))
    weight_VH = lm_head_weight(chunk)
    (loss, _), head = counted(
        lambda: token_loss_sum(
            hidden_NH,
            weight_VH,
            torch.arange(len(hidden_NH)),
            lambda logprob_C, _: -logprob_C,
            temperature=1.0,
            vocab_size=shape.vocab_size,
            group=topology.tensor_group,
            main_grad_VH=weight_VH.main_grad,
        )
    )
    _, backward = counted(loss.backward)
    return {"forward": forward, "head": head, "backward": backward}


class Collectives(TorchDispatchMode):
    """Adds up, by kind, the bytes of the full tensor that each collective gathers, scatters or sums."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.num_bytes[func._opname] += max(tensor.nbytes for tensor in tensors)
        return func(*args, **kwargs or {})


def collectives(shape: ModelShape, topology: Topology, **settings: Any) -> dict[str, dict[str, int]]:
    """Bytes by kind in a forward pass and in a backward pass, without the LM head and the sum over replicas."""
    (chunk,) = build_model(shape, topology, **settings)
    with Collectives() as forward:
        hidden_NH = chunk(*_inputs(topology))
    with Collectives() as backward:
        hidden_NH.sum().backward()
    return {"forward": forward.num_bytes, "backward": backward.num_bytes}


def count(tensor: int, context: int, sequence_parallel: bool) -> dict[str, dict]:
    """For each dtype and kind of recomputation: bytes for models of two and four layers, and FLOPs for two."""
    topology = init_topology(tensor, 1, context, threads=1)
    results = {}
    for dtype in ("float32", "bfloat16"):
        for recompute in ("none", "selective", "full"):
            settings = {"dtype": getattr(torch, dtype), "recompute": recompute, "sequence_parallel": sequence_parallel}
            results[f"{dtype} {recompute}"] = {
                "saved": [saved_bytes(small_shape(layers), topology, **settings) for layers in (2, 4)],
                "saved, q and k normed": [
                    saved_bytes(small_shape(layers, **QK_NORM), topology, **settings) for layers in (2, 4)
                ],
                "saved, experts": [saved_bytes(small_shape(layers, **EXPERTS), topology, **settings) for layers in (2, 4)]
                if tensor == context == 1
                else [],
                "flops": flops(small_shape(2), topology, **settings),
                "collectives": [collectives(small_shape(layers), topology, **settings) for layers in (2, 4)],
            }
    del topology
    gc.collect()
    shutdown()
    return results
