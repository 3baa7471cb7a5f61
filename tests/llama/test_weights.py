"""The strict loader: what is wrong with a checkpoint is named."""

import json

import pytest
import torch
from conftest import hugging_face_model, our_model, tiny_config
from safetensors.torch import load_file, save_file

from llama.attention import Layout
from llama.families import config_from_directory
from llama.model import Llama
from llama.weights import load_weights
from quant.linear import LinearNF4
from quant.quantise import quantise_linear

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


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    hugging_face_model(tiny_config(tie_word_embeddings=True), tmp_path)
    expected = our_model(tmp_path)(TOKENS, LAYOUT)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(our_model(tmp_path)(TOKENS, LAYOUT), expected)  # a copy does no harm
    for other in (embedding.flip(0).contiguous(), embedding[:-1].clone()):
        rewrite(tmp_path, lambda t, other=other: t.update({"lm_head.weight": other}))
        with pytest.raises(ValueError, match="lm_head.weight differs from embed_tokens.weight, .*tie_word_embeddings"):
            our_model(tmp_path)
