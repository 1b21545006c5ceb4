"""Which folder holds a checkpoint's weights, and which its configuration and tokenizer, in the layouts of several programs.

RUN/checkpoints/latest, step_000012/                           ours; RUN/config.yaml names the model
latest_checkpointed_iteration.txt, iter_0000012/               Megatron-LM
latest_checkpointed_iteration.txt, iter_0000012/run_config.yaml, tokenizer/                 Megatron-Bridge
latest_checkpointed_iteration.txt, global_step_12/actor/[model/]dist_ckpt/, huggingface/    verl; model/ in its layout 2
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nft_megatron.base.errors import UserError
from nft_megatron.base.paths import expand
from nft_megatron.base.untrusted import is_plain_name, read_text
from nft_megatron.config.yaml import parse_yaml, read_sections
from nft_megatron.convert.bridge_config import RUN_CONFIG
from nft_megatron.convert.foreign import refuse_folder, refuse_names
from nft_megatron.convert.mp_rank import is_mp_rank
from nft_megatron.weights.hf_reader import INDEX, SINGLE
from nft_megatron.weights.hf_writer import has_tokenizer
from nft_megatron.weights.torch_dist_index import METADATA, read_index

_MOST_BYTES = 1 << 18
"""Of Megatron-Bridge's configuration."""
_MEGATRON_POINTER, _OUR_POINTER = "latest_checkpointed_iteration.txt", "latest"
_POINTER_REMEDY = "give the path of the checkpoint itself"
_OF_VERL = ("model/dist_ckpt", "dist_ckpt", "model/huggingface", "huggingface")


@dataclass(frozen=True)
class ModelFiles:
    """The folders of ``config.json`` and of the tokenizer; ``note`` tells the user where they are, if that is worth knowing."""

    config: Path
    tokenizer: Path
    note: str = ""


def is_huggingface(folder: Path) -> bool:
    """Whether ``folder`` holds safetensors weights."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def resolve(path: Path, field: str) -> Path:
    """The checkpoint's own folder; ``path`` may also be a folder above it that names it, or holds just one.

    Raises:
        UserError: naming ``field`` if it does not exist, or if there are several and no file says which is the newest.
    """
    if not path.is_dir():
        raise UserError(field, path, "no such folder", "give the path of a checkpoint")
    if _is_checkpoint(path):
        return path
    step = _newest(path, field)
    if step is not None and _is_checkpoint(step):
        return step
    for role in ((step or path) / "actor", step or path):
        for name in _OF_VERL:
            if _is_checkpoint(role / name):
                return role / name
        if role.is_dir():
            refuse_folder(role, field)
    return step or path


def _is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and (is_huggingface(folder) or (folder / METADATA).is_file() or is_mp_rank(folder))


def _newest(path: Path, field: str) -> Path | None:
    """The folder that a file in ``path`` names, or the only one of a step; None if ``path`` is no folder of steps."""
    for pointer in (_MEGATRON_POINTER, _OUR_POINTER):
        if (path / pointer).is_file():
            name = read_text(path / pointer, field, _POINTER_REMEDY).strip()
            if pointer == _MEGATRON_POINTER and name.isascii() and name.isdigit():
                number = int(name[:20])
                of_verl = path / f"global_step_{number}"
                name = of_verl.name if of_verl.is_dir() else f"iter_{number:07d}"
            if not is_plain_name(name) or not (path / name).is_dir():
                raise UserError(field, path / pointer, f"names {name!r}, which is no folder next to it", _POINTER_REMEDY)
            return path / name
    steps = [folder for pattern in ("iter_*", "global_step_*") for folder in sorted(path.glob(pattern)) if folder.is_dir()]
    if len(steps) > 1:
        names = ", ".join(folder.name for folder in steps[:5]) + (" …" if len(steps) > 5 else "")
        raise UserError(field, path, f"holds {names} and no {_MEGATRON_POINTER}", "give the path of one of them")
    return steps[0] if steps else None


def model_files(checkpoint: Path, field: str, given: Path | None = None) -> ModelFiles | None:
    """The configuration and tokenizer of a checkpoint; None if there are none.

    They are those of ``given``; else the checkpoint's own, those beside it (verl), or those of the model that its run started
    from or that Megatron-Bridge's ``run_config.yaml`` names. A tokenizer that Megatron-Bridge keeps replaces that model's: it
    is the one that was trained with.

    Raises:
        UserError: naming ``field`` or the configuration of the run, if what names the model is unreadable.
    """
    kept = checkpoint / "tokenizer" if has_tokenizer(checkpoint / "tokenizer") else None
    if given is not None:
        return ModelFiles(given, given if has_tokenizer(given) or kept is None else kept)
    beside = checkpoint.parent / "huggingface"
    for folder in (checkpoint, beside if checkpoint.name == "dist_ckpt" else checkpoint):
        if (folder / "config.json").is_file():
            return ModelFiles(folder, folder)
    if (found := _model_of_run(checkpoint)) is not None:
        return ModelFiles(found, found)
    for key, name in _models_of_bridge(checkpoint, field):
        if (local := _local(name)) is not None:
            note = f"config.json is from {local}, which {key} in {RUN_CONFIG} names, the tokenizer from {kept or local}"
            return ModelFiles(local, kept or local, note)
    return None


def without_model(checkpoint: Path, field: str) -> UserError:
    """What to tell the user of a Megatron checkpoint for which :func:`model_files` finds nothing.

    Raises:
        UserError: at once, if the checkpoint could not be converted anyway.
    """
    if (checkpoint / METADATA).is_file():
        refuse_names(read_index(checkpoint, field).tensors, checkpoint, field)
    remedy = "name its Hugging Face folder with --model"
    for _, name in _models_of_bridge(checkpoint, field):
        problem = f"has no config.json, and its {RUN_CONFIG} names the model {name!r}, which is no model folder here"
        needed = "config.json suffices" if has_tokenizer(checkpoint / "tokenizer") else "config.json and tokenizer suffice"
        return UserError(field, checkpoint, problem, f"{remedy}; of its files {needed} (nothing is downloaded)")
    return UserError(field, checkpoint, "has no config.json", remedy)


def _model_of_run(checkpoint: Path) -> Path | None:
    run_config = checkpoint.resolve().parent.parent / "config.yaml"  # RUN/checkpoints/step_…
    if run_config.is_file():
        section = read_sections(run_config).get("model")
        if isinstance(section, dict) and isinstance(section.get("path"), str):
            try:
                return expand(section["path"])
            except ValueError as error:
                raise UserError(
                    f"{run_config}: model.path", section["path"], str(error), "name the folder with --model"
                ) from error
    return None


def _models_of_bridge(checkpoint: Path, field: str) -> list[tuple[str, str]]:
    """The model folders or hub ids in ``run_config.yaml``, each with its key, in Megatron-Bridge's own order."""
    path = checkpoint / RUN_CONFIG
    if not path.is_file():
        return []
    remedy = "name the model's Hugging Face folder with --model"
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise UserError(field, path, f"has {size:,} bytes, more than {_MOST_BYTES:,}", remedy)
    text = read_text(path, field, remedy)
    try:
        tree: Any = parse_yaml(text)
    except ValueError as error:
        raise UserError(field, path, f"not readable as YAML: {error}", remedy) from error
    found = []
    for section, key in (("model", "hf_model_id"), ("tokenizer", "tokenizer_model")):
        value = tree.get(section) if isinstance(tree, dict) else None
        name = value.get(key) if isinstance(value, dict) else None
        if isinstance(name, str) and name:
            found.append((f"{section}.{key}", name))
    return found


def _local(name: str) -> Path | None:
    try:
        folder = expand(name)
    except ValueError:
        return None
    return folder if (folder / "config.json").is_file() else None
