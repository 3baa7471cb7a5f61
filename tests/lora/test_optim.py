"""The flat vector of factors, and the optimisers on it, against one PyTorch optimiser over separate tensors."""

import bitsandbytes.optim
import pytest
import torch
from conftest import our_model

from fast.install import install
from llama.attention import Layout
from lora.inject import inject, lora_layers
from lora.optim import OPTIMISERS, FlatParameter, initialise, make_optimiser

TOKENS = torch.arange(30) * 7 % 500


def lora_model(directory):
    model = our_model(directory)
    torch.manual_seed(0)
    inject(model, rank=4, alpha=8)
    return model


def backward(model):
    model(TOKENS, Layout.packed([30])).logsumexp(1).sum().backward()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_flat_vector_moves_as_separate_tensors_do(tiny, name):
    apart, flat = lora_model(tiny[1]), lora_model(tiny[1])
    parameters = [p for p in apart.parameters() if p.requires_grad]
    options = dict(lr=1e-2, weight_decay=0.1)
    plain = {
        "adamw": lambda: torch.optim.AdamW(parameters, betas=(0.9, 0.99), **options),
        "sgd": lambda: torch.optim.SGD(parameters, momentum=0.9, **options),
    }[name]()
    factors = FlatParameter(lora_layers(flat))
    ours = make_optimiser(name, factors.parameter, 1e-2, 0.1)
    for _ in range(4):
        for model, optimiser in ((apart, plain), (flat, ours)):
            backward(model)
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)
    for (key, a), (_, b) in zip(apart.named_parameters(), flat.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    assert factors.parameter.numel() == sum(p.numel() for p in parameters)


def test_pieces_carry_gradients_to_the_flat_vector(tiny):
    plain, fast = lora_model(tiny[1]), lora_model(tiny[1])
    heads = [torch.nn.Linear(3, 2) for _ in "ab"]  # trained with the factors, behind them in the vector
    heads[1].load_state_dict(heads[0].state_dict())
    expected, factors = (
        FlatParameter(lora_layers(model), list(head.parameters()))
        for model, head in zip((plain, fast), heads, strict=True)
    )
    backward(plain)
    install(fast, flat=factors)
    backward(fast)
    for head in heads:
        head(torch.ones(3)).square().sum().backward()
    assert expected.parameter.grad[-8:].abs().min() > 0
    torch.testing.assert_close(factors.parameter.grad, expected.parameter.grad, rtol=1e-4, atol=1e-5)
    factors.parameter.data[-8:] = 0
    assert not heads[1].weight.any() and heads[0].weight.any()
    with torch.no_grad():  # between steps the merged linears follow the live factors
        before = fast(TOKENS, Layout.packed([30]))
        factors.parameter += 0.05
        assert not torch.equal(fast(TOKENS, Layout.packed([30])), before)


@pytest.mark.parametrize("name", list(OPTIMISERS))
def test_every_optimiser_lowers_a_loss_and_its_state_can_be_made_ahead(name):
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
    optimiser = make_optimiser(name, parameter, 1e-2, 0.0)
    assert initialise(optimiser, parameter) and initialise(optimiser, parameter) is optimiser.state[parameter]
    before = parameter.square().sum().item()
    for _ in range(20):
        parameter.grad = 2 * parameter.detach()
        optimiser.step()
    assert parameter.square().sum() < 0.9 * before


@pytest.mark.parametrize("name, kind", [("adamw8bit", "AdamW8bit"), ("lion8bit", "Lion8bit")])
def test_eight_bits_are_bitsandbytes_own(name, kind):
    start = torch.randn(8192, generator=torch.Generator().manual_seed(0))
    moved = []
    for make in (
        lambda p: make_optimiser(name, p, 1e-3, 0.1),
        lambda p: getattr(bitsandbytes.optim, kind)([p], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1),
    ):
        parameter = torch.nn.Parameter(start.clone())
        optimiser = make(parameter)
        for step in range(3):
            parameter.grad = torch.sin(start * (step + 1))
            optimiser.step()
        moved.append(parameter.detach())
    assert torch.equal(*moved) and not torch.equal(moved[0], start)


def test_an_unknown_optimiser_is_named():
    with pytest.raises(ValueError, match="unknown optimiser 'adam'; choose from adamw"):
        make_optimiser("adam", torch.nn.Parameter(torch.zeros(3)), 1e-3, 0.0)


def test_the_order_of_the_vector(tiny):
    """Of one parent all A, then all B, each in the order of the linears: what a saved state of the optimiser goes by,
    and what lets the A of q, k and v be multiplied as one matrix."""
    model = lora_model(tiny[1])
    layers = lora_layers(model)
    factors, names = FlatParameter(layers), {layer: name for name, layer in layers.items()}
    order = [f"{names[layer]}.{factor}" for layer, factor in factors.order]
    parents = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    assert order == [
        f"layers.{block}.{parent}.{name}.{factor}"
        for block in range(2)
        for parent, linears in parents.items()
        for factor in ("lora_A", "lora_B")
        for name in linears
    ]
    start = 0
    for layer, factor in factors.order:  # and so do the numbers lie
        values = getattr(layer, factor)
        assert torch.equal(factors.parameter.data[start : start + values.numel()].view_as(values), values)
        start += values.numel()
    assert start == len(factors.parameter)
