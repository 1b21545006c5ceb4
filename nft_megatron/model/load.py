"""Hugging Face weights straight into the model: every rank reads only the rows that it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nft_megatron.model.build import padded_vocab, policy_model
from nft_megatron.model.topology import Topology
from nft_megatron.weights import ModelShape, weight_table
from nft_megatron.weights.hf_reader import HFReader
from nft_megatron.weights.table import Entry, fill

# The local spec has norms as modules of their own, Transformer Engine fuses them into the linear layer that follows. Tables use
# the fused names, as Megatron's checkpoints do (models/gpt/gpt_layer_specs.py, sharded_state_dict_keys_map).
_FUSED_NAMES = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
)


def table_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under the names of the weight table: layers counted over the whole model."""
    for chunk in chunks:
        model = policy_model(chunk)
        first_layer = model.decoder.layers[0].layer_number - 1
        for name, parameter in model.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, number, rest = name.split(".", 3)
                name = f"decoder.layers.{first_layer + int(number)}.{rest}"
            for local, fused in _FUSED_NAMES:
                name = name.replace(local, fused)
            yield name, parameter


@torch.no_grad()
def load_weights(chunks: Sequence[torch.nn.Module], topology: Topology, shape: ModelShape, folder: Path | str) -> None:
    """Fill every parameter from the Hugging Face folder, cast to the parameters' dtype. Call it before making the optimizer.

    Raises:
        UserError: for a folder without weights, or whose tensors are missing, unexpected or of another shape.
    """
    table = weight_table(shape)
    entries = table.by_name
    rows = padded_vocab(shape, topology)
    with HFReader(Path(folder)) as reader:
        reader.check(table)
        for name, parameter in table_parameters(chunks):
            entry: Entry = entries[name]
            assert parameter.shape == entry.local_shape(topology.tensor_size, rows), name
            pieces = [
                reader.read(entry.sources[piece.source], entry.axis, piece.start, piece.stop)
                for piece in entry.pieces(topology.tensor_size, topology.tensor_rank, rows)
            ]
            fill(parameter, pieces, entry.axis)
