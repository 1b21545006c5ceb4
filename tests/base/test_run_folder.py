"""The lock of a run folder, and what is the run's own."""

import errno
import fcntl
import os
import shutil

import pytest

from nft_megatron.base.errors import StoppedEarly, UserError
from nft_megatron.base.own_folder import ForeignFolderError
from nft_megatron.base.run_folder import RunFolder, RunFolderTakenError


def content(folder):
    """Everything below ``folder``: links as such, files with their bytes."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def begun(root) -> RunFolder:
    """A run that has been started before, with two checkpoints."""
    run = RunFolder(root)
    with run.open():
        run.make_folders()
        run.config.write_text("seed: 1\n")
        for step in (1, 2):
            run.checkpoint(step).mkdir()
            (run.checkpoint(step) / "collector.parquet").write_text(f"{step} of {root}")
    return run


# -------------------------------------------------------------------------------------------------------------------- lock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES])
def test_a_file_system_without_locks_is_refused_with_the_remedy(folder, monkeypatch, number):
    def no_lock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with pytest.raises(UserError, match=r"^run_dir = .*: cannot be locked: .*; mount its file system .*flock") as end:
        folder.open()
    assert end.value.exit_code == 2 and not isinstance(end.value, RunFolderTakenError)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_file_system_that_is_away_is_not_one_without_locks(folder, monkeypatch, number):
    def away(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", away)
    with pytest.raises(OSError, match=os.strerror(number)):
        folder.open()


def replace_lock(run):
    (run.root / "lock").unlink()
    (run.root / "lock").touch()


def replace_folder(run):
    run.root.rename(run.root.with_name("elsewhere"))
    run.root.mkdir()
    (run.root / "lock").touch()


def replace_by_copy(run):
    run.root.rename(run.root.with_name("elsewhere"))
    shutil.copytree(run.root.with_name("elsewhere"), run.root)


@pytest.mark.parametrize("action", [replace_lock, replace_folder, replace_by_copy, lambda run: shutil.rmtree(run.root)])
@pytest.mark.parametrize("holds", [True, False])
def test_the_lock_is_a_file_and_not_a_name(tmp_path, action, holds):
    """Also for a rank that did not take it. Every one of these leaves, or makes, a file where the lock was, but the last."""
    run = begun(tmp_path / "run")
    holder = run if holds else RunFolder(run.root)
    with holder.open(), run.expected():
        run.check_is_open()
        action(run)
        with pytest.raises(OSError, match="the run folder has disappeared") as gone:
            run.check_is_open()
        assert gone.value.errno == errno.ESTALE
        with pytest.raises(StoppedEarly, match="has disappeared; once it is back"), run.expected():
            raise FileNotFoundError("a ledger")


def test_who_deletes_a_lock_lets_in_one_process_and_the_first_notices(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with first.open():
        (tmp_path / "run" / "lock").unlink()
        with second.open():
            second.check_is_open()
            with pytest.raises(OSError, match="disappeared"):
                first.check_is_open()
            with pytest.raises(RunFolderTakenError):
                RunFolder(tmp_path / "run").open()


def test_a_lock_that_is_replaced_while_it_is_taken_is_not_held(folder, monkeypatch):
    flock, calls = fcntl.flock, []

    def slow(file, how):
        calls.append(os.fstat(file.fileno()).st_ino)
        if len(calls) == 1:
            replace_lock(folder)
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with folder.open(wait_seconds=30.0) as lock:
        assert len(calls) == 2
        assert os.path.samestat(os.fstat(lock.fileno()), (folder.root / "lock").stat())


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "folder"])
def test_only_a_file_of_its_own_becomes_the_lock(folder, tmp_path, kind):
    folder.root.mkdir()
    (tmp_path / "precious").write_text("kept")
    lock = folder.root / "lock"
    if "link" in kind:
        lock.symlink_to(tmp_path / ("precious" if kind == "link" else "absent"))
    else:
        os.mkfifo(lock) if kind == "fifo" else lock.mkdir()
    before = content(tmp_path) if kind != "fifo" else None
    with pytest.raises(UserError, match=r"run_dir = .*: cannot be written \(.*/lock: "):
        folder.open()
    assert before is None or content(tmp_path) == before
    assert (tmp_path / "precious").read_text() == "kept" and not (tmp_path / "absent").exists()


def test_what_is_in_the_lock_stays(folder):
    folder.root.mkdir()
    (folder.root / "lock").write_text("somebody's note")
    folder.open().close()
    assert (folder.root / "lock").read_text() == "somebody's note"


# --------------------------------------------------------------------------------------------------------- what is its own


def test_a_first_start_deletes_nothing(folder, tmp_path):
    for name in (".tmp-1-mine", ".tmp-old-1-mine", "logs/.tmp-7-mine", "hf/.tmp-7-model/weights"):
        (folder.root / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.root / name).write_text("kept")
    before = content(tmp_path)
    folder.open().close()
    assert content(tmp_path) == before | {"run/lock": b""}


def test_a_later_start_deletes_its_own_leftovers_and_no_targets(tmp_path):
    run = begun(tmp_path / "run")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "weights").write_text("kept")
    before = content(tmp_path)
    for place in (run.root, run.checkpoints, run.logs):
        (place / ".tmp-77-link").symlink_to(tmp_path / "precious")
        (place / ".tmp-77-dangling").symlink_to(tmp_path / "absent")
        (place / ".tmp-77-folder").mkdir()
        (place / ".tmp-77-folder" / "link").symlink_to(tmp_path / "precious")
    (run.root / ".tmp-notes").write_text("not a name of ours")
    run.open().close()
    assert content(tmp_path) == before | {"run/.tmp-notes": b"not a name of ours"}


@pytest.mark.parametrize("name", ["checkpoints/step_000007", "hf/step_000007"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_with_the_checkpoints_of_something_else_is_refused(folder, tmp_path, name, linked):
    there = tmp_path / ("others" if linked else "run") / name
    there.mkdir(parents=True)
    (there / "weights").write_text("kept")
    if linked:
        folder.root.mkdir()
        (folder.root / there.parent.name).symlink_to(there.parent)
    before = content(tmp_path)
    with pytest.raises(ForeignFolderError, match=rf"^run_dir = .*: holds no run, but {name}; choose another folder"):
        folder.open()
    assert content(tmp_path) == before


def test_the_copy_of_a_run_is_a_run_also_without_its_lock(tmp_path):
    run = begun(tmp_path / "run")
    copy = RunFolder(shutil.copytree(run.root, tmp_path / "copy"))
    (copy.root / "lock").unlink()
    copy.open().close()
    assert copy.checkpoint_steps() == [1, 2]


def linked(root, target, name="checkpoints") -> RunFolder:
    """A new run whose folder ``name`` is a link to ``target``."""
    target.mkdir(exist_ok=True)
    root.mkdir()
    (root / name).symlink_to(target)
    return RunFolder(root)


@pytest.mark.parametrize("name", ["checkpoints", "hf", "ledger", "logs"])
def test_two_runs_cannot_share_what_their_links_lead_to(tmp_path, name):
    first = linked(tmp_path / "a", tmp_path / "disk", name)
    first.open().close()
    second = linked(tmp_path / "b", tmp_path / "disk", name)
    before = content(tmp_path)
    with pytest.raises(ForeignFolderError, match=rf"^run_dir = .*/b/{name}: leads to .*/disk, as .*/a/{name} of another run"):
        second.open()
    assert content(tmp_path) == before
    first.open().close()


def test_a_run_may_keep_its_checkpoints_on_another_disk_and_move(tmp_path):
    run = linked(tmp_path / "a", tmp_path / "disk")
    with run.open():
        run.make_folders()
        run.checkpoint(3).mkdir()
    run.open().close()
    run.root.rename(tmp_path / "moved")
    moved = RunFolder(tmp_path / "moved")
    for _ in range(2):
        with moved.open():
            assert moved.checkpoint_steps() == [3]


def test_a_link_into_another_run_is_refused(tmp_path):
    other = begun(tmp_path / "other")
    shutil.rmtree(other.checkpoints / "step_000001")
    shutil.rmtree(other.checkpoints / "step_000002")  # nothing else would tell
    run = linked(tmp_path / "run", other.checkpoints)
    with pytest.raises(ForeignFolderError, match=r"leads to .*/other/checkpoints, as .*/other/checkpoints of another run does"):
        run.open()


def test_a_link_that_leads_nowhere_is_refused(folder, tmp_path):
    folder.root.mkdir()
    (folder.root / "checkpoints").symlink_to(tmp_path / "absent")
    with pytest.raises(ForeignFolderError, match=r"run_dir = .*/checkpoints: leads to .*/absent, which is no folder; "):
        folder.open()
