"""Files and directories that stand under their name only when they are whole.

    with whole_file("prices.json") as part:            # a path beside prices.json
        part.write_text(text)
    with write_directory("out") as part:               # a directory beside out/
        save_file(tensors, part / "model.safetensors")

What is written lies under a temporary name beside the target until the block ends. Then its contents are fsynced, it is
renamed, and the directory that holds the name is fsynced: after a power cut, too, the name stands for the old or for
the new contents, never for half of them. A block that raises leaves the old ones, and nothing else.
"""

import errno
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # such an error comes from a write, which knows no name
# What a file system or platform that cannot fsync a directory answers, or one in which we may write but not read.
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EBADF, errno.EACCES)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends. Readable by all, as any file that is simply opened.

    Raises OSError that names `path` where it cannot be written.
    """
    path = Path(path)
    part = _beside(path, directory=False)
    try:
        with _named(path):
            yield part
            part.chmod(0o644)
            _sync(part)
            os.replace(part, path)
            _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def write_directory(out: str | Path) -> Iterator[Path]:
    """A directory to write to, which takes `out`'s place when the block ends. Its parents are made.

    At every moment the old or the new directory is whole: the old one is moved aside, and put back on any failure.
    Raises OSError that names `out` where it cannot be written.
    """
    out = Path(os.path.realpath(out))  # through a symbolic link, to where the files really lie
    part = _beside(out, directory=True)
    old = part.with_name(part.name.replace(".part-", ".old-"))
    try:
        part.chmod(0o755)
        with _named(out):
            yield part
            for path in [*part.rglob("*"), part]:
                if path.is_file():
                    path.chmod(0o644)  # safetensors writes for the owner alone
                _sync(path)
            if out.exists():
                os.rename(out, old)
            os.rename(part, out)
            _sync(out.parent)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if out.exists():  # else the old one could not be put back: it is the only one
            shutil.rmtree(old, ignore_errors=True)


def check_writable(out: str | Path) -> None:
    """Raises OSError or ValueError now, not after hours of training, where `write_directory(out)` could not work."""
    if os.path.ismount(out):
        raise ValueError(f"{out} is a mount point, which cannot be replaced; name a directory inside it")
    os.rmdir(_beside(Path(os.path.realpath(out)), directory=True))


def _beside(out: Path, directory: bool) -> Path:
    """A new temporary directory or file beside `out`. Raises OSError that names `out`."""
    try:
        if directory:
            out.parent.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
        descriptor, name = tempfile.mkstemp(prefix=f".{out.name}.part-", dir=out.parent)
        os.close(descriptor)
        return Path(name)
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror}") from None


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
def _named(out: Path) -> Iterator[None]:
    """A full disk, which whoever writes reports without a name -> OSError in one line that names `out`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(f"{out} cannot be written: {error.strerror}") from None
    except SafetensorError as error:
        if "while serializing" not in str(error):
            raise
        raise OSError(f"{out} cannot be written: {error}") from None
