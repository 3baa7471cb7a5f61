"""Merged linears against the readable ones, forward and backward.

    python -m pytest tests/fast/test_linears.py
"""

import pytest
import torch
from conftest import hugging_face_model, our_model, tiny_config
from kernel_helpers import DEVICE, close

from fast.install import install
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
