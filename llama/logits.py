"""The head's product: next-token logits in float32, and their gradient, for a frozen matrix of V rows.

    python -m pytest tests/llama/test_logits.py     # against a float64 product, forward and backward

The head is the largest matrix of a small model (49,152 x 576 of SmolLM2's 135M) and must be exact: the logits of an
answer lie near 36, where one bfloat16 step is 0.25, and prices would move by it. So the product is float32, but the
matrix stays in 16 (or 8) bits, and is cast a part at a time.
"""

import torch
from torch import Tensor

HEAD_CHUNK = 16384  # rows of lm_head at a time: 256 MiB in float32 at C = 4096, where the whole head would take 2 GiB


def exact_terms(x: Tensor) -> Tensor:
    """float32 as the sum of three bfloat16 terms, 8 bits of the 24 each.  (M, C) -> (3M, C) bfloat16"""
    high = x.bfloat16()
    middle = (x - high).bfloat16()
    return torch.cat([high, middle, (x - high - middle).bfloat16()])


def head_product(x: Tensor, rows: Tensor) -> Tensor:
    """x rows^T, accumulated in float32.  (M, C) float32, (n, C) -> (M, n) float32

    The tensor cores multiply bfloat16 only, but exactly, and add in float32: three products of x's terms give the
    float32 product 20 times sooner than the GPU's float32 units.
    """
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(exact_terms(x), rows.bfloat16().T, out_dtype=torch.float32).view(3, len(x), -1).sum(0)
    return x @ rows.float().T


class HeadFunction(torch.autograd.Function):
    """logits = x W^T in float32, for a frozen W (V, C): cast chunk by chunk, never whole.  (M, C) -> (M, V)

    Float32 because the answer's logits lie near 36, where a bfloat16 step is 0.25: prices would move by it.
    W is bfloat16, float32, or int8 with one `scale` (V,) a row.
    """

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.weight, ctx.scale = weight, scale
        logits = torch.cat([head_product(x, rows) for rows in weight.split(HEAD_CHUNK)], dim=1)  # (M, V)
        return logits if scale is None else logits.mul_(scale)

    @staticmethod
    def backward(ctx, g):
        grad, g = 0, g if ctx.scale is None else g * ctx.scale
        for part, rows in zip(g.split(HEAD_CHUNK, dim=1), ctx.weight.split(HEAD_CHUNK), strict=True):
            grad = grad + head_product(part, rows.T)  # (M, C)
        return grad, None, None
