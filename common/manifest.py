"""What a directory held when it was saved: manifest.json, the sha256 of every file, written last.

    seal(part, OWNED)                      # in the block that writes the directory
    verify("out")                          # when it is opened: a changed, missing or foreign file is one line
    read_whole("out", load)                # the same, and what `load()` reads is of one save

A file may be moved from one machine to another with the name of its base model changed: of a JSON file one key may be
LOOSE. Such a change is said, not refused.
"""

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Callable, Iterable, TypeVar

from common.files import SAVED, settle
from common.hub import sha256

MANIFEST = "manifest.json"
LOOSE = {"run.json": ("options", "model")}  # where the base model lies; what it holds has a digest of its own

REMEDY = "put back a copy of the whole directory, or train again"
T = TypeVar("T")
RETRIES = 5  # times that a directory is read again because it was saved meanwhile
PATIENCE = 10  # seconds for another process to finish a save


def seal(directory: Path, owned: Iterable[str]) -> None:
    """Write manifest.json: every file that is there, and which of `owned` are not, so that those of another run are
    known for that."""
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    files = {name: {"sha256": sha256(directory / name)} for name in names if name != MANIFEST}
    for name in LOOSE.keys() & files.keys():
        files[name]["but_for"] = _but_for(directory / name)
    manifest = {"files": files, "absent": sorted(set(owned) - set(files) - {MANIFEST})}
    (directory / MANIFEST).write_bytes(_written(manifest))


def seal_of(directory: str | Path) -> str | None:
    """sha256 of manifest.json, by which one save is told from another; None where there is none."""
    try:
        return sha256(Path(directory) / MANIFEST)
    except FileNotFoundError:
        return None


def verify(directory: str | Path) -> str | None:
    """Check every file against manifest.json; returns its sha256, or None where there is none (runs of earlier
    versions). What a killed save left to do is done first; a save meanwhile begins it anew.

    Raises ValueError, one line that names the file and what to do.
    """
    directory = Path(directory)
    for attempt in range(RETRIES):
        _settle(directory)
        seal = seal_of(directory)
        if seal is None:
            return None
        try:
            _check(directory)
            return seal
        except (ValueError, FileNotFoundError):
            if attempt == RETRIES - 1 or (seal_of(directory) == seal and not (directory / SAVED).exists()):
                raise
    return None


def read_whole(directory: str | Path, read: Callable[[], T]) -> T:
    """What `read()` makes of a directory: checked before, and read again where it was saved meanwhile, so that files of
    two saves never mix."""
    directory = Path(directory)
    for _ in range(RETRIES):
        seal = verify(directory)
        try:
            result = read()
        except (ValueError, OSError):
            if seal == seal_of(directory) and not (directory / SAVED).exists():
                raise
            continue
        if seal == seal_of(directory) and not (directory / SAVED).exists():
            return result
    raise ValueError(f"{directory} is saved more often than it can be read; try again when its training has ended")


def _settle(directory: Path) -> None:
    """Finish a save; where nothing may be written, wait for the process that is at it"""
    started = time.monotonic()
    while (directory / SAVED).exists():
        with suppress(OSError):
            settle(directory)
            continue
        if time.monotonic() - started > PATIENCE:
            raise ValueError(f"{directory} holds a save that was cut off: open it once where it can be written")
        time.sleep(0.05)


def _check(directory: Path) -> None:
    try:
        manifest = json.loads(written := (directory / MANIFEST).read_bytes())
        manifest.pop("sha256")
        if _written(manifest) != written:
            raise ValueError("its own sha256 is another")
        files = {name: (entry["sha256"], entry.get("but_for")) for name, entry in manifest["files"].items()}
        absent = list(map(str, manifest["absent"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / MANIFEST} is damaged ({error!r}); {REMEDY}") from None
    for name in absent:
        if os.path.lexists(directory / name):
            raise ValueError(f"{directory / name} is no part of this run: it is of another; remove it, or {REMEDY}")
    for name, (digest, but_for) in files.items():
        path = inside(directory, name)
        if not path.is_file():
            raise ValueError(f"{path} is missing, which {MANIFEST} lists; {REMEDY}")
        if sha256(path) == digest:
            continue
        now = but_for and _but_for(path)
        if not now or now["sha256"] != but_for.get("sha256") or now["value"] == but_for.get("value"):
            raise ValueError(f"{path} has changed since it was saved: it is damaged or of another run; {REMEDY}")
        print(f"{path} names {now['value']}; it was saved with {but_for.get('value')}", file=sys.stderr)


def inside(directory: Path, name: str) -> Path:
    """The file `name` of `directory`. Raises ValueError where it lies elsewhere, by its name or by a symbolic link."""
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"{path} leads out of {directory}; put the file itself there")
    return path


def _written(manifest: dict) -> bytes:
    """manifest.json, with a sha256 of its own"""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return (json.dumps(manifest | {"sha256": digest}, indent=1) + "\n").encode()


def _but_for(path: Path) -> dict | None:
    """The value of a JSON file's LOOSE key, and sha256 of all else, however it is spaced; None for what is no such
    file"""
    try:
        record = json.loads(path.read_bytes())
        section, key = LOOSE[path.name]
        value = record[section].pop(key)
        rest = json.dumps(record, sort_keys=True).encode()
        return {"value": value, "sha256": hashlib.sha256(rest).hexdigest()} if isinstance(value, str) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
