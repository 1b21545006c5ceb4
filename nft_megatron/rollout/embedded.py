"""The embedded engine: a transformers model that generates answers on the CPU, next to the trainer.

It needs no server and no GPU, so it suits laptops, tests and the quickstart; a fleet of vLLM servers implements the same
protocol for models of real size.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nft_megatron.base.records import Completion, Request, Sampling
from nft_megatron.rollout.engine import EngineFault, check_requests
from nft_megatron.rollout.pool import WorkerPool
from nft_megatron.weights import ModelShape

if TYPE_CHECKING:
    from nft_megatron.rollout.decode import Decoder


class EmbeddedEngine:
    """``Engine`` for the model in ``model_folder``. Reads its ``config.json``, and its tokenizer for stop texts; no weights.

    ``shape`` bounds the requests.

    ``num_processes`` 0 generates in this process on torch's own threads; 1 or more start that many workers of ``threads``
    threads each, in the background. Each decodes ``batch_size`` answers at a time in ``dtype``; log-probs are always float32.
    ``load_seconds`` limits how long a worker may take to start or to load weights, ``answer_seconds`` how long it may be silent
    while it generates; neither applies with ``num_processes`` 0.

    The same requests give the same tokens for every ``num_processes`` and ``batch_size``, unless the rounding of logits, which
    depends on a batch's shape, moves a draw across the boundary between two tokens. The same call repeats bit for bit; to
    guarantee this, the answers to an abandoned request are still generated, then discarded.
    """

    overlaps = False

    def __init__(
        self,
        model_folder: Path | str,
        shape: ModelShape,
        *,
        num_processes: int,
        batch_size: int,
        threads: int = 1,
        dtype: torch.dtype = torch.float32,
        load_seconds: float = 300.0,
        answer_seconds: float = 600.0,
    ) -> None:
        folder = Path(model_folder)
        self._shape = shape
        self._has_weights = False
        self._engine: Decoder | WorkerPool
        if num_processes == 0:
            from nft_megatron.rollout.decode import Decoder  # imports transformers, which only workers need otherwise

            self._engine = Decoder(folder, batch_size, dtype)
        else:
            self._engine = WorkerPool(
                folder,
                num_processes=num_processes,
                batch_size=batch_size,
                threads=threads,
                dtype=dtype,
                load_seconds=load_seconds,
                answer_seconds=answer_seconds,
            )

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        self._has_weights = False  # after a load that fails midway there are none to serve
        fingerprint = self._engine.load(tensors, version)
        self._has_weights = True
        return fingerprint

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, given_up: Container[int] = frozenset()
    ) -> Iterator[Completion]:
        if not self._has_weights:
            raise EngineFault("the embedded engine has no weights: load() them before generate()")
        check_requests(requests, sampling, self._shape.vocab_size, self._shape.max_positions)
        return _wanted(self._engine.generate(requests, sampling), requests, given_up)

    def close(self) -> None:
        self._has_weights = False
        self._engine.close()


def _wanted(answers: Iterable[Completion], requests: Sequence[Request], given_up: Container[int]) -> Iterator[Completion]:
    """Yield the answers to requests that are not given up; end once all are."""
    for completion in answers:
        if completion.request_id not in given_up:
            yield completion
        elif all(request.request_id in given_up for request in requests):
            return
