"""A GGUF file (llama.cpp's format) to a Hugging Face style directory: safetensors, config.json, tokenizer.json.

    python -m llama.gguf model.gguf out_dir/

The `gguf` package parses the file and undoes its quantisation, exactly, to float32. What else differs from Hugging
Face's depends on the architecture (config.py):

    names     blk.0.attn_q -> model.layers.0.self_attn.q_proj, in the tables below
    order     for `llama` (Mistral's too), the rows of q and k are stored for interleaved rotary pairs (rope.py);
              without the permutation back the model loads, gives no error, and answers wrongly. Others are unchanged
    norms     Gemma's are stored with the 1 added by which they multiply (1 + weight)
    rope      Llama 3.1's scaling is a tensor of divisors, rope_freqs.weight, Phi-3's two of factors, rope_factors_*
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from common.files import write_directory
from llama.gguf.config import Architecture, architecture_of, config_from_gguf
from llama.gguf.tokenizer import write_tokenizer

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")  # in the config
SHARD_BYTES = 1 << 30  # written at a time, so that the whole model never is in memory


def hugging_face_name(name: str, architecture: Architecture) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises ValueError for a name not in the
    tables."""
    stem, _, kind = name.rpartition(".")
    parts, block = stem.split("."), BLOCK | architecture.names
    if parts[0] == "blk" and len(parts) == 3 and parts[2] in block:
        return f"model.layers.{parts[1]}.{block[parts[2]]}.{kind}"
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    raise ValueError(f"unknown tensor {name}")


def split_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from interleaved pairs (x0, x1) to split halves (x0, x[D/2]).  (heads * D, C) -> (heads * D, C)"""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)  # (heads, D/2, 2, C)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def write_weights(tensors: list, architecture: Architecture, config: dict, directory: Path) -> None:
    """Dequantise, rename, permute and write shard by shard, with an index where there are several.

    `tensors` are the reader's. Raises ValueError that names a tensor whose type or name is not known.
    """
    weight_map, shard, size, shards = {}, {}, 0, 0

    def flush():
        nonlocal shard, size, shards
        if shard:
            shards += 1
            save_file(shard, directory / f"part-{shards}", metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, shards))
        shard, size = {}, 0

    from gguf.quants import dequantize

    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors}.items():  # before the long work
        try:
            dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            raise ValueError(
                f"{tensor.name} is of type {kind.name}, which cannot be dequantised; use a file in Q4_0, Q4_1, Q4_K, "
                "Q5_0, Q5_K, Q6_K, Q8_0, F16 or BF16"
            ) from None
    for tensor in tqdm(tensors, desc="converting GGUF to safetensors", unit="tensor"):
        if tensor.name in ROPE_TENSORS:
            continue
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if architecture.norm_offset and tensor.name.endswith("norm.weight"):
            values = values - 1
        if architecture.interleaved and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            queries = tensor.name.endswith("attn_q.weight")
            values = split_halves(values, config["num_attention_heads" if queries else "num_key_value_heads"])
        shard[hugging_face_name(tensor.name, architecture)] = torch.from_numpy(np.array(values))
        size += values.nbytes
        if size >= SHARD_BYTES:
            flush()
    flush()
    names = {
        n: f"model-{n:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        for n in range(1, shards + 1)
    }
    for number, name in names.items():
        os.rename(directory / f"part-{number}", directory / name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": {key: names[number] for key, number in weight_map.items()}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def convert(path: str | Path, out: str | Path) -> None:
    """Write the directory `out`, whole or not at all.

    Raises ValueError that names the file which is missing, damaged or of a model that is not supported, or `out` where
    it exists with something in it; OSError that names `out` where it cannot be written.
    """
    from gguf import GGUFReader  # slow to import, and only needed here

    path, out = Path(path), Path(out)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists; choose another name")
    with write_directory(out) as part:
        try:
            reader = GGUFReader(path)
            fields = {key: field.contents() for key, field in reader.fields.items()}
            if (parts := fields.get("split.count", 1)) != 1:
                raise ValueError(f"it is one of {parts} parts of a split file; join them with llama-gguf-split --merge")
            config = config_from_gguf(fields, {t.name: t for t in reader.tensors})
            write_tokenizer(fields, part)
            write_weights(reader.tensors, architecture_of(fields), config, part)
        except (ValueError, IndexError, KeyError) as error:  # the reader runs off the end of a truncated file
            raise ValueError(f"{path} is no readable GGUF of a supported model, or is cut short: {error}") from None
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
