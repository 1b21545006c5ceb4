"""A step's answers from its ledger: every rank reads a part of the file, and sends each answer to the ranks that train on it.

The answers that a data-parallel rank trains on lie all over the file, a few in nearly every row group. If each rank read its
own, it would read, check and decode the whole file. So the row groups are dealt out over all ranks, each read once in the
world, and one exchange in host memory follows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nft_megatron.algorithms import Algorithm
from nft_megatron.base.errors import UserError
from nft_megatron.base.records import AnswerTokens
from nft_megatron.batching.batch import MiniBatch, StepPlan, pack_minibatches, plan_step
from nft_megatron.batching.minibatches import BatchingRules
from nft_megatron.data.ledger import open_ledger
from nft_megatron.model.control import together
from nft_megatron.model.topology import Topology


def read_minibatches(
    topology: Topology, ledger: Path, step: int, algorithm: Algorithm, rules: BatchingRules
) -> list[MiniBatch]:
    """The mini-batches of ``step`` as this rank sees them. A collective of all ranks.

    Raises:
        UserError: on every rank, if the ledger is missing or damaged, or a sequence exceeds the token budget.
    """

    def read_part() -> tuple[StepPlan, np.ndarray, dict[int, AnswerTokens]]:
        with open_ledger(ledger) as opened:
            plan = plan_step(opened.index(), step, algorithm, rules)
            trained = np.sort(np.concatenate([plan.positions_of(rank) for rank in range(rules.num_ranks)]))
            reader_A = np.full(len(plan.index.row), -1)
            reader_A[trained] = opened.share_out(plan.index.row[trained], topology.world_size)
            own = np.flatnonzero(reader_A == topology.rank)
            tokens = dict(zip(own.tolist(), opened.tokens(plan.index.row[own]), strict=True))
        _check_lengths(ledger, plan, tokens)
        return plan, reader_A, tokens

    plan, reader_A, tokens = together(topology, read_part, is_short=True)
    tokens = _exchange(topology, plan, reader_A, tokens)
    place = topology.data_rank, topology.context_rank, topology.device
    return together(topology, lambda: pack_minibatches(plan, tokens, algorithm, rules, *place), is_short=True)


def _check_lengths(ledger: Path, plan: StepPlan, tokens: dict[int, AnswerTokens]) -> None:
    """Every rank derives from the lengths what it sends and receives, so they must be true."""
    for position, answer in tokens.items():
        expected = int(plan.index.prompt_length[position]), *[int(plan.index.answer_length[position])] * 2
        if expected != tuple(map(len, answer)):
            problem = f"is damaged: row {plan.index.row[position]} does not have as many tokens as it says"
            raise UserError("ledger", ledger, problem, "delete it and run again to collect its step anew")


def _exchange(
    topology: Topology, plan: StepPlan, reader_A: np.ndarray, tokens: dict[int, AnswerTokens]
) -> dict[int, AnswerTokens]:
    """The answers that this rank trains on, of those that each rank has read.

    ``reader_A``: the rank that has read an answer, −1 if none has. Answers travel as int32: prompt, answer, log-probs.
    """
    data_ranks: list[int] = [-1] * topology.world_size
    dist.all_gather_object(data_ranks, topology.data_rank, group=topology.host_group)
    positions_of = [plan.positions_of(rank) for rank in range(topology.data_size)]
    length_A = plan.index.prompt_length.astype(np.int64) + 2 * plan.index.answer_length.astype(np.int64)

    def joined(data_rank: int) -> np.ndarray:
        own = [tokens[position] for position in positions_of[data_rank].tolist() if position in tokens]
        parts = [part.view(np.int32) for answer in own for part in answer]
        return np.concatenate([np.empty(0, dtype=np.int32), *parts])

    parcels = [joined(rank) for rank in range(topology.data_size)]
    sent = torch.from_numpy(np.concatenate([parcels[rank] for rank in data_ranks]))
    expected = positions_of[topology.data_rank]
    arriving = [expected[reader_A[expected] == rank] for rank in range(topology.world_size)]
    num_received = [int(length_A[positions].sum()) for positions in arriving]
    received = torch.empty(sum(num_received), dtype=torch.int32)
    dist.all_to_all_single(received, sent, num_received, [len(parcels[rank]) for rank in data_ranks], group=topology.host_group)
    found, start, numbers = {}, 0, received.numpy()
    for position in np.concatenate(arriving).tolist():
        answer = start + int(plan.index.prompt_length[position])
        logprobs, stop = answer + int(plan.index.answer_length[position]), start + int(length_A[position])
        found[position] = AnswerTokens(numbers[start:answer], numbers[answer:logprobs], numbers[logprobs:stop].view(np.float32))
        start = stop
    return found
