"""Where a run writes, and that nothing it reads lies there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from nft_megatron.base.own_folder import ForeignFolderError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.config.schema import Config


def weights_folder(config: Config) -> Path:
    """The folder of the weights' versions, which no other run writes to or deletes from.

    Outside the run folder it is one of the run's own in ``fleet.weights_dir``, so that runs may share that.
    """
    run = config.run_dir.resolve()
    folder = (config.fleet.weights_dir or run / "weights").resolve()
    if folder != run and folder.is_relative_to(run):
        return folder
    return folder / f"{run.name}-{hashlib.sha256(bytes(run)).hexdigest()[:8]}"


def check_places(config: Config) -> None:
    """Raise :class:`ForeignFolderError` if the run would write to a folder it reads from, or read from one it writes to."""
    run = config.run_dir.resolve()
    written = [("run_dir", folder.resolve()) for folder in RunFolder(run).folders]
    written += [("run_dir", (run / name).resolve()) for name in ("fleet", "slurm")]
    written.append(("fleet.weights_dir", weights_folder(config)))
    for read, place in _read(config):
        for field, folder in written:
            if folder.is_relative_to(place) or (folder != run and place.is_relative_to(folder)):
                value = config.run_dir if field == "run_dir" else folder
                where = "is" if run == place else "would write into" if folder.is_relative_to(place) else "contains"
                problem = f"{where} {read} = {place}"
                raise ForeignFolderError(field, value, problem, "choose a folder that holds nothing but this run")


def _read(config: Config) -> Iterator[tuple[str, Path]]:
    yield "model.path", config.model.path.resolve()
    for path in config.data.train:
        yield "data.train", path.resolve()
    for path in config.evaluate.data:
        yield "evaluate.data", path.resolve()
