"""Where a run writes, and what it must not share."""

import os

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.base.own_folder import ForeignFolderError
from nft_megatron.config.load import load_config
from nft_megatron.config.places import check_places, weights_folder


@pytest.fixture
def place(tmp_path, run_config):
    """The configuration of a run beside a model and a folder of questions, with other places."""
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("model")

    def load(*overrides):
        return load_config(run_config(), [f"model.path={tmp_path}/model", *overrides])

    return load


SHARED = {
    "the model folder": (["run_dir={0}/model"], r"run_dir = .*/model: is model\.path = "),
    "through a link": (["run_dir={0}/link"], r"run_dir = .*/link: is model\.path = "),
    "through dots": (["run_dir={0}/data/../model/."], r"run_dir = .*: is model\.path = "),
    "in the model folder": (["run_dir={0}/model/inner/run"], r"run_dir = .*: would write into model\.path = "),
    "in the questions": (["run_dir={0}/data/run", "data.train={0}/data"], r"run_dir = .*: would write into data\.train = "),
    "in the held-out questions": (["run_dir={0}/data", "evaluate.data={0}/data"], r"run_dir = .*: is evaluate\.data = "),
    "the model in its checkpoints": (["model.path={0}/run/checkpoints/step_000003"], r"run_dir = .*: contains model\.path = "),
    "the model in its exports": (["model.path={0}/run/hf/step_000003"], r"run_dir = .*: contains model\.path = "),
    "the questions in its ledger": (
        ["data.train={0}/run/ledger/a.parquet"],
        r"run_dir = .*: contains data\.train = ",
    ),
    "weights in the model folder": (["fleet.weights_dir={0}/model"], r"fleet\.weights_dir = .*: would write into model\.path"),
}


@pytest.mark.parametrize("kind", SHARED)
def test_a_run_writes_nowhere_that_it_reads(place, tmp_path, kind):
    overrides, message = SHARED[kind]
    with pytest.raises(ForeignFolderError, match=message):
        check_places(place(*(override.format(tmp_path) for override in overrides)))


def test_links_within_the_run_folder_count_as_well(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hf").symlink_to(tmp_path / "model")
    with pytest.raises(ForeignFolderError, match=r"would write into model\.path"):
        check_places(place())


@pytest.mark.parametrize("overrides", [[], ["run_dir={0}"], ["run_dir={0}/model-run"], ["fleet.weights_dir={0}"]])
def test_beside_and_around_what_it_reads_it_may_write(place, tmp_path, overrides):
    check_places(place(*(override.format(tmp_path) for override in overrides)))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("''", "run_dir = : is empty, which would mean the current folder"),
        ("'  '", "is empty, which would mean the current folder"),
        ('"a\\nb"', r"run_dir = a\nb: has a control character, such as a line break"),
        ('"a\\0b"', r"has a control character"),
        ('"a\\eb"', r"has a control character"),
    ],
)
def test_a_run_folder_has_a_name_of_one_line(place, value, problem):
    with pytest.raises(UserError) as refused:
        place(f"run_dir={value}")
    assert problem in str(refused.value) and "run_dir = " in str(refused.value)


# ----------------------------------------------------------------------------------------------------------------- weights


def test_runs_that_share_a_weights_folder_share_no_version(place, tmp_path):
    shared = f"fleet.weights_dir={tmp_path}/weights"
    folders = {weights_folder(place(shared, f"run_dir={tmp_path}/{name}")) for name in ("a/run", "b/run", "c")}
    assert len(folders) == 3
    assert all(folder.parent == tmp_path / "weights" and folder.name not in ("a", "run", "c") for folder in folders)
    os.symlink(tmp_path / "a", tmp_path / "same")
    assert weights_folder(place(shared, f"run_dir={tmp_path}/same/run")) in folders, "the same run under another name"


def test_a_folder_in_the_run_folder_is_its_own(place, tmp_path):
    assert weights_folder(place()) == tmp_path / "run" / "weights"
    assert weights_folder(place(f"fleet.weights_dir={tmp_path}/run/fast")) == tmp_path / "run" / "fast"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").symlink_to(tmp_path / "data")
    assert weights_folder(place()).parent == tmp_path / "data", "where others may link to as well"
