"""The families' benchmark: real shapes against transformers, tiny ones written, loaded and trained.

python -m pytest tests/pipeline/test_benchmarks_families.py
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import families
from benchmarks.random_model import tensors_of, write
from benchmarks.shapes import FAMILIES, PUBLISHED, SHAPES
from benchmarks.train_speed import settings_of, work
from llama.families import config_from_dict
from pipeline.models import load_base, open_base, pick_dtype
from quant.linear import FrozenLinear

ROOT = Path(__file__).parents[2]  # where `python -m benchmarks...` runs
PARAMETERS = {  # as published; written down from memory, like the shapes
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "gemma-2-9b": 9_241_705_984,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
}


def settings(name, bits, model="", **own):
    options = {"batch": 4, "steps": 2, "warmup": 1, "rank": None, "alpha": None, "targets": None, "memory_budget": None}
    return settings_of(argparse.Namespace(**options, shape=name, bits=bits), model) | own


@pytest.mark.parametrize("name", FAMILIES)
def test_real_shapes_are_the_published_ones(name):
    """Every tensor of transformers' model from the same config.json: its name in the file and its shape"""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = json.loads(json.dumps(FAMILIES[name]))  # transformers writes into the dicts that it is given
    kinds = {key: value for key, value in raw.items() if key != "architectures"}
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kinds))
    assert type(hf).__name__ == raw["architectures"][0]
    ours = tensors_of(config_from_dict(FAMILIES[name]))
    theirs = {key.removeprefix("model."): tuple(p.shape) for key, p in hf.named_parameters()}
    assert ours == theirs
    assert families.computed(settings(name, 4), torch.bfloat16)["parameters"] == PARAMETERS[name] == hf.num_parameters()


def test_every_shape_is_one_that_the_network_computes():
    assert all(config_from_dict(config) for config in SHAPES.values()) and PUBLISHED.keys() == FAMILIES.keys()
    assert SHAPES["8b"] is FAMILIES["llama-3.1-8b"]
    like, real = (config_from_dict(SHAPES[name]) for name in ("14b", "phi-3-medium"))
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"):
        assert getattr(like, key) == getattr(real, key)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_one_is_written_loaded_and_trained(name, tmp_path):
    """Bytes by formula are those of what was loaded; the first loss is that of a model that knows nothing."""
    shape, directory = f"{name}-tiny", tmp_path / "model"
    write(shape, directory, "cpu")
    config, tokenizer, _ = open_base(str(directory))
    for bits in (4, 8, 16):
        options = argparse.Namespace(bits=bits, blocksize=64, double_quant=True, outlier_threshold=6.0)
        model = load_base(config, directory, torch.device("cpu"), torch.bfloat16, options)
        linears = [module for module in model.modules() if isinstance(module, FrozenLinear)]
        loaded = sum(linear.stored_bytes() for linear in linears) + sum(p.nbytes for p in model.parameters())
        row = families.computed(settings(shape, bits), torch.bfloat16)
        # NF4 fills up blocks of 256 absmax, and has one offset a linear.
        assert 0 <= loaded - row["computed_bytes"] <= (12 * len(linears) if bits == 4 else 0)
    norms = [p for key, p in model.named_parameters() if "norm" in key]
    assert all((norm - 1).abs().max() < 0.2 for norm in norms)  # Gemma's 1 is added by the loader
    row = families.computed(settings(shape, 16), pick_dtype("auto", torch.device("cpu")))
    budget, result = str(row["estimated_peak_bytes"]), tmp_path / "row.json"
    own = {"impl": "ours", "memory_budget": budget, "result": str(result), "started": time.time()}
    work(settings(shape, 16, directory, **own))
    row = json.loads(result.read_text())
    assert "failed" not in row and row["settings"].endswith("tokens, graph")  # nothing kept, nothing run twice
    assert len(row["step_ms"]) == 2 and abs(row["losses"][0] - math.log(1500)) < 1


def test_the_table_is_written_row_by_row(tmp_path, monkeypatch, capfd):
    """In processes of their own; the weights are gone afterwards."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "room").mkdir()
    monkeypatch.setattr(families, "roomy", lambda size: str(tmp_path / "room"))
    file = tmp_path / "new.json"
    command = ["--models", "phi-3-mini-tiny", "--bits", "4", "8", "--batch", "2", "--steps", "1", "--json", str(file)]
    families.run(families.parse_arguments(command))
    assert not list((tmp_path / "room").iterdir())
    rows = json.loads(file.read_text())["rows"]
    assert [row["bits"] for row in rows] == [4, 8] and all(row["tokens_per_second"] > 0 for row in rows)
    size = {"bf16": "0.000", "fp32": "0.001"}[os.environ["QLORA_DTYPE"]]  # GiB; embedding and head are not quantised
    assert f"| phi-3-mini-tiny | 296,896 | {size} / {size} |" in capfd.readouterr().out


def test_what_fails_is_a_row_that_says_so(tmp_path, monkeypatch, capfd):
    file = tmp_path / "new.json"
    arguments = families.parse_arguments(["--models", "tiny", "--bits", "4", "16", "--json", str(file)])
    monkeypatch.setattr(families.shutil, "disk_usage", lambda folder: argparse.Namespace(free=0))
    families.run(arguments)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 and all("no room for 0.0 GiB of weights in /dev/shm or" in row["failed"] for row in rows)
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(families, "write_apart", lambda *_: None)  # nothing there to load
    families.run(arguments)
    assert "tiny, 16 bits: FileNotFoundError" in capfd.readouterr().out


def test_computed_bytes_need_no_weights(capsys):
    families.run(families.parse_arguments(["--computed", "--models", "llama-3.1-8b", "phi-3-medium"]))
    out = capsys.readouterr().out
    assert "| meta-llama/Llama-3.1-8B | 8,030,261,248 | 5.311 / 8.463 / 14.958 |" in out and "tokens/s" not in out
