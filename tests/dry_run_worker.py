"""benchmarks/dry_run.py in small, and faults planted into what its ranks would do."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from meta_worker import TINY, case

from nft_megatron.data import ledger

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import dry_run

SHAPE, LAYOUT = case(replace(TINY, num_layers=4), 2, 2, 2, 2, 2)
"""Tied: the last stage has a second copy of the embedding."""


def _with(rank: int, **changes: Callable) -> Callable[[list], list]:
    """Ranks of which one has other fields, each made from its own."""

    def change(ranks: list) -> list:
        changed = {name: make(getattr(ranks[rank], name)) for name, make in changes.items()}
        return [*ranks[:rank], replace(ranks[rank], **changed), *ranks[rank + 1 :]]

    return change


def _longer(items: list) -> list:
    """The last of the items whose boxes do not end their tensor's rows has one more."""
    for number in reversed(range(len(items))):
        data = items[number].tensor_data
        if len(data.size) != 3:
            continue
        first, length = data.chunk.offsets[1], data.chunk.sizes[1]
        if first + length < data.size[1]:
            sizes = torch.Size([data.chunk.sizes[0], length + 1, data.chunk.sizes[2]])
            longer = replace(items[number], tensor_data=replace(data, chunk=replace(data.chunk, sizes=sizes)))
            return [*items[:number], longer, *items[number + 1 :]]
    raise AssertionError("no such item")


FAULTS: dict[str, Callable[[list], list]] = {
    "a rank reads an answer less": _with(3, rows=lambda rows: rows[1:]),
    "a rank reads another's answers too": lambda ranks: _with(3, rows=lambda rows: np.append(rows, ranks[4].rows))(ranks),
    "a rank's packs lack a token": _with(5, num_loss_tokens=lambda number: number - 1),
    "a rank writes what another writes": lambda ranks: _with(2, plan=lambda _: ranks[0].plan)(ranks),
    "a rank writes a row of another's, too": _with(2, plan=lambda plan: replace(plan, items=_longer(plan.items))),
    "a rank writes a tensor less": _with(2, plan=lambda plan: replace(plan, items=plan.items[1:])),
    "a message is not received": lambda ranks: _with(0, messages=lambda each: each[:-1])(ranks),
    "a tensor is published twice": _with(0, published=lambda each: [*each, each[0]]),
}


def measure() -> dict:
    """What was found, and what each fault raised (None: nothing)."""
    with mock.patch.object(ledger, "_ROW_GROUP_TOKENS", 1000):
        ranks, lengths = dry_run.all_ranks(SHAPE, LAYOUT, num_answers=256, mean=40.0)
    raised = {fault: _raised(plant(ranks), SHAPE, LAYOUT, lengths) for fault, plant in FAULTS.items()}
    return {"found": dry_run.check(ranks, SHAPE, LAYOUT, lengths), "raised": raised}


def _raised(*arguments) -> str | None:
    try:
        dry_run.check(*arguments)
    except (AssertionError, ValueError) as error:
        return str(error) or type(error).__name__
    return None
