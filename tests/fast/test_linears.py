"""Merged linears against the readable ones, forward and backward.

    python -m pytest tests/fast/test_linears.py
"""

import pytest
import torch
from conftest import hugging_face_model, our_model, tiny_config
from kernel_helpers import DEVICE, close

from fast.install import install
from fast.linears import cast_factors
from fast.nf4 import JoinedNF4
from fast.plan import Plan
from llama.attention import Layout
from lora.inject import inject, lora_layers
from lora.optim import FlatParameter
from quant.linear import LinearNF4


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.skipif(DEVICE == "cpu", reason="the packed kernel needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_nf4_weights_equal_bitsandbytes(nested, dtype):
    linears = [
        LinearNF4(torch.randn(o, 1024, device=DEVICE) * (i + 1) * 0.01, double_quant=nested)
        for i, o in enumerate((1024, 256, 512))
    ]
    apart = torch.cat([linear.dequantise(dtype) for linear in linears])
    assert JoinedNF4.fits(linears)
    joined = JoinedNF4(linears)
    assert torch.equal(joined.dequantise_into(torch.full_like(apart, float("nan"))), apart)
    assert torch.equal(torch.cat([linear.dequantise(dtype) for linear in linears]), apart)  # through their views


def gradients(directory, bits, targets, fast, keep=False, dtype=torch.float32):
    torch.manual_seed(0)
    model = our_model(directory, bits=bits, dtype=dtype).to(DEVICE)
    model.frequency = model.frequency.to(DEVICE)
    inject(model, rank=4, alpha=6, targets=targets)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    factors = FlatParameter(lora_layers(model))
    if fast:
        install(model, Plan(keep=2 if keep else 0), factors)
    torch.manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (15,), device=DEVICE)
    logits = model(tokens, Layout.packed([5, 7, 3], DEVICE), torch.tensor([3, 4, 10, 14], device=DEVICE))
    logits.backward(torch.randn_like(logits))
    return logits.detach(), factors.parameter.grad


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,down_proj"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_model_of_merged_linears_equals_the_readable_one(tmp_path, bits, targets, keep):
    hugging_face_model(tiny_config(attention_bias=True), tmp_path / "m")
    plain, fast = (gradients(tmp_path / "m", bits, targets, fast, keep) for fast in (False, True))
    for a, b in zip(fast, plain, strict=True):
        # 8 bits: outlier columns go by all rows at once, and the textbook's last block is given more of them.
        close(a, b, torch.bfloat16 if bits == 8 else torch.float32)


def flat_model(directory):
    """(merged linears of a model, the factors of those that have LoRA as one vector)"""
    model = our_model(directory)
    inject(model, rank=4, alpha=6, targets="q_proj,v_proj,down_proj")
    factors = FlatParameter(lora_layers(model), [torch.nn.Parameter(torch.ones(5))])  # a price head's, behind them
    install(model, flat=factors)
    factors.parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    return model.run_layers.linears, factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_cast_at_once_are_those_of_each_layer_and_carry_gradients(tiny, dtype):
    linears, factors = flat_model(tiny[1])
    cast = cast_factors(factors, linears, dtype)
    assert set(cast) == {linear for linear in linears if linear.lora} and len(cast) == 2 * 2  # q and v; down
    loss = 0
    for linear, (lora_A, *lora_Bs) in cast.items():
        assert torch.equal(lora_A, torch.cat([layer.lora_A for layer in linear.lora]).to(dtype))
        assert len(lora_Bs) == len(linear.lora)
        for layer, lora_B in zip(linear.lora, lora_Bs, strict=True):
            assert torch.equal(lora_B, layer.lora_B.to(dtype))
        loss = loss + sum((n + 1) * factor.sum() for n, factor in enumerate((lora_A, *lora_Bs)))
    loss.backward()
    for linear in cast:
        assert all((layer.lora_A.grad == 1).all() for layer in linear.lora)
        assert all((layer.lora_B.grad == n).all() for n, layer in enumerate(linear.lora, 2))
    assert not factors.parameter.grad[-5:].any()


def test_factors_that_are_no_neighbours_are_refused(tiny):
    linears, factors = flat_model(tiny[1])
    order = factors.order  # A of q, A of v, B of q, B of v
    order[1], order[2] = order[2], order[1]
    with pytest.raises(ValueError, match="must be neighbours in the flat vector"):
        cast_factors(factors, linears, torch.float32)
