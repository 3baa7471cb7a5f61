"""Merging takes the files that training reads, of the run's own base, and says so where they are not.

    python -m pytest tests/lora/test_merge_files.py
"""

import json
import shutil

import pytest
import torch
from conftest import our_model
from safetensors.torch import load_file, save_file

from common.shards import weights_digest
from lora.adapter import save_adapter
from lora.inject import inject
from lora.merge import merge

KEY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def run(tiny, tmp_path):
    """(base, checkpoint): an adapter that changes q_proj, of a run in 16 bits"""
    model, ckpt = our_model(tiny[1]), tmp_path / "out"
    inject(model, rank=4, alpha=8, targets="q_proj")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    ckpt.mkdir()
    save_adapter(model, ckpt, base_model="x")
    write_run(ckpt, weights_digest(tiny[1]))
    return tiny[1], ckpt


def write_run(ckpt, digest):
    options = {"bits": 16, "blocksize": 64, "double_quant": True}
    base = {"sha256": digest} if digest else {}
    (ckpt / "run.json").write_text(json.dumps({"options": options, "base_model": base}))


def test_stray_copies_are_neither_merged_nor_copied(run, tmp_path):
    base, ckpt = run
    tensors = load_file(base / "model.safetensors")
    names = {k: f"model-0000{1 + (n % 2)}-of-00002.safetensors" for n, k in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({k: t for k, t in tensors.items() if names[k] == file}, base / file)
    save_file(tensors, base / "a_copy.safetensors")  # sorts before the shards
    save_file({k.removeprefix("model."): t for k, t in tensors.items()}, base / "consolidated.safetensors")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"dtype": "float32", "torch_dtype": "float32"}))
    assert merge(ckpt, base, tmp_path / "merged") == 2
    out = tmp_path / "merged"
    assert {p.name for p in out.glob("*.safetensors")} == set(names.values())
    whole = {k: t for file in set(names.values()) for k, t in load_file(out / file).items()}
    assert whole.keys() == tensors.keys() and not torch.equal(whole[KEY], tensors[KEY].bfloat16())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": sum(t.nbytes for t in whole.values())}, "weight_map": names}
    config = json.loads((out / "config.json").read_text())
    assert [config.get(key) for key in ("dtype", "torch_dtype")] == ["bfloat16", None]
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_stale_index_does_not_come_along(run, tmp_path):
    base, ckpt = run
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {KEY: "old.safetensors"}}))
    merge(ckpt, base, tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["int8", "fp8", "other"])
@pytest.mark.parametrize("digest", [True, False])
def test_another_base_is_refused_in_one_line(run, tmp_path, kind, digest):
    base, ckpt = tmp_path / "base", run[1]
    shutil.copytree(run[0], base)
    if not digest:
        write_run(ckpt, None)
    tensors = load_file(base / "model.safetensors")
    change = {
        "int8": lambda t: (t / t.abs().max() * 127).round().to(torch.int8),
        "fp8": lambda t: t.to(torch.float8_e4m3fn),
        "other": lambda t: t.flip(0).contiguous(),
    }
    save_file({k: change[kind](t) if "proj" in k else t for k, t in tensors.items()}, base / "model.safetensors")
    if kind == "other" and not digest:
        return merge(ckpt, base, tmp_path / "merged")  # a run of before: it does not know better
    words = "was trained on another base model than" if kind == "other" else "has dtype .*, expected one of F32"
    with pytest.raises(ValueError, match=words) as error:
        merge(ckpt, base, tmp_path / "merged")
    assert "\n" not in str(error.value) and not (tmp_path / "merged").exists()
