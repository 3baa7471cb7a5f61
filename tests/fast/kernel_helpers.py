"""What the tests of the fast path share: where kernels run, and a piece both ways, plain and fused."""

import os

import pytest
import torch

from fast.layers import PLAIN

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRET), reason="Triton kernels need a GPU, or TRITON_INTERPRET=1"
)
# Off the GPU the kernels compute in float32; on it bfloat16 too, where one rounding is 2^-8.
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]


def close(a, b, dtype=torch.float32):
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    error = (a.float() - b.float()).norm() / b.float().norm()
    assert error < tolerance, error


def both(name, inputs, extra):
    """Outputs and input gradients of a piece, plain and fused"""
    from fast.norm_glu import FUSED

    results = []
    for pieces in (PLAIN, FUSED):
        given = [None if x is None else x.clone().requires_grad_() for x in inputs]
        out = getattr(pieces, name)(*[None if x is None else x * 1 for x in given], *extra)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        torch.autograd.backward(out, [torch.randn_like(o) for o in out])
        results.append([*out, *(x.grad for x in given if x is not None)])
    return zip(*results, strict=True)
