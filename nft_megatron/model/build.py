"""From the sizes of a model to this rank's part of it: Megatron-Core's ``GPTModel`` inside ``DistributedDataParallel``.

    shape = read_shape(folder)
    chunks = build_model(shape, topology, dtype=torch.float32)
    load_weights(chunks, topology, shape, folder)

    def forward_step(data_iterator, chunk):                      # one micro-batch; called by Megatron's pipeline schedule
        micro_batch = next(data_iterator)
        packed = pack_sequences(lengths, topology.device, topology.context_rank, topology.context_size)
        hidden_NH = chunk(input_ids_1T, position_ids_1T, packed, loss_positions_N)
        def loss_function(hidden_NH):                            # called only where the model ends
            loss = ...                                           # from hidden_NH and lm_head_weight(chunk)
            return loss, NO_TOKEN_COUNT, statistics
        return hidden_NH, loss_function

    zero_gradients(chunks)
    run_schedule(chunks, forward_step, micro_batches, forward_only=False)

**Parts.** A pipeline stage holds one part of the model, or several under the interleaved schedule, each a chunk of the list:
part v of stage p is number v · stages + p of the model's parts, all with the same number of layers.

**The scale of gradients.** After the schedule, ``parameter.main_grad`` is the plain sum of d(loss)/d(parameter) over the
micro-batches of all data-parallel and context-parallel ranks. Nothing divides it: ``calculate_per_token_loss`` sets DDP's
scaling factor to 1 (distributed/distributed_data_parallel.py:257) and, with a three-tuple from the loss function, keeps the
schedule from dividing by the number of micro-batches (pipeline_parallel/schedules.py:262); ``_finalize`` withholds the token
count by which ``finalize_model_grads`` would divide. So a loss carries its own denominator. The same function sums the
gradients that several ranks share: norm weights under sequence parallelism, and the tied embedding of the first and last
pipeline stage. With the distributed optimizer a rank's sum is complete only on its own shard of the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nft_megatron.config.kernels import KernelsConfig
from nft_megatron.model.megatron import engine_fuses_gradients
from nft_megatron.model.policy import PolicyModel, block_spec
from nft_megatron.model.settings import Recompute, padded_vocab, transformer_config
from nft_megatron.model.tensor_overlap import open_buffers
from nft_megatron.model.topology import Topology
from nft_megatron.weights import ModelShape

NO_TOKEN_COUNT = torch.tensor(0, dtype=torch.int)
"""Second item that a loss function returns: see "The scale of gradients"."""

Chunks = list[DistributedDataParallel]
ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]]


def build_model(
    shape: ModelShape,
    topology: Topology,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = True,
    recompute: Recompute = "none",
    variable_lengths: bool = True,
    pack_tokens: int = 0,
    kernels: KernelsConfig | None = None,
) -> Chunks:
    """This rank's part of the model, with zero weights until they are loaded: ``topology.virtual_pipeline`` chunks.

    Args:
        dtype: of weights and activations. Gradients are summed in float32.
        sequence_parallel: shard activations outside attention and MLP between tensor ranks; no effect at tensor size 1.
        recompute: what the backward pass recomputes instead of storing: ``selective`` the MLPs, ``full`` whole layers.
        variable_lengths: pipeline stages exchange the length of every pack. Otherwise all packs have the same length.
        pack_tokens: that length, over all context ranks; read only for ``kernels.overlap_tensor_communication``.
        kernels: section ``kernels`` of the configuration; None: its defaults.

    Raises:
        UserError: naming ``parallel.tensor`` or ``parallel.pipeline`` if the model cannot be split that way.
    """
    config = transformer_config(shape, topology, dtype, sequence_parallel, recompute, variable_lengths, kernels)
    if config.deterministic_mode and topology.device.type == "cuda":
        torch.use_deterministic_algorithms(True)  # not with warn_only, under which torch's flash attention ignores it
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if config.tp_comm_overlap:
        open_buffers(topology, pack_tokens, shape.hidden_size, dtype)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=topology.device.type == "cuda",
        overlap_param_gather=kernels is not None and kernels.overlap_parameter_gather,
    )
    chunks = [
        DistributedDataParallel(
            config=config, ddp_config=ddp_config, module=model.to(topology.device), disable_bucketing=part > 0
        )
        for part, model in enumerate(build_parts(shape, topology, config))
    ]
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks


def build_parts(shape: ModelShape, topology: Topology, config: TransformerConfig) -> Iterator[PolicyModel]:
    """The chunks of :func:`build_model` before they get gradient buffers."""
    first, last = topology.is_first_stage, topology.is_last_stage
    for part in range(topology.virtual_pipeline):
        number = part if topology.virtual_pipeline > 1 else None
        with engine_fuses_gradients(config):
            model = PolicyModel(
                shape,
                config=config,
                transformer_layer_spec=block_spec(config, number),
                vocab_size=padded_vocab(shape, topology),
                max_sequence_length=shape.max_positions,
                pre_process=first and part == 0,
                post_process=last and part == topology.virtual_pipeline - 1,
                share_embeddings_and_output_weights=shape.tied_embeddings,
                position_embedding_type="rope" if config.transformer_impl == "transformer_engine" else "none",
                rotary_base=shape.rope_theta,
                vp_stage=number,
            )
        yield model


def run_schedule(
    chunks: Chunks, forward_step: ForwardStep, micro_batches: Sequence[Any], *, num_tokens: int = 1, forward_only: bool
) -> list[Any]:
    """Megatron's pipeline schedule over ``micro_batches``; see the example at the top of this file.

    Args:
        forward_step: takes an iterator over micro-batches, from which it draws one, and a chunk.
        num_tokens: of every pack, over all its context ranks; used only if lengths do not vary.

    Returns:
        The third item of every loss function, in the order of the micro-batches; empty where the model does not end.
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=num_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def zero_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Zero all gradients. Call it before every update."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
