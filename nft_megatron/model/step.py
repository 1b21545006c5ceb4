"""One rank's part of a rollout step: old log-probs, then the updates (lines 12-20 of Algorithm 1).

The gradient is that of Σ_tokens ω·ℓ / D with one D for the whole mini-batch (contract 1). Each token carries its weight ω/D
from the start, and gradients are plain sums over micro-batches and data-parallel ranks, so no layout can change the scale.

Suffix ``_N``: one entry per loss token of a micro-batch; ``H`` hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nft_megatron.algorithms import Algorithm, build_algorithm
from nft_megatron.batching.batch import MicroBatch, MiniBatch
from nft_megatron.batching.minibatches import BatchingRules
from nft_megatron.model import objective
from nft_megatron.model.build import NO_TOKEN_COUNT, Chunks, run_schedule, zero_gradients
from nft_megatron.model.checkpoint import Snapshot, load_checkpoint, take_snapshot
from nft_megatron.model.export import hf_tensors
from nft_megatron.model.gradient_cosine import gradient_cosine, gradient_shards
from nft_megatron.model.gradient_export import hf_gradients
from nft_megatron.model.lm_head import Entropy
from nft_megatron.model.logprob import token_logprobs
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.packed_sequences import attention_kind, pack_sequences
from nft_megatron.model.policy import lm_head_weight
from nft_megatron.model.policy_sums import POLICY_WIDTH, PolicySums, needs_entropy, policy_row
from nft_megatron.model.shared_reading import read_minibatches
from nft_megatron.model.token_loss import token_loss_sum
from nft_megatron.model.topology import Topology
from nft_megatron.model.update_stats import UpdateStats, summarize
from nft_megatron.observe.metrics import MetricsRow
from nft_megatron.observe.rate_buckets import RateBuckets, bucket_sums
from nft_megatron.weights import ModelShape

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, object]]


@dataclass(frozen=True)
class StepBatch:
    """A prepared rollout step. ``measured``: by the pass for old log-probs; the updates measure what it left out.

    >>> StepBatch(minibatches=(), measured=PolicySums()).metrics["trained_tokens"]
    0
    """

    minibatches: tuple[MiniBatch, ...]
    measured: PolicySums

    @property
    def metrics(self) -> MetricsRow:
        """The metrics of the answers, of all ranks, as far as they are measured."""
        num_tokens = sum(minibatch.num_tokens for minibatch in self.minibatches)
        return {"trained_tokens": num_tokens} | self.measured.metrics(num_tokens)


@dataclass(frozen=True, eq=False)
class Trainer:
    """This rank's part of the model and its training. Every method is a collective over all ranks.

    ``importance_cap``: largest importance weight of a token against the engine's own distribution; None: no such weights.
    ``gradient_cosine_every``: steps between measurements of the angle between gradients of right and wrong answers; 0: none.
    ``fused_lm_head``: use Triton's kernels for the LM head on CUDA.
    """

    topology: Topology
    shape: ModelShape
    chunks: Chunks
    optimizer: PolicyOptimizer
    algorithm: Algorithm
    rules: BatchingRules
    temperature: float
    importance_cap: float | None = None
    gradient_cosine_every: int = 0
    fused_lm_head: bool = True

    # ---------------------------------------------------------------------------------------------- before the updates

    def prepare(self, ledger: Path, step: int) -> StepBatch:
        """Plan the updates of ``step``, get this rank's answers from the ledger, recompute their old log-probs.

        The old log-probs come from the same packs as the updates, so that R = 1 bit for bit before the first one. Packs that
        take all of them from the engine are left out of the pass.
        """
        minibatches = read_minibatches(self.topology, ledger, step, self.algorithm, self.rules)
        micro_batches = [micro_batch for minibatch in minibatches for micro_batch in minibatch.micro_batches]
        with torch.no_grad():
            passing = [micro_batch for micro_batch in micro_batches if micro_batch.recomputes]
            recomputed = self._run_schedule(passing, self._old_logprobs, forward_only=True) if passing else []
        measured = PolicySums.of(*self._over_all([sums for _, sums in recomputed], POLICY_WIDTH))
        if self.topology.is_last_stage:
            logprobs = iter([logprob_N for logprob_N, _ in recomputed])
            micro_batches = [
                self._with_old_policy(each, next(logprobs) if each.recomputes else each.engine_logprob_N)
                for each in micro_batches
            ]
        in_order, every = iter(micro_batches), self.gradient_cosine_every
        return StepBatch(
            tuple(
                replace(
                    minibatch,
                    micro_batches=tuple(islice(in_order, len(minibatch.micro_batches))),
                    measures_cosine=number == 0 and every > 0 and step % every == 0,
                    measures_mismatch=number == 0 and self.rules.old_logprobs == "engine",
                )
                for number, minibatch in enumerate(minibatches)
            ),
            measured,
        )

    def _with_old_policy(self, micro_batch: MicroBatch, logprob_N: Tensor) -> MicroBatch:
        """``micro_batch`` with its π_old, and its weights times min(π_old / π_engine, cap) if a cap is set.

        ``logprob_N``: under the current weights, which are π_old but for older answers.
        """
        engine_N = micro_batch.engine_logprob_N
        old_logprob_N = torch.where(micro_batch.is_stale_N, engine_N, logprob_N)
        weight_N = micro_batch.weight_N
        if self.importance_cap is not None:
            weight_N = weight_N * (old_logprob_N - engine_N).exp().clamp(max=self.importance_cap)
        return replace(micro_batch, old_logprob_N=old_logprob_N, weight_N=weight_N)

    def mismatch(self, ledger: Path, step: int) -> MetricsRow:
        """How far the log-probs of ``ledger``'s answers are from this model's, in the metrics of the step after ``step`` − 1.

        Covers right answers of the current weights, version ``step`` − 1. Any loss works that leaves none of them out, whatever
        the other answers to the question are. See :class:`MismatchSums` for the metrics.
        """
        rules = replace(self.rules, num_updates=1, old_logprobs="recompute")
        of_every_answer = replace(self, algorithm=build_algorithm("rft"), rules=rules)
        return of_every_answer.prepare(ledger, step).metrics

    def _old_logprobs(self, micro_batch: MicroBatch, chunk: torch.nn.Module) -> LossFunction:
        def function(hidden_NH: Tensor) -> tuple[Tensor, Tensor, object]:
            targets_N = micro_batch.packed.targets_N
            logprob_N, entropy_N = token_logprobs(hidden_NH, lm_head_weight(chunk), targets_N, entropy="value", **self._head)
            assert entropy_N is not None
            sums = policy_row(micro_batch, logprob_N, entropy_N, in_update=False, measures_mismatch=True)
            return hidden_NH.new_zeros(()), NO_TOKEN_COUNT, (logprob_N, sums)

        return function

    # ---------------------------------------------------------------------------------------------------- the updates

    def update(self, minibatch: MiniBatch) -> UpdateStats:
        """One optimizer step on the mini-batch. If loss or gradient is not finite, it is counted but not applied."""
        positive = self._positive_gradient(minibatch) if minibatch.measures_cosine else None
        zero_gradients(self.chunks)
        loss = functools.partial(self._loss, measures_mismatch=minibatch.measures_mismatch)
        sums = self._run_schedule(minibatch.micro_batches, loss, forward_only=False)
        cosine = None
        if positive is not None:
            cosine = gradient_cosine(positive, gradient_shards(self.optimizer), self.topology)
        width = 6 + len(RateBuckets().sums)
        numbers = self._over_all(sums, width + POLICY_WIDTH, largest=(0, width))
        largest, loss_positive, loss_negative, kl, clamped, wrong, *buckets = numbers[:width]
        applied = self.optimizer.step(loss_positive + loss_negative)
        return UpdateStats(
            loss_positive=loss_positive,
            loss_negative=loss_negative,
            kl_sum=kl,
            num_clamped=clamped,
            num_wrong_tokens=wrong,
            num_tokens=minibatch.num_tokens,
            log_ratio_max=largest,
            buckets=RateBuckets(tuple(buckets)),
            gradient_cosine=cosine,
            applied=applied,
            policy=PolicySums.of(*numbers[width:]),
        )

    def _positive_gradient(self, minibatch: MiniBatch) -> list[Tensor]:
        """This rank's shards of the gradient of right answers alone."""
        zero_gradients(self.chunks)
        right_only = functools.partial(self._loss, right_only=True)
        self._run_schedule(minibatch.micro_batches, right_only, forward_only=False)
        return gradient_shards(self.optimizer)

    def _loss(
        self, micro_batch: MicroBatch, chunk: torch.nn.Module, *, right_only: bool = False, measures_mismatch: bool = False
    ) -> LossFunction:
        """One pass through the LM head if the loss is a sum over tokens, else two.

        ``right_only``: the gradient does not flow through the log-probs of wrong answers.
        """
        algorithm, context_group = self.algorithm, self.topology.context_group

        def through(logprob_C: Tensor, tokens: slice) -> Tensor:
            return logprob_C.where(micro_batch.is_correct_N[tokens], logprob_C.detach()) if right_only else logprob_C

        def loss_of(logprob_C: Tensor, tokens: slice) -> Tensor:
            return objective.token_loss(algorithm, micro_batch, through(logprob_C, tokens), tokens).loss_N

        def function(hidden_NH: Tensor) -> tuple[Tensor, Tensor, object]:
            weight_VH, targets_N = lm_head_weight(chunk), micro_batch.packed.targets_N
            head = self._head | {"main_grad_VH": weight_VH.main_grad}  # type: ignore[attr-defined]
            if algorithm.coupling == "token":
                entropy_N = torch.zeros_like(micro_batch.engine_logprob_N) if needs_entropy(micro_batch) else None
                loss, logprob_N = token_loss_sum(hidden_NH, weight_VH, targets_N, loss_of, entropy_N=entropy_N, **head)
            else:
                entropy: Entropy = "value" if needs_entropy(micro_batch) else "none"
                logprob_N, entropy_N = token_logprobs(hidden_NH, weight_VH, targets_N, entropy=entropy, **head)
                trained_N = through(logprob_N, slice(None))
                loss = objective.sequence_loss(algorithm, micro_batch, trained_N, context_group).sum()
            logprob_N = logprob_N.detach()
            policy = policy_row(micro_batch, logprob_N, entropy_N, in_update=True, measures_mismatch=measures_mismatch)
            return loss, NO_TOKEN_COUNT, torch.cat((self._sums(micro_batch, logprob_N), policy))

        return function

    def _sums(self, micro_batch: MicroBatch, logprob_N: Tensor) -> Tensor:
        """The largest log R, the terms that :class:`UpdateStats` sums, in its order, and those by r̂; float64."""
        measured = objective.measure(self.algorithm, micro_batch, logprob_N, self.topology.context_group)
        assert micro_batch.old_logprob_N is not None
        delta_N = logprob_N - micro_batch.old_logprob_N
        sums = [
            delta_N.max() if len(delta_N) else delta_N.new_full((), -torch.inf),
            measured.right,
            measured.wrong,
            # KL(π_old ‖ π_θ) from answers of π_old, each term ≥ 0: R − 1 − log R
            (torch.expm1(delta_N.clamp(max=20)) - delta_N).sum(),
            measured.clamped_N.float().sum(),
            (~micro_batch.is_correct_N).float().sum(),
        ]
        buckets = bucket_sums(
            delta_N, micro_batch.is_correct_N, micro_batch.correct_rate_N, measured.clamped_N, measured.gradient_N
        )
        return torch.cat((torch.stack(sums).double(), buckets))

    def summary(self, batch: StepBatch, updates: Sequence[UpdateStats]) -> MetricsRow:
        """The metrics of a rollout step and all its updates."""
        measured = sum((update.policy for update in updates), start=batch.measured)
        return replace(batch, measured=measured).metrics | summarize(updates, self.optimizer.num_updates)

    def gradients(self, minibatch: MiniBatch) -> Iterator[tuple[str, Tensor]]:
        """The gradient of the mini-batch's loss at the current weights, as :func:`.hf_gradients` yields it; no update."""
        zero_gradients(self.chunks)
        self._run_schedule(minibatch.micro_batches, self._loss, forward_only=False)
        return hf_gradients(self.chunks, self.topology, self.shape)

    # ---------------------------------------------------------------------------------------------------- between steps

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by Hugging Face name, full tensors on rank 0; every rank must exhaust the iterator."""
        return hf_tensors(self.chunks, self.topology, self.shape)

    def snapshot(self, step: int) -> Snapshot:
        """A snapshot of model, optimizer and generators, to be written."""
        return take_snapshot(self.chunks, self.optimizer, self.topology, {"step": step})

    def load(self, folder: Path) -> int:
        """Restore a written :meth:`snapshot`, under any layout, and return its step."""
        return load_checkpoint(folder, self.chunks, self.optimizer, self.topology)["step"]

    # ----------------------------------------------------------------------------------------------------- both passes

    def _run_schedule(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_of: Callable[[MicroBatch, torch.nn.Module], LossFunction],
        *,
        forward_only: bool,
    ) -> list:
        """Megatron's pipeline schedule over ``micro_batches``; returns the loss functions' results on the last stage."""

        config = self.chunks[0].config
        attention = attention_kind(config.transformer_impl, config.params_dtype, self.topology.device)

        def forward_step(data: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, LossFunction]:
            micro_batch = next(data)
            packed, topology = micro_batch.packed, self.topology
            place = topology.context_rank, topology.context_size
            sequences = pack_sequences(packed.lengths, topology.device, *place, attention)
            output = chunk(packed.input_ids_T[None], packed.position_ids_T[None], sequences, packed.loss_positions_N)
            return output, loss_of(micro_batch, chunk)

        num_tokens = self.rules.token_budget
        return run_schedule(self.chunks, forward_step, micro_batches, num_tokens=num_tokens, forward_only=forward_only)

    @property
    def _head(self) -> dict[str, Any]:
        """Arguments of every pass through the LM head."""
        return {
            "temperature": self.temperature,
            "vocab_size": self.shape.vocab_size,
            "group": self.topology.tensor_group,
            "fused": self.fused_lm_head,
        }

    def _over_all(self, rows: Sequence[Tensor], width: int, largest: Sequence[int] = (0,)) -> list[float]:
        """The rows of all micro-batches and ranks added up, but of the columns ``largest`` the largest number.

        Waits for the device once.
        """
        greatest, own = [-torch.inf] * width, [0.0] * width
        if rows:  # other stages have none
            table = torch.stack(list(rows))
            greatest, own = torch.stack((table.amax(0), table.sum(0))).tolist()
        assert len(own) == width, (len(own), width)
        numbers = self._reduce(own, dist.ReduceOp.SUM)
        of_all = self._reduce([greatest[column] for column in largest], dist.ReduceOp.MAX)
        for column, number in zip(largest, of_all, strict=True):
            numbers[column] = number
        return numbers

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        """Sum over all ranks, counting each share of the tokens once: on the last stage's first tensor rank."""
        counts = self.topology.is_last_stage and self.topology.tensor_rank == 0
        neutral = 0.0 if operation == dist.ReduceOp.SUM else -torch.inf
        vector = torch.tensor(list(values) if counts else [neutral] * len(values), dtype=torch.float64)
        dist.all_reduce(vector, op=operation, group=self.topology.host_group)
        return vector.tolist()
