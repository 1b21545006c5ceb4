"""Conversions beside the real mbridge and Megatron-Bridge, whichever can be imported; prints a row for each family.

    python tests/convert/with_peers.py OUT                          makes the models, with this project's transformers
    PYTHONPATH=THEIR_PACKAGES python tests/convert/with_peers.py OUT      converts them

Runs on a CPU: their models' layers of Transformer Engine are replaced by Megatron's local ones under the same names
(:func:`stand_in`), and packages of theirs that no conversion needs by mocks, where they are not installed.
"""

import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import distributions, version
from pathlib import Path

UNUSED = ["modelopt", "wandb", "mlflow", "nvidia_resiliency_ext", "qwen_vl_utils", "datasets", "timm", "open_clip", "comet_ml"]
sys.path += [str(Path(__file__).parents[1])]


class Anything(type):
    """Its classes have every attribute, can be built and called, and do nothing."""

    def __getattr__(cls, name: str) -> "Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda *_, **__: None, "__call__": lambda *_, **__: None})


class Mocks:
    """Finds packages of ``UNUSED`` that nothing else finds."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        anything = Anything(spec.name, (), {})
        return type(spec.name, (types.ModuleType,), {"__getattr__": lambda _, name: getattr(anything, name)})(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(Mocks())

import torch  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from nft_megatron.convert.commands import to_hf, to_megatron  # noqa: E402
from nft_megatron.model.cpu import adapt_to_cpu  # noqa: E402
from nft_megatron.model.topology import init_topology, shutdown  # noqa: E402


class FusedLinear(ColumnParallelLinear):
    """The names of Transformer Engine's linear layer with its norm. Never computes."""

    def __init__(self, input_size: int, output_size: int, **arguments) -> None:
        super().__init__(input_size, output_size, **arguments)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=self.weight.dtype))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


FusedLinear.__name__ = "TELayerNormColumnParallelLinear"  # by which Megatron-Bridge knows how it is split


def stand_in(config):
    """The layer of Transformer Engine's spec, of Megatron's local modules."""
    config.persist_layer_norm = config.gradient_accumulation_fusion = config.apply_rope_fusion = False
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.sharded_state_dict_keys_map = {}
    layer.submodules.input_layernorm = IdentityOp
    layer.submodules.self_attention.submodules.linear_qkv = FusedLinear
    if config.num_moe_experts is None:
        layer.submodules.pre_mlp_layernorm = IdentityOp
        layer.submodules.mlp.submodules.linear_fc1 = FusedLinear
    return layer


def of_megatron_bridge(hf: Path, out: Path) -> dict[str, Path]:
    """``import_ckpt`` of ``hf`` read by us, and ours read by ``export_ckpt``."""
    UNUSED.extend(("transformer_engine", "triton"))  # Megatron-Core has already looked for them
    from megatron.bridge import AutoBridge
    from megatron.bridge.models import gpt_provider

    gpt_provider.transformer_engine_layer_spec = stand_in
    AutoBridge.import_ckpt(hf, out / "theirs")
    to_hf(out / "theirs", out / "read theirs")
    torch.distributed.destroy_process_group()
    AutoBridge.from_hf_pretrained(hf).export_ckpt(out / "ours", out / "read ours", show_progress=False)
    return {way: out / way for way in ("read theirs", "read ours")}


def of_mbridge(hf: Path, out: Path) -> dict[str, Path]:
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
    return {way: out / way for way in ("read theirs", "read ours")}


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
        make_models(folder)
    torch.cuda.current_device, torch.cuda.set_device = lambda: torch.device("cpu"), lambda _: None
    for package, run in (("mbridge", of_mbridge), ("megatron-bridge", of_megatron_bridge)):
        if not list(distributions(name=package)):
            continue
        print(f"{package} {version(package)}, megatron-core {version('megatron-core')}, torch {torch.__version__}")
        for out in sorted(folder.iterdir(), key=lambda out: ("tied" in out.name, out.name)):  # mbridge remembers a tied head
            adapt_to_cpu()
            init_topology(threads=1)
            try:
                ways = run(out / "hf", out)
                found = ["bit-equal" if is_same(out / "hf", ways[way]) else "differs" for way in ways]
            except Exception as error:  # a peer's, which lacks a family
                found = [f"{type(error).__name__}: {error}"]
            print(f"| {out.name} | {' | '.join(found)} |", flush=True)
            if torch.distributed.is_initialized():
                shutdown()
        return


if __name__ == "__main__":
    main()
