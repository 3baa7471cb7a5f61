"""A GGUF file (llama.cpp's format) to a Hugging Face style directory: safetensors, config.json, tokenizer.json.

    python -m llama.gguf model.gguf out_dir/

The `gguf` package parses the file and undoes its quantisation, exactly, to float32. Three things differ from
Hugging Face's:

    names     blk.0.attn_q -> model.layers.0.self_attn.q_proj, in the table below
    order     GGUF stores the rows of q and k for interleaved rotary pairs (rope.py); without the permutation back
              the model loads, gives no error, and answers wrongly
    rope      Llama 3.1's scaling is a tensor of divisors, rope_freqs.weight, not five numbers in the config
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from llama.bpe import BYTE_LEVEL, PRE_TOKENIZERS
from llama.config import LlamaConfig
from llama.rope import inverse_frequencies

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
SHARD_BYTES = 1 << 30  # written at a time, so that the whole model never is in memory


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises ValueError for a name not in the
    table."""
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".")
    if parts[0] == "blk" and len(parts) == 3 and parts[2] in BLOCK:
        return f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.{kind}"
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    raise ValueError(f"unknown tensor {name}")


def split_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from interleaved pairs (x0, x1) to split halves (x0, x[D/2]).  (heads * D, C) -> (heads * D, C)"""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)  # (heads, D/2, 2, C)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def config_from_gguf(fields: dict, tensors: dict) -> dict:
    """config.json as a dict, from GGUF metadata and the tensors by name (only `output.weight` and `rope_freqs.weight`
    matter)."""
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise ValueError(f"architecture {kind!r} is not supported; supported: llama")
    try:
        heads = int(fields["llama.attention.head_count"])
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "hidden_size": int(fields["llama.embedding_length"]),
            "intermediate_size": int(fields["llama.feed_forward_length"]),
            "num_hidden_layers": int(fields["llama.block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
            "head_dim": int(fields.get("llama.rope.dimension_count", int(fields["llama.embedding_length"]) // heads)),
            "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 12),
            "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
            "max_position_embeddings": int(fields["llama.context_length"]),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "float32",
        }
    except KeyError as missing:
        raise ValueError(f"metadata lacks {missing}") from None
    if "rope_freqs.weight" in tensors:
        divisors = torch.from_numpy(np.array(tensors["rope_freqs.weight"].data, dtype=np.float32))
        plain = inverse_frequencies(LlamaConfig.from_dict(config))
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if not torch.allclose(inverse_frequencies(LlamaConfig.from_dict(config)), plain / divisors, rtol=1e-3):
            raise ValueError("rope_freqs.weight is not Llama 3.1's scaling of an 8,192 token context")
    return config


def write_weights(tensors: list, config: dict, directory: Path) -> None:
    """Dequantise, rename, permute and write shard by shard, with an index."""
    weight_map, shard, size, shards = {}, {}, 0, 0

    def flush():
        nonlocal shard, size, shards
        if shard:
            shards += 1
            save_file(shard, directory / f"part-{shards}", metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, shards))
        shard, size = {}, 0

    from gguf.quants import dequantize

    for tensor in tqdm(tensors, desc="converting GGUF to safetensors", unit="tensor"):
        if tensor.name == "rope_freqs.weight":
            continue  # in the config
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            queries = tensor.name.endswith("attn_q.weight")
            values = split_halves(values, config["num_attention_heads" if queries else "num_key_value_heads"])
        shard[hugging_face_name(tensor.name)] = torch.from_numpy(np.array(values))
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


def tokenizer_json_from_gguf(fields: dict) -> dict:
    """GGUF metadata (`tokenizer.ggml.*`, plain values) -> the `tokenizer.json` that Hugging Face would have.

    transformers 5 ignores `pre` and gives every model GPT-2's pattern; the model was trained with its own.
    """
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}.get
    model, pre, tokens, merges, types = map(get, ("model", "pre", "tokens", "merges", "token_type"))
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"GGUF tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {pre!r} is not supported; "
            f"use a file with model 'gpt2' and pre one of {', '.join(PRE_TOKENIZERS)}"
        )
    if not tokens or merges is None or len(types or ()) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError("GGUF tokenizer.ggml.tokens, merges, token_type are missing or do not fit; convert it again")
    post, bos = None, get("bos_token_id")
    if get("add_bos_token", pre == "llama-bpe"):  # llama.cpp's default where the key is absent
        if bos is None:
            raise ValueError("GGUF tokenizer.ggml.add_bos_token is set but bos_token_id is missing; convert it again")
        single = [{"SpecialToken": {"id": tokens[bos], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        post = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
        }
    steps = [step | {"trim_offsets": True} if step["type"] == "ByteLevel" else step for step in PRE_TOKENIZERS[pre][1]]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    # Type 3 is a control token; type 4 (user defined) an added token that Hugging Face does not call special.
    added = [
        {"id": i, "content": token, **plain, "special": kind == 3}
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (3, 4)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        # Qwen normalises to NFC; GGUF has no field for it and llama.cpp leaves it out.
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": post,
        "decoder": BYTE_LEVEL | {"trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "merges": list(merges),
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
        },
    }


def tokenizer_config_from_gguf(fields: dict) -> dict:
    """The names of BOS and EOS, for `tokenizer_config.json`: a `tokenizer.json` has no place for them."""
    ids = {key: fields.get(f"tokenizer.ggml.{key}_id") for key in ("bos_token", "eos_token")}
    return {key: fields["tokenizer.ggml.tokens"][i] for key, i in ids.items() if i is not None}


def convert(path: str | Path, out: str | Path) -> None:
    """Write the directory under a temporary name and rename it when whole. Raises ValueError that names the file."""
    from gguf import GGUFReader  # slow to import, and only needed here

    path, out = Path(path), Path(out)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        try:
            reader = GGUFReader(path)
            fields = {key: field.contents() for key, field in reader.fields.items()}
            config = config_from_gguf(fields, {t.name: t for t in reader.tensors})
            write_weights(reader.tensors, config, part)
            (part / "tokenizer.json").write_text(json.dumps(tokenizer_json_from_gguf(fields), ensure_ascii=False))
            (part / "tokenizer_config.json").write_text(json.dumps(tokenizer_config_from_gguf(fields)))
        except (ValueError, IndexError, KeyError) as error:  # the reader runs off the end of a truncated file
            raise ValueError(f"{path} is no readable GGUF of a supported model, or is cut short: {error}") from None
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in part.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GGUF to a Hugging Face style directory")
    parser.add_argument("gguf", help="the .gguf file")
    parser.add_argument("out", help="the directory to write; must not exist")
    arguments = parser.parse_args()
    try:
        convert(arguments.gguf, arguments.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
