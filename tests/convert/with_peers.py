"""Conversions beside the real mbridge, on a CPU; prints a row for each family.

    python tests/convert/with_peers.py OUT                          makes the models, with this project's transformers
    PYTHONPATH=MBRIDGE python tests/convert/with_peers.py OUT       converts them; MBRIDGE: mbridge and its transformers 4

Its model's layers of Transformer Engine are replaced by Megatron's local ones under the same names (:func:`stand_in`).
"""

import sys
from importlib.metadata import distributions, version
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from safetensors.torch import load_file

from nft_megatron.convert.commands import to_hf, to_megatron
from nft_megatron.model.cpu import adapt_to_cpu
from nft_megatron.model.topology import init_topology, shutdown


class FusedLinear(ColumnParallelLinear):
    """The names of Transformer Engine's linear layer with its norm. Never computes."""

    def __init__(self, input_size: int, output_size: int, **arguments) -> None:
        super().__init__(input_size, output_size, **arguments)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=self.weight.dtype))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


def stand_in(config):
    """The layer of Transformer Engine's spec, of Megatron's local modules."""
    config.persist_layer_norm = config.gradient_accumulation_fusion = False
    layer = get_gpt_layer_local_spec(config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.sharded_state_dict_keys_map = {}
    layer.submodules.input_layernorm = IdentityOp
    layer.submodules.self_attention.submodules.linear_qkv = FusedLinear
    if config.num_moe_experts is None:
        layer.submodules.pre_mlp_layernorm = IdentityOp
        layer.submodules.mlp.submodules.linear_fc1 = FusedLinear
    return layer


def of_mbridge(hf: Path, out: Path) -> None:
    """mbridge's model saved by Megatron-Core and read by us; ours loaded into its model, which it exports."""
    from mbridge import AutoBridge

    bridge = AutoBridge.from_pretrained(str(hf))
    bridge._get_transformer_layer_spec = lambda vp_stage=None: stand_in(bridge.config)
    (wrapped,) = bridge.get_model(weight_path=str(hf), use_cpu_initialization=True)
    model = wrapped.module  # of Float16Module
    (out / "theirs").mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(out / "theirs"))
    to_hf(out / "theirs", out / "read theirs", model=hf)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(out / "ours"))["model"])
    bridge.save_weights([wrapped], str(out / "read ours"))


def is_same(a: Path, b: Path) -> bool:
    first, second = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()} for folder in (a, b)
    )
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def make_models(folder: Path) -> None:
    """A small model of every family, and ours of it."""
    from tiny_families import FAMILIES, LLAMA3, tiny_model

    for name in FAMILIES:
        model = tiny_model(name, torch.bfloat16)
        if "llama 3" in name:
            model.config.rope_parameters.update(LLAMA3 | {"original_max_position_embeddings": 8192})
        model.save_pretrained(folder / name / "hf")
        to_megatron(folder / name / "hf", folder / name / "ours")


def main() -> None:
    folder = Path(sys.argv[1])
    if not folder.exists():
        sys.path.append(str(Path(__file__).parents[1]))
        make_models(folder)
    if not list(distributions(name="mbridge")):
        return
    torch.cuda.current_device = lambda: torch.device("cpu")
    print(f"mbridge {version('mbridge')}, megatron-core {version('megatron-core')}, torch {torch.__version__}")
    print("| family | read theirs | read ours |")
    for out in sorted(folder.iterdir(), key=lambda out: ("tied" in out.name, out.name)):  # mbridge remembers a tied head
        adapt_to_cpu()
        init_topology(threads=1)
        try:
            of_mbridge(out / "hf", out)
            found = ["bit-equal" if is_same(out / "hf", out / way) else "differs" for way in ("read theirs", "read ours")]
        except Exception as error:  # mbridge's, which lacks a family
            found = [f"{type(error).__name__}: {error}"]
        print(f"| {out.name} | {' | '.join(found)} |", flush=True)
        shutdown()


if __name__ == "__main__":
    main()
