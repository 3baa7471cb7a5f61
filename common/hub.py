"""The user's cache, downloads that are checked, and snapshots of the Hugging Face hub.

What is fetched or made here lies under `$QLORA_CACHE`, else ~/.cache/qlora-pricer, under a name that holds its sha256.
It is made under a lock and stands there whole or not at all (files.py): two processes at once, or one that is killed
halfway, do no harm. Every error is one line.
"""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable

from tqdm import tqdm

from common.files import whole_file
from common.locks import held

# kind -> (the hub's own word, what stands before a name in a sentence, what a gated one asks to accept)
KINDS = {"model": ("model", "", "licence"), "data set": ("dataset", "data set ", "terms")}


def cache_directory() -> Path:
    return Path(os.environ.get("QLORA_CACHE") or Path.home() / ".cache" / "qlora-pricer").expanduser()


def sha256(path: str | Path) -> str:
    """In hexadecimal, of a file of any size: it is never whole in memory."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached directory `name`, made by `make(path)` the first time; other processes wait. `make` writes it whole or
    not at all."""
    out = cache_directory() / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.is_dir():
        with held(f"{out}.lock", f"{out} is being made by", wait=True):
            if not out.is_dir():  # another process may have made it while this one waited
                make(out)
    return out


def download(url: str, digest: str, path: Path) -> Path:
    """The file `path`, fetched where it is not there yet or no longer has the sha256 `digest`, with a bar.

    Raises OSError where the server cannot be reached or the contents do not have the sha256 `digest`.
    """
    if path.is_file() and sha256(path) == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(path) as part:
            with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as handle:
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm(desc=f"fetching {path.name}", total=size or None, unit="B", unit_scale=True) as bar:
                    while chunk := response.read(1 << 16):
                        handle.write(chunk)
                        bar.update(len(chunk))
            if (actual := sha256(part)) != digest:
                raise OSError(f"{url} has sha256 {actual}, expected {digest}: cut short or changed")
    except urllib.error.URLError as error:
        raise OSError(f"cannot fetch {url}: {error.reason}") from None
    return path


def snapshot(repo: str, kind: str, patterns: list[str]) -> Path:
    """The local directory with the files of a hub repository that match `patterns`, in huggingface_hub's own cache.

    `kind` is "model" or "data set". Raises OSError where the repository is gated, missing or cannot be reached.
    """
    # Slow to import, and only a hub id needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    repo_type, article, terms = KINDS[kind]
    try:
        return Path(snapshot_download(repo, repo_type=repo_type, allow_patterns=patterns))
    except GatedRepoError:
        message = f"{article}{repo} is gated: accept its {terms} on its page, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        message = f"no {kind} {repo!r} on the hub, or it is private: check the name, or log in with `hf auth login`"
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"cannot fetch {article}{repo} from the hub: {reason}"
    raise OSError(message)
