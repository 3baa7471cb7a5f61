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
from common.files import recover, update_directory, whole_file, write_directory

ROOT = Path(__file__).resolve().parents[2]


def update(out):
    return update_directory(out, ["a", "b"])


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
@pytest.mark.parametrize("what, number", [("file", errno.EINVAL), ("file", errno.EIO), ("directory", errno.ENOSPC)])
def test_a_sync_that_fails_in_earnest_is_an_error(tmp_path, writer, what, number, monkeypatch):
    fsync = os.fsync

    def failing(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == (what == "directory"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=f"{tmp_path / 'out'} cannot be written: {os.strerror(number)}"):
        with writer(tmp_path / "out") as part:
            (part if writer is whole_file else part / "a").write_text("new")
    assert set(os.listdir(tmp_path)) <= {"out"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.EIO])
@pytest.mark.parametrize("writer", [whole_file, write_directory, update])
def test_a_mount_that_knows_no_modes_is_no_error(tmp_path, writer, number, monkeypatch):
    def refuse(self, mode, **options):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "chmod", refuse)
    with writer(tmp_path / "out") as part:
        (part if writer is whole_file else part / "a").write_text("new")
    assert os.listdir(tmp_path) == ["out"]


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


def test_a_directory_that_another_process_has_written_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path / 'run'} cannot be written: it exists, and holds something"):
        with write_directory(tmp_path / "run") as part:
            (part / "a").write_text("second")
            with write_directory(tmp_path / "run") as other:
                (other / "a").write_text("first")
    assert (tmp_path / "run" / "a").read_text() == "first" and os.listdir(tmp_path) == ["run"]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    for writer in (write_directory, update):
        (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
        with writer(tmp_path / "link") as part:
            (part / "a").write_text("new")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "run" / "a").read_text() == "new"
        (tmp_path / "link").unlink()
        (tmp_path / "disk" / "run" / "a").unlink()


# ---- directories that are written again and again --------------------------------------------------------------------


def fill(out, text, *names, owned=("a", "b", "state/c")):
    with update_directory(out, owned, last="a") as part:
        for name in names:
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(text)


def test_an_update_replaces_what_is_owned_and_leaves_all_else(tmp_path):
    out = tmp_path / "run"
    fill(out, "first", "a", "b", "state/c")
    (out / "thesis.txt").write_text("mine")
    (out / "state" / "note").write_text("mine")
    (out / "report").symlink_to(tmp_path)
    fill(out, "second", "a", "state/c")
    left = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert {name: left[name] for name in left if not name.startswith("report")} == {
        "a": "second", "state/c": "second", "thesis.txt": "mine", "state/note": "mine",
    }  # fmt: skip
    assert (out / "report").is_symlink() and not (out / "b").exists()


def test_an_update_follows_no_link_out_of_its_directory(tmp_path):
    (tmp_path / "away").mkdir()
    for name in ("b", "c"):
        (tmp_path / "away" / name).write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "b").symlink_to(tmp_path / "away" / "b")
    (tmp_path / "run" / "state").symlink_to(tmp_path / "away")
    fill(tmp_path / "run", "new", "a", "state/c")
    assert [(tmp_path / "away" / name).read_text() for name in ("b", "c")] == ["mine", "mine"]
    assert (tmp_path / "run" / "state" / "c").read_text() == "new" and not (tmp_path / "run" / "state").is_symlink()


@pytest.mark.parametrize("writer", [write_directory, update])
def test_a_disk_that_is_full_at_a_file_within_names_that_file_where_it_would_be(tmp_path, writer):
    with pytest.raises(OSError) as error:
        with writer(tmp_path / "out") as part, whole_file(part / "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(error.value) == f"{tmp_path / 'out' / 'a'} cannot be written: No space left on device"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_update_that_fails_leaves_the_old_files(tmp_path, error):
    fill(tmp_path / "run", "first", "a", "b")
    with pytest.raises(error):
        with update(tmp_path / "run") as part:
            (part / "a").write_text("half")
            raise error
    assert sorted(os.listdir(tmp_path / "run")) == ["a", "b"] and (tmp_path / "run" / "a").read_text() == "first"
    with pytest.raises(error):
        with update(tmp_path / "new"):
            raise error
    assert os.listdir(tmp_path) == ["run"]


MOVES = ["rename", "replace", "unlink", "rmdir"]


def test_an_update_that_is_killed_anywhere_is_the_old_or_the_new_files_when_settled(tmp_path):
    """Every call that changes what a name means is once the last one."""
    script = (
        "import os, sys; from test_files import fill; left = int(sys.argv[2])\n"
        "def counted(call):\n"
        "    def counting(*given, **options):\n"
        "        global left; left -= 1\n"
        "        if left < 0: os.kill(os.getpid(), 9)\n"
        "        return call(*given, **options)\n"
        "    return counting\n"
        f"for name in {MOVES}: setattr(os, name, counted(getattr(os, name)))\n"
        "fill(sys.argv[1], 'new', 'a', 'state/c')\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    seen, number, code = [], 0, -9
    while code:
        out = tmp_path / f"run{number}"
        fill(out, "old", "a", "b", "state/c")
        command = [sys.executable, "-c", script, str(out), str(number)]
        code = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}).returncode
        recover(out)
        left = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
        left = {name: text for name, text in left.items() if not name.startswith(files.SAVING)}
        whole = [dict.fromkeys(("a", "b", "state/c"), "old"), dict.fromkeys(("a", "state/c"), "new")]
        assert left in whole, number
        seen.append(whole.index(left))
        number += 1
    assert seen == sorted(seen) and set(seen) == {0, 1} and len(seen) >= 6


def test_what_killed_processes_leave_is_cleared_and_what_living_ones_write_is_not(tmp_path):
    (tmp_path / "run" / ".saving-1").mkdir(parents=True)
    (tmp_path / ".run.part-1").mkdir()
    (tmp_path / ".file.part-1").write_text("half")
    for path in (tmp_path / "run" / ".saving-1", tmp_path / ".run.part-1", tmp_path / ".file.part-1"):
        os.utime(path, (1e9, 1e9))
    with whole_file(tmp_path / "file") as living:
        os.utime(living, (1e9, 1e9))
        with whole_file(tmp_path / "file") as part:
            part.write_text("new")
        assert living.exists() and not (tmp_path / ".file.part-1").exists()
    recover(tmp_path / "run")
    fill(tmp_path / "run", "new", "a")
    assert sorted(os.listdir(tmp_path)) == ["file", "run"] and os.listdir(tmp_path / "run") == ["a"]


@pytest.mark.parametrize("left, holds", [(["old", "part"], "part"), (["old"], "old"), (["out", "old"], "out")])
def test_what_earlier_versions_left_between_two_renames_is_found(tmp_path, left, holds):
    for name in left:
        path = tmp_path / ("run" if name == "out" else f".run.{name}-x1")
        path.mkdir()
        (path / "a").write_text(name)
        os.utime(path, (1e9, 1e9))
    recover(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"] and (tmp_path / "run" / "a").read_text() == holds


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
