"""A base model that was replaced under the same name is refused by whatever opens a run.

    python -m pytest tests/pipeline/test_base_digest.py
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.base_digest import base_identity, check_base


def weights(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def a_bit(directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 16
    path.write_bytes(data)


def change_json(file, change):
    def apply(directory):
        raw = json.loads((directory / file).read_text())
        change(raw)
        (directory / file).write_text(json.dumps(raw))

    return apply


def as_halves(directory):
    tensors = {k: t.to(torch.bfloat16) for k, t in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def swapped(raw):
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


CHANGES = {
    "weights": (weights, "weights differ"),
    "a bit": (a_bit, "weights differ"),
    "another dtype": (as_halves, "weights differ"),
    "config": (change_json("config.json", lambda raw: raw.update(rope_theta=77.0)), "config.json differs"),
    "tokenizer": (change_json("tokenizer.json", swapped), "tokenizer differs"),
}


@pytest.mark.parametrize("change, words", CHANGES.values(), ids=CHANGES)
def test_a_changed_base_is_refused_in_one_line(tiny_directory, change, words):
    run = {"base_model": base_identity("name", tiny_directory)}
    check_base(run, tiny_directory, "out")
    change(tiny_directory)
    with pytest.raises(ValueError, match=f"^out was trained on another base model than .* holds: its {words}$"):
        check_base(run, tiny_directory, "out")


def test_what_changes_nothing_is_no_other_base(tiny_directory, tmp_path):
    run = {"base_model": base_identity("name", tiny_directory)}
    shutil.copytree(tiny_directory, tmp_path / "moved")
    change_json("config.json", lambda raw: raw.update(transformers_version="9", torch_dtype="bfloat16"))(
        tmp_path / "moved"
    )
    check_base(run, tmp_path / "moved", "out")


@pytest.mark.parametrize("base_model", [{}, None, {"name": "a", "directory": "b"}])
def test_runs_of_before_have_no_digest_and_open(tiny_directory, base_model):
    weights(tiny_directory)
    check_base({"base_model": base_model}, tiny_directory, "out")
