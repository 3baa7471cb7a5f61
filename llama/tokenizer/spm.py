"""SentencePiece vocabularies (Llama 2, Mistral, Gemma, Phi-3), run by Google's library whatever file they come in:

    tokenizer.model    as it is
    tokenizer.json     BPE over characters with `byte_fallback`: vocabulary and merges -> `from_json`
    GGUF               tokens, scores and types -> `model_proto`, which llama/gguf/ writes as a tokenizer.model

Text becomes characters, a space being "▁"; of all neighbours that spell a token, those of the highest score (leftmost
if tied) become one, until none do; a character without a token becomes its UTF-8 bytes, <0xE2> and so on.

tokenizer.json lists pairs by rank where SentencePiece goes by the score of what they spell. With minus the rank as the
score the two agree, if every token's characters, merged by the lower ranks alone, end as a listed pair (why: the top of
bpe.py, which tests it for each token).
"""

import re
import struct

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's types; GGUF has the same numbers
SPACE = "▁"  # U+2581
# User-defined tokens are ordinary text that is one token wherever it stands (Gemma's runs of spaces, <h1>). Some steer
# the model: control tokens in all but type, which a product's title must not spell.
STEERING = re.compile(r"<\|.*\|>|<unused\d+>|<(start|end)_of_\w+>|<mask>|\[multimodal]|\[/?[A-Z_]+]")
_BARE = b"\x1a\x02\x18\x00"  # ModelProto.normalizer_spec (field 3) { add_dummy_prefix (field 3) = false }


class SentencePiece:
    """THE TRAP: Llama 2, Mistral and Phi-3 put "▁" (a space) before any text, as if a sentence began there.

    "129.00" after "Price is $" would be ▁ 1 2 9 . 0 0: the model learns to answer with a space, and is then asked for
    a digit. Dropping the ▁ afterwards fails wherever it has merged into the first token (▁the).
    Two things only a tokenizer.json does: with `once`, no ▁ goes before a text that begins with a space (Metaspace);
    with `cut`, a pattern, a ▁ that the text itself holds is no space: runs of it are tokens of their own.
    """

    def __init__(self, proto: bytes, once: bool = False, cut: re.Pattern | None = None):
        from sentencepiece import SentencePieceProcessor  # only these families need it

        self.model, self.once, self.cut = SentencePieceProcessor(model_proto=proto), once, cut
        # Two serialised protobufs in a row are one, the last value of a field winning.
        self.bare = SentencePieceProcessor(model_proto=proto + _BARE)
        self.encode_continuation, self.vocab_size = self.bare.encode, self.model.vocab_size()

    def encode(self, text: str) -> list[int]:
        if self.cut and SPACE in text:
            return [i for part in self.cut.split(text) for i in self.model.encode(part)]
        return (self.bare if self.once and text[:1] in (" ", SPACE) else self.model).encode(text)

    def decode(self, ids: list[int]) -> str:  # Phi-3's control tokens have ids beyond the file's, and no text
        return self.model.decode([i for i in ids if i < self.vocab_size])

    def id_of(self, token: str) -> int | None:
        """None where the vocabulary lacks it: SentencePiece itself answers with the unknown token."""
        piece = self.model.piece_to_id(token)
        return None if piece == self.model.unk_id() and token != self.model.id_to_piece(piece) else piece


def _field(tag: int, payload: bytes) -> bytes:
    size, out = len(payload), bytearray([tag])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes(out) + bytes([size]) + payload


def model_proto(pieces, dummy_prefix: bool) -> bytes:
    """(token, score, type) by id -> a tokenizer.model, byte for byte as sentencepiece_model.proto numbers its fields.

    User-defined tokens that steer the model become control tokens.
    """
    out = []
    for token, score, kind in pieces:
        kind = CONTROL if kind == USER_DEFINED and STEERING.fullmatch(token) else kind
        piece = _field(0x0A, token.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        out.append(_field(0x0A, piece))
    trainer = b"\x18\x02" + b"\x98\x02\x01"  # model_type (3) = BPE, byte_fallback (35) = true
    # name (1), add_dummy_prefix (3), remove_extra_whitespaces (4) = false; spaces are escaped by default
    normalizer = _field(0x0A, b"identity") + b"\x18" + bytes([dummy_prefix]) + b"\x20\x00"
    return b"".join(out) + _field(0x12, trainer) + _field(0x1A, normalizer)


def without_steering(proto: bytes) -> bytes:
    """A tokenizer.model whose user-defined tokens that steer the model are control tokens; the rest as it was."""
    out, at = [], 0
    while at < len(proto):  # fields of ModelProto: a tag of one byte, a length, so many bytes
        tag, size, shift, at = proto[at], 0, 0, at + 1
        while True:
            byte, at = proto[at], at + 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        payload, at = proto[at : at + size], at + size
        if at > len(proto):
            raise ValueError("damaged or cut short; download it again")
        if tag == 0x0A and payload[:1] == b"\x0a" and payload.endswith(bytes([0x18, USER_DEFINED])):
            name = payload[2 : 2 + payload[1]].decode("utf-8", "replace")  # names of 128 bytes and more steer nothing
            payload += bytes([0x18, CONTROL]) if STEERING.fullmatch(name) else b""  # the last value wins
        out.append(_field(tag, payload))
    return b"".join(out)


def from_json(data: dict, merges: list[tuple[str, str]], ranks: dict[str, int], added: dict) -> SentencePiece:
    """A byte-fallback tokenizer.json as SentencePiece. `merges` by rank, `ranks` of the tokens not in `added`.

    Raises ValueError that names what SentencePiece would not do alike.
    """
    model, vocab, unknown = data["model"], data["model"]["vocab"], data["model"].get("unk_token")
    if model.get("ignore_merges"):
        raise ValueError("ignore_merges with byte_fallback is not supported")
    if sorted(vocab.values()) != list(range(len(vocab))) or unknown not in vocab:
        raise ValueError("the vocabulary has gaps or no unk_token, which SentencePiece needs")
    dummy_prefix, once = _prefix(data.get("normalizer"), data.get("pre_tokenizer"))
    kinds = dict.fromkeys(vocab, NORMAL)
    # No merge leads to the others: they never appear (the bytes, control tokens, Gemma's ▁======).
    others = [token for token in vocab if len(token) > 1 and token not in ranks]
    kinds |= {token: BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else CONTROL for token in others}
    kinds |= {name: _added_kind(name, token, dummy_prefix) for name, token in added.items() if name in vocab}
    kinds[unknown] = UNKNOWN
    runs = {token for token, kind in kinds.items() if kind == USER_DEFINED and SPACE in token}
    if runs:
        _check_runs(runs, merges)
    pieces = ((token, -float(ranks.get(token, 0)), kinds[token]) for token in sorted(vocab, key=vocab.get))
    cut = re.compile(f"({SPACE}{{2,{max(map(len, runs))}}})") if runs else None
    return SentencePiece(model_proto(pieces, dummy_prefix), once, cut)


def _added_kind(name: str, token: dict, dummy_prefix: bool) -> int:
    """User-defined where both libraries cut the token out of the text and leave the rest alone; else a control token.

    Raises ValueError where it is neither.
    """
    if token["special"]:
        return CONTROL
    changes = dummy_prefix or any(token.get(key) for key in ("single_word", "lstrip", "rstrip", "normalized"))
    if not changes and " " not in name:
        return USER_DEFINED
    if re.fullmatch(r"<\S+>", name):
        return CONTROL
    raise ValueError(f"added token {name!r} replaces ordinary text, which is not supported")


def _check_runs(runs: set[str], merges: list[tuple[str, str]]) -> None:
    """Gemma's runs of spaces are user-defined: SentencePiece takes the longest that fits, from the left. So does
    merging, if a run that has begun grows by one ▁ before anything else happens to a ▁."""
    order = {pair: n for n, pair in enumerate(merge for merge in merges if SPACE in merge[0] + merge[1])}
    longest = max(map(len, runs))
    grows = [order.get((SPACE * n, SPACE), len(order)) for n in range(longest - 1, 0, -1)]
    others = [n for (a, b), n in order.items() if a + b not in runs]
    first = grows == sorted(grows) and grows[-1] < min(others, default=len(order))
    if runs != {SPACE * n for n in range(2, longest + 1)} or not first:
        raise ValueError(f"added tokens with {SPACE} that are not runs of spaces, merged first, are not supported")


def _prefix(normalizer: dict | None, pre: dict | None) -> tuple[bool, bool]:
    """Whether ▁ goes before a text, and whether only where no space is. Files say so in three ways."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    # After the normalizer there is no space left to split at.
    nothing = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if normalizer in (replace, prepend) and pre in (None, nothing):
        return normalizer == prepend, False
    metaspace = {"type": "Metaspace", "replacement": SPACE, "split": False}
    if normalizer is None and metaspace.items() <= (pre or {}).items():
        return pre["prepend_scheme"] != "never", True
    raise ValueError(f"normalizer {str(normalizer)[:200]} with pre_tokenizer {str(pre)[:200]} is not supported")
