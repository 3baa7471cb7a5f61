"""Which file of a model directory is read, and the digest of what is in it.

    python -m pytest tests/common/test_shards.py
"""

import json
import os

import pytest
import torch
from conftest import our_model
from safetensors.torch import load_file, save_file

from common import shards
from llama.attention import Layout

TOKENS, LAYOUT = torch.arange(20), Layout.packed([20])


def in_shards(directory, tensors):
    """Written as two files and an index"""
    names = {key: f"model-{1 + n % 2:05d}-of-00002.safetensors" for n, key in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({k: t for k, t in tensors.items() if names[k] == file}, directory / file, metadata={"format": "pt"})
    (directory / shards.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))


def test_a_newer_single_file_goes_before_an_old_index(tiny):
    """As in transformers, whose logits are the oracle"""
    from transformers import AutoModelForCausalLM

    tensors = load_file(tiny[1] / shards.SINGLE)
    in_shards(tiny[1], tensors)
    save_file({k: t * 1.5 for k, t in tensors.items()}, tiny[1] / shards.SINGLE, metadata={"format": "pt"})
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tiny[1]).eval()(TOKENS[None]).logits[0]
    torch.testing.assert_close(our_model(tiny[1])(TOKENS, LAYOUT), theirs, rtol=1e-4, atol=1e-4)
    (tiny[1] / shards.SINGLE).unlink()  # and without it the index is read again
    assert not torch.allclose(our_model(tiny[1])(TOKENS, LAYOUT), theirs, rtol=1e-2)


NAMES = ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "..", "", 3, None, [], "a\0"]


@pytest.mark.parametrize("file", NAMES)
def test_names_in_an_index_stay_in_their_folder(tmp_path, file):
    (tmp_path / shards.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(ValueError, match="no file of") as error:
        shards.weight_map(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": null}', '{"weight_map": [1]}', "\xff", "[" * 100_000])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / shards.INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="index.json is damaged"):
        shards.weight_map(tmp_path)


def test_the_digest_is_of_the_tensors_not_of_the_files(tiny):
    whole = shards.weights_digest(tiny[1])
    tensors = load_file(tiny[1] / shards.SINGLE)
    (tiny[1] / shards.SINGLE).unlink()
    in_shards(tiny[1], tensors)
    assert shards.weights_digest(tiny[1]) == whole
    tensors["model.norm.weight"][3] += 1e-3
    in_shards(tiny[1], tensors)
    assert shards.weights_digest(tiny[1]) != whole


@pytest.mark.parametrize("kept_from", [0, 1 << 26])
def test_a_flipped_bit_is_seen_whether_digests_are_kept_or_not(tiny, tmp_path, monkeypatch, kept_from):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "KEPT_FROM", kept_from)
    path = tiny[1] / shards.SINGLE
    before, about, data = shards.weights_digest(tiny[1]), os.stat(path), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))  # the time of the contents can be set back
    assert shards.weights_digest(tiny[1]) != before
    data[-1] ^= 1
    path.write_bytes(data)
    assert shards.weights_digest(tiny[1]) == before


def test_a_large_file_is_hashed_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "KEPT_FROM", 0)
    before = shards.weights_digest(tiny[1])
    monkeypatch.setattr(shards, "_hash", lambda *_: pytest.fail("hashed twice"))
    assert shards.weights_digest(tiny[1]) == before
