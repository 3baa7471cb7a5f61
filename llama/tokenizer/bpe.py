"""Byte-level BPE (Llama 3, Qwen, SmolLM2, GPT-2) on tiktoken; __init__.py reads the files.

Byte-level BPE has three steps. (1) A regular expression cuts the text into pieces, roughly words; no token crosses a
cut. (2) A piece becomes its UTF-8 bytes, one symbol each. (3) Of all neighbours with a merge, the pair of lowest rank
(leftmost if tied) becomes one symbol, until no pair has one. `tiktoken` does all three, fast; this file puts
Hugging Face's vocabulary and merges into its terms.

One difference has to be proved away. Hugging Face merges the pairs it lists; tiktoken merges any two symbols whose
concatenation is a token. They agree if every token's bytes, merged by the lower ranks alone, end as a listed pair:
neighbours x, y that spell token t were merged only inside their own bytes, hence just as those bytes alone would be.
Vocabularies trained as BPE have this property; `check_merges` tests it for each token (1.5 s for 128,000).
"""
import unicodedata
from itertools import pairwise

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
# llama.cpp's other names for patterns of the table.
GGUF_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_LONG = 100_000  # characters; some way above it a run of whitespace overflows the stack of tiktoken's regex: a panic

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# GPT-2's table: a printable byte is written as itself, the 68 others as the characters from U+0100 on (space is Ġ).
_BYTE = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


class ByteLevel:
    """tiktoken with the model's ids: its ranks are ours (256 bytes, then merge order), `ids[rank]` is the model's id.

    tiktoken reads a merge's priority off the number itself, but nothing makes ids follow merge order (control tokens
    stand in front, a vocabulary may be shuffled). Hence two numberings and a table between them, one to one.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str, ids=None, bytes_of=None, nfc=False):
        self.ids = ids or range(len(ranks))  # where the file is tiktoken's own, both numberings are one
        self.bytes_of = bytes_of or {rank: token for token, rank in ranks.items()}
        self.missing = bytes(b for b in range(256) if self.ids[ranks[bytes([b])]] is None)
        self.nfc, self.pieces = nfc, regex.compile(pattern)
        self.bpe = tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = max(self.bytes_of) + 1

    @classmethod
    def from_json(cls, model: dict, pattern: str, nfc: bool, added: dict[str, dict]) -> "ByteLevel":
        """`model` and, by name, `added_tokens` of a tokenizer.json"""
        vocab = {t: i for t, i in model["vocab"].items() if t not in added}
        spelling = {t: bytes(map(_BYTE.get, t)) for t in vocab if t and all(c in _BYTE for c in t)}
        merges = listed_merges(model)
        merged = merge_order(merges)
        # ignore_merges (Llama 3): a piece that is a token is taken whole, even if no merge leads to it. tiktoken
        # always does so; without the flag such a token never appears, so it gets no rank.
        whole = bool(model.get("ignore_merges"))
        rest = [t for t, spelt in spelling.items() if len(spelt) > 1 and t not in merged] if whole else []
        # tiktoken needs all 256 bytes; SmolLM2 has no token for 21 (control characters, bytes of unassigned planes).
        # They keep a rank without an id; Hugging Face deletes them inside their piece.
        single = {spelt[0]: vocab[t] for t, spelt in spelling.items() if len(spelt) == 1}
        if len(single) < 256 and model.get("unk_token") is not None:
            raise ValueError("unk_token for bytes that have no token is not supported")
        ids = [*map(single.get, range(256)), *(vocab[t] for t in [*merged, *rest])]
        ranks = {bytes([b]): b for b in range(256)} | {spelling[t]: 256 + n for n, t in enumerate([*merged, *rest])}
        check_merges(ranks, {(spelling[a], spelling[b]) for a, b in merges}, whole)
        bytes_of = {i: spelling.get(t, t.encode()) for t, i in vocab.items()}
        bytes_of |= {t["id"]: b"" if t["special"] else t["content"].encode() for t in added.values()}
        return cls(ranks, pattern, ids, bytes_of, nfc)

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


def listed_merges(model: dict) -> list[tuple[str, str]]:
    """A tokenizer.json's merges as pairs: older files write "a b", newer ones ["a", "b"]."""
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]


def merge_order(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Merged token -> its rank. Llama 3 and Gemma list several pairs for a token, one after the other.

    Raises ValueError where the pairs of one token do not stand together.
    """
    merged = dict.fromkeys(a + b for a, b in merges)
    if sum(x != y for x, y in pairwise([None, *(a + b for a, b in merges)])) != len(merged):
        raise ValueError("the merges of one token do not stand together, so it has no single rank")
    return {token: rank for rank, token in enumerate(merged)}


def check_merges(ranks: dict, pairs: set[tuple], unreachable: bool) -> None:
    """Raises ValueError unless every token's bytes (or characters), merged by the ranks below its own, end as a listed
    pair (why: at the top).

    With `unreachable` they may also end as three symbols or more: no merge makes such a token (Gemma's ▁======), and
    it comes from a piece equal to it (with ignore_merges) or never (SentencePiece).
    """
    for token, rank in ranks.items():
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 1:
            best, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if best >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1 and tuple(parts) not in pairs and not (unreachable and len(parts) > 2):
            raise ValueError(f"token {token!r} is not what its own merges make, so merging by rank would differ")
