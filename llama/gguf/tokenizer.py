"""The tokenizer in a GGUF file's metadata (`tokenizer.ggml.*`) as the files of a Hugging Face style directory:

    model gpt2     tokens, merges and the name of a pattern -> tokenizer.json (Llama 3, Qwen, SmolLM2)
    model llama    tokens, scores and types -> tokenizer.model (Llama 2, Mistral, Gemma, Phi-3)

and tokenizer_config.json for BOS and EOS. read.py calls `write_tokenizer`.
"""

import json
from pathlib import Path

from llama.tokenizer import spm
from llama.tokenizer.bpe import BYTE_LEVEL, GGUF_NAMES, PRE_TOKENIZERS


def write_tokenizer(fields: dict, directory: Path) -> None:
    """Raises ValueError that names the field where the tokenizer is of another kind or does not fit together."""
    if fields.get("tokenizer.ggml.model") == "llama":
        (directory / "tokenizer.model").write_bytes(tokenizer_model_from_gguf(fields))
    else:
        said = json.dumps(tokenizer_json_from_gguf(fields), ensure_ascii=False)
        (directory / "tokenizer.json").write_text(said, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config_from_gguf(fields)))


def tokenizer_model_from_gguf(fields: dict) -> bytes:
    """The `tokenizer.model` that the GGUF was made from, as far as ids go."""
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}.get
    tokens, scores, types = map(get, ("tokens", "scores", "token_type"))
    if not tokens or not len(tokens) == len(scores or ()) == len(types or ()) == len(set(tokens)):
        raise ValueError("GGUF tokenizer.ggml.tokens, scores, token_type are missing or do not fit; convert it again")
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if get(key):
            raise ValueError(f"GGUF tokenizer.ggml.{key} is not supported: it would change the text")
    unknown = get("unknown_token_id", types.index(spm.UNKNOWN) if spm.UNKNOWN in types else None)
    if unknown is None:
        raise ValueError("GGUF tokenizer.ggml.unknown_token_id is missing; convert it again")

    def piece(i: int) -> tuple[str, float, int]:
        kind = spm.UNKNOWN if i == unknown else types[i]
        # llama.cpp's converter writes user-defined tokens, and only those, with spaces.
        return tokens[i].replace(" ", spm.SPACE) if kind == spm.USER_DEFINED else tokens[i], scores[i], kind

    return spm.model_proto(map(piece, range(len(tokens))), dummy_prefix=bool(get("add_space_prefix", True)))


def tokenizer_json_from_gguf(fields: dict) -> dict:
    """GGUF metadata (`tokenizer.ggml.*`, plain values) -> the `tokenizer.json` that Hugging Face would have.

    transformers 5 ignores `pre` and gives every model GPT-2's pattern; the model was trained with its own.
    """
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}.get
    model, pre, tokens, merges, types = map(get, ("model", "pre", "tokens", "merges", "token_type"))
    named, pre = pre, GGUF_NAMES.get(pre, pre) if isinstance(pre, str) else pre
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"GGUF tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {pre!r} is not supported; "
            f"use a file with model 'llama', or 'gpt2' and pre one of {', '.join(PRE_TOKENIZERS)}"
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
        "normalizer": {"type": "NFC"} if named == "qwen2" else None,
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
    """`tokenizer_config.json`: the names of BOS and EOS, for which a `tokenizer.json` has no place."""
    ids = {key: fields.get(f"tokenizer.ggml.{key}_id") for key in ("bos_token", "eos_token")}
    config = {key: fields["tokenizer.ggml.tokens"][i] for key, i in ids.items() if i is not None}
    if fields.get("tokenizer.ggml.model") == "llama":  # a tokenizer.json says it in its template; true by default
        config["add_bos_token"] = bool(fields.get("tokenizer.ggml.add_bos_token", True))
    return config
