"""fast/layers.py equal to the textbook: FastLayers against run_layers on the same weights, forward and backward.

    python -m pytest tests/fast/test_layers.py

Float32. The linears are not quantised: tests/fast/test_linears.py has those of 4 and 8 bits.
"""

import json

import pytest
import torch
from conftest import our_model
from kernel_helpers import DEVICE, close
from test_families import FAMILIES, write_family

from fast.install import install
from fast.layers import FastLayers
from fast.plan import Plan
from llama.attention import Layout
from llama.generate import extend, prefill, read_prefix
from llama.model import run_layers

FAMILY_NAMES = ["llama 3.1", "smollm2, llama 3.2", "gemma2", "qwen3"]  # biases; tied; post norms, caps; norms of heads
LENGTHS = [9, 21, 6]  # beyond Gemma's window of 11
ROWS = torch.tensor([8, 20, 29, 33, 35])  # packed indices, some of each sequence
ALL = torch.arange(300)


@pytest.fixture(params=FAMILY_NAMES)
def pair(request, tmp_path):
    """(textbook, fast): two models of the same random weights"""
    write_family(request.param, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(FAMILIES[request.param]))
    textbook, fast = (our_model(tmp_path / "model").to(DEVICE) for _ in range(2))
    install(fast)
    assert textbook.run_layers is run_layers and isinstance(fast.run_layers, FastLayers)
    return textbook, fast


def states_and_gradient(model, at, plan=None):
    """Hidden states of LENGTHS tokens, and the gradient of a random sum of them to the embedding"""
    if plan:
        install(model, plan, tokens=sum(LENGTHS))
    tokens = torch.randint(1, 300, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    model.embed_tokens.weight.requires_grad_().grad = None
    states = model.hidden_states(tokens, Layout.packed(LENGTHS, DEVICE), at=None if at is None else at.to(DEVICE))
    probe = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    states.backward(probe.to(DEVICE))
    return states.detach(), model.embed_tokens.weight.grad


@pytest.mark.parametrize("at", [None, ROWS], ids=["all rows", "some rows"])
def test_states_and_gradients_are_those_of_the_textbook(pair, at):
    results = [states_and_gradient(model, at) for model in pair]
    assert results[0][0].shape == (36 if at is None else 5, pair[0].config.hidden_size)
    assert results[0][0].std() > 0.3 and results[0][1].norm() > 1
    for fast, textbook in zip(*reversed(results), strict=True):
        assert fast.dtype == torch.float32
        close(fast, textbook)


def test_a_recomputed_block_gives_the_same(pair):
    """One block run again in backward, those behind it as they are"""
    for fast, textbook in zip(
        states_and_gradient(pair[1], ROWS, Plan(recompute=1)), states_and_gradient(pair[0], ROWS), strict=True
    ):
        close(fast, textbook)


def test_the_last_block_goes_on_with_the_rows_asked_for(tiny):
    """Dropping the others after its attention changes no number, forward or backward, and spares its MLP the rest."""
    model, layout = our_model(tiny[1]), Layout.packed([9, 4, 6])
    install(model)
    at = torch.tensor([8, 11, 12, 18])
    x = torch.randn(19, model.config.hidden_size)
    seen, down = [], model.run_layers.blocks[-1].down
    multiply = down.multiply
    down.multiply = lambda x: seen.append(len(x)) or multiply(x)
    results = []
    for rows in (at, None):
        model.embed_tokens.weight.data[:19] = x
        model.embed_tokens.weight.requires_grad_().grad = None
        states = model.hidden_states(torch.arange(19), layout, at=rows)
        states = states if rows is not None else states[at]
        states.square().sum().backward()
        results.append((states.detach(), model.embed_tokens.weight.grad))
    for some, whole in zip(*results, strict=True):
        torch.testing.assert_close(some, whole, rtol=1e-5, atol=2e-5)
    assert seen == [4, 19]


@torch.no_grad()
@pytest.mark.parametrize("shared", [0, 14])  # 14: a prefix read once, beyond Gemma's window
def test_with_a_cache_the_textbook_is_followed_level_by_level(pair, shared):
    """prefill, then two levels of a tree: log-probabilities, the likeliest tokens, and the states a price head reads"""
    draw = torch.Generator().manual_seed(2)
    prefix = torch.randint(1, 300, (shared,), generator=draw).tolist()
    prompts = [torch.randint(1, 300, (n,), generator=draw).tolist() for n in (7, 3, 12)]
    levels = [torch.randint(1, 300, (3, n), generator=draw).to(DEVICE) for n in (2, 3)]
    parents = [torch.zeros(3, 2, dtype=torch.long), torch.tensor([[2, 1, 2]] * 3)]
    results = []
    for model in pair:
        choices = ALL.to(DEVICE)
        log_probs, top, cache = prefill(model, prompts, choices, read_prefix(model, prefix) if shared else None)
        numbers, tops = [log_probs, cache.states], [top]
        for tokens, of in zip(levels, parents, strict=True):
            log_probs, top = extend(model, cache, tokens, of.to(DEVICE), choices)
            numbers.append(log_probs)
            tops.append(top)
        results.append((numbers, tops))
    (textbook, tops), (fast, fast_tops) = results
    for a, b in zip(fast, textbook, strict=True):
        close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(fast_tops, tops, strict=True))
