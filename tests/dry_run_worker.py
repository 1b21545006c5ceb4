"""benchmarks/dry_run.py in small, and faults planted into what its ranks would do."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from meta_worker import TINY, case

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import dry_run

CASES = {
    "tied, 16 ranks": case(TINY, 2, 2, 2, 2, 2),
    "untied, 16 ranks": case(replace(TINY, tied_embeddings=False), 2, 2, 1, 1, 4),
}


def _with(rank: int, **changes: Callable) -> Callable[[list], list]:
    """Ranks of which one has other fields, each made from its own."""

    def change(ranks: list) -> list:
        changed = {name: make(getattr(ranks[rank], name)) for name, make in changes.items()}
        return [*ranks[:rank], replace(ranks[rank], **changed), *ranks[rank + 1 :]]

    return change


FAULTS: dict[str, Callable[[list], list]] = {
    "a rank reads an answer less": _with(3, rows=lambda rows: rows[1:]),
    "a rank reads another's answers too": lambda ranks: _with(3, rows=lambda rows: np.append(rows, ranks[4].rows))(ranks),
    "a rank's packs lack a token": _with(5, num_loss_tokens=lambda number: number - 1),
    "a rank writes what another writes": lambda ranks: _with(2, plan=lambda _: ranks[0].plan)(ranks),
    "a rank writes a tensor less": _with(2, plan=lambda plan: replace(plan, items=plan.items[1:])),
    "a message is not received": lambda ranks: _with(0, messages=lambda each: each[:-1])(ranks),
    "a tensor is published twice": _with(0, published=lambda each: [*each, each[0]]),
}


def measure() -> dict[str, dict]:
    """By case: what was found, and what each fault raised (None: nothing)."""
    results = {}
    for name, (shape, layout) in CASES.items():
        ranks, lengths = dry_run.all_ranks(shape, layout, num_answers=256, mean=40.0)
        raised = {fault: _raised(plant(ranks), shape, layout, lengths) for fault, plant in FAULTS.items()}
        results[name] = {"found": dry_run.check(ranks, shape, layout, lengths), "raised": raised}
    return results


def _raised(*arguments) -> str | None:
    try:
        dry_run.check(*arguments)
    except (AssertionError, ValueError) as error:
        return str(error) or type(error).__name__
    return None
