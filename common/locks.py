"""Who writes what: locks that name the process which holds them, and temporary names that nobody holds any more.

    with held("out/.lock", "out is being trained by"):              # refuses at once, or waits and says for whom

A lock is the kernel's, on an open file: it ends with its process, however that ends, so none is ever stale. Where a
file system or platform has no such locks, the process that the file names is asked for.
"""

import errno
import json
import os
import shutil
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DAY = 24 * 3600  # seconds after which a temporary name is taken for abandoned, where files cannot be locked
AGAIN = 60  # seconds between two lines of one who waits


@contextmanager
def held(path: str | Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which is removed at the end; its directory is there.

    Where another process has it: ValueError that begins with `busy` and names that process; with `wait`, the same as a
    line on standard error, now and each minute, until it is free.
    """
    path, told = Path(path), 0.0
    while (descriptor := _take(path)) is None:
        who = _holder(path)
        if not wait:
            raise ValueError(f"{busy} {who}; wait for it, or choose another name")
        if not told or time.monotonic() - told > AGAIN:
            print(f"waiting: {busy} {who}", file=sys.stderr, flush=True)
            told = time.monotonic()
        time.sleep(0.1)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: who waits for it sees that it is gone, and makes a new one
        os.close(descriptor)


def _take(path: Path) -> int | None:
    """A descriptor of the locked file, or None where another process has it"""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        try:
            if not fcntl:
                raise OSError(errno.ENOTSUP, "no locks")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(descriptor), os.stat(path))  # not just removed by who held it
        except BlockingIOError:
            free = False
        except FileNotFoundError:
            free = False
        except OSError:  # no locks here: is the process alive that wrote its name?
            free = not _alive(_read(path))
        if free:
            os.ftruncate(descriptor, 0)
            record = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)[:200]}
            os.write(descriptor, json.dumps(record).encode())
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if isinstance(record, dict) and isinstance(record.get("pid"), int) else {}
    except (OSError, ValueError):
        return {}


def _alive(record: dict) -> bool:
    """Whether the process that wrote `record` is there; of another machine's nothing is known"""
    if not record or record["pid"] == os.getpid():
        return False
    if record.get("host") != socket.gethostname():
        return True
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _holder(path: Path) -> str:
    """Of a lock, in words: process 123 (python train.py ...), which is stopped"""
    record = _read(path)
    if not record:
        return "another process"
    here = record.get("host") == socket.gethostname()
    words = f"process {record['pid']}" + ("" if here else f" on {record.get('host')}")
    words += f" ({' '.join(str(record.get('command')).split())[:80]})"
    with suppress(OSError, IndexError):
        state = Path(f"/proc/{record['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        if here and state in "Tt":
            words += f", which is stopped (kill -CONT {record['pid']} lets it go on)"
    return words


# ---- temporary names -------------------------------------------------------------------------------------------------


@contextmanager
def in_use(part: Path) -> Iterator[None]:
    """Lock a temporary name for as long as this process lives; where that cannot be done, its age must tell."""
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(part, os.O_RDONLY)
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def clear(folder: Path, prefix: str, least_age: float = 1) -> None:
    """Remove what killed processes have left in `folder` under temporary names with this prefix. `least_age` is in
    seconds: 0 where the caller holds a lock, so that no other process can just have begun."""
    for path in folder.glob(f"{escaped(prefix)}*"):
        if path.is_symlink() or not _abandoned(path, least_age):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def escaped(name: str) -> str:
    """`name` for a glob pattern that means just that"""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _abandoned(path: Path, least_age: float) -> bool:
    """Whether no process writes to this temporary name any more. One of this second may only not be locked yet."""
    with suppress(OSError):
        age = time.time() - path.stat().st_mtime
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return age >= least_age
        except BlockingIOError:
            return False
        except OSError:
            pass
        finally:
            os.close(descriptor)
        return age > DAY
    return False
