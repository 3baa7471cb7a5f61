"""The price head beside the network: the state that it reads, and the prediction that comes of it."""

import random

import numpy as np
import pytest
import torch
from conftest import our_model

from lora.inject import inject, lora_layers
from pipeline.checkpoint import adapter_digest
from pipeline.prediction import last_states, predict, without_adapter
from pipeline.predictor import open_head
from pricing.distribution.decode import PriceTree
from pricing.distribution.intervals import MIDDLE
from pricing.distribution.quantile_head import new_price_head, save_head


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(300) for _ in range(length)] for length in lengths]


def test_a_prediction_reads_the_head_where_the_digits_begin(tiny):
    """The state that prefill leaves, prefix read once or not, against the states of the whole prompt"""
    model = our_model(tiny[1])
    prompts = [[7, 8, 9, *random.Random(n).choices(range(300), k=n + 2)] for n in range(6)]
    settings = {"states": "tuned", "blocks": [2], "mean": False}
    head = new_price_head(np.array([5.0, 50.0, 500.0]), 72, 1.0, settings, "cpu")
    tree = PriceTree.build(lambda text: [ord(letter) for letter in text])
    seen = {}

    def on_batch(indices, part):
        seen.update(zip(indices, part.head, strict=True))

    found = predict(model, tree, prompts, head, batch_tokens=20, on_batch=on_batch)
    expected = head.quantiles(last_states(model, prompts, None))
    np.testing.assert_allclose(found.head, expected, atol=1e-4)
    np.testing.assert_array_equal([seen[n] for n in range(6)], found.head)
    np.testing.assert_allclose(found.median(), np.sqrt(found.median("head") * found.median("median")))
    assert np.ptp(found.head[:, MIDDLE]) > 1e-3


def test_the_state_is_transformers_hidden_state_at_the_last_prompt_token(tiny):
    hf, directory = tiny
    model, prompts = our_model(directory), prompts_of(9, 3, 14, 1, 6)
    with torch.no_grad():
        hidden = [hf(torch.tensor([p]), output_hidden_states=True).hidden_states[-1] for p in prompts]  # (1, T, C) each
    expected = np.stack([states[0, -1].numpy() for states in hidden])
    found = last_states(model, prompts, 16)
    assert found.dtype == np.float32 and found.shape == (5, 72)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_states_without_the_adapter_are_those_of_the_base(tiny):
    prompts, base = prompts_of(5, 8), our_model(tiny[1])
    model = our_model(tiny[1])
    inject(model, rank=2, alpha=4, dropout=0.0, rslora=False, targets="all-linear")
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    tuned, plain = last_states(model, prompts, 64), last_states(base, prompts, 64)
    assert np.abs(tuned - plain).max() > 0.1
    with without_adapter(model):
        np.testing.assert_allclose(last_states(model, prompts, 64), plain, atol=1e-6)
    np.testing.assert_array_equal(last_states(model, prompts, 64), tuned)


def test_a_head_beside_another_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    head = new_price_head(np.ones(3), 8, 1.0, {"joint": True, "adapter": adapter_digest(tmp_path)}, "cpu")
    save_head(head, tmp_path)
    assert open_head(tmp_path).settings == head.settings
    (tmp_path / "adapter_model.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match="was trained .* another adapter"):
        open_head(tmp_path)
