"""Names and folders of other programs: a shared prefix is left out, and what is no Megatron model is refused by its name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert.conftest import tensors_of
from safetensors.torch import save_file
from tiny_families import VOCAB

from nft_megatron.base.errors import UserError
from nft_megatron.convert.commands import check, to_hf, to_megatron
from nft_megatron.weights import read_shape, weight_table
from nft_megatron.weights.table import merge


@pytest.fixture
def hf(sources) -> Path:
    return sources["untied"]


def parameters(hf: Path) -> dict[str, torch.Tensor]:
    """The model in ``hf`` under Megatron's names, with layers numbered."""
    tensors = tensors_of(hf)
    return {
        entry.name: merge(entry, [tensors[source] for source in entry.sources], 1, 0, VOCAB)
        for entry in weight_table(read_shape(hf)).entries
        if entry.exported
    }


def save(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.module."])
def test_a_shared_prefix_is_left_out_and_said(hf: Path, tmp_path: Path, capsys, prefix: str):
    state = {prefix + name: tensor for name, tensor in parameters(hf).items()}
    own = tmp_path / "iter_0000003" / "mp_rank_00"
    own.mkdir(parents=True)
    torch.save({"model": state}, own / "model_optim_rng.pt")
    state["optimizer.state.exp_avg.x"] = torch.ones(3)
    for folder in (save(tmp_path / "saved", state), own.parent):
        check(hf, folder)
        assert f"begin with '{prefix}', which is left out" in capsys.readouterr().out


def test_no_prefix_is_not_mentioned(hf: Path, tmp_path: Path, capsys):
    check(hf, save(tmp_path / "saved", parameters(hf)))
    assert "left out" not in capsys.readouterr().out


def test_two_models_in_one_checkpoint_are_not_taken_for_one(hf: Path, tmp_path: Path):
    state = {prefix + name: tensor for prefix in ("", "ema.") for name, tensor in parameters(hf).items()}
    with pytest.raises(UserError, match=r"ema\.decoder.* is a key of .* but not of the model"):
        to_hf(save(tmp_path / "saved", state), tmp_path / "hf", model=hf)


def with_adapter(hf: Path, folder: Path) -> Path:
    name = "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"
    return save(folder, parameters(hf) | {name: torch.ones(2, 3)})


def adapter_alone(hf: Path, folder: Path) -> Path:
    return save(folder, {"decoder.layers.0.mlp.linear_fc1.lora_A.default.weight": torch.ones(2, 3)})


def of_peft(hf: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 3)}, folder / "adapter_model.safetensors")
    return folder


def of_megatron_fsdp(hf: Path, folder: Path) -> Path:
    state = {f"model.module.{name}": tensor for name, tensor in parameters(hf).items()}
    for name in [name for name in state if name.endswith("linear_fc1.weight")]:
        state[f"{name}_w"], state[f"{name}_v"] = state.pop(name).chunk(2)
    return save(folder, state)


def of_fsdp(hf: Path, folder: Path) -> Path:
    return save(folder, {f"model.{name}": tensor for name, tensor in tensors_of(hf).items()})


def files(*names: str) -> Callable[[Path, Path], Path]:
    def write(_: Path, folder: Path) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        return folder

    return write


ADAPTER = "holds a LoRA adapter .*; merge the adapter into its base model"
OF_VERL = "holds FSDP shards of verl .*; merge them by .*model_merger"
SHARD = "model_world_size_2_rank_0.pt"
REFUSED = {
    "a model with an adapter": (with_adapter, ADAPTER),
    "an adapter": (adapter_alone, ADAPTER),
    "PEFT's folder": (of_peft, "holds a LoRA adapter of PEFT .*; merge the adapter into its base model"),
    "Megatron-FSDP": (of_megatron_fsdp, "holds Megatron-FSDP shards .*_v.*; export it as a Hugging Face folder"),
    "FSDP": (of_fsdp, "holds FSDP shards under Hugging Face names .*; export it as a Hugging Face folder"),
    "verl's FSDP, actor": (files(SHARD, "fsdp_config.json"), OF_VERL),
    "verl's FSDP, root": (files(f"global_step_3/actor/{SHARD}"), OF_VERL),
    "DeepSpeed": (files("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"), "holds DeepSpeed shards"),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_megatron_model_is_refused_by_its_name(hf: Path, tmp_path: Path, what: str, given: bool):
    make, message = REFUSED[what]
    folder, model = make(hf, tmp_path / "theirs"), hf if given else None
    for call in (
        lambda: to_hf(folder, tmp_path / "hf", model=model),
        lambda: check(hf, folder, model=model),
        lambda: check(folder, folder, model=model),
    ):
        with pytest.raises(UserError, match=message) as refused:
            call()
        assert "copy the checkpoint again" not in str(refused.value)
    assert not (tmp_path / "hf").exists()


def test_a_file_per_rank_with_an_adapter(hf: Path, tmp_path: Path):
    (tmp_path / "mp_rank_00").mkdir()
    state = parameters(hf) | {"decoder.layers.1.mlp.linear_fc2.adapter.linear_out.weight": torch.ones(2, 3)}
    torch.save({"model": state}, tmp_path / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(UserError, match=ADAPTER):
        to_hf(tmp_path, tmp_path / "hf", model=hf)


def test_an_adapter_is_no_model_to_convert_to_megatron(hf: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"SRC = .*holds a LoRA adapter of PEFT"):
        to_megatron(of_peft(hf, tmp_path / "peft"), tmp_path / "megatron")
