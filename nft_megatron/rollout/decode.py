"""The decode loop: continuous batching on a schedule that depends only on the answers, so repeating a call repeats every bit.

A prompt is read once, up to its last token, and its keys and values are copied into a slot for each of its answers; each answer
then starts by decoding from the prompt's last token. Slots of finished answers stay idle until an eighth of the slots are; then
the live ones are compacted and the rest are refilled from the queue. Bookkeeping stays rare and at most an eighth is wasted.

Shapes: B answers (slots in use), V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from nft_megatron.base.records import Completion, FinishReason, Request, Sampling
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.rollout.model import CausalModel
from nft_megatron.rollout.sampling import draw, stream_keys, uniforms
from nft_megatron.rollout.stopping import StopRule

_PROMPT_TOKENS = 8192  # per prefill, padding included: bounds its memory


@dataclass(frozen=True)
class _Waiting:
    """An answer whose prompt has been read into row ``source`` of ``key_values``."""

    request: Request
    index: int
    key_values: torch.Tensor
    source: int


class Decoder:
    """The engine inside one process, for requests that ``EmbeddedEngine`` has checked.

    It enforces no deadline: a worker's parent process does, and without workers there is none.
    """

    def __init__(self, model_folder: Path, batch_size: int, dtype: torch.dtype = torch.float32) -> None:
        self._folder, self._batch_size = model_folder, batch_size
        self._model = CausalModel(model_folder, dtype)
        self._version = -1

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        fingerprint = self._model.load(tensors)
        self._version = version
        return fingerprint

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        return chain.from_iterable(self.steps(requests, sampling))

    def steps(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """Like :meth:`generate`, but yield the answers that each decoding step finished as one list."""
        return _Batch(self._model, self._folder, self._batch_size, self._version, requests, sampling).run()

    def close(self) -> None:
        """Nothing to close: memory is freed with the object."""


class _Batch:
    """One call of ``generate``. Rows 0 … ``_num_rows`` − 1 of every array and of the cache are in use; some may be idle."""

    def __init__(
        self, model: CausalModel, folder: Path, batch_size: int, version: int, requests: Sequence[Request], sampling: Sampling
    ) -> None:
        self._model, self._sampling, self._version = model, sampling, version
        self._stop = StopRule(sampling, model.vocab_size, folder)
        self._unread = deque(request for request in requests if request.seeds)
        self._waiting: deque[_Waiting] = deque()
        size = min(batch_size, sum(len(request.seeds) for request in requests))
        self._slots = model.new_slots(size)
        self._num_rows = 0
        self._answer: list[_Waiting] = []
        self._live_B = np.zeros(size, dtype=bool)
        self._started_B = np.zeros(size)  # by time.perf_counter()
        self._key_B = np.zeros(size, dtype=np.uint64)
        self._count_B = np.zeros(size, dtype=np.int64)  # tokens generated
        self._position_B = np.zeros(size, dtype=np.int64)  # of the token fed to the next step
        self._last_B = np.zeros(size, dtype=np.int64)  # that token
        # Idle rows keep writing into the one column beyond the longest answer.
        self._tokens_BT = np.zeros((size, sampling.max_tokens + 1), dtype=np.int32)
        self._logprobs_BT = np.zeros((size, sampling.max_tokens + 1), dtype=np.float32)
        self._arrays = (
            self._live_B,
            self._started_B,
            self._key_B,
            self._count_B,
            self._position_B,
            self._last_B,
            self._tokens_BT,
            self._logprobs_BT,
        )

    def run(self) -> Iterator[list[Completion]]:
        """Yield the answers that each step finished; skip steps that finished none."""
        while True:
            num_idle = self._num_rows - int(self._live_B[: self._num_rows].sum())
            if 8 * num_idle >= self._num_rows:
                self._compact()
                self._refill()
                if self._num_rows == 0:
                    return
            if finished := self._step():
                yield finished

    def _compact(self) -> None:
        """Move the live rows to the front."""
        live_B = self._live_B[: self._num_rows]
        num_live = int(live_B.sum())
        targets = np.flatnonzero(~live_B[:num_live])
        sources = num_live + np.flatnonzero(live_B[num_live:])
        if len(targets):
            self._slots.move(torch.from_numpy(sources), torch.from_numpy(targets))
            for array in self._arrays:
                array[targets] = array[sources]
            for source, target in zip(sources, targets, strict=True):
                self._answer[target] = self._answer[source]
        del self._answer[num_live:]
        self._live_B[num_live:] = False
        self._num_rows = num_live

    def _refill(self) -> None:
        """Start answers in all free rows, in request order, until none are left."""
        while self._num_rows < len(self._live_B) and (self._waiting or self._unread):
            if not self._waiting:
                self._read_prompts(len(self._live_B) - self._num_rows)
            # Answers whose prompts were read together start together.
            key_values = self._waiting[0].key_values
            starting: list[_Waiting] = []
            while self._waiting and self._num_rows + len(starting) < len(self._live_B):
                starting.append(self._waiting.popleft())
            rows = slice(self._num_rows, self._num_rows + len(starting))
            self._slots.fill(rows, key_values, torch.tensor([answer.source for answer in starting]))
            self._answer += starting
            self._live_B[rows] = True
            self._started_B[rows] = time.perf_counter()
            self._key_B[rows] = stream_keys([answer.request.seeds[answer.index] for answer in starting])
            self._count_B[rows] = 0
            self._position_B[rows] = [len(answer.request.prompt_tokens) - 1 for answer in starting]
            self._last_B[rows] = [answer.request.prompt_tokens[-1] for answer in starting]
            self._num_rows = rows.stop

    def _read_prompts(self, num_answers: int) -> None:
        """Read the next prompts, enough for ``num_answers`` answers if they fit into ``_PROMPT_TOKENS``; at least one."""
        batch: list[Request] = []
        width = 1  # a one-token prompt is only padding here
        while self._unread and sum(len(request.seeds) for request in batch) < num_answers:
            wider = max(width, len(self._unread[0].prompt_tokens) - 1)
            if batch and wider * (len(batch) + 1) > _PROMPT_TOKENS:
                break
            width = wider
            batch.append(self._unread.popleft())
        tokens_PS = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, request in enumerate(batch):
            tokens_PS[row, : len(request.prompt_tokens) - 1] = torch.from_numpy(request.prompt_tokens[:-1].astype(np.int64))
        key_values = self._model.read(tokens_PS)
        for row, request in enumerate(batch):
            self._waiting.extend(_Waiting(request, index, key_values, row) for index in range(len(request.seeds)))

    def _step(self) -> list[Completion]:
        """Decode one token per row and return the answers that this finishes."""
        rows = np.arange(self._num_rows)
        live_B, count_B, position_B = self._live_B[rows], self._count_B[rows], self._position_B[rows]
        num_tokens = int(position_B[live_B].max()) + 1
        last_B = torch.from_numpy(self._last_B[rows])
        logits_BV = self._model.step(last_B, torch.from_numpy(position_B), num_tokens, self._slots)
        uniforms_B = torch.from_numpy(uniforms(self._key_B[rows], count_B))
        tokens, logprobs = draw(logits_BV, uniforms_B, self._sampling.temperature, self._sampling.top_p)
        tokens_B, logprobs_B = tokens.numpy(), logprobs.numpy()
        if not np.isfinite(logprobs_B[live_B]).all():
            raise EngineFault(f"the model's logits are not finite with the weights of version {self._version}")
        self._last_B[rows] = tokens_B
        self._tokens_BT[rows, count_B] = tokens_B
        self._logprobs_BT[rows, count_B] = logprobs_B
        self._count_B[rows] += live_B
        self._position_B[rows] += live_B
        stopped_B = self._stop.find(self._tokens_BT, count_B + 1)
        finished_B = live_B & (stopped_B | (count_B + 1 == self._sampling.max_tokens))
        self._live_B[rows] = live_B & ~finished_B
        return [self._completion(row, "stop" if stopped_B[row] else "length") for row in np.flatnonzero(finished_B).tolist()]

    def _completion(self, row: int, finish_reason: FinishReason) -> Completion:
        answer, length = self._answer[row], self._count_B[row]
        return Completion(
            request_id=answer.request.request_id,
            index=answer.index,
            tokens=self._tokens_BT[row, :length].copy(),
            logprobs=self._logprobs_BT[row, :length].copy(),
            finish_reason=finish_reason,
            weight_version=self._version,
            seconds=time.perf_counter() - self._started_B[row],
        )
