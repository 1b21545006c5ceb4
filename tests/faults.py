"""Faults that the real parts don't produce on demand."""

from unittest import mock

from nft_megatron.cli import main
from nft_megatron.model.step import Trainer


def train_with_broken_update(config: str) -> None:
    """``nft-megatron train`` whose second update raises."""
    update, calls = Trainer.update, []

    def broken(self, minibatch):
        calls.append(minibatch)
        if len(calls) == 2:
            raise RuntimeError("the second update broke")
        return update(self, minibatch)

    with mock.patch.object(Trainer, "update", broken):
        main(["train", config])
