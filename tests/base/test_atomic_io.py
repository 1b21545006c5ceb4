import pytest

from nft_megatron.base.atomic_io import atomic_file, atomic_folder, remove, remove_leftovers
from nft_megatron.base.errors import UserError
from nft_megatron.base.run_folder import RunFolder


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_target_is_untouched_until_the_end(tmp_path):
    target = tmp_path / "sub" / "a"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"


def test_folder_replaces_an_older_one_whole(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "stale").touch()
    with atomic_folder(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("x")
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*")) == ["inner", "inner/file"]
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        (temporary / "file").touch()
        raise RuntimeError
    assert (target / "inner" / "file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path):
    (tmp_path / ".tmp-77-step_000001").mkdir()
    (tmp_path / ".tmp-77-step_000001" / "half").touch()
    (tmp_path / ".tmp-77-latest").touch()
    (tmp_path / "step_000001").mkdir()
    (tmp_path / ".hidden").touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "step_000001"]


def test_links_are_replaced_and_deleted_and_their_targets_stay(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    for name in ("a", "b", "c"):
        (tmp_path / name).symlink_to("precious" if name != "c" else "absent")
    for name in ("a", "c"):
        with atomic_folder(tmp_path / name) as temporary:
            (temporary / "file").write_text("new")
    remove(tmp_path / "b")
    remove(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "precious"]
    assert [(tmp_path / name / "file").read_text() for name in ("a", "c", "precious")] == ["new", "new", "kept"]


def test_run_folder_is_locked_once_and_finds_its_checkpoints(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.open():
        with pytest.raises(UserError, match="another process is training in it"):
            folder.open()
        assert folder.latest_step() is None
        for step in (20, 3):
            folder.checkpoint(step).mkdir(parents=True)
        folder.set_latest(20)
        assert folder.latest_step() == 20
        assert folder.checkpoint_steps() == [3, 20]
    folder.open().close()
