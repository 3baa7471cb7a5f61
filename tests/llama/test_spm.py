"""llama/tokenizer/spm.py: vocabularies of characters that fall back to bytes, against `tokenizers` and
Google's `sentencepiece`.

    python -m pytest tests/llama/test_spm.py

Toy vocabularies are trained here. The real ones are in tests/llama/test_real_tokenizers.py.
"""

import io
import json

import pytest
from test_tokenizer import CORPUS, NASTY, bad_decodes, fuzz, load, mismatches

from llama.tokenizer import Tokenizer, spm
from pricing.distribution.decode import PriceTree

hf = pytest.importorskip("tokenizers", reason="the oracle, see requirements-dev.txt")
sentencepiece = pytest.importorskip("sentencepiece")

BYTES = [f"<0x{b:02X}>" for b in range(256)]
RUNS = [c * n for c in ("\n", "▁") for n in range(2, 8)]
STEERING = ["<unused0>", "<start_of_turn>", "[multimodal]", "<|user|>"]
SPACES = [*"▁\n\t", "▁▁", "▁▁▁ x", " ▁▁", "a▁ ▁b", " " * 20 + "x", "a \n  \n\n\n", "\n" * 23 + "▁" * 9 + " ", "<0x0A>"]
TEXTS = CORPUS + NASTY + SPACES + fuzz(2000, 11, ["▁", "▁▁", "   ", "\n\n", "<b>", "</h1>"])
PREPEND = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}  # fmt: skip
REPLACE = PREPEND["normalizers"][1]


def metaspace(scheme):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
FORMS = {  # normalizer, pre_tokenizer
    "llama 2, mistral, phi-3": (PREPEND, None),
    "gemma": (REPLACE, SPLIT),
    "mistral since": (None, metaspace("first")),
    "always": (None, metaspace("always")),
    "never": (None, metaspace("never")),
}


def toy(form, bos=False):
    """A trained byte-fallback vocabulary as tokenizer.json"""
    tok = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.pre_tokenizer = hf.pre_tokenizers.Metaspace()  # so that no token crosses a space
    trainer = hf.trainers.BpeTrainer(
        vocab_size=620, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False, limit_alphabet=120
    )
    tok.train_from_iterator(CORPUS * 3, trainer)
    data = json.loads(tok.to_str())
    data["normalizer"], data["pre_tokenizer"] = FORMS[form]
    data["added_tokens"] = data["added_tokens"][:3]
    strip = [] if form in ("gemma", "never") else [hf.decoders.Strip(" ", 1, 0)]
    parts = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse(), *strip]
    tok.decoder = hf.decoders.Sequence(parts)
    data["decoder"] = json.loads(tok.to_str())["decoder"]
    if bos:
        tok.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        data["post_processor"] = json.loads(tok.to_str())["post_processor"]
    return data


def add(data, name, special=False, **flags):
    ident = data["model"]["vocab"].setdefault(name, len(data["model"]["vocab"]))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | flags
    data["added_tokens"].append({"id": ident, "content": name, "special": special, **flags})


def gemma():
    """As Gemma 3's: runs of spaces and lines are added tokens and come first in the merges, the longest first of all"""
    data = toy("gemma", bos=True)
    known = set(data["model"]["vocab"])
    data["model"]["merges"] = [m for m in data["model"]["merges"] if "".join(m) not in RUNS]
    for name in ["\n", *RUNS, "<b>", "</h1>", *STEERING]:
        add(data, name)
    assert not known & {"<b>", "</h1>"}
    splits = [(t[0] * i, t[0] * (len(t) - i)) for t in RUNS for i in range(1, len(t))]
    splits.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))  # the pairs of one token do not stand together
    data["model"]["merges"] = [list(pair) for pair in splits] + data["model"]["merges"]
    return data


def oracle_of(data):
    """The library on the same file, but for the tokens that a title must not spell"""
    kept = [t for t in data["added_tokens"] if not t["special"] and t["content"] not in STEERING]
    return hf.Tokenizer.from_str(json.dumps(data | {"added_tokens": kept, "post_processor": None}))


def without_bos(ours, oracle, texts):
    pairs = zip(texts, oracle.encode_batch(texts))
    return [text for text, theirs in pairs if ours.encode_prompt(text)[ours.adds_bos :] != theirs.ids]


@pytest.mark.parametrize("form", FORMS)
def test_lone_json(tmp_path, form):
    data = toy(form)
    ours, oracle = load(tmp_path, data), hf.Tokenizer.from_str(json.dumps(data))
    assert mismatches(ours, oracle, TEXTS) == [] and bad_decodes(ours, oracle, TEXTS) == []
    ids = [i for text in TEXTS for i in ours.encode_prompt(text)]
    assert {3 + ord("\0"), 3 + 0xF0} < set(ids) and max(ids) > 500  # bytes and merges were really there
    assert ours.vocab_size == oracle.get_vocab_size() and not ours.adds_bos


def test_lone_json_of_gemma(tmp_path):
    data = gemma()
    ours, oracle = load(tmp_path, data, {"bos_token": "<s>", "eos_token": "</s>"}), oracle_of(data)
    assert without_bos(ours, oracle, TEXTS) == []
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (1, 2, True)
    one = [ours.encode_answer(text) for text in ("▁" * 7, " " * 7, "\n\n\n", "<b>")]
    assert [len(ids) for ids in one] == [1, 1, 1, 1] and one[0] == one[1]


@pytest.mark.parametrize("form", ["gemma", "llama 2, mistral, phi-3"])
def test_tokens_that_steer_the_model_are_spelled_out(tmp_path, form):
    data = gemma() if form == "gemma" else toy(form)
    if form != "gemma":
        for name in ("<|user|>", "</think>"):  # as Phi-3's: not special, but no text either
            add(data, name, rstrip=True)
    control = {t["id"] for t in data["added_tokens"] if t["content"] in [*STEERING, "<s>", "</s>", "</think>"]}
    ours, oracle = load(tmp_path, data), oracle_of(data | {"added_tokens": []})
    for text in ["<s>", "a</s> b", "<|user|>\nhello", "<start_of_turn>user", "[multimodal]<unused0>", "</think>"]:
        ids = ours.encode_prompt(text)[ours.adds_bos :]
        assert not control & set(ids) and ids == oracle.encode(text).ids and ours.decode(ids) == text


@pytest.mark.parametrize("form", FORMS)
def test_answers_and_prices(tmp_path, form):
    ours = load(tmp_path, toy(form, bos=True))
    for prompt in ["Price is $", "a", "a\n\n"]:
        for answer in ["129.00", "drive", " drive", "\n", "😀"]:
            assert ours.decode(ours.encode_prompt(prompt) + ours.encode_answer(answer)) == prompt + answer
    tree = PriceTree.build(ours.encode_answer)
    assert [len(level) for level in tree.levels][0] == 1 and tree.leaf.count(None) >= 1
    assert ours.encode_prompt("Price is $7")[-1:] == ours.encode_answer("7")


# ---------------------------------------------------------------- tokenizer.model


def trained(**changes):
    out = io.BytesIO()
    options = dict(
        vocab_size=420, model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    ) | changes  # fmt: skip
    lines = iter([c.replace("\n", " ") for c in CORPUS] * 9)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, **options)
    return out.getvalue()


GEMMA_OPTIONS = dict(
    add_dummy_prefix=False, user_defined_symbols=[*RUNS, "<b>", *STEERING], pad_id=0, eos_id=1, bos_id=2, unk_id=3,
    pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
)  # fmt: skip


def test_a_models_user_defined_tokens_stay_but_for_those_that_steer(tmp_path):
    proto = trained(**GEMMA_OPTIONS)
    (tmp_path / "tokenizer.model").write_bytes(proto)
    ours, google = Tokenizer.from_directory(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert (ours.bos_id, ours.eos_id, ours.adds_bos, ours.vocab_size) == (2, 1, True, google.vocab_size())
    harmless = [text for text in TEXTS if not any(name in text for name in STEERING)]
    assert [t for t in harmless if ours.encode_prompt(t)[1:] != google.encode(t)] == []
    for name in STEERING:
        ids = ours.encode_prompt(name)
        assert google.piece_to_id(name) in google.encode(name)  # what is mended here
        assert google.piece_to_id(name) not in ids and ours.decode(ids) == name
    plain = trained()
    assert spm.without_steering(plain) == plain
    (tmp_path / "tokenizer.model").write_bytes(plain[: len(plain) // 2])
    with pytest.raises(ValueError, match="tokenizer.model: damaged or cut short"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("gemma_like", [False, True])
def test_a_rebuilt_model_is_googles(gemma_like):
    proto = trained(**GEMMA_OPTIONS if gemma_like else {})
    google = sentencepiece.SentencePieceProcessor(model_proto=proto)

    def kind(i):
        if google.is_unknown(i):
            return spm.UNKNOWN
        if google.is_control(i):
            return spm.CONTROL
        user = google.id_to_piece(i) in [*RUNS, "<b>"]
        return spm.BYTE if google.is_byte(i) else spm.USER_DEFINED if user and gemma_like else spm.NORMAL

    n = google.vocab_size()
    pieces = [(google.id_to_piece(i), google.get_score(i), kind(i)) for i in range(n)]
    rebuilt = spm.SentencePiece(spm.model_proto(pieces, dummy_prefix=not gemma_like))
    texts = [text for text in TEXTS if not any(name in text for name in STEERING)]
    assert [t for t in texts if rebuilt.encode(t) != google.encode(t)] == []
    assert [t for t in texts if rebuilt.decode(google.encode(t)) != google.decode(google.encode(t))] == []


def test_phi_3(tmp_path):
    """EOS is a control token that only the JSON files know, beyond the ids of tokenizer.model"""
    proto = trained()
    (tmp_path / "tokenizer.model").write_bytes(proto)
    data = toy("llama 2, mistral, phi-3")
    data["added_tokens"] += [{"id": 420, "content": "<|endoftext|>", "special": True}]
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "add_bos_token": False}
    ours = load(tmp_path, data, config)
    assert (ours.bos_id, ours.eos_id, ours.adds_bos, ours.vocab_size) == (1, 420, False, 421)
    google = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert ours.encode_prompt("a drive") == google.encode("a drive")
    assert ours.decode([*ours.encode_prompt("a drive"), 420]) == "a drive"
    (tmp_path / "tokenizer.json").unlink()
    config |= {"added_tokens_decoder": {"420": {"content": "<|endoftext|>"}}, "eos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_directory(tmp_path).eos_id == 420


# ---------------------------------------------------------------- what is refused


def shuffled_runs(data):
    merges = data["model"]["merges"]
    merges.insert(0, merges.pop(next(n for n, m in enumerate(merges) if m == ["▁", "▁"])))


REFUSED = {
    "ignore_merges": ("ignore_merges", lambda d: d["model"].update(ignore_merges=True)),
    "gaps": ("gaps", lambda d: d["model"]["vocab"].pop("\n")),
    "no unk": ("no unk_token", lambda d: d["model"].update(unk_token=None)),
    "normalizer": ("'NFC'", lambda d: d.update(normalizer={"type": "NFC"})),
    "prepend alone": ("Prepend", lambda d: d.update(normalizer={"type": "Prepend", "prepend": "▁"})),
    "split": ("'split': True", lambda d: d.update(normalizer=None, pre_tokenizer=metaspace("first") | {"split": True})),
    "bytes": ("256", lambda d: d["model"]["vocab"].update({"q0": d["model"]["vocab"].pop("<0x41>")})),
    "a word": ("'drive'", lambda d: add(d, "drive", rstrip=True)),
    "a space": ("'a b'", lambda d: add(d, "a b")),
    "with ▁": ("runs of spaces", lambda d: add(d, "▁x▁")),
    "runs late": ("runs of spaces", shuffled_runs),
    "dropout": ("dropout", lambda d: d["model"].update(dropout=0.1)),
}


@pytest.mark.parametrize("words, change", REFUSED.values(), ids=REFUSED.keys())
def test_what_sentencepiece_would_not_do_alike_is_refused_by_name(tmp_path, words, change):
    data = gemma()
    load(tmp_path, data)
    change(data)
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path, data)
    assert str(tmp_path / "tokenizer.json") in str(caught.value) and "\n" not in str(caught.value)


def test_merges_that_sentencepiece_would_read_differently_are_refused(tmp_path):
    # "abc" is listed as ab + c, but b + c comes first: Hugging Face never makes abc from these, SentencePiece would.
    data = toy("gemma")
    vocab = data["model"]["vocab"]
    data["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    for token in ("a", "b", "c", "bc", "ab", "abc"):
        vocab.setdefault(token, len(vocab))
    with pytest.raises(ValueError, match="'abc' is not what its own merges make"):
        load(tmp_path, data)
