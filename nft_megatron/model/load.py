"""Hugging Face weights straight into the model: every rank reads only the rows that it holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from nft_megatron.model.policy import policy_model
from nft_megatron.model.settings import padded_vocab
from nft_megatron.model.topology import Topology
from nft_megatron.weights import ModelShape, weight_table
from nft_megatron.weights.decoder import fused_name
from nft_megatron.weights.hf_reader import HFReader, refuse_non_finite
from nft_megatron.weights.table import Entry, fill

log = logging.getLogger(__name__)


def table_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under the names of the weight table, with layers and experts numbered across the whole model."""
    for chunk in chunks:
        model = policy_model(chunk)
        layer = model.decoder.layers[0]
        has_experts = isinstance(layer.mlp, MoELayer)
        first_expert = layer.mlp.local_expert_indices[0] if has_experts else 0
        for name, parameter in model.named_parameters():
            name = _counted_from("decoder.layers.", layer.layer_number - 1, name)
            name = _counted_from(".local_experts.", first_expert, name)
            yield fused_name(name, has_experts), parameter


def _counted_from(prefix: str, first: int, name: str) -> str:
    """``name`` with the number after ``prefix`` increased by ``first``; unchanged without that prefix.

    >>> _counted_from("decoder.layers.", 4, "decoder.layers.1.mlp.linear_fc1.weight")
    'decoder.layers.5.mlp.linear_fc1.weight'
    """
    before, found, after = name.partition(prefix)
    if not found:
        return name
    number, dot, rest = after.partition(".")
    return f"{before}{prefix}{first + int(number)}{dot}{rest}"


@torch.no_grad()
def load_weights(chunks: Sequence[torch.nn.Module], topology: Topology, shape: ModelShape, folder: Path | str) -> None:
    """Fill every parameter from the Hugging Face folder, cast to the parameters' dtype. Call it before creating the optimizer.

    Raises:
        UserError: for a folder without weights, with tensors that are missing, unexpected, misshapen or not finite, or with two
            different LM heads.
    """
    table = weight_table(shape)
    entries = table.by_name
    rows = padded_vocab(shape, topology)
    with HFReader(Path(folder)) as reader:
        notes = reader.check(table)
        if topology.is_main:
            for note in notes:
                log.warning("%s: %s", folder, note)
        for name, parameter in table_parameters(chunks):
            entry: Entry = entries[name]
            assert parameter.shape == entry.local_shape(topology.tensor_size, rows), name
            pieces = [
                reader.read(entry.sources[piece.source], entry.axis, piece.start, piece.stop)
                for piece in entry.pieces(topology.tensor_size, topology.tensor_rank, rows)
            ]
            fill(parameter, pieces, entry.axis)
            refuse_non_finite("model.path", Path(folder), " or ".join(entry.sources), parameter)
