"""Which rows of which Hugging Face tensors make up a Megatron-Core parameter, and the reverse. Pure: no files, no groups.

Every layout that Megatron uses (interleaved QKV, gate above up, a shard of the vocabulary) is a list of *slices*: along one
axis, the parameter is a sequence of contiguous slices of Hugging Face tensors. So each entry states its slices once, for any
tensor-parallel rank, and loading, export, conversion and gradients all follow from that one statement.

    linear_qkv (2 query groups of 2 heads)   q0 q1 k0 v0 | q2 q3 k1 v1         tp 2 cuts at the bar
    linear_fc1                               gate | up                         tp 2: gate_0 up_0, gate_1 up_1

Names number layers and experts across the whole model: ``decoder.layers.7.mlp.experts.local_experts.5.linear_fc1.weight``
belongs to expert 5 of the model, on whichever rank. Expert-parallel ranks hold equal consecutive ranges of the experts, and
tensor ranks split each expert as they split a dense MLP (Megatron's default: expert tensor parallel size = tensor parallel
size).

Shapes in comments: H hidden, V vocabulary, d head dimension, g query groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch


class Layout(Enum):
    """How the slices of an entry are ordered."""

    WHOLE = "whole"  # the same on every tensor rank
    SPLIT = "split"  # sources stacked, each cut into tp equal parts: one source is a plain shard, two are gate | up
    QKV = "qkv"  # sources q, k, v, interleaved by query group; whole groups per rank
    VOCABULARY = "vocabulary"  # rows of the padded vocabulary; those past the real one are padding


@dataclass(frozen=True)
class Piece:
    """Rows ``start:stop`` (along the entry's axis) of source tensor number ``source``.

    >>> Piece(source=1, start=0, stop=512)
    Piece(source=1, start=0, stop=512)
    """

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Entry:
    """One Megatron-Core parameter and the Hugging Face tensors it consists of.

    ``name`` is Megatron's name with the layer numbered across the whole model; ``sources`` and ``shapes`` are the Hugging Face
    names and full shapes; ``axis`` is the one along which the sources are concatenated and split over ranks. ``num_groups`` is
    for ``QKV``. ``expert`` is the number of the parameter's expert, None outside experts. ``exported`` is False for a second
    copy of a tensor that another entry already exports (a tied LM head).

    >>> Entry("fc1", ("gate", "up"), ((8, 4), (8, 4)), Layout.SPLIT).local_shape(tensor_size=2, padded_vocab=0)
    (8, 4)
    """

    name: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    axis: int = 0
    num_groups: int = 0
    expert: int | None = None
    exported: bool = True

    def pieces(self, tensor_size: int, tensor_rank: int, padded_vocab: int) -> tuple[Piece, ...]:
        """The slices that rank ``tensor_rank`` of ``tensor_size`` holds, in order.

        >>> qkv = Entry("qkv", ("q", "k", "v"), ((8, 4), (4, 4), (4, 4)), Layout.QKV, num_groups=2)
        >>> [(piece.source, piece.start, piece.stop) for piece in qkv.pieces(2, 1, 0)]
        [(0, 4, 8), (1, 2, 4), (2, 2, 4)]
        """
        lengths = [shape[self.axis] for shape in self.shapes]
        if self.layout is Layout.WHOLE:
            return tuple(Piece(source, 0, length) for source, length in enumerate(lengths))
        if self.layout is Layout.SPLIT:
            parts = [length // tensor_size for length in lengths]
            return tuple(Piece(source, tensor_rank * part, (tensor_rank + 1) * part) for source, part in enumerate(parts))
        if self.layout is Layout.VOCABULARY:
            part, vocab = padded_vocab // tensor_size, lengths[0]
            start, stop = tensor_rank * part, (tensor_rank + 1) * part
            return (Piece(0, min(start, vocab), min(stop, vocab)),)
        groups = self.num_groups // tensor_size
        sizes = [length // self.num_groups for length in lengths]
        return tuple(
            Piece(source, group * size, (group + 1) * size)
            for group in range(tensor_rank * groups, (tensor_rank + 1) * groups)
            for source, size in enumerate(sizes)
        )

    def local_shape(self, tensor_size: int, padded_vocab: int) -> tuple[int, ...]:
        """The shape of the parameter on each tensor rank."""
        shape = list(self.shapes[0])
        if self.layout is Layout.VOCABULARY:
            shape[self.axis] = padded_vocab // tensor_size
        else:
            total = sum(source_shape[self.axis] for source_shape in self.shapes)
            shape[self.axis] = total if self.layout is Layout.WHOLE else total // tensor_size
        return tuple(shape)


@dataclass(frozen=True)
class WeightTable:
    """All entries of a model, in the order in which Hugging Face lists its tensors.

    ``copies``: Hugging Face tensors that a folder may store although another one, whose name is given, has the same values: a
    tied LM head. They are compared, not read.

    >>> WeightTable((Entry("norm", ("model.norm.weight",), ((4,),), Layout.WHOLE),)).by_name["norm"].sources
    ('model.norm.weight',)
    """

    entries: tuple[Entry, ...]
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def by_name(self) -> Mapping[str, Entry]:
        """Entries under their Megatron names."""
        return {entry.name: entry for entry in self.entries}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model and its shape: what a complete folder contains."""
        return {
            source: shape
            for entry in self.entries
            if entry.exported
            for source, shape in zip(entry.sources, entry.shapes, strict=True)
        }


_BUFFER = re.compile(
    r"(^|\.)(rotary_(pos_)?emb\.((original_)?inv_freq|cos_cached|sin_cached)|(self_attn|attn|attention)\.bias|masked_bias|position_ids)$"
)


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is none of the model's weights but a constant that config.json implies.

    Earlier versions of transformers saved them: rotary frequencies, causal masks, position numbers.

    >>> is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq"), is_buffer("model.layers.0.self_attn.q_proj.bias")
    (True, False)
    """
    return _BUFFER.search(name) is not None


def note_on_buffers(names: Iterable[str]) -> tuple[str, ...]:
    """At most one line for the user: which stored tensors are ignored.

    >>> note_on_buffers(["masked_bias", "h.0.attn.bias"])
    ('ignored: 2 stored constants that config.json implies, such as h.0.attn.bias',)
    """
    ignored = sorted(filter(is_buffer, names))
    what = f"{len(ignored)} stored constants" if len(ignored) > 1 else "1 stored constant"
    return (f"ignored: {what} that config.json implies, such as {ignored[0]}",) if ignored else ()


def split(entry: Entry, shards: Sequence[torch.Tensor], padded_vocab: int) -> list[torch.Tensor]:
    """The Hugging Face tensors of ``entry`` from the shards of all tensor ranks, in rank order; padding is dropped.

    Returns new tensors, one per source, in the shards' dtype and device. The inverse of :func:`merge`.
    """
    full = [torch.empty(shape, dtype=shards[0].dtype, device=shards[0].device) for shape in entry.shapes]
    shards = shards[:1] if entry.layout is Layout.WHOLE else shards
    for rank, shard in enumerate(shards):
        offset = 0
        for piece in entry.pieces(len(shards), rank, padded_vocab):
            length = piece.stop - piece.start
            full[piece.source].narrow(entry.axis, piece.start, length).copy_(shard.narrow(entry.axis, offset, length))
            offset += length
    return full


def merge(entry: Entry, sources: Sequence[torch.Tensor], tensor_size: int, tensor_rank: int, padded_vocab: int) -> torch.Tensor:
    """The parameter of one tensor rank from full Hugging Face tensors; rows of vocabulary padding are zero.

    >>> gate_up = Entry("fc1", ("gate", "up"), ((4,), (4,)), Layout.SPLIT)
    >>> merge(gate_up, [torch.arange(4), torch.arange(10, 14)], 2, 1, 0).tolist()
    [2, 3, 12, 13]
    """
    pieces = [
        sources[piece.source].narrow(entry.axis, piece.start, piece.stop - piece.start)
        for piece in entry.pieces(tensor_size, tensor_rank, padded_vocab)
    ]
    return fill(torch.zeros(entry.local_shape(tensor_size, padded_vocab), dtype=sources[0].dtype), pieces, entry.axis)


def fill(parameter: torch.Tensor, pieces: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Copy ``pieces`` in sequence along ``axis`` into ``parameter`` and zero the rest (vocabulary padding)."""
    offset = 0
    for piece in pieces:
        parameter.narrow(axis, offset, piece.shape[axis]).copy_(piece)
        offset += piece.shape[axis]
    parameter.narrow(axis, offset, parameter.shape[axis] - offset).zero_()
    return parameter
