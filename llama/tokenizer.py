"""Text to token ids and back, id for id as the model's own tokenizer does it.  Imported by the scripts, not run alone:

    tokenizer = Tokenizer.from_directory(model)
    ids = tokenizer.encode_prompt("... Price is $") + tokenizer.encode_answer("129.00")

Byte-level BPE has three steps. (1) A regular expression cuts the text into pieces, roughly words; no token crosses a
cut. (2) A piece becomes its UTF-8 bytes, one symbol each. (3) Of all neighbours with a merge, the pair of lowest rank
(leftmost if tied) becomes one symbol, until no pair has one. `tiktoken` does all three, fast; this file translates a
Hugging Face `tokenizer.json` into its terms, and refuses by name what it could not reproduce exactly.

One difference has to be proved away. Hugging Face merges the pairs it lists; tiktoken merges any two symbols whose
concatenation is a token. They agree if every token's bytes, merged by the lower ranks alone, end as a listed pair:
neighbours x, y that spell token t were merged only inside their own bytes, hence just as those bytes alone would be.
Vocabularies trained as BPE have this property; `_check_merges` tests it for each token (1.5 s for 128,000).
"""
import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM cuts out each digit first, then applies GPT-2's pattern to the rest, so whitespace before a digit counts as
# trailing: "\n\n8" is \n\n, 8 where GPT-2 has \n, \n, 8. `Digits` asks Rust's char::is_numeric, which knows 13 digits
# of Unicode 17 (Tolong Siki, Chinese small numbers) that \p{N} in tiktoken 0.14 lacks.
_N = "\\p{N}\U00011DE0-\U00011DE9\U00016FF4-\U00016FF6"
SMOLLM = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+|[{_N}]| ?[^\s\p{{L}}{_N}]+|\s+(?![^\s{_N}])|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
PRE_TOKENIZERS = {  # name in GGUF (`tokenizer.ggml.pre`): pattern here, pre_tokenizer steps at Hugging Face
    "gpt-2": (GPT2, [BYTE_LEVEL]),
    "smollm": (SMOLLM, [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]),
    "llama-bpe": (LLAMA3, [_SPLIT | {"pattern": {"Regex": LLAMA3}}, BYTE_LEVEL | {"use_regex": False}]),
    "qwen2": (QWEN2, [_SPLIT | {"pattern": {"Regex": QWEN2}}, BYTE_LEVEL | {"use_regex": False}]),
}
_LONG = 100_000  # characters; some way above it a run of whitespace overflows the stack of tiktoken's regex: a panic

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# GPT-2's table: a printable byte is written as itself, the 68 others as the characters from U+0100 on (space is Ġ).
_BYTE = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


class Tokenizer:
    """`vocab_size` is the highest id + 1, the rows an embedding must have; `bos_id` and `eos_id` may be None."""

    def __init__(self, backend, bos_id: int | None, eos_id: int | None, adds_bos: bool):
        self._backend, self.bos_id, self.eos_id, self.adds_bos = backend, bos_id, eos_id, adds_bos
        self.vocab_size: int = backend.vocab_size

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
                return _from_sentencepiece((file := proto).read_bytes(), config)
            if data:
                return _from_json(data, config)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = error if type(error) is ValueError else f"damaged ({type(error).__name__}: {error})"
            raise ValueError(f"{file}: {reason}; use a model directory with a byte-level BPE tokenizer.json "
                             "(Llama 3, Qwen, SmolLM2) or a SentencePiece tokenizer.model") from None
        raise ValueError(f"{path}: has neither tokenizer.json nor tokenizer.model; give a complete model directory")

    def encode_prompt(self, text: str) -> list[int]:
        """ids = [bos_id if adds_bos] + encode(text). The one way in for training and pricing: BOS is there once.

        A product title is untrusted: "<|endoftext|>" in it is spelled out like any text, never the control token.
        """
        return [self.bos_id] * self.adds_bos + self._backend.encode(_well_formed(text))

    def encode_answer(self, text: str) -> list[int]:
        """The ids of a continuation, apart from its prompt's: no BOS, and no space that was not written."""
        return self._backend.encode_continuation(_well_formed(text))

    def decode(self, ids) -> str:
        """The text of `ids`. Control tokens (BOS, EOS, ...) have none; broken UTF-8 becomes U+FFFD."""
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {self.vocab_size} tokens")
        return self._backend.decode(ids)


class _ByteLevel:
    """tiktoken with the model's ids: its ranks are ours (256 bytes, then merge order), `ids[rank]` is the model's id.

    tiktoken reads a merge's priority off the number itself, but nothing makes ids follow merge order (control tokens
    stand in front, a vocabulary may be shuffled). Hence two numberings and a table between them, one to one.
    """

    def __init__(self, model: dict, pattern: str, nfc: bool, added: dict[str, dict]):
        vocab = {t: i for t, i in model["vocab"].items() if t not in added}
        spelling = {t: bytes(map(_BYTE.get, t)) for t in vocab if t and all(c in _BYTE for c in t)}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        merged = dict.fromkeys(a + b for a, b in merges)  # in merge order; Llama 3 lists several pairs per token
        if sum(x != y for x, y in pairwise([None, *(a + b for a, b in merges)])) != len(merged):
            raise ValueError("the merges of one token do not stand together, so it has no single rank")
        # ignore_merges (Llama 3): a piece that is a token is taken whole, even if no merge leads to it. tiktoken
        # always does so; without the flag such a token never appears, so it gets no rank.
        whole = bool(model.get("ignore_merges"))
        rest = [t for t, spelt in spelling.items() if len(spelt) > 1 and t not in merged] if whole else []
        # tiktoken needs all 256 bytes; SmolLM2 has no token for 21 (control characters, bytes of unassigned planes).
        # They keep a rank without an id; Hugging Face deletes them inside their piece.
        single = {spelt[0]: vocab[t] for t, spelt in spelling.items() if len(spelt) == 1}
        self.missing = bytes(b for b in range(256) if b not in single)
        if self.missing and model.get("unk_token") is not None:
            raise ValueError("unk_token for bytes that have no token is not supported")
        self.ids = [*map(single.get, range(256)), *(vocab[t] for t in [*merged, *rest])]
        ranks = {bytes([b]): b for b in range(256)} | {spelling[t]: 256 + n for n, t in enumerate([*merged, *rest])}
        _check_merges(ranks, {(spelling[a], spelling[b]) for a, b in merges}, whole)
        self.nfc, self.pieces = nfc, regex.compile(pattern)
        self.bpe = tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bytes_of = {i: spelling.get(t, t.encode()) for t, i in vocab.items()}
        self.bytes_of |= {t["id"]: b"" if t["special"] else t["content"].encode() for t in added.values()}
        self.vocab_size = max(self.bytes_of) + 1

    def encode(self, text: str) -> list[int]:
        # Hugging Face's NFC tables are older than Python's: two marks in a row, one of 98 rare ones, may swap.
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if len(text) < _LONG:
            ids = [self.ids[rank] for rank in self.bpe.encode_ordinary(text)]
            if None not in ids:
                return ids
        # Rare: a byte without a token. It still separates words (the cut comes first), then vanishes from its piece.
        # `regex` follows a newer Unicode than tiktoken: beside such a byte, a letter new in Unicode 17 may cut apart.
        pieces = (match.group().encode().translate(None, self.missing) for match in self.pieces.finditer(text))
        return [self.ids[rank] for piece in pieces if piece for rank in self.bpe._encode_single_piece(piece)]

    encode_continuation = encode  # byte-level tokens carry their own spaces: a continuation is ordinary text

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", "replace")


class _SentencePiece:
    """Llama 2's tokenizer.model. THE TRAP: it puts "▁" (a space) before any text, as if a sentence began there.

    "129.00" after "Price is $" would be ▁ 1 2 9 . 0 0: the model learns to answer with a space, and is then asked for
    a digit. Dropping the ▁ afterwards fails wherever it has merged into the first token (▁the).
    """

    def __init__(self, proto: bytes):
        from sentencepiece import SentencePieceProcessor  # only this route needs it

        self.model = SentencePieceProcessor(model_proto=proto)
        # Two serialised protobufs in a row are one, the last value of a field winning. These four bytes say
        # ModelProto.normalizer_spec (field 3) { add_dummy_prefix (field 3) = false }.
        self.bare = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        self.encode, self.encode_continuation, self.decode = self.model.encode, self.bare.encode, self.model.decode
        self.vocab_size = self.model.vocab_size()


def _well_formed(text: str) -> str:  # a lone surrogate (JSON can carry one) has no UTF-8: U+FFFD, as in tiktoken
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _from_sentencepiece(proto: bytes, config: dict) -> Tokenizer:
    """The proto names BOS but not whether to add it: added by default, as in Meta's code and transformers' Llama."""
    backend = _SentencePiece(proto)
    bos, eos = (i if i >= 0 else None for i in (backend.model.bos_id(), backend.model.eos_id()))
    return Tokenizer(backend, bos, eos, bos is not None and bool(config.get("add_bos_token", True)))


def _from_json(data: dict, config: dict) -> Tokenizer:
    model, added = data["model"], {t["content"]: t for t in data.get("added_tokens") or ()}
    if model["type"] != "BPE":
        raise ValueError(f"model type {model['type']} is not supported")
    for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{key} {model[key]!r} of the model is not supported")
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"normalizer {normalizer} is not supported")
    for name, token in added.items():  # "<think>" is a control token in all but name; words and runs of spaces are not
        if not token["special"] and not regex.fullmatch(r"<\S+>", name):
            raise ValueError(f"added token {name!r} replaces ordinary text, which is not supported")
    known = model["vocab"] | {name: token["id"] for name, token in added.items()}
    names = [t["content"] if isinstance(t, dict) else t for t in (config.get("bos_token"), config.get("eos_token"))]
    if unknown := [t for t in names if t is not None and t not in known]:
        raise ValueError(f"has no token {unknown[0]!r}, which tokenizer_config.json names")
    # transformers 5 believes the template alone; version 4's Llama classes believed add_bos_token alone.
    bos, says = _template_bos(data.get("post_processor")), config.get("add_bos_token")
    if says is not None and says != (bos is not None):
        raise ValueError(f"post_processor and add_bos_token {says} in tokenizer_config.json disagree, correct one")
    backend = _ByteLevel(model, _pattern(data["pre_tokenizer"]), normalizer == "NFC", added)
    return Tokenizer(backend, known.get(names[0]) if bos is None else bos, known.get(names[1]), bos is not None)


def _pattern(pre: dict) -> str:
    """The one regular expression that cuts as the pre_tokenizer does. A new family is a row in `PRE_TOKENIZERS` and a
    test."""
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    # trim_offsets moves character offsets, not ids; a file older than use_regex means true.
    steps = [{k: v for k, v in (BYTE_LEVEL | s if s["type"] == "ByteLevel" else s).items() if k != "trim_offsets"}
             for s in steps]
    for pattern, known in PRE_TOKENIZERS.values():
        if steps == known:
            return pattern
    raise ValueError(f"pre_tokenizer {json.dumps(pre)[:300]} is not one of {', '.join(PRE_TOKENIZERS)}")


def _template_bos(post: dict | None) -> int | None:
    """The id that the post_processor puts in front of a text, if it does that and nothing else."""
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


def _check_merges(ranks: dict[bytes, int], pairs: set[tuple[bytes, bytes]], whole: bool) -> None:
    """Every token's bytes, merged by the ranks below its own, end as a listed pair (why: the top of this file).

    With `whole` they may also end as three symbols or more: such a token comes only from a piece equal to it.
    """
    for token, rank in ranks.items():
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 1:
            best, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if best >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1 and tuple(parts) not in pairs and not (whole and len(parts) > 2):
            raise ValueError(f"token {token!r} is not what its own merges make, so tiktoken would differ")
