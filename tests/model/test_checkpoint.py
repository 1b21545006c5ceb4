"""Checkpoints that cannot be written or trusted. Round trips and other layouts are in test_layouts.py.

One task saves one checkpoint and then loads spoilt copies of it.
"""

import errno
from pathlib import Path

import pytest
from checkpoint_worker import generators_of_another_device, measure


@pytest.fixture(scope="module")
def messages(world, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What happened in each case: the error's class and text, or null."""
    return world(1)(measure, model_folder, tmp_path_factory.mktemp("checkpoints"))


def test_before_the_first_update_a_checkpoint_round_trips(messages: dict):
    assert messages["intact"] is None
    assert messages["extra"] == {"step": 0}


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("one bit flipped", "__0_0.distcp is damaged"),
        ("truncated", "__0_0.distcp is damaged"),
        ("tensor file missing", "lacks its file __0_0.distcp"),
        ("metadata missing", "lacks its file .metadata"),
        ("common file flipped", "common.pt is damaged"),
        ("no checksums", "not a complete checkpoint"),
        ("empty folder", "not a complete checkpoint"),
    ],
)
def test_damage_is_found_before_anything_is_loaded(messages: dict, case: str, text: str):
    kind, message, changed = messages[case]
    assert kind == "DamagedCheckpointError"
    assert text in message
    assert "checkpoints/latest" in message
    assert changed == []


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("index executes", ".metadata: is not the metadata of a torch_dist checkpoint"),
        ("index executes and is right", ".metadata: is not the metadata of a torch_dist checkpoint"),
        ("index of another file", "the file '../good/__0_0.distcp' is not in its folder"),
        ("index with a negative offset", "a size or offset that is none"),
        ("index beyond the file", "__0_0.distcp: is truncated within"),
        ("common part executes", "names __builtin__.eval, which is not data"),
        ("common part of another program", "is not of a run of nft_megatron"),
        ("object executes", "names __builtin__.eval, which is not data"),
        ("object is none", "no usable states of random generators"),
        ("state of a module executes", "_extra_state/shard_0_2 is more than an empty state of Transformer Engine"),
        ("deep metadata.json", "is nested too deeply"),
        ("other metadata.json", "is not Megatron-Core's"),
    ],
)
def test_a_hostile_checkpoint_is_refused(messages: dict, case: str, text: str):
    """Its checksums are right: whoever can write a checkpoint can write them too."""
    kind, message, _ = messages[case]
    assert kind == "UserError"
    assert text in message


def test_nothing_in_a_hostile_checkpoint_is_executed(messages: dict):
    assert messages["executed"] == []


def test_weights_that_are_not_finite_are_refused(messages: dict):
    kind, message, _ = messages["not finite"]
    assert kind == "UserError"
    assert "model.norm.weight holds numbers that are not finite in float32" in message


def test_the_checkpoint_of_another_model_is_refused(messages: dict):
    kind, message, _ = messages["another model"]
    assert kind == "UserError"
    assert "of another model" in message
    assert "model.path" in message


@pytest.mark.parametrize("space", ["100 bytes", "20000 bytes"])
def test_a_full_disk_is_an_os_error(messages: dict, space: str):
    """100 bytes: not even the common part fits. 20000: that does, the tensors don't."""
    kind, message, _ = messages[space]
    assert kind == "OSError"
    errno_and_text, filename = message.split(": ")
    assert errno_and_text == f"[Errno {errno.EFBIG}] File too large while saving a checkpoint"
    assert Path(filename.strip("'")).name == space, "the folder"


def test_a_run_may_begin_without_transformer_engine_and_resume_with_it_and_the_other_way_round(messages: dict):
    without, with_it = messages["states of attention"]
    assert (without, with_it > 0) == (0, True), "the case is real"
    assert messages["begun without extra state"] == []
    assert messages["begun with extra state"] == []


def test_generators_of_another_kind_of_device_are_not_restored(world, model_folder: Path):
    assert world(1)(generators_of_another_device, model_folder) == {
        "same device": True,
        "cpu generator": True,
        "tracker kept": True,
    }
