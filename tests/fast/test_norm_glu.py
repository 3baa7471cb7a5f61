"""Norms with the sum before them and SwiGLU as Triton kernels, against the plain pieces of fast/layers.py.

    python -m pytest tests/fast/test_norm_glu.py
    TRITON_INTERPRET=1 python -m pytest tests/fast/test_norm_glu.py      # without a GPU, where Triton is installed

Without either all are skipped, and say so.
"""

import pytest
import torch
from kernel_helpers import DEVICE, DTYPES, both, close, kernels

from fast.layers import PLAIN


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [True, False])
def test_add_norm(dtype, add):
    x, delta = torch.randn(5, 48, device=DEVICE), torch.randn(5, 48, device=DEVICE, dtype=dtype) if add else None
    for plain, fused in both("add_norm", [x, delta], (torch.rand(48, device=DEVICE), 1e-5, dtype)):
        assert fused.dtype == plain.dtype
        close(fused, plain, dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_swiglu_and_geglu(dtype, gelu):
    for plain, fused in both("glu", [2 * torch.randn(5, 2 * 1100, device=DEVICE, dtype=dtype)], (gelu,)):
        close(fused, plain, dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads_that_are_no_residual(dtype):
    """q and k norms and Gemma's norms after a sub-layer read the compute dtype, with nothing to add"""
    inputs, weight = [torch.randn(7, 32, device=DEVICE, dtype=dtype), None], torch.rand(32, device=DEVICE)
    for plain, fused in both("add_norm", inputs, (weight, 1e-5, dtype)):
        close(fused, plain, dtype)


@kernels
@pytest.mark.parametrize("name, inputs", [("add_norm", 1), ("add_norm", 2), ("silu", 1), ("gelu", 1)])
def test_rows_with_gaps_between_them(name, inputs):
    """What the pieces read may be a slice, as a lone kv head's keys are one of q, k, v."""
    from fast.norm_glu import FUSED

    results = []
    for pieces in (PLAIN, FUSED):
        torch.manual_seed(0)
        wide = [torch.randn(7, 96, device=DEVICE, requires_grad=True) for _ in range(inputs)]
        given = [x[:, 32:64] for x in wide]
        if name == "add_norm":
            extra = [None] * (2 - inputs) + [torch.rand(32, device=DEVICE), 1e-5, torch.float32]
            out = pieces.add_norm(*given, *extra)[1]
        else:
            out = pieces.glu(*given, name == "gelu")
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE))
        results.append([out, *(x.grad for x in wide)])
    for plain, fused in zip(*results, strict=True):
        close(fused, plain)
