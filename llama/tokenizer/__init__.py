"""Text to token ids and back, id for id as the model's own tokenizer does it.

    tokenizer = Tokenizer.from_directory(model)
    ids = tokenizer.encode_prompt("... Price is $") + tokenizer.encode_answer("129.00")

A vocabulary is of one of two kinds, each with a backend: bytes that merge (bpe.py, on tiktoken), or characters that
merge and fall back to bytes (spm.py, on SentencePiece). This file reads a model's files into their terms, and refuses
by name what they could not reproduce exactly.
"""
import json
import re
from base64 import b64decode
from pathlib import Path

from llama.tokenizer import bpe, spm


class Tokenizer:
    """`vocab_size` is the highest id + 1: the rows that an embedding must have. `bos_id` and `eos_id` may be None."""

    def __init__(self, backend, bos_id: int | None, eos_id: int | None, adds_bos: bool):
        self._backend, self.bos_id, self.eos_id, self.adds_bos = backend, bos_id, eos_id, adds_bos
        self.vocab_size: int = max(backend.vocab_size, 1 + (eos_id or 0))

    @classmethod
    def from_directory(cls, path) -> "Tokenizer":
        """Reads `tokenizer.json`, or `tokenizer.model` where that is missing or only SentencePiece's copy in JSON.

        Raises ValueError, one line with the file's name, for anything missing, broken or not exactly representable.
        """
        path, read = Path(path), lambda file: json.loads(file.read_text("utf-8")) if file.is_file() else {}
        proto, file = path / "tokenizer.model", path / "tokenizer_config.json"
        try:
            config = dict(read(file))
            data = dict(read(file := path / "tokenizer.json"))
            # Llama 2 ships both; its JSON is a byte-fallback BPE over characters, so the original decides.
            if proto.is_file() and (not data or data["model"].get("byte_fallback")):
                return _from_model((file := proto).read_bytes(), data, config)
            if data:
                return _from_json(data, config)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = error if type(error) is ValueError else f"damaged ({type(error).__name__}: {error})"
            raise ValueError(f"{file}: {reason}; use a model directory with a byte-level BPE tokenizer.json "
                             "(Llama 3, Qwen, SmolLM2) or a SentencePiece tokenizer.model") from None
        raise ValueError(f"{path}: has neither tokenizer.json nor tokenizer.model; give a complete model directory")

    def encode_prompt(self, text: str) -> list[int]:
        """ids = [bos_id if adds_bos] + encode(text). Training and pricing both use this, so BOS is there once.

        A product title is untrusted: "<|endoftext|>" in it is spelled out like any text, never the control token.
        """
        return [self.bos_id] * self.adds_bos + self._backend.encode(_well_formed(text))

    def encode_answer(self, text: str) -> list[int]:
        """The ids of a continuation, apart from its prompt's: no BOS, and no space that was not written."""
        return self._backend.encode_continuation(_well_formed(text))

    def decode(self, ids) -> str:
        """The text of `ids`. Control tokens (BOS, EOS, ...) have none; broken UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {self.vocab_size} tokens")
        return self._backend.decode(ids)


def _well_formed(text: str) -> str:  # a lone surrogate (JSON can carry one) has no UTF-8: U+FFFD, as in tiktoken
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _from_model(proto: bytes, data: dict, config: dict) -> Tokenizer:
    """The proto names BOS but not whether to add it: added by default, as in Meta's code and transformers' Llama.

    tokenizer_config.json goes first: Phi-3's EOS is <|endoftext|>, which only the JSON files know.
    """
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", proto):
        return _from_tiktoken(proto)
    backend = spm.SentencePiece(spm.without_steering(proto))
    ids = {t["content"]: t["id"] for t in data.get("added_tokens") or ()}
    ids |= {t["content"]: int(i) for i, t in (config.get("added_tokens_decoder") or {}).items()}
    bos, eos = (i if i >= 0 else None for i in (backend.model.bos_id(), backend.model.eos_id()))
    known = [ids.get(name, backend.id_of(name)) if name else None for name in _names(config)]
    bos, eos = (default if i is None else i for i, default in zip(known, (bos, eos)))
    return Tokenizer(backend, bos, eos, bos is not None and bool(config.get("add_bos_token", True)))


def _from_tiktoken(lines: bytes) -> Tokenizer:
    """Llama 3's first file, which holds no pattern and no control tokens: BOS and EOS follow its 128,000 tokens."""
    ranks = {b64decode(token): int(rank) for token, rank in (line.split() for line in lines.splitlines())}
    if (size := len(ranks)) != 128_000:
        raise ValueError(f"a tiktoken file of {size:,} tokens is not Llama 3's of 128,000")
    return Tokenizer(bpe.ByteLevel(ranks, bpe.LLAMA3), size, size + 1, True)


def _names(config: dict) -> list[str | None]:
    """BOS and EOS in tokenizer_config.json."""
    return [t["content"] if isinstance(t, dict) else t for t in (config.get("bos_token"), config.get("eos_token"))]


def _from_json(data: dict, config: dict) -> Tokenizer:
    model, added = data["model"], {t["content"]: t for t in data.get("added_tokens") or ()}
    if model["type"] != "BPE":
        raise ValueError(f"model type {model['type']} is not supported")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{key} {model[key]!r} of the model is not supported")
    known = model["vocab"] | {name: token["id"] for name, token in added.items()}
    names = _names(config)
    if unknown := [t for t in names if t is not None and t not in known]:
        raise ValueError(f"has no token {unknown[0]!r}, which tokenizer_config.json names")
    # transformers 5 believes the template alone; version 4's Llama classes believed add_bos_token alone.
    bos, adds_bos = _template_bos(data.get("post_processor")), config.get("add_bos_token")
    if adds_bos is not None and adds_bos != (bos is not None):
        raise ValueError(f"post_processor and add_bos_token {adds_bos} in tokenizer_config.json disagree, correct one")
    backend = _byte_fallback(data, added) if model.get("byte_fallback") else _byte_level(data, added)
    return Tokenizer(backend, known.get(names[0]) if bos is None else bos, known.get(names[1]), bos is not None)


def _byte_level(data: dict, added: dict[str, dict]) -> bpe.ByteLevel:
    normalizer = data.get("normalizer") or {}
    if normalizer.get("type") == "Sequence" and len(normalizer["normalizers"]) < 2:
        normalizer = next(iter(normalizer["normalizers"]), {})
    normalizer = normalizer.get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"normalizer {normalizer} is not supported")
    for name, token in added.items():  # "<think>" is a control token in all but name; words and runs of spaces are not
        if not token["special"] and not re.fullmatch(r"<\S+>", name):
            raise ValueError(f"added token {name!r} replaces ordinary text, which is not supported")
    return bpe.ByteLevel.from_json(data["model"], _pattern(data["pre_tokenizer"]), normalizer == "NFC", added)


def _byte_fallback(data: dict, added: dict[str, dict]) -> spm.SentencePiece:
    merges = bpe.listed_merges(data["model"])
    merged = bpe.merge_order([pair for pair in merges if pair[0] + pair[1] not in added])
    bpe.check_merges(merged, set(merges), unreachable=True)
    return spm.from_json(data, merges, merged, added)


def _pattern(pre: dict) -> str:
    """The one regular expression that cuts as the pre_tokenizer does. Raises ValueError where there is none.

    A new family is a row in `PRE_TOKENIZERS` and a test.
    """
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    # trim_offsets moves character offsets, not ids; a file older than use_regex means true.
    steps = [{k: v for k, v in (bpe.BYTE_LEVEL | s if s["type"] == "ByteLevel" else s).items() if k != "trim_offsets"}
             for s in steps]
    for pattern, known in bpe.PRE_TOKENIZERS.values():
        if steps == known:
            return pattern
    raise ValueError(f"pre_tokenizer {json.dumps(pre)[:300]} is not one of {', '.join(bpe.PRE_TOKENIZERS)}")


def _template_bos(post: dict | None) -> int | None:
    """The id that the post_processor puts in front of a text, or None. Raises ValueError for anything else."""
    bos = None
    for step in post["processors"] if post and post["type"] == "Sequence" else [post] if post else []:
        match step:
            case {"type": "ByteLevel"} | {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
                pass
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, {"Sequence": _}]}:
                [bos] = step["special_tokens"][name]["ids"]
            case _:
                raise ValueError(f"post_processor {json.dumps(step)[:300]} is not supported")
    return bos
