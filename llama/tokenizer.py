"""Text to token ids and back, exactly as the model's own tokenizer does it.  Used by the scripts, not run alone:

    tokenizer = Tokenizer.from_directory(model)
    ids = tokenizer.encode_prompt("... Price is $") + tokenizer.encode_answer("129.00")

Byte-level BPE in three steps. (1) A regular expression cuts the text into pieces, roughly words; no token crosses
a cut. (2) Each piece becomes UTF-8 bytes, one symbol a byte. (3) Of all adjacent pairs of symbols with a merge, the
one of lowest rank (leftmost if tied) is merged, until none is left. `tiktoken` does all three, fast; this file turns
a Hugging Face `tokenizer.json` into its terms, and refuses by name whatever it could not reproduce id for id.

Two readings of "merge" have to be held equal. Hugging Face lists the pairs that merge; tiktoken merges any two
symbols whose concatenation is a token. They agree if every token, spelled in bytes and merged by the lower ranks
alone, ends as a listed pair: two neighbours x, y that spell token t were formed by merges inside them, so they are
what those bytes come to on their own. A vocabulary trained by BPE has this property; `_check_merges` proves it.

Prompt and answer are encoded apart and their ids concatenated, so that the loss mask is a position (design habit 5).
"""
import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit is cut out first, GPT-2's pattern cuts the rest: whitespace before a digit counts as trailing ("\n\n8" is
# \n\n, 8 here and \n, \n, 8 in GPT-2). `Digits` asks Rust's char::is_numeric, which knows 13 digits of Unicode 17
# (Tolong Siki, Chinese small numbers) that the \p{N} of tiktoken 0.14 does not.
_N = "\\p{N}\U00011DE0-\U00011DE9\U00016FF4-\U00016FF6"
SMOLLM = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+|[{_N}]| ?[^\s\p{{L}}{_N}]+|\s+(?![^\s{_N}])|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Hugging Face matches with Oniguruma, tiktoken with fancy-regex. Anchors (Ruby's ^ and $ match at every line), class
# intersections and any escape but these mean different things there, so such a pattern is refused.
_AMBIGUOUS = regex.compile(r"(?<!\[)\^|\$|&&|\\[^sSpPrnt]")
_LONG = 100_000  # characters; a whitespace run near a million overflows fancy-regex's stack and panics the interpreter

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# GPT-2's table: a printable byte is written as itself, the 68 others as the characters from U+0100 (space is Ġ).
_BYTE = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


class Tokenizer:
    """ids = [bos_id if adds_bos] + encode(text); `vocab_size` = highest id + 1, the rows an embedding must have."""

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
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, regex.error) as error:
            reason = error if type(error) is ValueError else f"damaged ({type(error).__name__}: {error})"
            raise ValueError(f"{file}: {reason}; use a model directory with a byte-level BPE tokenizer.json "
                             "(Llama 3, Qwen 2, SmolLM2) or a SentencePiece tokenizer.model") from None
        raise ValueError(f"{path}: has neither tokenizer.json nor tokenizer.model; give a complete model directory")

    def encode_prompt(self, text: str) -> list[int]:
        """The one way in for training and pricing alike, so BOS cannot come twice or be forgotten (pitfall 13).

        A product title is untrusted: "<|endoftext|>" inside it is spelled out like any text, never the control token.
        """
        return [self.bos_id] * self.adds_bos + self._backend.encode(_well_formed(text))

    def encode_answer(self, text: str) -> list[int]:
        """The ids of a continuation: no BOS, and no space that was not written."""
        return self._backend.encode_continuation(_well_formed(text))

    def decode(self, ids) -> str:
        """The text of `ids`. Control tokens (BOS, EOS, ...) have none; broken UTF-8 becomes U+FFFD."""
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {self.vocab_size}")
        return self._backend.decode(ids)


class _ByteLevel:
    """tiktoken with our ids. Ranks are ours (256 bytes, then merge order); `ids[rank]` is the model's id.

    The two numberings are kept apart because tiktoken reads priority from the number itself, and nothing says that
    ids follow merge order (added tokens in front, shuffled vocabularies). The table is a bijection, so it is exact.
    """

    def __init__(self, model: dict, pattern: str, nfc: bool, added: dict[str, dict]):
        vocab = {t: i for t, i in model["vocab"].items() if t not in added}
        spelling = {t: bytes(map(_BYTE.get, t)) for t in vocab if t and all(c in _BYTE for c in t)}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"] or ()]
        results = dict.fromkeys(a + b for a, b in merges)
        if sum(x != y for x, y in pairwise([None, *(a + b for a, b in merges)])) != len(results):
            raise ValueError("merges of one token do not stand together, so it has no single rank")
        # ignore_merges (Llama 3): a piece that is a token is taken whole even if no merge leads to it. tiktoken always
        # does; without the flag such a token can never appear, so it gets no rank.
        rest = [t for t in spelling if t not in results] if model.get("ignore_merges") else []
        ranks = {bytes([b]): b for b in range(256)}
        self.ids: list[int | None] = [None] * 256
        for token, spelt in spelling.items():
            if len(spelt) == 1:
                self.ids[spelt[0]] = vocab[token]
        for token in [*results, *(t for t in rest if len(spelling[t]) > 1)]:
            ranks[spelling[token]] = len(ranks)
            self.ids.append(vocab[token])
        _check_merges(ranks, {(spelling[a], spelling[b]) for a, b in merges}, bool(model.get("ignore_merges")))
        # tiktoken needs all 256 bytes, SmolLM2 has no token for 21 of them (control characters, bytes of unassigned
        # planes). They keep a rank without an id; Hugging Face deletes them inside the piece, or writes unk_token.
        self.missing = bytes(b for b in range(256) if self.ids[b] is None)
        if self.missing and model.get("unk_token") is not None:
            if model.get("fuse_unk"):
                raise ValueError("fuse_unk with bytes that have no token is not supported")
            for b in self.missing:
                self.ids[b] = model["vocab"][model["unk_token"]]
            self.missing = b""
        self.nfc, self.pieces = nfc, regex.compile(pattern)
        self.bpe = tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bytes_of = {i: spelling.get(t, t.encode()) for t, i in vocab.items()}
        self.bytes_of |= {t["id"]: b"" if t["special"] else t["content"].encode() for t in added.values()}
        self.vocab_size = max(self.bytes_of) + 1

    def encode(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if len(text) < _LONG:
            ids = [self.ids[rank] for rank in self.bpe.encode_ordinary(text)]
            if None not in ids:
                return ids
        # Rare: a byte without a token. It still separates words (the cut comes first), then vanishes from its piece.
        pieces = (match.group().encode().translate(None, self.missing) for match in self.pieces.finditer(text))
        return [self.ids[rank] for piece in pieces if piece for rank in self.bpe._encode_single_piece(piece)]

    encode_continuation = encode  # bytes carry their own spaces: a continuation is ordinary text

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", "replace")


class _SentencePiece:
    """Llama 2's tokenizer.model.  THE TRAP: it writes "▁" (a space) before any text it encodes, as if a sentence began.

    "129.00" after "Price is $" would become ▁ 1 2 9 . 0 0: the model would learn to answer with a space and be asked
    for digits where it expects one. Searching for the ▁ and dropping it fails where it has merged into the first token.
    """

    def __init__(self, proto: bytes):
        from sentencepiece import SentencePieceProcessor  # only this route needs it

        self.model = SentencePieceProcessor(model_proto=proto)
        # A serialised protobuf followed by another is the two merged, the last value winning. These four bytes are
        # ModelProto.normalizer_spec (field 3) { add_dummy_prefix (field 3) = false }.
        self.bare = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        self.encode, self.encode_continuation, self.decode = self.model.encode, self.bare.encode, self.model.decode
        self.vocab_size = self.model.vocab_size()


def _well_formed(text: str) -> str:
    """A lone surrogate (JSON can carry one) has no UTF-8: U+FFFD, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _from_sentencepiece(proto: bytes, config: dict) -> Tokenizer:
    """Ids and specials as in the proto; BOS as Meta's code and transformers' Llama default have it: added."""
    backend = _SentencePiece(proto)
    bos, eos = (i if i >= 0 else None for i in (backend.model.bos_id(), backend.model.eos_id()))
    return Tokenizer(backend, bos, eos, bos is not None and bool(config.get("add_bos_token", True)))


def _from_json(data: dict, config: dict) -> Tokenizer:
    model, added = data["model"], {t["content"]: t for t in data.get("added_tokens") or ()}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"model type {model.get('type')} (byte_fallback {model.get('byte_fallback')}) is not supported")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"model.{key} {model[key]!r} is not supported")
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"normalizer {normalizer} is not supported")
    for token in added.values():  # "<think>" is a control token in all but name; runs of spaces or words are text
        if not token["special"] and not regex.fullmatch(r"<\S+>", token["content"]):
            raise ValueError(f"added token {token['content']!r} is matched in ordinary text, which is not supported")
    backend = _ByteLevel(model, _pattern(data["pre_tokenizer"]), normalizer == "NFC", added)

    def special(key: str) -> int | None:
        value = config.get(key)
        name = value["content"] if isinstance(value, dict) else value
        if name is not None and name not in added and name not in model["vocab"]:
            raise ValueError(f"has no token {name!r}, the {key} of tokenizer_config.json")
        return None if name is None else added[name]["id"] if name in added else model["vocab"][name]

    # transformers 5 believes the template and ignores add_bos_token, version 4 did the reverse for Llama classes.
    bos, says = _template_bos(data.get("post_processor")), config.get("add_bos_token")
    if says is not None and says != (bos is not None):
        raise ValueError(f"post_processor and add_bos_token {says} in tokenizer_config.json disagree, correct one")
    return Tokenizer(backend, special("bos_token") if bos is None else bos, special("eos_token"), bos is not None)


def _pattern(pre: dict) -> str:
    """The one regular expression that cuts as the pre_tokenizer does."""
    match pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]:
        case [{"type": "ByteLevel", "add_prefix_space": False, **level}] if level.get("use_regex", True):
            return GPT2
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, **level}] if level.get("use_regex", True):
            return SMOLLM
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}] if not _AMBIGUOUS.search(pattern):
            # What lies between two matches is a piece of its own to Hugging Face; tiktoken would drop it.
            return rf"{pattern}|(?:(?!{pattern})[\s\S])++"
    raise ValueError(f"pre_tokenizer {json.dumps(pre)[:300]} is not supported")


def _template_bos(post: dict | None) -> int | None:
    """The id that the post_processor puts in front of a single text, if it does that and nothing else."""
    for step in post["processors"] if post and post["type"] == "Sequence" else [post] if post else []:
        match step:
            case {"type": "ByteLevel"} | {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
                continue
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, {"Sequence": _}]}:
                [bos] = step["special_tokens"][name]["ids"]
                return bos
        raise ValueError(f"post_processor {json.dumps(step)[:300]} is not supported")
    return None


def _check_merges(ranks: dict[bytes, int], pairs: set[tuple[bytes, bytes]], whole_pieces: bool) -> None:
    """Every token, merged by the ranks below its own, ends as a listed pair (the essay above says why that suffices).

    With `whole_pieces` it may also end in three or more symbols: then only a piece equal to the token yields it.
    """
    for token, rank in ranks.items():
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 1:
            best, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if best >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1 and tuple(parts) not in pairs and not (whole_pieces and len(parts) > 2):
            raise ValueError(f"token {token!r} is not what its own merges make, tiktoken would differ")


_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(pattern: str) -> list[dict]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            _LEVEL | {"use_regex": False}]


_GGUF_PRE = {  # values of `tokenizer.ggml.pre`, named in llama.cpp's convert_hf_to_gguf.py
    "gpt-2": [_LEVEL], "smollm": [{"type": "Digits", "individual_digits": True}, _LEVEL],
    "llama-bpe": _split(LLAMA3), "qwen2": _split(QWEN2)}


def tokenizer_json_from_gguf(fields: dict) -> dict:
    """GGUF metadata (`tokenizer.ggml.*`, plain values) -> the `tokenizer.json` that Hugging Face would have.

    transformers 5 ignores `pre` and gives every model GPT-2's pattern; the model was trained with its own.
    """
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}.get
    model, pre, tokens, merges, types = map(get, ("model", "pre", "tokens", "merges", "token_type"))
    if model != "gpt2" or pre not in _GGUF_PRE:
        raise ValueError(f"GGUF tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {pre!r} is not supported; "
                         f"use a file with model 'gpt2' and pre one of {', '.join(_GGUF_PRE)}")
    if not tokens or merges is None or len(types or ()) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError("GGUF tokenizer.ggml.tokens, merges, token_type are missing or do not fit; convert it again")
    post, flags = None, dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    if get("add_bos_token", pre == "llama-bpe"):  # llama.cpp's default where the key is absent
        if get("bos_token_id") is None:
            raise ValueError("GGUF tokenizer.ggml.add_bos_token is set but bos_token_id is missing; convert it again")
        name = tokens[get("bos_token_id")]
        single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        post = {"type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {name: {"id": name, "ids": [get("bos_token_id")], "tokens": [name]}}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        # Type 3 is a control token, type 4 (user defined) an added token that Hugging Face does not call special.
        "added_tokens": [{"id": i, "content": token, **flags, "special": kind == 3}
                         for i, (token, kind) in enumerate(zip(tokens, types)) if kind in (3, 4)],
        # Qwen normalises to NFC; GGUF has no field for it and llama.cpp leaves it out.
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _GGUF_PRE[pre]}, "post_processor": post,
        "decoder": _LEVEL, "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "merges": list(merges),
            "ignore_merges": pre == "llama-bpe", "vocab": {token: i for i, token in enumerate(tokens)}}}


def tokenizer_config_from_gguf(fields: dict) -> dict:
    """The names of BOS and EOS, for `tokenizer_config.json`: a `tokenizer.json` has no place for them."""
    ids = {key: fields.get(f"tokenizer.ggml.{key}_id") for key in ("bos_token", "eos_token")}
    return {key: fields["tokenizer.ggml.tokens"][i] for key, i in ids.items() if i is not None}
