"""What the processes of tests/model/test_checkpoint.py run."""

import gc
import io
import pickle
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from nft_megatron.config.sections import OptimizerConfig
from nft_megatron.model import checkpoint
from nft_megatron.model.attention import PackedAttention
from nft_megatron.model.build import build_model
from nft_megatron.model.checkpoint import load_checkpoint, save_checkpoint
from nft_megatron.model.checksums import write_checksums
from nft_megatron.model.load import load_weights, table_parameters
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.topology import Topology, init_topology, shutdown
from nft_megatron.weights import read_shape


class Harmful:
    """Pickled, it is a program that leaves a file beside the checkpoint and then returns ``value``."""

    def __init__(self, folder: Path, value: object = None) -> None:
        self.folder, self.value = folder, value

    def __reduce__(self):
        left, value = str(self.folder.parent / f"executed {self.folder.name}"), pickle.dumps(self.value)
        return eval, (f"(open({left!r}, 'w'), __import__('pickle').loads({value!r}))[1]",)


def _edit_index(folder: Path, action) -> None:
    content = pickle.loads((folder / ".metadata").read_bytes())
    action(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def _replace_object(folder: Path, key: str, value: object) -> None:
    """Let the index point to ``value`` for the objects whose key contains ``key``."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path = folder / "__0_0.distcp"
    start = path.stat().st_size

    def point(index) -> None:
        places = [place for name, place in index.storage_data.items() if key in name.fqn and name.offset is None]
        assert places
        for place in places:
            place.offset, place.length = start, len(buffer.getvalue())

    with path.open("ab") as file:
        file.write(buffer.getvalue())
    _edit_index(folder, point)


def _first_place(index):
    return next(place for name, place in index.storage_data.items() if name.offset is not None)


def _live_index(folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(pickle.dumps(Harmful(folder, pickle.loads(path.read_bytes()))))


def _unpickled_by_te(folder: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(Harmful(folder))), dtype=torch.uint8)


HOSTILE = {
    "index executes": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Harmful(folder))),
    "index executes and is right": _live_index,
    "index of another file": lambda folder: _edit_index(
        folder, lambda index: setattr(_first_place(index), "relative_path", "../good/__0_0.distcp")
    ),
    "index with a negative offset": lambda folder: _edit_index(
        folder, lambda index: setattr(_first_place(index), "offset", -5)
    ),
    "index beyond the file": lambda folder: _edit_index(folder, lambda index: setattr(_first_place(index), "length", 1 << 40)),
    "common part executes": lambda folder: torch.save({"common": Harmful(folder)}, folder / "common.pt"),
    "common part of another program": lambda folder: torch.save({"common": {"format": "1"}}, folder / "common.pt"),
    "object executes": lambda folder: _replace_object(folder, "generators", [Harmful(folder)]),
    "object is none": lambda folder: _replace_object(folder, "generators", [{"cpu": 5}]),
    "state of a module executes": lambda folder: _replace_object(folder, "_extra_state", [_unpickled_by_te(folder)]),
    "deep metadata.json": lambda folder: (folder / "metadata.json").write_text("[" * 100_000),
    "other metadata.json": lambda folder: (folder / "metadata.json").write_text('{"backend": 1}'),
}


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

    for case, action in HOSTILE.items():
        copy = folder / case
        shutil.copytree(good, copy)
        action(copy)
        (copy / "checksums.json").unlink()
        write_checksums(copy, topology)
        results[case] = outcome(lambda copy=copy: load_checkpoint(copy, fresh, fresh_optimizer, topology), fresh)
    results["executed"] = sorted(path.name for path in folder.glob("executed*"))

    broken = folder / "broken model"
    shutil.copytree(model_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][1] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    results["not finite"] = outcome(lambda: load_weights(fresh, topology, shape, broken), fresh)

    other, other_optimizer = make(replace(shape, ffn_hidden_size=2 * shape.ffn_hidden_size))
    results["another model"] = outcome(lambda: load_checkpoint(good, other, other_optimizer, topology), other)

    results["intact"] = outcome(lambda: results.update(extra=load_checkpoint(good, fresh, fresh_optimizer, topology)), fresh)

    # As Transformer Engine's attention does, which a run may meet only when it resumes.
    PackedAttention.get_extra_state = lambda self: torch.zeros(0, dtype=torch.uint8)
    PackedAttention.set_extra_state = lambda self, state: None
    with_state = folder / "with extra state"
    with_state.mkdir()
    engine, engine_optimizer = make(shape)
    results["begun without extra state"] = outcome(
        lambda: load_checkpoint(good, engine, engine_optimizer, topology), engine
    ) or _differing(engine, chunks)
    save_checkpoint(with_state, engine, engine_optimizer, topology, {})
    del PackedAttention.get_extra_state, PackedAttention.set_extra_state
    plain, plain_optimizer = make(shape)
    results["begun with extra state"] = outcome(
        lambda: load_checkpoint(with_state, plain, plain_optimizer, topology), plain
    ) or _differing(plain, chunks)
    stored = [FileSystemReader(path).read_metadata().state_dict_metadata for path in (good, with_state)]
    results["states of attention"] = [sum("core_attention._extra_state" in key for key in keys) for keys in stored]

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


def _differing(one, other) -> list[str]:
    expected = dict(table_parameters(other))
    return [name for name, parameter in table_parameters(one) if not torch.equal(parameter, expected[name])]


def generators_of_another_device(model_folder: Path) -> dict:
    """States as a CPU and as a GPU save them, restored on a CPU; the second kind must leave its generators alone."""
    topology = init_topology(threads=1)
    torch.manual_seed(5)
    saved = checkpoint._generators(topology).data
    expected = torch.rand(3)
    checkpoint._set_generators(saved, topology)
    results = {"same device": torch.equal(torch.rand(3), expected)}
    tracker = get_cuda_rng_tracker()
    before = {name: state.clone() for name, state in tracker.get_states().items()}
    of_gpu = {name: torch.zeros(16, dtype=torch.uint8) for name in before}
    checkpoint._set_generators(saved | {"device": torch.zeros(16, dtype=torch.uint8), "tracker": of_gpu}, topology)
    results["cpu generator"] = torch.equal(torch.rand(3), expected)
    results["tracker kept"] = all(torch.equal(state, before[name]) for name, state in tracker.get_states().items())
    del topology
    gc.collect()
    shutdown()
    return results
