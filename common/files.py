"""Files and directories that stand under their name only when they are whole.

    with whole_file("prices.json") as part:            # a path beside prices.json
        part.write_text(text)
    with write_directory("merged") as part:            # a directory beside merged/, which must not be there
        save_file(tensors, part / "model.safetensors")
    with update_directory("out", OWNED) as part:       # a directory in out/; what else lies there stays
        save_file(tensors, part / "adapter_model.safetensors")

What is written lies under a temporary name until the block ends. Then its contents are fsynced, it is renamed, and the
directory that holds the name is fsynced: after a power cut, too, the name stands for the old or for the new contents,
never for half of them. A block that raises leaves the old ones, and nothing else; what a killed process leaves under
its temporary names, the next writer of the same target clears away.
"""

import errno
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterable, Iterator

from safetensors import SafetensorError

from common.locks import clear, escaped, in_use

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # such an error comes from a write, which knows no name
FAILING = (errno.EIO, errno.EROFS, errno.EINVAL)  # such a one too, where it comes without a name
# What a file system or platform that cannot fsync a directory answers, or one in which we may write but not read.
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EBADF, errno.EACCES, errno.EIO)
SAVING, SAVED, STEPS = ".saving-", ".saved", ".steps"  # in a directory that is being updated


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends. Readable by all, as any file that is simply opened.

    Raises OSError that names `path` where it cannot be written.
    """
    path = Path(path)
    part = _beside(path, directory=False)
    try:
        with _named(path), in_use(part):
            yield part
            _chmod(part, 0o644)
            _sync(part)
            os.replace(part, path)
            _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def write_directory(out: str | Path) -> Iterator[Path]:
    """A directory to write to, which becomes `out` when the block ends. Its parents are made. `out` may be there
    already only as an empty directory.

    Raises OSError that names `out` where it cannot be written, or where another process has written it meanwhile.
    """
    out = Path(os.path.realpath(out))  # through a symbolic link, to where the files really lie
    part = _beside(out, directory=True)
    try:
        with _named(out, part), in_use(part):
            yield part
            _make_durable(part)
            try:
                os.rename(part, out)  # replaces an empty directory
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise OSError(f"{out} cannot be written: it exists, and holds something") from None
            _sync(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def update_directory(out: str | Path, owned: Iterable[str], last: str | None = None) -> Iterator[Path]:
    """A directory to write to, whose files take their places in `out` when the block ends, `last` as the last of them.
    Of what lies in `out` only the files `owned` (paths below it) are replaced or removed: all else stays.

    One rename, to out/.saved, decides: before it the old files are the directory's, after it the new ones, and
    whoever comes next moves what a killed process did not get to (`settle`). Symbolic links in `out` are replaced,
    never followed. Raises OSError that names `out` where it cannot be written.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        settle(out)
        clear(out, SAVING)
        part = Path(tempfile.mkdtemp(prefix=SAVING, dir=out))
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror}") from None
    try:
        with _named(out, part), in_use(part):
            yield part
            files = sorted(str(path.relative_to(part)) for path in part.rglob("*") if path.is_file())
            files.sort(key=lambda name: name == last)
            gone = [name for name in owned if name not in files and os.path.lexists(out / name)]
            steps = [f"remove {name}\n" for name in gone] + [f"move {name}\n" for name in files]
            (part / STEPS).write_text("".join(steps), encoding="utf-8")
            _make_durable(part)
            while True:
                try:
                    os.rename(part, out / SAVED)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    settle(out)  # another process has just saved there
            _sync(out)
            settle(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):
            out.rmdir()  # where it was made for nothing


def settle(out: str | Path) -> None:
    """Finish an update of `out` that was whole when its process was killed. Several may do so at once."""
    out, saved = Path(out), Path(out) / SAVED
    try:
        steps = (saved / STEPS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # no update to finish, or another process just has
        return
    for step in steps:
        verb, name = step.split(" ", 1)
        target = out / name
        with suppress(FileNotFoundError):  # done already
            if target.parent != out and target.parent.is_symlink():
                target.parent.unlink()
            if verb == "remove":
                target.unlink()
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(saved / name, target)
    for folder in {out} | {(out / step.split(" ", 1)[1]).parent for step in steps}:
        if folder.is_dir():
            _sync(folder)
    shutil.rmtree(saved, ignore_errors=True)


def recover(out: str | Path) -> None:
    """Finish or undo what a killed process has left of `out`: an update; or, of versions that replaced a directory by
    two renames, the new directory (.out.part-*) or the old one (.out.old-*) that lies beside it."""
    out = Path(os.path.realpath(out))
    for old in sorted(out.parent.glob(f".{escaped(out.name)}.old-*")):
        part = old.with_name(old.name.replace(".old-", ".part-"))
        if not out.exists() and not old.is_symlink():
            os.rename(part if part.is_dir() else old, out)  # the old one was moved when the new one was whole
        shutil.rmtree(old, ignore_errors=True)
    if out.parent.is_dir() and os.access(out.parent, os.W_OK):
        clear(out.parent, f".{out.name}.part-")
    if out.is_dir():
        settle(out)


def _beside(out: Path, directory: bool) -> Path:
    """A new temporary directory or file beside `out`. Raises OSError that names `out`."""
    try:
        if directory:
            out.parent.mkdir(parents=True, exist_ok=True)
        clear(out.parent, f".{out.name}.part-")
        if directory:
            return Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
        descriptor, name = tempfile.mkstemp(prefix=f".{out.name}.part-", dir=out.parent)
        os.close(descriptor)
        return Path(name)
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror}") from None


def _make_durable(part: Path) -> None:
    """Readable by all, and on the disk: a directory and everything in it"""
    _chmod(part, 0o755)
    for path in [*part.rglob("*"), part]:
        if path.is_file():
            _chmod(path, 0o644)  # safetensors writes for the owner alone
        _sync(path)


def _chmod(path: Path, mode: int) -> None:
    """Where the mount knows of modes"""
    with suppress(OSError):
        path.chmod(mode)


def _sync(path: Path) -> None:
    """fsync a file, or a directory where the platform can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC or not path.is_dir():
            raise


@contextmanager
def _named(out: Path, part: Path | None = None) -> Iterator[None]:
    """A full disk or a failing one, which whoever writes reports without a name -> OSError in one line that names
    `out`; so does what names a file of `part`, which is gone when the line is read"""
    try:
        yield
    except OSError as error:
        if error.errno is None and part and str(part) in str(error):
            raise OSError(str(error).replace(str(part), str(out))) from None
        if error.errno not in FULL and (error.errno not in FAILING or error.filename is not None):
            raise
        raise OSError(f"{out} cannot be written: {error.strerror}") from None
    except SafetensorError as error:
        if "while serializing" not in str(error):
            raise
        raise OSError(f"{out} cannot be written: {error}") from None
