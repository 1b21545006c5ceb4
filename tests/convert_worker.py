"""What the processes of tests/convert run: loading and saving conversions with the real Megatron-Core, and being killed."""

import argparse
import gc
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from dying import Dying
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

from nft_megatron.config.sections import OptimizerConfig
from nft_megatron.convert import engine
from nft_megatron.convert.commands import to_hf, to_megatron
from nft_megatron.model.build import Chunks, build_model, build_parts
from nft_megatron.model.checkpoint import save_checkpoint
from nft_megatron.model.load import load_weights
from nft_megatron.model.meta import fake_place
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.packed_sequences import pack_sequences
from nft_megatron.model.policy import lm_head_weight, policy_model
from nft_megatron.model.settings import transformer_config
from nft_megatron.model.topology import Topology, init_topology, shutdown
from nft_megatron.plan.layouts import ParallelLayout
from nft_megatron.weights import ModelShape, read_shape


@dataclass(frozen=True)
class Layout:
    """``loads``: names of the models to load; ``saves``: those to save again. ``last``: layers of the last stage."""

    tensor: int
    pipeline: int
    loads: tuple[str, ...]
    saves: tuple[str, ...] = ()
    context: int = 1
    expert: int = 1
    virtual: int = 1
    last: int | None = None

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * max(self.context, self.expert)


def measure(layout: Layout, folders: dict[str, tuple[Path, Path]], out: Path) -> None:
    """Load conversions and save models.

    For each (Hugging Face folder, its conversion): load the conversion and write findings to ``out/<name>_<rank>.json``; save
    the weights, as read from the Hugging Face folder, in both of Megatron's formats under ``out/<name>``.
    """
    topology = init_topology(
        layout.tensor,
        layout.pipeline,
        layout.context,
        virtual_pipeline=layout.virtual,
        last_stage_layers=layout.last,
        expert=layout.expert,
        timeout_seconds=240,
        threads=1,
    )
    for name in layout.loads:
        folder, converted = folders[name]
        shape = read_shape(folder)
        expected = build_model(shape, topology)
        load_weights(expected, topology, shape, folder)
        chunks = build_model(shape, topology)
        findings = _load(chunks, converted, expected)
        if topology.world_size == 1:
            findings["logits"] = _logits(chunks, topology, shape).tolist()
        (out / f"{name}_{topology.rank}.json").write_text(json.dumps(findings))
        if name in layout.saves:
            _save(expected, topology, out / name)
        del chunks, expected
    del topology
    gc.collect()
    shutdown()


def _load(chunks: Chunks, converted: Path, expected: Chunks) -> dict:
    state = {str(part): policy_model(chunk).sharded_state_dict() for part, chunk in enumerate(chunks)}
    loaded, missing, unexpected = dist_checkpointing.load(state, str(converted), strict="return_all")
    different = []
    for part, (chunk, right) in enumerate(zip(chunks, expected, strict=True)):
        policy_model(chunk).load_state_dict(loaded[str(part)])
        pairs = zip(policy_model(chunk).named_parameters(), policy_model(right).parameters(), strict=True)
        different += [name for (name, actual), wanted in pairs if not torch.equal(actual, wanted)]
    return {"different": different, "missing": sorted(missing), "unexpected": sorted(unexpected)}


@torch.no_grad()
def _logits(chunks: Chunks, topology: Topology, shape: ModelShape) -> torch.Tensor:
    """Logits at every position of one sequence: token i is (7 i + 3) mod 131."""
    positions = torch.arange(40)
    tokens = (7 * positions + 3) % 131
    hidden_NH = chunks[0](tokens[None], positions[None], pack_sequences([40], topology.device), positions)
    return hidden_NH @ lm_head_weight(chunks[0])[: shape.vocab_size].T


def _save(chunks: Chunks, topology: Topology, folder: Path) -> None:
    """``torch_dist`` with optimizer state and, without expert parallelism, one file per rank, named as by Megatron-LM."""
    (folder / "torch_dist").mkdir(parents=True, exist_ok=True)
    optimizer = PolicyOptimizer(chunks, OptimizerConfig(learning_rate=1e-3, warmup_updates=0))
    save_checkpoint(folder / "torch_dist", chunks, optimizer, topology, {"step": 0})
    if topology.world_size > topology.tensor_size * topology.pipeline_size:
        return
    stage = f"_{topology.pipeline_rank:03d}" if topology.pipeline_size > 1 else ""
    own = folder / "mp_rank" / "iter_0000012" / f"mp_rank_{topology.tensor_rank:02d}{stage}"
    own.mkdir(parents=True)
    states = [policy_model(chunk).state_dict_for_save_checkpoint() for chunk in chunks]
    content = {
        "args": argparse.Namespace(num_layers=2, path=Path("x")),
        "checkpoint_version": 3.0,
        "iteration": 12,
        **({"model": states[0]} if len(states) == 1 else {f"model{part}": state for part, state in enumerate(states)}),
        "optimizer": {"exp_avg": torch.randn(1000)},
    }
    torch.save(content, own / "model_optim_rng.pt")
    (folder / "mp_rank" / "latest_checkpointed_iteration.txt").write_text("12")


def convert_dying(direction: str, source: Path, final: Path, moment: int, counted: Path) -> None:
    """A conversion that is killed at its operation number ``moment`` (0: never; ``counted`` then gets their number)."""
    dying, write_rows = Dying(str(final), moment), engine.Files.write_rows

    def write(*arguments: object) -> None:
        dying.operate()
        write_rows(*arguments)

    engine.Files.write_rows = write
    {"to-megatron": to_megatron, "to-hf": to_hf}[direction](source, final, workers=1)
    counted.write_text(str(dying.count))


def wanted(folder: Path, tensor: int, pipeline: int) -> list[dict[str, list]]:
    """What the real model on every rank requests from a checkpoint: tensors, and keys of other objects.

    The model is built on the meta device, rank by rank, in this process.
    """
    shape = read_shape(folder)
    layout = ParallelLayout(tensor, pipeline, 1, 1, 1, True, "none", 16384)
    ranks = []
    for rank in range(layout.num_gpus):
        with fake_place(rank, layout, torch.device("meta")) as topology, torch.device("meta"):
            config = transformer_config(shape, topology, torch.bfloat16, True, "none", True)
            (model,) = build_parts(shape, topology, config)
            tensors, objects = [], []
            for value in policy_model(model).sharded_state_dict().values():
                if isinstance(value, ShardedObject):
                    objects.append(value.unique_key)
                    continue
                for one in value.build() if isinstance(value, ShardedTensorFactory) else [value]:
                    size = [*(1 for _ in range(one.prepend_axis_num)), *one.local_shape]
                    is_copy = any(one.replica_id)
                    tensors.append([one.key, one.global_shape, one.global_offset, size, is_copy])
            ranks.append({"tensors": tensors, "objects": objects})
    return ranks
