"""The part of weights and optimizer state that one rank alone holds or updates, as boxes of the whole model's tensors.

The distributed optimizer lays parameters end to end in buckets and gives each rank of the replica group an equal range of every
bucket, in which it alone keeps master weights and moments and updates the weights. So the ranks' ranges are the whole model,
once. A range of a matrix is at most three boxes: the end of a row, whole rows, the start of a row. As boxes they can be stored
without asking other ranks, and read under any layout.

Megatron's own format with this property, ``fully_sharded_model_space``, describes ranges that its ``ShardedTensor`` now refuses
(dist_checkpointing/mapping.py:130); ``fully_reshardable`` gathers, and ``dp_reshardable`` is bound to the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_MASTER, _MOMENTS = "param", ("exp_avg", "exp_avg_sq")
_PREFIX = "optimizer.state"


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements ``start`` to ``stop`` of a row-major array, as offsets and sizes of boxes, in order.

    >>> list(boxes((4, 5), 3, 17))
    [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    >>> list(boxes((4, 5), 6, 8)), list(boxes((20,), 6, 8)), list(boxes((4, 5), 6, 6))
    ([((1, 1), (1, 2))], [((6,), (2,))], [])
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        for offsets, sizes in boxes(shape[1:], start - last * row, stop - last * row):
            yield (last, *offsets), (1, *sizes)
        return
    for offsets, sizes in boxes(shape[1:], start - (first - 1) * row, row) if start < first * row else ():
        yield (first - 1, *offsets), (1, *sizes)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    for offsets, sizes in boxes(shape[1:], 0, stop - last * row):
        yield (last, *offsets), (1, *sizes)


def parameter_shards(optimizers: Sequence[DistributedOptimizer], model: Mapping[str, Any]) -> list[ShardedTensor]:
    """This rank's part of weights, master weights and moments. Their data are the tensors themselves, so that reading into them
    restores them; float32 weights are their own masters.

    ``model``: sharded states of the chunks, whose tensors are the parameters themselves.
    """
    parts: dict[Tensor, list[ShardedTensor]] = {}
    for entry in nested_values(model):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            parts[entry.data] = list(nested_values([entry.build() if isinstance(entry, ShardedTensorFactory) else entry]))
    shards: list[ShardedTensor] = []
    for optimizer in optimizers:
        for parameter, start, stop in _ranges(optimizer):
            weight = parameter.detach().view(-1)[start:stop]
            shards += _boxes_of(parameter, parts[parameter], start, stop, weight, "")
            for name, tensor in _state(optimizer, parameter, weight).items():
                shards += _boxes_of(parameter, parts[parameter], start, stop, tensor, f"{_PREFIX}.{name}.")
    return shards


def _ranges(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, int, int]]:
    """Parameters of which this rank updates elements, and which."""
    for of_buffer in optimizer.gbuf_ranges:
        for buckets in of_buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _state(optimizer: DistributedOptimizer, parameter: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The tensors themselves. Transformer Engine's Adam, where moments are bfloat16, also holds the master weights."""
    group, position = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][position]
    state = optimizer.optimizer.state[main]
    master = state.get("master_param", main).detach()
    moments = {name: state[name].detach() for name in _MOMENTS}
    return moments if master.dtype == weight.dtype else {_MASTER: master} | moments


def _boxes_of(
    parameter: Tensor, parts: Sequence[ShardedTensor], start: int, stop: int, data: Tensor, prefix: str
) -> Iterator[ShardedTensor]:
    """``data``, a vector for elements ``start`` to ``stop`` of ``parameter``, as boxes of the whole model's tensors.

    ``parts``: where the parameter's elements are in those: all of it, or gate and up by themselves.
    """
    for part in parts:
        whole = part.data
        assert whole.is_contiguous() and len(part.replica_id) == 3, part
        first = whole.storage_offset() - parameter.storage_offset()  # of the parameter's elements, in this part
        position = max(start - first, 0)
        for offsets, sizes in boxes(whole.shape, position, min(stop - first, whole.numel())):
            count, leading = math.prod(sizes), part.prepend_axis_num
            begin = first + position - start
            local = (*[1] * leading, *sizes)
            within = (*[0] * leading, *offsets)
            yield ShardedTensor(
                prefix + part.key,
                data[begin : begin + count].view(local),
                data.dtype,
                local,
                part.global_shape,
                tuple(offset + more for offset, more in zip(part.global_offset, within, strict=True)),
                axis_fragmentations=None,  # boxes form no regular grid
                replica_id=(*part.replica_id[:2], 0),  # tensor and pipeline copies remain; this data rank holds it alone
                allow_shape_mismatch=part.allow_shape_mismatch,
            )
            position += count
