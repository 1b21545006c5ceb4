"""What each rank does in tests/convert/test_megatron.py: the real Megatron-Core loads what was converted and saves its own."""

import argparse
import gc
import json
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from nft_megatron.model.attention import pack_sequences
from nft_megatron.model.build import Chunks, build_model
from nft_megatron.model.checkpoint import save_checkpoint
from nft_megatron.model.load import load_weights
from nft_megatron.model.optimizer import AdamW, PolicyOptimizer
from nft_megatron.model.policy import lm_head_weight, policy_model
from nft_megatron.model.topology import Topology, init_topology, shutdown
from nft_megatron.weights import ModelShape, read_shape


def measure(folders: dict[str, tuple[Path, Path]], out: Path, tensor: int, pipeline: int, expert: int) -> None:
    """For each (Hugging Face folder, its conversion): load the conversion, write findings to ``out/<name>_<rank>.json``, and
    save the weights, as read from the Hugging Face folder, in both of Megatron's formats below ``out/<name>``."""
    topology = init_topology(tensor, pipeline, expert=expert, timeout_seconds=60, threads=1)
    for name, (folder, converted) in folders.items():
        shape = read_shape(folder)
        expected = build_model(shape, topology)
        load_weights(expected, topology, shape, folder)
        chunks = build_model(shape, topology)
        findings = _load(chunks, converted, expected)
        if topology.world_size == 1:
            findings["logits"] = _logits(chunks, topology, shape).tolist()
        (out / f"{name}_{topology.rank}.json").write_text(json.dumps(findings))
        _save(expected, topology, out / name)
        del chunks, expected
    del topology
    gc.collect()
    shutdown()


def _load(chunks: Chunks, converted: Path, expected: Chunks) -> dict:
    state = {"model": policy_model(chunks[0]).sharded_state_dict()}
    loaded, missing, unexpected = dist_checkpointing.load(state, str(converted), strict="return_all")
    policy_model(chunks[0]).load_state_dict(loaded["model"])
    pairs = zip(policy_model(chunks[0]).named_parameters(), policy_model(expected[0]).parameters(), strict=True)
    return {
        "different": [name for (name, actual), wanted in pairs if not torch.equal(actual, wanted)],
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
    }


@torch.no_grad()
def _logits(chunks: Chunks, topology: Topology, shape: ModelShape) -> torch.Tensor:
    """Of every position of one sequence: token i is (7 i + 3) mod 131."""
    positions = torch.arange(40)
    tokens = (7 * positions + 3) % 131
    hidden_NH = chunks[0](tokens[None], positions[None], pack_sequences([40], topology.device), positions)
    return hidden_NH @ lm_head_weight(chunks[0])[: shape.vocab_size].T


def _save(chunks: Chunks, topology: Topology, folder: Path) -> None:
    """``torch_dist`` with optimizer state and, where no experts are spread, a file a rank as Megatron-LM names them."""
    (folder / "torch_dist").mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "torch_dist", chunks, PolicyOptimizer(chunks, AdamW(1e-3)), topology, {"step": 0})
    if topology.world_size > topology.tensor_size * topology.pipeline_size:
        return
    stage = f"_{topology.pipeline_rank:03d}" if topology.pipeline_size > 1 else ""
    own = folder / "mp_rank" / "iter_0000012" / f"mp_rank_{topology.tensor_rank:02d}{stage}"
    own.mkdir(parents=True)
    content = {
        "args": argparse.Namespace(num_layers=2, path=Path("x")),
        "checkpoint_version": 3.0,
        "iteration": 12,
        "model": policy_model(chunks[0]).state_dict_for_save_checkpoint(),
        "optimizer": {"exp_avg": torch.randn(1000)},
    }
    torch.save(content, own / "model_optim_rng.pt")
    (folder / "mp_rank" / "latest_checkpointed_iteration.txt").write_text("12")
