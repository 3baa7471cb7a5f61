"""Which tensors a model directory holds, in which of its files, and a digest of what is in them.

    weight_map("model")        {"model.norm.weight": "model-00002-of-00002.safetensors", ...}
    weights_digest("model")    sha256 over name, dtype, shape and bytes of every tensor

The digest does not depend on how the tensors are spread over files. That of a large file is kept in the user's cache
under the file's path, size and times, so that 16 GB are hashed once and not at each start.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.files import whole_file
from common.hub import cache_directory

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 100_000_000  # safetensors' own limit
KEPT_FROM = 1 << 26  # bytes: digests of smaller files are not kept, hashing them takes no time


def weight_map(directory: str | Path) -> dict[str, str]:
    """Name of a tensor -> name of its file. A model.safetensors goes before an index, as in transformers.

    Raises ValueError that names the file where neither is there, the index is damaged or a name leads elsewhere.
    """
    directory = Path(directory)
    if (directory / SINGLE).is_file():
        return dict.fromkeys(read_header(directory / SINGLE)[0], SINGLE)
    index = directory / INDEX
    if not index.is_file():
        raise ValueError(f"{directory} holds neither {SINGLE} nor {INDEX}")
    try:
        listed = json.loads(index.read_bytes())["weight_map"]
        if not isinstance(listed, dict):
            raise TypeError(f"weight_map is {type(listed).__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from None
    for key, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or "\0" in file or "\\" in file:
            raise ValueError(f"{index}: weight_map names {str(file)[:80]!r} for {key[:80]}: no file of {directory}")
    return listed


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """The tensors of a safetensors file by name (dtype, shape, data_offsets), and where their bytes begin.

    Raises ValueError that names a file which is missing or damaged.
    """
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= min(HEADER_BYTES, os.path.getsize(path) - 8):
                raise ValueError(f"a header of {length} bytes")
            header, start = json.loads(handle.read(length)), 8 + length
        size = os.path.getsize(path) - start
        header.pop("__metadata__", None)
        for name, about in header.items():
            begin, end = about["data_offsets"]
            if not (type(begin) is type(end) is int and 0 <= begin <= end <= size):
                raise ValueError(f"{name[:80]} lies at {begin} to {end} of {size} bytes")
            about["dtype"], about["shape"]
        return header, start
    except FileNotFoundError:
        raise ValueError(f"shard {path} is missing, though the index lists it; download it again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"shard {path} is truncated or damaged ({error}); download it again") from None


def weights_digest(directory: str | Path) -> str:
    """sha256, in hexadecimal, over the tensors that `weight_map` lists. Raises ValueError as it does."""
    directory, lines = Path(directory), []
    listed = weight_map(directory)
    for file in sorted(set(listed.values())):
        digests = _file_digests(directory / file)
        for name in (name for name, where in listed.items() if where == file):
            if name not in digests:
                raise ValueError(f"{directory / file} lacks {name}, though the index lists it")
            lines.append(f"{name} {digests[name]}\n")
    return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogatepass")).hexdigest()


def _file_digests(path: Path) -> dict[str, str]:
    """Tensor -> dtype, shape and sha256 of its bytes, of one file; from the cache where the file is unchanged."""
    header, start = read_header(path)
    about = os.stat(path)
    if about.st_size < KEPT_FROM:
        return _hash(path, header, start)
    identity = f"{path.resolve()} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino}"
    kept = cache_directory() / "digests" / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()}.json"
    try:
        digests = json.loads(kept.read_bytes())
        if isinstance(digests, dict) and digests.keys() == header.keys():
            return digests
    except (OSError, ValueError):
        pass  # not hashed yet, or a damaged note: the file itself says
    digests = _hash(path, header, start)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(kept) as part:
            part.write_text(json.dumps(digests), encoding="utf-8")
    except OSError:
        pass  # a cache that may only be read: hashed again the next time
    return digests


def _hash(path: Path, header: dict[str, dict], start: int) -> dict[str, str]:
    def of(name: str) -> str:
        (begin, end), digest = header[name]["data_offsets"], hashlib.sha256()
        with open(path, "rb") as handle:
            handle.seek(start + begin)
            left = end - begin
            while left and (chunk := handle.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
        return f"{header[name]['dtype']} {header[name]['shape']} {digest.hexdigest()}"

    with ThreadPoolExecutor(4) as pool:  # hashlib works outside the interpreter's lock
        return dict(zip(header, pool.map(of, header), strict=True))


def check_weights(directory: str | Path, digest: str | None, who: str | Path) -> None:
    """Raises ValueError where the weights in `directory` are not those whose `digest` the run `who` keeps; None, of a
    run that keeps none, fits all."""
    if digest is not None and weights_digest(directory) != digest:
        raise ValueError(f"{who} was trained on another base model than {directory} holds: its weights differ")
