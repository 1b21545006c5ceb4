"""What the processes of tests/model/test_checkpoint.py run."""

import gc
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import torch

from nft_megatron.config.sections import OptimizerConfig
from nft_megatron.model.build import build_model
from nft_megatron.model.checkpoint import load_checkpoint, save_checkpoint
from nft_megatron.model.load import load_weights, table_parameters
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.topology import Topology, init_topology, shutdown
from nft_megatron.weights import read_shape


def measure(model_folder: Path, folder: Path) -> dict:
    topology = init_topology(threads=1)
    results = _measure(model_folder, folder, topology)
    del topology
    gc.collect()
    shutdown()
    return results


def _measure(model_folder: Path, folder: Path, topology: Topology) -> dict:
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

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for space in (100, 20_000):
        full = folder / f"{space} bytes"
        full.mkdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (space, limits[1]))  # writing beyond it fails as on a full disk
        results[full.name] = outcome(lambda full=full: save_checkpoint(full, chunks, optimizer, topology, {}), chunks)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)
    return results
