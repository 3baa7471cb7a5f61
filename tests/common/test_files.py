"""Files and directories that are whole or absent: what is synced and when, what a failure leaves, what it says.

    python -m pytest tests/common/test_files.py
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import files
from common.files import check_writable, whole_file, write_directory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def events(monkeypatch):
    """What reaches the disk, in order: ("sync", path) and ("rename", from, to)"""
    seen, paths = [], {}
    opened, fsync, rename, replace = os.open, os.fsync, os.rename, os.replace

    def recording_open(path, *args, **options):
        descriptor = opened(path, *args, **options)
        paths[descriptor] = Path(path)
        return descriptor

    def recording_fsync(descriptor):
        seen.append(("sync", paths[descriptor]))
        fsync(descriptor)

    def recording(move):
        def moving(source, target):
            seen.append(("rename", Path(source), Path(target)))
            move(source, target)

        return moving

    monkeypatch.setattr(os, "open", recording_open)
    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording(rename))
    monkeypatch.setattr(os, "replace", recording(replace))
    return seen


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_files_contents_are_synced_then_renamed_then_the_directory_is_synced(tmp_path, events):
    with whole_file(tmp_path / "a") as part:
        part.write_text("new")
    assert events == [("sync", part), ("rename", part, tmp_path / "a"), ("sync", tmp_path)]
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_failing_block_leaves_the_old_file_and_nothing_else(tmp_path, error):
    for old in ([], ["a"]):
        with pytest.raises(error):
            with whole_file(tmp_path / "a") as part:
                part.write_text("half")
                raise error
        assert os.listdir(tmp_path) == old
        (tmp_path / "a").write_text("old")
    assert (tmp_path / "a").read_text() == "old"


def test_a_file_has_its_name_only_when_the_block_ends(tmp_path):
    (tmp_path / "a").write_text("old")
    with whole_file(tmp_path / "a") as part:
        part.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("writer", [whole_file, write_directory])
def test_a_full_disk_names_the_target(tmp_path, writer, number):
    with pytest.raises(OSError) as error:
        with writer(tmp_path / "out"):
            raise OSError(number, os.strerror(number))  # from a write: it knows of no name
    assert str(error.value) == f"{tmp_path / 'out'} cannot be written: {os.strerror(number)}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", [whole_file, write_directory])
def test_a_disk_that_is_full_only_when_it_is_synced_names_the_target(tmp_path, writer, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"{tmp_path / 'out'} cannot be written: No space left"):
        with writer(tmp_path / "out") as part:
            (part if writer is whole_file else part / "a").write_text("new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", [whole_file, write_directory])
def test_other_errors_pass_as_they_are(tmp_path, writer):
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "another")
    with pytest.raises(FileNotFoundError) as raised:
        with writer(tmp_path / "out"):
            raise error
    assert raised.value is error


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path / 'no' / 'a'} cannot be written: No such file") as error:
        with whole_file(tmp_path / "no" / "a"):
            pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", files.CANNOT_SYNC)
@pytest.mark.parametrize("writer", [whole_file, write_directory])
def test_a_directory_that_cannot_be_synced_is_no_error(tmp_path, writer, number, monkeypatch):
    fsync = os.fsync

    def files_alone(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    with writer(tmp_path / "out") as part:
        (part if writer is whole_file else part / "a").write_text("new")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("writer", [whole_file, write_directory])
@pytest.mark.parametrize("what, number", [("file", errno.EINVAL), ("directory", errno.EIO)])
def test_a_sync_that_fails_in_earnest_is_an_error(tmp_path, writer, what, number, monkeypatch):
    fsync = os.fsync

    def failing(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == (what == "directory"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(number)):
        with writer(tmp_path / "out") as part:
            (part if writer is whole_file else part / "a").write_text("new")
    assert set(os.listdir(tmp_path)) <= {"out"}


def test_an_entry_that_cannot_be_synced_leaves_the_new_directory_alone(tmp_path, monkeypatch):
    with write_directory(tmp_path / "run") as part:
        (part / "a").write_text("first")
    fsync = os.fsync

    def failing(descriptor):
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == os.path.realpath(tmp_path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        with write_directory(tmp_path / "run") as part:
            (part / "a").write_text("second")
    assert os.listdir(tmp_path) == ["run"] and (tmp_path / "run" / "a").read_text() == "second"


# ---- directories ---------------------------------------------------------------------------------------------------


def test_a_directorys_contents_are_synced_then_renamed_then_the_entry_is_synced(tmp_path, events):
    with write_directory(tmp_path / "run") as part:
        (part / "a").write_text("new")
        (part / "state").mkdir()
        (part / "state" / "b").write_text("new")
        (part / "a").chmod(0o600)  # as safetensors leaves its files
    *synced, renamed, entry = events
    assert set(synced) == {("sync", path) for path in (part / "a", part / "state" / "b", part / "state", part)}
    assert renamed == ("rename", part, tmp_path / "run") and entry == ("sync", tmp_path)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "run" / "a").stat().st_mode & 0o777 == 0o644


def test_an_interrupted_write_leaves_the_old_directory(tmp_path):
    with write_directory(tmp_path / "run") as part:
        (part / "a").write_text("first")
    with pytest.raises(KeyboardInterrupt):
        with write_directory(tmp_path / "run") as part:
            (part / "a").write_text("half")
            raise KeyboardInterrupt
    assert (tmp_path / "run" / "a").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_new_directory_replaces_the_old_one_whole(tmp_path):
    with write_directory(tmp_path / "deep" / "run") as part:
        (part / "a").write_text("first")
    with write_directory(tmp_path / "deep" / "run") as part:
        (part / "b").write_text("second")
        assert os.listdir(tmp_path / "deep" / "run") == ["a"]
    assert os.listdir(tmp_path / "deep" / "run") == ["b"] and os.listdir(tmp_path / "deep") == ["run"]


def test_a_failure_between_the_two_renames_puts_the_old_directory_back(tmp_path, monkeypatch):
    with write_directory(tmp_path / "run") as part:
        (part / "a").write_text("first")
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk gone"):
        with write_directory(tmp_path / "run") as part:
            (part / "a").write_text("second")
    assert (tmp_path / "run" / "a").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_old_directory_that_cannot_be_put_back_is_not_removed(tmp_path, monkeypatch):
    with write_directory(tmp_path / "run") as part:
        (part / "a").write_text("first")
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) >= 2:
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk gone"):
        with write_directory(tmp_path / "run") as part:
            (part / "a").write_text("second")
    [old] = tmp_path.iterdir()
    assert (old / "a").read_text() == "first"


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    with write_directory(tmp_path / "link") as part:
        (part / "a").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "run" / "a").read_text() == "new"


def test_a_full_disk_leaves_nothing_and_is_named(tmp_path):
    """Files may have 1,000 bytes, as if there were no more room: safetensors' own error."""
    script = (
        "import pathlib, resource, sys, torch; from common.files import write_directory\n"
        "from safetensors.torch import save_file; from common.cli import run_main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "def main():\n"
        "    with write_directory(pathlib.Path(sys.argv[1])) as part:\n"
        "        save_file({'w': torch.zeros(9999)}, part / 'w.safetensors')\n"
        "run_main(main)"
    )
    made = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(made, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path / 'out'} cannot be written: ")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_what_could_not_be_written_is_refused_beforehand(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "run")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"{tmp_path / 'file' / 'run'} cannot be written: "):
        check_writable(tmp_path / "file" / "run")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ValueError, match="is a mount point, which cannot be replaced"):
        check_writable(tmp_path)
