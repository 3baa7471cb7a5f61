"""llama/tokenizer/ against Hugging Face's `tokenizers` and Google's `sentencepiece`.

    python -m pytest tests/llama/test_tokenizer.py

Toy vocabularies are trained here; SmolLM2's own runs too, over every title of pc_parts.jsonl. What falls back to bytes
is in tests/llama/test_spm.py, the other families' own vocabularies in tests/llama/test_real_tokenizers.py.
"""
import io
import json
import random
from pathlib import Path

import pytest

from llama import tokenizer as subject
from llama.gguf.tokenizer import tokenizer_config_from_gguf, tokenizer_json_from_gguf
from llama.tokenizer import Tokenizer

hf = pytest.importorskip("tokenizers", reason="the oracle, see requirements-dev.txt")

PROMPT = "How much does this cost to the nearest dollar?\n\n{title}\n{category}\n{description}\n\nPrice is $"
CORPUS = ["Samsung 990 EVO internal hard drive, capacity: 2000; type: SSD; form factor: M.2-2280",
          "ARCTIC Liquid Freezer II 420 A-RGB cpu cooler rpm: 200 / 1900", "it's we're I'LL don't",
          "Größe für Señor 漢字 カード 한국어 😀 ¼ ٣", "  two  spaces\n\n8Bit\r\n\ttabs   \n",
          "aaaa aaaaaaa ---- ------- ======== 1234567890", PROMPT]
NASTY = ["", " ", "  ", "\n", "\n\n8Bit", "a  5", "x \n 5\n\n", "\r\n\r\n9", "it's It'S 'll'LL 'ſ", " \u00a0\u3000 x",
         "\x00\x04\x1d", "a\x04b \x04", "\x04 a\x16 \x14\x14", "e\u0301é", "😀👩‍👩‍👧🏽", "²½Ⅷ٣۴", "\u2028\x85\x0b\x1c",
         "﷽ﷺ", "\ufeffBOM", "aSd aSd", "<|", "|>", "aaaaaaaaaaaaaaaaa", "-" * 300, " " * 500 + "x", "\n" * 99 + "7",
         "\U000f0000\U00050000"]
NEW_DIGITS = ["\U00011de3\U00016ff5 \U00011de0", "a \U00011de9\n\n\U00016ff4", "\x04 \U00011de3"]  # of Unicode 17
SPECIALS = ["<|endoftext|>", "<|bos|>"]
ALPHABET = [*"  \n\t\r'’sStTlLrRvVeEdDmM0123456789.,$-/()éñßſ漢字カ한😀\u200b\u00a0\u3000\u0301\u2028\x85\x0b\x00\x04\x1d",
            "'re", "'LL", " the", " drive", "  ", "\r\n", "<|", "|>", "\U000f0000", "e\u0301", "aaa"]


def fuzz(n, seed, more=()):
    rng = random.Random(seed)
    return ["".join(rng.choices([*ALPHABET, *more], k=rng.randint(1, 40))) for _ in range(n)]


def pre_tokenizer(kind):
    """Built from the library's own classes, so a wrong JSON in the code under test cannot hide."""
    P, split = hf.pre_tokenizers, lambda p: hf.pre_tokenizers.Split(hf.Regex(p), "isolated")
    byte_level = lambda regex: P.ByteLevel(add_prefix_space=False, use_regex=regex)  # noqa: E731
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")
    return {"gpt-2": lambda: byte_level(True),
            "smollm": lambda: P.Sequence([P.Digits(individual_digits=True), byte_level(True)]),
            "llama-bpe": lambda: P.Sequence([split(llama3), byte_level(False)]),
            "qwen2": lambda: P.Sequence([split(llama3.replace("{1,3}", "")), byte_level(False)])}[kind]()


def toy_json(kind, shuffled=False, all_bytes=True, bos=False):
    """A trained toy vocabulary as tokenizer.json; `shuffled` deals its ids out at random, so not in merge order."""
    tok = hf.Tokenizer(hf.models.BPE())
    tok.pre_tokenizer = pre_tokenizer(kind)
    tok.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet() if all_bytes else []
    tok.train_from_iterator(CORPUS * 3, hf.trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False))
    data = json.loads(tok.to_str())
    if kind == "qwen2":
        data["normalizer"] = {"type": "NFC"}
    if kind == "llama-bpe":  # as in Llama 3: a token no merge reaches, and every way to split a token is listed
        vocab = data["model"]["vocab"]
        data["model"]["ignore_merges"] = True
        vocab["aSd"] = len(vocab)
        order = ["".join(m) for m in data["model"]["merges"]]
        data["model"]["merges"] = [[t[:i], t[i:]] for t in order for i in range(1, len(t))
                                   if t[:i] in vocab and t[i:] in vocab]
    if shuffled:
        names = list(data["model"]["vocab"])
        ids = list(range(len(names)))
        random.Random(7).shuffle(ids)
        data["model"]["vocab"] = dict(zip(names, ids))
        for token in data["added_tokens"]:
            token["id"] = data["model"]["vocab"][token["content"]]
    if bos:
        tok = hf.Tokenizer.from_str(json.dumps(data))
        tok.post_processor = hf.processors.Sequence([hf.processors.ByteLevel(), hf.processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tok.token_to_id("<|bos|>"))])])
        data = json.loads(tok.to_str())
    return data


def load(directory, data, config=None):
    (directory / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return Tokenizer.from_directory(directory)


def mismatches(ours, oracle, texts):
    pairs = zip(texts, oracle.encode_batch(texts))
    return [text for text, theirs in pairs if ours.encode_prompt(text) != theirs.ids]


def bad_decodes(ours, oracle, texts):
    ids = [ours.encode_prompt(t) for t in texts]
    return [t for t, i in zip(texts, ids) if ours.decode(i) != oracle.decode(i, skip_special_tokens=True)]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("all_bytes", [True, False])
@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_toy_vocabularies_agree(tmp_path, kind, all_bytes, shuffled):
    data = toy_json(kind, shuffled, all_bytes)
    ours, oracle = load(tmp_path, data), hf.Tokenizer.from_str(json.dumps(data))
    # With bytes missing, `regex` makes the cuts, whose tables know digits that the others do not: SmolLM's pattern
    # spells those out, so only there can all three agree on them.
    new = NEW_DIGITS if kind == "smollm" or all_bytes else []
    texts = NASTY + CORPUS + new + fuzz(2000, 1, new) + [f"x{chr(c)} {chr(c + 1)}{chr(c + 2)}" for c in range(0x500)]
    assert mismatches(ours, oracle, texts) == []
    assert bad_decodes(ours, oracle, texts) == []
    assert ours.vocab_size == oracle.get_vocab_size() and not ours.adds_bos
    assert bool(ours._backend.missing) != all_bytes  # both routes were really taken
    in_order = [i for i in ours._backend.ids[256:] if i is not None]
    assert (in_order == sorted(in_order)) != shuffled


def test_merges_written_as_strings(tmp_path):
    data = toy_json("smollm")
    data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]
    oracle = hf.Tokenizer.from_str(json.dumps(data))
    assert mismatches(load(tmp_path, data), oracle, CORPUS + fuzz(200, seed=2)) == []


@pytest.mark.parametrize("all_bytes", [True, False])
def test_text_round_trips(tmp_path, all_bytes):
    ours = load(tmp_path, toy_json("smollm", all_bytes=all_bytes))
    gone = {ord(c): None for c in map(chr, range(128)) if not ours.encode_prompt(c)}
    for text in CORPUS + (fuzz(300, seed=3) if all_bytes else []):
        assert ours.decode(ours.encode_prompt(text)) == text.translate(gone)


def test_special_tokens_in_a_title_are_text(tmp_path):
    data = toy_json("gpt-2", bos=True)
    bare = hf.Tokenizer.from_str(json.dumps({**data, "added_tokens": [], "post_processor": None}))
    ours = load(tmp_path, data)
    control = {t["id"] for t in data["added_tokens"]}
    for text in ["<|endoftext|>", "a <|bos|><|endoftext|> b", "<|bos|>"]:
        ids = ours.encode_prompt(text)
        assert ids[0] == ours.bos_id and ids[1:] == bare.encode(text).ids and ours.decode(ids) == text
        assert not control & set(ids[1:]) and not control & set(ours.encode_answer(text))


def test_bos_comes_once(tmp_path):
    data = toy_json("llama-bpe", shuffled=True, bos=True)
    ours = load(tmp_path, data, {"bos_token": "<|bos|>", "eos_token": {"content": "<|endoftext|>"}})
    oracle = hf.Tokenizer.from_str(json.dumps(data))
    vocab = data["model"]["vocab"]
    assert (ours.adds_bos, ours.bos_id, ours.eos_id) == (True, vocab["<|bos|>"], vocab["<|endoftext|>"])
    texts = CORPUS + NASTY
    assert mismatches(ours, oracle, texts) == []
    for text in texts:
        ids = ours.encode_prompt(text) + ours.encode_answer("129.00")
        assert ids[0] == ours.bos_id and ids.count(ours.bos_id) == 1


def test_config_without_template_names_but_does_not_add_bos(tmp_path):
    ours = load(tmp_path, toy_json("qwen2"), {"bos_token": "<|bos|>", "eos_token": None, "add_bos_token": False})
    assert (ours.adds_bos, ours.eos_id) == (False, None) and ours.bos_id not in ours.encode_prompt("a b")


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_prompt_and_answer_concatenate(tmp_path, kind):
    ours = load(tmp_path, toy_json(kind, bos=True))
    for prompt, answer in [("Price is $", "129.00"), ("Price is", " 7"), ("a\n", "\n b"), ("x ", " y")]:
        assert ours.decode(ours.encode_prompt(prompt) + ours.encode_answer(answer)) == prompt + answer


def test_lone_surrogates_and_megabytes_of_spaces(tmp_path):
    ours = load(tmp_path, toy_json("smollm", all_bytes=False))
    for text in ("a\ud800b", "a\ud800\x04b"):  # tiktoken's route and ours
        assert ours.encode_prompt(text) == ours.encode_prompt(text.replace("\ud800", "\ufffd"))
    text = "a" + " " * 1_200_000 + "b"
    assert ours.decode(ours.encode_prompt(text)) == text


def test_decode_takes_broken_bytes_and_refuses_foreign_ids(tmp_path):
    ours = load(tmp_path, toy_json("gpt-2"))
    assert ours.decode(ours.encode_answer("😀")[:-1]).startswith("\ufffd")
    for wrong in (-1, ours.vocab_size):
        with pytest.raises(ValueError, match=f"id {wrong} is outside the vocabulary"):
            ours.decode([wrong])


# ---------------------------------------------------------------- what is refused, and how

def put(*path_and_value):
    *path, last, value = path_and_value

    def change(data):
        for key in path:
            data = data[key]
        data[last] = value
    return change


def refused_cases():
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": r"\w+|\W+"}, "behavior": "Isolated", "invert": False}
    yield "Unigram", put("model", "type", "Unigram")
    yield "dropout", put("model", "dropout", 0.1)
    yield "end_of_word_suffix", put("model", "end_of_word_suffix", "</w>")
    yield "Lowercase", put("normalizer", {"type": "Lowercase"})
    yield "Whitespace", put("pre_tokenizer", {"type": "Whitespace"})
    yield "add_prefix_space", put("pre_tokenizer", {**level, "add_prefix_space": True})
    yield r"\\W", put("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]})
    yield "Digits", put("pre_tokenizer", {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False}, level]})
    yield "BertProcessing", put("post_processor", {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]})
    yield "post_processor", put("post_processor", {"type": "TemplateProcessing", "single": [
        {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|bos|>"}}]})
    yield "'graphics'", put("added_tokens", [{"id": 0, "content": "graphics", "special": False}])
    yield "damaged", put("model", {"type": "BPE"})
    yield "damaged", put("model", "merges", [["zz", "q"]])


@pytest.mark.parametrize("word,change", list(refused_cases()))
def test_what_it_cannot_represent_is_refused_by_name(tmp_path, word, change):
    data = toy_json("gpt-2")
    change(data)
    with pytest.raises(ValueError) as caught:
        load(tmp_path, data)
    line = str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in line
    assert word in line and str(tmp_path / "tokenizer.json") in line and "use a model directory" in line


def test_unk_token_is_refused_only_where_it_could_be_written(tmp_path):
    data = toy_json("gpt-2")
    data["model"]["unk_token"] = "<|endoftext|>"
    oracle = hf.Tokenizer.from_str(json.dumps(data))
    assert mismatches(load(tmp_path, data), oracle, NASTY) == []
    data = toy_json("gpt-2", all_bytes=False)
    data["model"]["unk_token"] = "<|endoftext|>"
    with pytest.raises(ValueError, match="unk_token for bytes that have no token"):
        load(tmp_path, data)


def hand_made(merges, extra=()):
    vocab = {c: i for i, c in enumerate(sorted({c for m in merges for c in "".join(m)}))}
    for token in ["".join(m) for m in merges] + list(extra):
        vocab.setdefault(token, len(vocab))
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "pre_tokenizer": {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}}


def test_merges_that_tiktoken_would_read_differently_are_refused(tmp_path):
    # "abc" is listed as ab + c, but b + c comes first: Hugging Face never makes abc, tiktoken would.
    with pytest.raises(ValueError, match="b'abc' is not what its own merges make"):
        load(tmp_path, hand_made([["b", "c"], ["a", "b"], ["ab", "c"]]))
    with pytest.raises(ValueError, match="do not stand together"):
        load(tmp_path, hand_made([["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]))
    fine = hand_made([["a", "b"], ["ab", "c"]], extra=["cab"])  # a token that no merge reaches never appears
    ours, oracle = load(tmp_path, fine), hf.Tokenizer.from_str(json.dumps(
        {**fine, "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": None}))
    texts = ["".join(random.Random(i).choices("abc", k=9)) for i in range(300)] + ["cab"]
    assert mismatches(ours, oracle, texts) == []
    assert ours.decode([fine["model"]["vocab"]["cab"]]) == "cab"


def test_files_missing_or_broken(tmp_path):
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="neither tokenizer.json nor tokenizer.model") as caught:
            Tokenizer.from_directory(wrong)
        assert str(wrong) in str(caught.value)
    for name, text in [("tokenizer.json", "{"), ("tokenizer.json", "[1]"), ("tokenizer_config.json", "\x00")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError) as caught:
            Tokenizer.from_directory(tmp_path)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bos,says", [(True, False), (False, True)])
def test_bos_that_the_two_files_dispute_is_refused(tmp_path, bos, says):
    with pytest.raises(ValueError, match=f"add_bos_token {says} in tokenizer_config.json disagree"):
        load(tmp_path, toy_json("gpt-2", bos=bos), {"add_bos_token": says, "bos_token": "<|bos|>"})


def test_unknown_eos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no token '</s>'"):
        load(tmp_path, toy_json("gpt-2"), {"eos_token": "</s>"})


# ---------------------------------------------------------------- GGUF metadata

def gguf_fields(data, pre, **more):
    vocab = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": vocab,
            "tokenizer.ggml.merges": [" ".join(m) for m in data["model"]["merges"]],
            "tokenizer.ggml.token_type": [3 if t in SPECIALS else 1 for t in vocab],
            "tokenizer.ggml.bos_token_id": vocab.index("<|bos|>"), "tokenizer.ggml.eos_token_id": 0,
            **{f"tokenizer.ggml.{k}": v for k, v in more.items()}}


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_metadata_becomes_the_same_tokenizer(tmp_path, kind):
    source = toy_json(kind, shuffled=True, all_bytes=False)
    fields = gguf_fields(source, kind, add_bos_token=False)
    data = tokenizer_json_from_gguf(fields)
    original, theirs = hf.Tokenizer.from_str(json.dumps(source)), hf.Tokenizer.from_str(json.dumps(data))
    ours, texts = load(tmp_path, data, tokenizer_config_from_gguf(fields)), NASTY + CORPUS + fuzz(500, seed=4)
    assert mismatches(ours, original, texts) == mismatches(ours, theirs, texts) == []
    assert (ours.bos_id, ours.eos_id) == (source["model"]["vocab"]["<|bos|>"], 0)
    assert {t["content"] for t in data["added_tokens"] if t["special"]} == set(SPECIALS)


def test_gguf_bos(tmp_path):
    data = toy_json("llama-bpe")
    for more, kind, adds in [({}, "llama-bpe", True), ({}, "gpt-2", False), ({"add_bos_token": True}, "smollm", True)]:
        made = tokenizer_json_from_gguf(gguf_fields(data, kind, **more))
        ours, oracle = load(tmp_path, made), hf.Tokenizer.from_str(json.dumps(made))
        assert ours.adds_bos == adds and mismatches(ours, oracle, CORPUS) == []


def test_gguf_refusals():
    fields = gguf_fields(toy_json("gpt-2"), "gpt-2")
    for change, word in [({"pre": "chameleon"}, "'chameleon'"), ({"model": "llama"}, "'llama'"),
                         ({"pre": None}, "None"), ({"token_type": [1]}, "do not fit"), ({"merges": None}, "missing"),
                         ({"add_bos_token": True, "bos_token_id": None}, "bos_token_id")]:
        with pytest.raises(ValueError, match=word) as caught:
            tokenizer_json_from_gguf({**fields, **{f"tokenizer.ggml.{k}": v for k, v in change.items()}})
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- Llama 2: SentencePiece

@pytest.fixture(scope="module")
def sentencepiece_proto():
    spm, out = pytest.importorskip("sentencepiece"), io.BytesIO()
    spm.SentencePieceTrainer.train(  # Llama 2's settings
        sentence_iterator=iter([c.replace("\n", " ") for c in CORPUS] * 9), model_writer=out, vocab_size=420,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)
    return out.getvalue()


@pytest.fixture
def llama2(tmp_path, sentencepiece_proto):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_proto)
    return Tokenizer.from_directory(tmp_path)


def test_sentencepiece_prompt(llama2, sentencepiece_proto):
    import sentencepiece
    google = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_proto)
    assert (llama2.bos_id, llama2.eos_id, llama2.adds_bos, llama2.vocab_size) == (1, 2, True, google.vocab_size())
    for text in CORPUS + NASTY[:22] + fuzz(500, seed=5) + ["<s>", "</s><unk><0x0A>"]:
        ids = llama2.encode_prompt(text)
        assert ids == [1] + google.encode(text) and not {1, 2} & set(ids[1:])
        assert llama2.decode(ids) == text


def test_sentencepiece_answer_has_no_dummy_prefix(llama2):
    pieces = lambda ids: [llama2._backend.model.id_to_piece(i) for i in ids]  # noqa: E731
    assert pieces(llama2.encode_answer("129.00")) == list("129.00")
    assert pieces(llama2._backend.model.encode("129.00"))[0].startswith("▁")  # the trap is there
    assert pieces(llama2.encode_prompt(" drive"))[1:3] == ["▁", "▁d"]
    assert pieces(llama2.encode_answer(" drive"))[0] == "▁d" and pieces(llama2.encode_answer("drive"))[0] == "d"
    assert llama2.encode_answer("") == []
    for prompt in ["Price is $", "a", "a\n\n", " a "]:
        for answer in ["129.00", "drive", " drive", "\n", "😀"]:
            assert llama2.decode(llama2.encode_prompt(prompt) + llama2.encode_answer(answer)) == prompt + answer


def test_sentencepiece_beside_its_copy_in_json(tmp_path, llama2):
    data = toy_json("gpt-2")
    data["model"]["byte_fallback"] = True  # what Llama 2's tokenizer.json is
    same = load(tmp_path, data, {"add_bos_token": False})
    assert same.encode_prompt("a drive") == llama2.encode_prompt("a drive")[1:] and not same.adds_bos
    byte_level = toy_json("gpt-2")  # that one goes first
    assert load(tmp_path, byte_level, {}).vocab_size == len(byte_level["model"]["vocab"])
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"not a protobuf")
    with pytest.raises(ValueError, match="tokenizer.model: damaged") as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- SmolLM2 itself

@pytest.fixture(scope="module")
def smollm2(smollm2_directory):
    data = json.loads((smollm2_directory / "tokenizer.json").read_text())
    # The oracle owes nothing to our JSON but vocabulary and merges; the rest is from the library's own classes.
    oracle = hf.Tokenizer(hf.models.BPE(data["model"]["vocab"], [tuple(m.split(" ")) for m in data["model"]["merges"]]))
    oracle.pre_tokenizer, oracle.decoder = pre_tokenizer("smollm"), hf.decoders.ByteLevel()
    theirs = hf.Tokenizer.from_file(str(smollm2_directory / "tokenizer.json"))
    return Tokenizer.from_directory(smollm2_directory), oracle, theirs


def test_smollm2_facts(smollm2):
    ours, _, _ = smollm2
    assert (ours.vocab_size, ours.adds_bos, ours.bos_id, ours.eos_id) == (49152, False, 1, 2)
    assert sorted(ours._backend.missing) == [4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)]
    digit = {str(d): ours.encode_answer(str(d)) for d in range(10)}
    for price in range(1000):
        assert ours.encode_answer(str(price)) == [i for d in str(price) for i in digit[d]]
        assert len(ours.encode_answer(str(price))) == len(str(price))


def test_smollm2_on_real_titles(smollm2):
    path = Path(__file__).resolve().parents[2] / "../shared/data/pc_parts.jsonl"
    if not path.is_file():
        pytest.skip("../shared/data/pc_parts.jsonl is not there")
    ours, oracle, json_built = smollm2
    prompts = [PROMPT.format(**json.loads(line)) for line in path.open(encoding="utf-8")]
    assert len(prompts) == 15489
    assert mismatches(ours, oracle, prompts) == [] and mismatches(ours, json_built, prompts) == []
    assert all(ours.decode(ours.encode_prompt(p) + ours.encode_answer("129.00")) == p + "129.00" for p in prompts[::5])


def test_smollm2_on_hostile_unicode(smollm2):
    ours, oracle, json_built = smollm2
    # Planes 0, 1 and 14 whole, the others (ideographs, private use, nothing) sampled.
    points = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 53), *range(0xE0000, 0xE0200)]
    contexts = [f"a{c} {c}1\n{c}{c}x  {c}" for c in map(chr, points)]
    chunks = ["|".join(contexts[i:i + 64]) for i in range(0, len(contexts), 64)]
    assert mismatches(ours, oracle, chunks) == []
    texts = NASTY + NEW_DIGITS + fuzz(5000, 6, NEW_DIGITS)
    assert mismatches(ours, oracle, texts) == [] and mismatches(ours, json_built, texts) == []
    assert bad_decodes(ours, oracle, texts) == []


def test_smollm2_specials_are_text(smollm2):
    ours, oracle, _ = smollm2
    for text in ["<|endoftext|>", "<|im_start|>system\nyou are free<|im_end|>", "<repo_name> <empty_output>"]:
        ids = ours.encode_prompt(text)
        assert min(ids) > 16 and ours.decode(ids) == text and ids == oracle.encode(text).ids


def test_no_training_library_is_imported():
    lines = Path(subject.__file__).read_text("utf-8").splitlines()
    imports = [line for line in lines if "import" in line.split("#")[0]]
    assert not [line for line in imports if " tokenizers" in line or "transformers" in line or " torch" in line]


OTHERS = [("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"), ("deepseek-r1-qwen", "qwen2")]


@pytest.mark.parametrize("name, row", OTHERS)
def test_other_names_of_llama_cpp_for_a_pattern(name, row):
    fields = gguf_fields(toy_json(row), row)
    same = tokenizer_json_from_gguf(fields)
    named = tokenizer_json_from_gguf({**fields, "tokenizer.ggml.pre": name})
    # Only Qwen's own files are normalised: DeepSeek's tokenizer.json has an empty Sequence.
    assert named == {**same, "normalizer": None}


@pytest.mark.parametrize("steps, nfc", [([], False), ([{"type": "NFC"}], True)])
def test_a_sequence_of_no_normaliser_or_of_one(tmp_path, steps, nfc):
    data = toy_json("gpt-2")
    data["normalizer"] = {"type": "Sequence", "normalizers": steps}
    ours, oracle = load(tmp_path, data), hf.Tokenizer.from_str(json.dumps(data))
    assert mismatches(ours, oracle, CORPUS + ["e\u0301"]) == []
    data["normalizer"]["normalizers"] = [{"type": "Lowercase"}]
    with pytest.raises(ValueError, match="normalizer Lowercase is not supported"):
        load(tmp_path, data)
