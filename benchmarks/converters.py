"""How fast and how lean the converters are, against `cp`, safetensors and two other converters in the same run.

A random model of --shape (bfloat16) is converted in both directions, one process a conversion, flushed to the disk:

  cp            `cp` of the model's file and fsync: what the disk and the page cache allow
  safetensors   load every tensor and save them again, fsync: a conversion that changes nothing
  no proof      `nft-megatron convert --no-proof`: manifest without hashes, fsync, rename
  ours          `nft-megatron convert`: hashes of all tensors, scan for non-finite values, manifest, fsync, rename
  mbridge       mbridge: into a Megatron-Core model, saved as torch_dist by this project's writer; the way back likewise
  bridge        Megatron-Bridge, likewise

The last two run only with --peers-python, an interpreter with torch, megatron-core, transformers, mbridge and megatron-bridge,
and on the CPU: through the local layer spec, with names of Transformer Engine's spec translated, and Megatron-Bridge with an
empty package in place of transformer_engine. Imports are not counted, building the model that they need is. Every source is
read once before, so that all find it in the page cache. Ways take turns within each repeat; the table has medians over the
repeats, and a ratio is the median of the ratios within a repeat.

--layers converts models that differ in depth only, and prints the peak memory of each.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 1,
    "vocab_size": 151936,
    "num_key_value_heads": 2,
}
SHAPES = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
PREDICTED_GB = {"7B": 15.2, "32B": 65.5}
OURS = ("no proof", "ours")
PEERS = {"mbridge": "mbridge", "bridge": "megatron.bridge"}  # way: package
GOALS = [  # of the shape 1.5b: way, compared with, direction, the ratio of seconds that is to be reached
    ("no proof", "cp", "in", "<=", 1.5),
    ("no proof", "cp", "out", "<=", 3.0),
    ("ours", "cp", "in", "<=", 4.0),
    ("ours", "cp", "out", "<=", 4.0),
    ("mbridge", "ours", "in", ">=", 5.0),
    ("mbridge", "ours", "out", ">=", 2.0),
    ("bridge", "ours", "in", ">=", 5.0),
    ("bridge", "ours", "out", ">=", 2.0),
]
MOST_GB = 0.8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="1.5b", help="(%(default)s)")
    add("--repeats", type=int, default=3, help="rounds in which all ways take turns (%(default)s)")
    add("--workers", type=int, help="of ours (one a core)")
    add("--folder", type=Path, help="on the disk to measure; takes three times the model (a temporary folder)")
    add("--layers", type=int, nargs="+", help="only the memory of ours, at these numbers of layers (such as 6 12 24)")
    add("--peers-python", type=Path, help="interpreter that has the peers (none: without them)")
    add("--one", nargs=4, metavar=("WAY", "in|out", "SRC", "DST"), help="only this conversion; prints seconds and GB as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.one:
        way, direction, source, destination = arguments.one
        WAYS[way](direction, Path(source), Path(destination), arguments.workers)
        return
    print("torch and all else that is imported takes a part of the memory: its peak before a conversion is in brackets")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="converters-") as name:
        if arguments.layers:
            compare_depths(arguments, Path(name))
        else:
            compare_ways(arguments, Path(name))


def compare_ways(arguments: argparse.Namespace, folder: Path) -> None:
    ways = ["cp", "safetensors", *OURS]
    if arguments.peers_python:
        ways += [way for way, package in PEERS.items() if has(arguments, way, package)]
    num_bytes = make(folder / "hf", SHAPES[arguments.shape])
    print(f"{arguments.shape}: {num_bytes / 1e9:.2f} GB, medians of {arguments.repeats} repeats\n", flush=True)
    figures = {(way, direction): [] for way in ways for direction in ("in", "out")}
    for _ in range(arguments.repeats):
        for way in ways:
            for direction in ("in", "out"):
                figures[way, direction].append(measure(arguments, way, direction, folder))
            shutil.rmtree(folder / way)
    report(figures, ways, num_bytes)


def compare_depths(arguments: argparse.Namespace, folder: Path) -> None:
    """Peak memory grows with the largest tensor, not with the model."""
    print(f"\nwidths of {arguments.shape}\n| layers |    GB | largest tensor, GB | peak GB in  | out         |")
    print("|-------:|------:|-------------------:|------------:|------------:|")
    for num_layers in arguments.layers:
        shape = SHAPES[arguments.shape] | {"num_hidden_layers": num_layers}
        num_bytes = make(folder / "hf", shape)
        largest = 2 * (QWEN | shape)["vocab_size"] * shape["hidden_size"]
        peaks = [memory(measure(arguments, "ours", direction, folder)) for direction in ("in", "out")]
        print(f"| {num_layers:6} | {num_bytes / 1e9:5.2f} | {largest / 1e9:18.2f} | {peaks[0]} | {peaks[1]} |", flush=True)
        for name in ("ours", "hf"):
            shutil.rmtree(folder / name)


def memory(figure: dict) -> str:
    return f"{figure['gigabytes']:.2f} ({figure['before']:.2f})"


def make(folder: Path, shape: dict) -> int:
    """A random model, by a process of its own: one that has been large passes its peak on to those that it starts."""
    maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(folder, shape))
    maker.start()
    maker.join()
    return (folder / "model.safetensors").stat().st_size


def has(arguments: argparse.Namespace, way: str, package: str) -> bool:
    here = str(Path(__file__).parent)
    first = f"import sys; sys.path.append({here!r}); import converters, nft_megatron.model.build; converters.stub()"
    code = f"{first}; import {package}"
    ended = subprocess.run([arguments.peers_python, "-c", code], env=environment(), capture_output=True, text=True)
    if ended.returncode:
        print(f"{way} is left out: {ended.stderr.strip().splitlines()[-1]}")
    return ended.returncode == 0


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}


def make_model(folder: Path, shape: dict) -> None:
    """A folder with random weights in one file."""
    import torch
    from safetensors.torch import save_file

    from nft_megatron.weights import read_shape, weight_table

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN | shape))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator).mul_(0.02).bfloat16()
    tensors = {}
    for number, (name, size) in enumerate(weight_table(read_shape(folder)).shapes.items()):
        count = math.prod(size)
        tensors[name] = noise.roll(number).repeat(-(-count // len(noise)))[:count].view(size).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def measure(arguments: argparse.Namespace, way: str, direction: str, folder: Path) -> dict:
    """One conversion in a process of its own. What is out of cp and safetensors is the same as what goes in."""
    (folder / way).mkdir(exist_ok=True)
    source = folder / way / "in" if direction == "out" and way not in ("cp", "safetensors") else folder / "hf"
    workers = ["--workers", str(arguments.workers)] if arguments.workers else []
    for path in source.iterdir():
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    os.sync()
    ended = subprocess.run(
        [
            arguments.peers_python if way in PEERS else sys.executable,
            __file__,
            *workers,
            "--one",
            way,
            direction,
            source,
            folder / way / direction,
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    if ended.returncode:
        sys.exit(f"{way} {direction} ended with {ended.returncode} (-9: no memory left?):\n{ended.stderr[-3000:]}")
    figure = json.loads(ended.stdout.splitlines()[-1])
    print(f"{way} {direction}: {figure['seconds']:.1f} s, processor {figure['cpu']:.1f} s", file=sys.stderr, flush=True)
    return figure


def report(figures: dict, ways: list[str], num_bytes: int) -> None:
    def median(way: str, direction: str, what: str) -> float:
        return statistics.median(figure[what] for figure in figures[way, direction])

    def ratio(way: str, to: str, direction: str) -> float:
        pairs = zip(figures[way, direction], figures[to, direction], strict=True)
        return statistics.median(one["seconds"] / other["seconds"] for one, other in pairs)

    print("| way         | in, s | x cp | / ours | CPU s | out, s | x cp | / ours | CPU s | peak GB in  | out         |")
    print("|-------------|------:|-----:|-------:|------:|-------:|-----:|-------:|------:|------------:|------------:|")
    for way in ways:
        cells = [
            f"{median(way, to, 'seconds'):5.1f} | {ratio(way, 'cp', to):4.1f} | {ratio(way, 'ours', to):6.1f} | "
            f"{median(way, to, 'cpu'):5.1f}"
            for to in ("in", "out")
        ]
        peaks = [max(figures[way, to], key=lambda figure: figure["gigabytes"]) for to in ("in", "out")]
        print(f"| {way:11} | {cells[0]} |  {cells[1]} | {memory(peaks[0])} | {memory(peaks[1])} |")
    print()
    for way in OURS:
        for name, size in PREDICTED_GB.items():
            seconds = [median(way, direction, "seconds") * size * 1e9 / num_bytes for direction in ("in", "out")]
            print(f"predicted for {name} ({size} GB), {way}: in {seconds[0]:.0f} s, out {seconds[1]:.0f} s, memory as above")
    print()
    for way, to, direction, sign, goal in GOALS:
        if way in ways:
            found = ratio(way, to, direction)
            met = found <= goal if sign == "<=" else found >= goal
            print(f"goal: {direction}, {way} {sign} {goal} x {to}: {found:.1f}, {'met' if met else 'not met'}")
    peak = max(figure["gigabytes"] for way in OURS for direction in ("in", "out") for figure in figures[way, direction])
    print(f"goal: memory of ours <= {MOST_GB} GB: {peak:.2f}, {'met' if peak <= MOST_GB else 'not met'}")


# ------------------------------------------------------------------------------------------------------------- one conversion


@contextlib.contextmanager
def timed() -> Iterator[None]:
    start, start_cpu, before = time.perf_counter(), cpu_seconds(), peak_gigabytes()
    yield
    figures = {"seconds": time.perf_counter() - start, "cpu": cpu_seconds() - start_cpu}
    print(json.dumps({**figures, "gigabytes": peak_gigabytes(), "before": before}))


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def cpu_seconds() -> float:
    """Of this process and those that it has waited for. A busy machine raises it too."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def flush(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copy(direction: str, source: Path, destination: Path, workers: int | None) -> None:
    with timed():
        destination.mkdir()
        subprocess.run(["cp", source / "model.safetensors", destination], check=True)
        flush(destination)


def safetensors(direction: str, source: Path, destination: Path, workers: int | None) -> None:
    from safetensors.torch import load_file, save_file

    with timed():
        destination.mkdir()
        save_file(load_file(source / "model.safetensors"), destination / "model.safetensors")
        flush(destination)


def ours(direction: str, source: Path, destination: Path, workers: int | None, *, proof: bool = True) -> None:
    from nft_megatron.convert.commands import to_hf, to_megatron

    with timed():
        (to_megatron if direction == "in" else to_hf)(source, destination, workers=workers, proof=proof)


def fused(name: str) -> str:
    from nft_megatron.weights.decoder import fused_name

    return fused_name(name, has_experts=False)


def stub() -> None:
    """An empty transformer_engine: Megatron-Bridge imports names from it that a conversion does not use."""

    class AnyName(type):
        def __getattr__(cls, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return AnyName(name, (), {})

    def module(name: str) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__path__ = []
        made.__getattr__ = AnyName.__getattr__.__get__(AnyName("x", (), {}))
        return made

    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules[name] = module(name)
    sys.modules["transformer_engine"].pytorch = sys.modules["transformer_engine.pytorch"]


def peer(name: str, direction: str, source: Path, destination: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing

    from nft_megatron.model.build import build_parts
    from nft_megatron.model.policy import policy_model
    from nft_megatron.model.settings import transformer_config
    from nft_megatron.model.topology import init_topology, shutdown
    from nft_megatron.weights import read_shape

    stub()
    hf = source if direction == "in" else source.parents[1] / "hf"
    topology = init_topology(threads=1)
    bridge = (mbridge_of if name == "mbridge" else megatron_bridge_of)(hf)
    with timed(), contextlib.redirect_stdout(sys.stderr):
        shape = read_shape(hf)
        config = transformer_config(shape, topology, torch.bfloat16, False, "none", True)
        models = list(build_parts(shape, topology, config))
        if name == "bridge":
            models[0].config.share_embeddings_and_output_weights = shape.tied_embeddings
        destination.mkdir()
        if direction == "in":
            bridge.load(models, hf)
            save(policy_model(models[0]).sharded_state_dict(), destination, topology)
        else:
            state = policy_model(models[0]).sharded_state_dict()
            models[0].load_state_dict(dist_checkpointing.load(state, str(source)))
            bridge.save(models, destination)
        flush(destination)
    del topology, models, bridge
    gc.collect()
    shutdown()


def save(state: dict, folder: Path, topology: object) -> None:
    """By this project's writer, in this process: Megatron's forks, and did not come back here (cause not looked into)."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    from nft_megatron.model.checkpoint import _write_shards

    sharded, common = save_preprocess(state)
    TorchCommonSaveStrategy("torch", 1).save_common(common, folder)
    _write_shards(sharded, folder, topology.control_group)
    save_config(CheckpointingConfig("torch_dist"), str(folder))


def mbridge_of(hf: Path) -> types.SimpleNamespace:
    from mbridge import AutoBridge

    bridge = AutoBridge.from_pretrained(str(hf))
    to_hf = bridge._weight_name_mapping_mcore_to_hf
    bridge._weight_name_mapping_mcore_to_hf = lambda name: to_hf(fused(name))

    def save(models: list, folder: Path) -> None:
        bridge.safetensor_io = bridge._get_safetensor_io(str(hf))
        bridge.save_weights(models, str(folder))

    return types.SimpleNamespace(load=lambda models, folder: bridge.load_weights(models, str(folder)), save=save)


def megatron_bridge_of(hf: Path) -> types.SimpleNamespace:
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry

    lookup = MegatronMappingRegistry.megatron_to_hf_lookup
    MegatronMappingRegistry.megatron_to_hf_lookup = lambda self, name: lookup(self, fused(name))
    bridge = AutoBridge.from_hf_pretrained(str(hf))
    return types.SimpleNamespace(
        load=lambda models, folder: bridge.load_hf_weights(models, str(folder)),
        save=lambda models, folder: bridge.save_hf_weights(models, str(folder), show_progress=False),
    )


WAYS = {
    "cp": copy,
    "safetensors": safetensors,
    "no proof": partial(ours, proof=False),
    "ours": ours,
    "mbridge": lambda direction, source, destination, workers: peer("mbridge", direction, source, destination),
    "bridge": lambda direction, source, destination, workers: peer("bridge", direction, source, destination),
}

if __name__ == "__main__":
    main()
