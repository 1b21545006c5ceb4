"""π ← π_θ⁺: the trained weights as one stream of Hugging Face tensors, to the engine or into a folder."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from nft_megatron.base.atomic_io import atomic_folder
from nft_megatron.model.control import on_main, together
from nft_megatron.model.step import Trainer
from nft_megatron.rollout.engine import Engine
from nft_megatron.weights.hf_writer import write_hf_folder

Stream = Iterable[tuple[str, torch.Tensor]]
T = TypeVar("T")


@dataclass(frozen=True)
class WeightSync:
    """Every method is called on all ranks; ``engine`` is rank 0's, None elsewhere."""

    trainer: Trainer
    engine: Engine | None
    model_folder: Path

    def publish(self, version: int) -> str | None:
        """Give the engine the current weights under ``version``. Returns their fingerprint on rank 0."""
        engine = self.engine
        return self._send(lambda tensors: engine.load(tensors, version) if engine is not None else None)

    def export(self, folder: Path) -> None:
        """Write the current weights as a Hugging Face model folder, completely or not at all."""

        def write(tensors: Stream) -> None:
            with atomic_folder(folder) as temporary:
                write_hf_folder(temporary, tensors, self.model_folder)

        if not on_main(self.trainer.topology, folder.exists):
            self._send(write)

    def _send(self, sink: Callable[[Stream], T]) -> T | None:
        """Feed the stream to ``sink`` on rank 0; a failure there is raised on every rank."""

        def feed() -> T | None:
            stream = self.trainer.hf_tensors()
            try:
                return sink(stream) if self.trainer.topology.is_main else None
            finally:
                deque(stream, maxlen=0)  # the other ranks are in the stream's collectives: participate to the end

        return together(self.trainer.topology, feed)
