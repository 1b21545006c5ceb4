"""Section ``kernels`` of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from nft_megatron.base.config_model import ConfigModel, PositiveInt
from nft_megatron.base.errors import UserError


def _not_built(value: str) -> str:
    if value != "off":
        raise UserError(
            "kernels.fp8",
            value,
            "is not built: its rounding would add to the difference between the engine's and the trainer's log-probs, which "
            "nobody has measured with it",
            "set it to off",
        )
    return value


class KernelsConfig(ConfigModel):
    """How the trainers use their GPUs. It changes speed, memory and rounding, never what is computed."""

    gradient_accumulation_fusion: bool = True
    """Weight gradients are added to their float32 sums by the matrix product itself, where Transformer Engine or apex has the
    kernel; otherwise, and if false, by a pass of its own after each. On in Megatron-LM and in Megatron-Bridge's recipes."""
    context_communication: Literal["p2p", "all_gather", "a2a"] = "p2p"
    """How context-parallel ranks exchange keys and values under Transformer Engine: in a ring, overlapped with attention
    (its default); gathered before it; or as heads instead of tokens, which needs as many key-value heads per tensor rank as
    context ranks. Layers without Transformer Engine gather."""
    fused_lm_head: bool = True
    """On GPUs the passes over the LM head's logits are two Triton kernels, which read each logit twice and write it once, where
    torch's operators move eight times as much. Triton comes with torch's CUDA builds. false: torch's operators."""
    overlap_parameter_gather: bool = False
    """Data-parallel ranks gather updated weights during the next forward pass, each part just before the layer that needs it,
    instead of all at once after the update. The weights of a step's last update are gathered before they are published.
    Megatron-LM's --overlap-param-gather; on in Megatron-Bridge's recipes."""
    overlap_tensor_communication: bool = False
    """Tensor-parallel ranks exchange activations in pieces during the matrix products (Transformer Engine's userbuffers;
    Megatron-LM's --tp-comm-overlap, on in NVIDIA's performance recipes). Needs Transformer Engine, tensor ranks within a node,
    sequence_parallel, and train.pad_to_budget, as its buffers have one size."""
    device_connections: PositiveInt | None = None
    """CUDA_DEVICE_MAX_CONNECTIONS of the trainers. null: 1 under tensor or context parallelism on GPUs before Blackwell, as
    Megatron-LM demands, so that communication begins before the matrix product that hides it; else CUDA's own. What the
    environment already has wins."""
    allocator: str = "expandable_segments:True"
    """PYTORCH_ALLOC_CONF of the trainers. By default segments can grow, or packs of different lengths leave memory in pieces
    that nothing fits (torch's notes on CUDA memory management). Empty: torch's own. What the environment already has wins."""
    deterministic: bool = False
    """Only kernels whose result does not depend on timing: a run that resumes on the same layout, GPUs and versions equals
    an uninterrupted one to the bit. Slower. Not needed on the CPU."""
    fp8: Annotated[Literal["off", "delayed", "blockwise"], AfterValidator(_not_built)] = "off"
    """Matrix products in 8 bits: refused so far."""
