"""``~`` in every path that a person writes, and folders that do not exist."""

import argparse
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.base.paths import expand
from nft_megatron.cli.arguments import user_path
from nft_megatron.cli.main import COMMANDS, _parse, build_parser
from nft_megatron.config.load import config_from, dump_config, load_config
from nft_megatron.config.schema import Config

NOBODY = "~nobody-of-that-name/x"


def smallest() -> dict[str, Any]:
    return {"run_dir": "r", "model": {"path": "m"}, "data": {"train": ["t"]}, "train": {"num_steps": 1}}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def path_fields(model: Any = Config, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every field of the configuration that holds a path, and whether it holds several."""
    for name, field in model.model_fields.items():
        for option in typing.get_args(field.annotation) or (field.annotation,):
            if not prefix and isinstance(option, type) and hasattr(option, "model_fields"):
                yield from path_fields(option, f"{name}.")
        if "Path" in str(field.annotation):
            yield f"{prefix}{name}", "tuple" in str(field.annotation)


FIELDS = dict(path_fields())


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def test_the_fields_are_found():
    assert {"run_dir", "model.path", "data.train", "evaluate.data", "fleet.key_file", "slurm.python"} <= FIELDS.keys()
    assert FIELDS["data.train"] and not FIELDS["run_dir"]


@pytest.mark.parametrize("key", FIELDS)
def test_a_tilde_is_expanded_in_every_field(home, tmp_path, key):
    """As an override, in a list, in a file; and what the run writes is the expanded path."""
    one = (home / "a b",) if FIELDS[key] else home / "a b"
    assert value_of(config_from(smallest(), [f"{key}=~/a b"]), key) == one
    if FIELDS[key]:
        several = value_of(config_from(smallest(), [f"{key}=[~/a b, x/~, ~root]"]), key)
        assert several == (home / "a b", Path("x/~"), Path("/root"))
    tree, (section, _, leaf) = smallest(), key.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[leaf] = "~/a b"
    config = config_from(tree)
    assert value_of(config, key) == one
    (tmp_path / "written.yaml").write_text(dump_config(config))
    assert "~" not in (tmp_path / "written.yaml").read_text()
    assert load_config(tmp_path / "written.yaml") == config


def test_images_and_mounts_too_but_not_what_only_looks_like_a_path(home):
    overrides = ["slurm.container_image=~/nft.sqsh", "slurm.container_mounts=[~/data:/data, /shared:/shared]"]
    slurm = config_from(smallest(), overrides).slurm
    assert slurm.container_image == f"{home}/nft.sqsh"
    assert slurm.container_mounts == (f"{home}/data:/data", "/shared:/shared")
    assert config_from(smallest(), ["slurm.container_image=docker://nvcr.io/x"]).slurm.container_image == "docker://nvcr.io/x"


@pytest.mark.parametrize("key", ["run_dir", "model.path", "fleet.key_file"])
def test_nobodys_home_is_an_error_that_names_the_field(key):
    with pytest.raises(UserError, match=rf"{key} = {NOBODY}: this machine knows no home folder ~nobody-of-that-name; "):
        config_from(smallest(), [f"{key}={NOBODY}"])
    assert expand("~root/x") == Path("/root/x")


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)
        else:
            yield action


def test_every_argument_that_is_a_path_expands_it(home):
    everything = list(actions(build_parser(COMMANDS)))
    assert [action.dest for action in everything if action.type is Path] == []
    assert len([action for action in everything if action.type is user_path]) > 20
    assert (user_path("~/a"), user_path("a/~")) == (home / "a", Path("a/~"))
    with pytest.raises(argparse.ArgumentTypeError, match="no home folder"):
        user_path(NOBODY)
    options = _parse(["report", "~/run", "--out=~/page.html"])
    assert (options.reported, options.out) == (home / "run", home / "page.html")


def test_functions_too(home):
    (home / "configs").mkdir(parents=True)
    (home / "configs" / "a.yaml").write_text(dump_config(config_from(smallest())))
    assert load_config("~/configs/a.yaml", ["evaluate.data=~/x"]).evaluate.data == (home / "x",)
    from nft_megatron.convert.commands import convert_checkpoint
    from nft_megatron.evaluate.folder import evaluate_folder

    with pytest.raises(UserError, match=f"MODEL = {home}/model: no such folder"):
        evaluate_folder(config_from(smallest(), ["evaluate.data=x.jsonl"]), "~/model")
    with pytest.raises(UserError, match=f"SRC = {home}/a: no such folder"):
        convert_checkpoint("~/a", "~/b")


def loaders(absent: Path) -> list[tuple[str, Callable[[], object]]]:
    """Everything that opens a model folder, with the field that it names."""
    from nft_megatron.convert.commands import check, to_hf, to_megatron
    from nft_megatron.data.tokenizer import load_tokenizer
    from nft_megatron.evaluate.folder import default_config
    from nft_megatron.weights import read_shape
    from nft_megatron.weights.hf_reader import HFReader

    here, out = absent.parent, absent.parent / "out"
    return [
        ("model.path", lambda: load_tokenizer(absent)),
        ("model.path", lambda: read_shape(absent)),
        ("model.path", lambda: HFReader(absent)),
        ("MODEL", lambda: default_config(absent, out, [])),
        ("SRC", lambda: to_megatron(absent, out)),
        ("SRC", lambda: to_hf(absent, out)),
        ("--model", lambda: to_hf(here, out, model=absent)),
        ("A", lambda: check(absent, here)),
        ("--model", lambda: check(here, here, model=absent)),
    ]


def test_a_missing_folder_is_said_before_what_it_lacks(tmp_path):
    for field, call in loaders(tmp_path / "absent"):
        with pytest.raises(UserError) as raised:
            call()
        assert (raised.value.field, raised.value.problem) == (field, "no such folder"), str(raised.value)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "absent").touch()
    for _, call in loaders(tmp_path / "absent")[:5]:
        with pytest.raises(UserError, match="is a file, not a folder; give the path of a Hugging Face model folder"):
            call()
