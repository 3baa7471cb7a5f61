"""Write a model directory of a given shape with random bfloat16 weights, to measure bytes and seconds, not prices.

    python -m benchmarks.random_model --shape 8b --out /tmp/random-8b        16 GB on disk, seconds with a GPU

The tokenizer spells as Llama 3's does where it matters here: 0 to 999 are single tokens, other text is bytes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from llama.bpe import LLAMA3
from llama.config import LlamaConfig
from llama.model import Llama

SHARED = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
SHAPES = {  # what differs from SHARED
    "8b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336),
    "14b": dict(  # Phi-3-medium's, as a Llama
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=10, intermediate_size=17920,
        vocab_size=32064,
    ),
    "3b": dict(
        hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, intermediate_size=8192, tie_word_embeddings=True
    ),
    "smollm2": dict(  # SmolLM2-135M's
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        head_dim=64, vocab_size=49152, tie_word_embeddings=True, rope_theta=100000.0, rope_scaling=None,
        max_position_embeddings=8192,
    ),
    "tiny": dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=8, intermediate_size=96, head_dim=16, vocab_size=1500
    ),
}  # fmt: skip
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


def write(shape: str, out: Path, device: str, seed: int = 0) -> None:
    """A shard for each layer, one for the rest, and the index."""
    config = SHARED | SHAPES[shape]
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(config))
    shards: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        shards.setdefault(".".join(name.split(".")[:2]) if name.startswith("layers.") else "rest", []).append(
            (name, parameter.shape)
        )
    out.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(seed)
    weight_map = {}
    for number, tensors in enumerate(tqdm(shards.values(), desc=f"writing {out}", unit="shard"), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = {}
        for name, shape_of in tensors:
            values = torch.randn(shape_of, generator=generator, device=device) * 0.02
            key = name if name.startswith("lm_head") else f"model.{name}"
            part[key] = (values + (len(shape_of) == 1)).to(torch.bfloat16).cpu()  # norms lie around 1
            weight_map[key] = file
        save_file(part, out / file, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "tokenizer.json").write_text(json.dumps(toy_tokenizer()))
    tokenizer = SPECIAL | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (out / "config.json").write_text(json.dumps(config, indent=2))


def directory_of(shape: str) -> Path:
    """The directory of a shape in the temporary directory, written (in a process of its own) if it is not there."""
    directory = Path(tempfile.gettempdir()) / f"random-{shape}"
    if not directory.exists():
        command = [sys.executable, "-m", "benchmarks.random_model", "--shape", shape, "--out", str(directory)]
        subprocess.run(command, check=True)
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    args = parser.parse_args()
    write(args.shape, args.out, "cuda" if torch.cuda.is_available() else "cpu")
