"""Write a model directory of a given shape with random bfloat16 weights, to measure bytes and seconds, not prices.

    python -m benchmarks.random_model --shape 8b --out /tmp/random-8b        16 GB on disk, seconds with a GPU

The tokenizer spells as Llama 3's does where it matters here: 0 to 999 are single tokens, other text is bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.shapes import SHAPES
from llama.config import LlamaConfig
from llama.families import config_from_dict
from llama.model import Llama
from llama.tokenizer.bpe import LLAMA3
from llama.weights import FUSED

SPECIAL = {"eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}  # named, or Unsloth adds a token and grows the head


def toy_tokenizer() -> dict:
    """A tokenizer.json: 256 bytes and the numbers 10 to 999, whole (`ignore_merges`), cut like Llama 3's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    pairs = [f"{n:02d}" for n in range(100)]
    triples = [f"{n:03d}" for n in range(1000)]
    vocab = {token: i for i, token in enumerate([*(letter[b] for b in range(256)), *pairs, *triples])}
    # BPE joins the pair of lowest rank first: "987" becomes 9 + 87, for 87 comes before 98.
    joins = [(t[0], t[1:]) if t[1:] < t[:2] else (t[:2], t[2]) for t in triples]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": len(vocab) + i, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i, token in enumerate(SPECIAL.values())
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": vocab, "merges": [[p[0], p[1]] for p in pairs] + [list(j) for j in joins],
        },
    }  # fmt: skip


def tensors_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the family's files have them: Phi-3's q, k, v as one matrix, and its gate and up"""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    for fused, parts in FUSED.items() if config.fused_projections else ():
        for first in [name for name in shapes if f".{parts[0]}." in name]:
            rows = [shapes.pop(first.replace(parts[0], part)) for part in parts]
            shapes[first.replace(parts[0], fused)] = (sum(height for height, _ in rows), rows[0][1])
    return shapes


def write(shape: str, out: Path, device: str, seed: int = 0) -> None:
    """A shard for each layer, one for the rest, and the index. Several shards at a time: one CPU core fills memory,
    let alone a disk, more slowly than a GPU draws numbers."""
    raw = SHAPES[shape]
    config = config_from_dict(raw)
    shards: dict[str, dict] = {}
    for name, size in tensors_of(config).items():
        shard = ".".join(name.split(".")[:2]) if name.startswith("layers.") else "rest"
        shards.setdefault(shard, {})[name if name.startswith("lm_head") else f"model.{name}"] = size
    out.mkdir(parents=True)

    def write_shard(number: int, sizes: dict) -> dict[str, str]:
        generator = torch.Generator(device).manual_seed(seed + number)
        file, part = f"model-{number:05d}-of-{len(shards):05d}.safetensors", {}
        for key, size in sizes.items():
            values = torch.randn(size, generator=generator, device=device).mul_(0.02)
            if "norm" in key and not config.norm_offset:
                values += 1  # norms lie around 1, which Gemma's files leave out
            part[key] = values.to(torch.bfloat16).cpu()
        save_file(part, out / file, metadata={"format": "pt"})
        return dict.fromkeys(part, file)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = pool.map(write_shard, range(1, len(shards) + 1), shards.values())
        written = list(tqdm(parts, desc=f"writing {out}", unit="shard", total=len(shards)))
    weight_map = {key: file for part in written for key, file in part.items()}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "tokenizer.json").write_text(json.dumps(toy_tokenizer()))
    tokenizer = SPECIAL | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (out / "config.json").write_text(json.dumps(raw, indent=2))


def write_apart(shape: str, out: Path, time_limit: float | None = None) -> None:
    """`write` in a process of its own, whose GPU memory ends with it. Raises subprocess.SubprocessError."""
    command = [sys.executable, "-m", "benchmarks.random_model", "--shape", shape, "--out", str(out)]
    subprocess.run(command, check=True, timeout=time_limit)


def directory_of(shape: str) -> Path:
    """The directory of a shape in the temporary directory, written if it is not there."""
    directory = Path(tempfile.gettempdir()) / f"random-{shape}"
    if not directory.exists():
        write_apart(shape, directory)
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    args = parser.parse_args()
    write(args.shape, args.out, "cuda" if torch.cuda.is_available() else "cpu")
