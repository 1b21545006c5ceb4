"""Conversions that are killed, at any moment: nobody takes what they leave for a checkpoint, and the same call finishes it."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from convert.conftest import tensors_of
from convert_worker import convert_dying
from launcher import Ranks
from tiny_families import FAMILIES, SIZES
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from nft_megatron.base.errors import UserError
from nft_megatron.convert import engine, transfer
from nft_megatron.convert.commands import check, to_hf, to_megatron
from nft_megatron.convert.journal import PartialFolder
from nft_megatron.weights import read_shape

NUM_KILLS = 10  # in each direction
COMMANDS = {"to-megatron": to_megatron, "to-hf": to_hf}


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, Path]:
    """A model of eight layers as a Hugging Face folder, its conversion, and the way back, all undisturbed."""
    config_class, model_class, changes = FAMILIES["qwen2"]
    folder = tmp_path_factory.mktemp("ends")
    torch.manual_seed(0)
    model_class(config_class(**{**SIZES, **changes, "num_hidden_layers": 8})).bfloat16().save_pretrained(folder / "source")
    to_megatron(folder / "source", folder / "to-megatron")
    to_hf(folder / "to-megatron", folder / "to-hf")
    return {"to-megatron": folder / "to-megatron", "to-hf": folder / "to-hf", "source": folder / "source"}


@pytest.fixture
def copied(monkeypatch) -> list[str]:
    """The tensors that conversions in this process have copied since."""
    names: list[str] = []
    copy = transfer._Job._copy
    monkeypatch.setattr(transfer._Job, "_copy", lambda job, name: names.append(name) or copy(job, name))
    return names


def assert_nobody_reads(folder: Path) -> None:
    """Neither transformers, nor torch.distributed.checkpoint under Megatron-Core's load, nor a training start, nor check."""
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises((OSError, UserError)):
        FileSystemReader(folder).read_metadata()
    with pytest.raises(UserError):
        read_shape(folder)
    with pytest.raises(UserError):
        check(folder, folder)


def same(folder: Path, other: Path) -> bool:
    """Every file, byte for byte; a manifest says where its tensors came from."""
    names = {path.name for path in folder.iterdir()}
    manifests = [json.loads((path / "conversion.json").read_text()) | {"source": None} for path in (folder, other)]
    return (
        names == {path.name for path in other.iterdir()}
        and all((folder / name).read_bytes() == (other / name).read_bytes() for name in names - {"conversion.json"})
        and manifests[0] == manifests[1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("direction", COMMANDS)
def test_killed_at_any_moment(ends, tmp_path: Path, copied, direction: str):
    source, counted = ends["source"] if direction == "to-megatron" else ends["to-megatron"], tmp_path / "counted"

    def convert(final: Path, moment: int = 0) -> int:
        """In a process of its own; its exit code."""
        return Ranks(convert_dying, (direction, source, final, moment, counted), 1, tmp_path).wait(600).returncode

    assert convert(tmp_path / "undisturbed") == 0
    num_operations = int(counted.read_text())
    assert same(tmp_path / "undisturbed", ends[direction])
    random_moments = random.Random(direction)
    num_tensors, part_done = len(tensors_of(ends["source"])), 0
    for number in range(NUM_KILLS):
        final = tmp_path / f"killed {number}"
        partial, journal = tmp_path / f"{final.name}.partial", tmp_path / f"{final.name}.partial" / "journal.jsonl"
        moment = 1 + int(num_operations * (number + random_moments.random()) / NUM_KILLS)
        assert convert(final, moment) == -signal.SIGKILL
        if final.exists():  # it had its name already
            assert same(final, ends[direction])
            continue
        assert_nobody_reads(final)
        done = max(0, journal.read_text().count("\n") - 1) if journal.exists() else 0
        is_whole = (partial / "conversion.json").exists()  # and lacks but its name
        if done < num_tensors and not is_whole:
            assert_nobody_reads(partial)
        part_done += 0 < done < num_tensors
        copied.clear()
        COMMANDS[direction](source, final)
        assert len(copied) == num_tensors - done
        assert same(final, ends[direction])
        assert not partial.exists()
    assert part_done, "no moment tested anything"


@pytest.mark.parametrize("direction", COMMANDS)
def test_what_did_not_reach_the_disk_is_written_again(ends, tmp_path: Path, monkeypatch, copied, direction: str):
    """Its hash tells. A line of the journal that was cut off counts for nothing."""
    source, final = ends["source"] if direction == "to-megatron" else ends["to-megatron"], tmp_path / "killed"
    write_rows, num_written = engine.Files.write_rows, 0

    def give_up(*arguments) -> None:
        nonlocal num_written
        num_written += 1
        if num_written > 20:
            raise KeyboardInterrupt
        write_rows(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.Files, "write_rows", give_up)
        COMMANDS[direction](source, final, workers=1)
    journal = tmp_path / "killed.partial" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 21
    lost = json.loads(lines[5])["tensor"]
    journal.write_text("".join(f"{line}\n" for line in lines) + lines[6][:20])
    (victim,) = [path for path in journal.parent.iterdir() if path.suffix in (".distcp", ".safetensors")]
    content = victim.read_bytes()
    data = tensors_of(ends["source"])[lost].view(torch.uint8).numpy().tobytes()
    assert content.count(data[:64]) == 1
    victim.write_bytes(content.replace(data[:64], bytes(64)))

    copied.clear()
    COMMANDS[direction](source, final)
    assert lost in copied
    assert len(copied) == len(tensors_of(ends["source"])) - 19
    assert same(final, ends[direction])


def test_without_proof_an_interrupted_conversion_begins_anew(sources, tmp_path: Path, monkeypatch, copied):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transfer, "_hashes_around_tensors", interrupt)
        to_megatron(sources["tied"], tmp_path / "out", proof=False)
    to_megatron(sources["tied"], tmp_path / "out", proof=False)
    assert len(copied) == 2 * len(tensors_of(sources["tied"]))
    check(sources["tied"], tmp_path / "out")


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_another_source_begins_anew(sources, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transfer, "_hashes_around_tensors", interrupt)
        to_megatron(sources["tied"], tmp_path / "out")
    (tmp_path / "out.partial" / "strange.distcp").write_bytes(b"x")
    to_megatron(sources["untied"], tmp_path / "out")
    assert not (tmp_path / "out" / "strange.distcp").exists()
    check(sources["untied"], tmp_path / "out")


def test_interrupted_in_its_last_moments_it_leaves_nothing_of_them(sources, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PartialFolder, "publish", interrupt)
        to_megatron(sources["untied"], tmp_path / "out")
    (tmp_path / "out.partial" / ".tmp-1-conversion.json").write_text("{")
    to_megatron(sources["untied"], tmp_path / "out")
    to_megatron(sources["untied"], tmp_path / "at once")
    for folder, other in (("out", "at once"), ("at once", "out")):
        for path in (tmp_path / folder).iterdir():
            assert path.read_bytes() == (tmp_path / other / path.name).read_bytes(), path.name
