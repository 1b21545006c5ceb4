"""What test_recorded_runs.py runs in a process whose working directory is the recorded run's."""

import os
from pathlib import Path

from nft_megatron.cli.main import main
from nft_megatron.rollout.embedded import EmbeddedEngine


def in_folder(folder: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    main(arguments)


def resume_without_asking(folder: Path) -> None:
    """Continue training; the engine may answer held-out questions (greedily) and the probe, but no training question."""
    generate = EmbeddedEngine.generate

    def refuse_training(self, requests, sampling, *arguments, **options):
        assert sampling.temperature == 0 or len(requests[0].seeds) == 1, "a question of the finished round was asked again"
        return generate(self, requests, sampling, *arguments, **options)

    EmbeddedEngine.generate = refuse_training
    in_folder(folder, ["train", "config.yaml"])
