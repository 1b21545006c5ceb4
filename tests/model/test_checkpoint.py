"""Checkpoints that cannot be written or trusted. Round trips and other layouts are in test_layouts.py.

One launch of this file as a worker, which saves one checkpoint and then loads spoilt copies of it.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def messages(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What happened in each case: the error's class and text, or null."""
    folder = tmp_path_factory.mktemp("checkpoints")
    result = subprocess.run(
        [sys.executable, __file__, str(model_folder), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=150,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_before_the_first_update_a_checkpoint_round_trips(messages: dict):
    assert messages["intact"] is None
    assert messages["extra"] == {"step": 0}


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("one bit flipped", "__0_0.distcp is damaged"),
        ("truncated", "__0_0.distcp is damaged"),
        ("tensor file missing", "lacks its file __0_0.distcp"),
        ("metadata missing", "lacks its file .metadata"),
        ("common file flipped", "common.pt is damaged"),
        ("no checksums", "not a complete checkpoint"),
        ("empty folder", "not a complete checkpoint"),
    ],
)
def test_damage_is_found_before_anything_is_loaded(messages: dict, case: str, text: str):
    kind, message, changed = messages[case]
    assert kind == "DamagedCheckpointError"
    assert text in message
    assert "checkpoints/latest" in message
    assert changed == []


def test_the_checkpoint_of_another_model_is_refused(messages: dict):
    kind, message, _ = messages["another model"]
    assert kind == "UserError"
    assert "of another model" in message
    assert "model.path" in message


@pytest.mark.parametrize("space", ["100 bytes", "20000 bytes"])
def test_a_full_disk_is_an_os_error(messages: dict, space: str):
    """100 bytes: not even the common part fits. 20000: that does, the tensors don't."""
    kind, message, _ = messages[space]
    assert kind == "OSError"
    errno_and_text, filename = message.split(": ")
    assert errno_and_text == f"[Errno {errno.EFBIG}] File too large while saving a checkpoint"
    assert Path(filename.strip("'")).name == space, "the folder"


# ------------------------------------------------------------------------------------------------------------ the worker


def worker(model_folder: Path, folder: Path) -> None:
    import gc

    from nft_megatron.model.topology import init_topology, shutdown

    topology = init_topology(threads=1)
    print(json.dumps(measure(model_folder, folder, topology)))
    del topology
    gc.collect()
    shutdown()


def measure(model_folder: Path, folder: Path, topology) -> dict:
    import resource
    import shutil
    import signal
    from dataclasses import replace

    import torch

    from nft_megatron.config.schema import OptimizerConfig
    from nft_megatron.model.build import build_model
    from nft_megatron.model.checkpoint import load_checkpoint, save_checkpoint
    from nft_megatron.model.load import load_weights, table_parameters
    from nft_megatron.model.optimizer import PolicyOptimizer
    from nft_megatron.weights import read_shape

    def make(shape):
        chunks = build_model(shape, topology)
        return chunks, PolicyOptimizer(chunks, OptimizerConfig(learning_rate=1e-3, warmup_updates=0))

    def outcome(action, chunks):
        before = {name: parameter.detach().clone() for name, parameter in table_parameters(chunks)}
        try:
            action()
        except Exception as error:
            changed = [name for name, parameter in table_parameters(chunks) if not torch.equal(parameter, before[name])]
            return type(error).__name__, str(error), changed
        return None

    shape = read_shape(model_folder)
    chunks, optimizer = make(shape)
    load_weights(chunks, topology, shape, model_folder)
    good = folder / "good"
    good.mkdir()
    save_checkpoint(good, chunks, optimizer, topology, {"step": 0})

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-100])

    spoil = {
        "one bit flipped": lambda copy: flip(copy / "__0_0.distcp"),
        "truncated": lambda copy: truncate(copy / "__0_0.distcp"),
        "tensor file missing": lambda copy: (copy / "__0_0.distcp").unlink(),
        "metadata missing": lambda copy: (copy / ".metadata").unlink(),
        "common file flipped": lambda copy: flip(copy / "common.pt"),
        "no checksums": lambda copy: (copy / "checksums.json").unlink(),
        "empty folder": lambda copy: [path.unlink() for path in copy.iterdir()],
    }
    results = {}
    fresh, fresh_optimizer = make(shape)
    for case, action in spoil.items():
        copy = folder / case
        shutil.copytree(good, copy)
        action(copy)
        results[case] = outcome(lambda copy=copy: load_checkpoint(copy, fresh, fresh_optimizer, topology), fresh)

    other, other_optimizer = make(replace(shape, ffn_hidden_size=2 * shape.ffn_hidden_size))
    results["another model"] = outcome(lambda: load_checkpoint(good, other, other_optimizer, topology), other)

    results["intact"] = outcome(lambda: results.update(extra=load_checkpoint(good, fresh, fresh_optimizer, topology)), fresh)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for space in (100, 20_000):
        full = folder / f"{space} bytes"
        full.mkdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (space, limits[1]))  # a write past it fails like one on a full disk
        results[full.name] = outcome(lambda full=full: save_checkpoint(full, chunks, optimizer, topology, {}), chunks)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return results


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
