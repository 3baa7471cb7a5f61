"""What is no matrix product in a block, each as one Triton kernel a direction: norm with the sum before it, SwiGLU.

    python -m pytest tests/fast/test_norm_glu.py       # against the plain pieces of fast/layers.py

The plain pieces read and write memory once for every operation in their formula; these read each input and write each
result once. The formulas are the same, in float32 inside; what they return is rounded once, at the end.
Compiling the plain ones (torch.compile) gave kernels two to four times slower where they split gate and up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.attention import PackedAttention, shared_memory, tile_of
from fast.layers import PLAIN, Pieces
from llama.attention import Layout, Scores


@triton.jit
def add_norm_forward(x, delta, weight, total, normed, rstd, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64) * size, tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row + at, inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row + at, inside, other=0.0).to(tl.float32)
        tl.store(total + row + at, value, inside)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / size + eps)
    tl.store(rstd + tl.program_id(0), scale)
    value = value * scale * tl.load(weight + at, inside, other=0.0)
    tl.store(normed + row + at, value.to(normed.dtype.element_ty), inside)


@triton.jit
def add_norm_backward(
    grad_total, grad_normed, total, weight, rstd, grad_x, grad_delta, size,
    KEEP: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64) * size, tl.arange(0, BLOCK)
    inside = at < size
    scale = tl.load(rstd + tl.program_id(0))
    unit = tl.load(total + row + at, inside, other=0.0) * scale
    grad = tl.load(grad_normed + row + at, inside, other=0.0).to(tl.float32) * tl.load(weight + at, inside, other=0.0)
    grad = scale * (grad - unit * (tl.sum(grad * unit, 0) / size))
    if KEEP:  # something reads the sum itself
        grad += tl.load(grad_total + row + at, inside, other=0.0)
    tl.store(grad_x + row + at, grad, inside)
    if ADD:
        tl.store(grad_delta + row + at, grad.to(grad_delta.dtype.element_ty), inside)


class AddNorm(torch.autograd.Function):
    """add_norm; the weight is frozen"""

    @staticmethod
    def forward(ctx, x, delta, weight, eps, dtype):
        (rows, size), add = x.shape, delta is not None
        x, delta = x.contiguous(), delta.contiguous() if add else None  # a lone kv head is a slice of q, k, v
        total = torch.empty_like(x) if add else x
        normed, rstd = torch.empty_like(x, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
        block = triton.next_power_of_2(size)
        add_norm_forward[(rows,)](x, delta, weight, total, normed, rstd, size, eps, ADD=add, BLOCK=block, num_warps=8)
        ctx.save_for_backward(total, weight, rstd)
        ctx.delta_dtype = delta.dtype if add else None
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx, grad_total, grad_normed):
        total, weight, rstd = ctx.saved_tensors
        (rows, size), add, keep = total.shape, ctx.delta_dtype is not None, grad_total is not None
        grad_x = torch.empty_like(total)
        grad_delta = torch.empty_like(total, dtype=ctx.delta_dtype) if add else None
        add_norm_backward[(rows,)](
            grad_total.contiguous() if keep else None, grad_normed.contiguous(), total, weight, rstd,
            grad_x, grad_delta, size, KEEP=keep, ADD=add, BLOCK=triton.next_power_of_2(size), num_warps=8,
        )  # fmt: skip
        return grad_x, grad_delta, None, None, None


@triton.jit
def glu_forward(gate_up, out, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, inside, other=0.0).to(tl.float32)
    inner = gate
    if GELU:  # with tanh: gate * sigmoid(2 sqrt(2 / pi) (gate + 0.044715 gate^3))
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    tl.store(out + row * size + at, (gate * tl.sigmoid(inner) * up).to(out.dtype.element_ty), inside)


@triton.jit
def glu_backward(gate_up, grad, grad_gate_up, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * size + at, inside, other=0.0).to(tl.float32)
    inner, slope = gate, 1.0
    if GELU:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * gate * gate)
    sigmoid = tl.sigmoid(inner)
    to = grad_gate_up + row * 2 * size + at
    tl.store(to, (g * up * sigmoid * (1 + gate * slope * (1 - sigmoid))).to(grad_gate_up.dtype.element_ty), inside)
    tl.store(to + size, (g * gate * sigmoid).to(grad_gate_up.dtype.element_ty), inside)


class GLU(torch.autograd.Function):
    """SwiGLU, or with `gelu` Gemma's GELU in its place.  (N, 2F) -> (N, F)"""

    @staticmethod
    def forward(ctx, gate_up, gelu):
        gate_up = gate_up.contiguous()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        glu_forward[(rows, triton.cdiv(size, 1024))](gate_up, out, size, GELU=gelu, BLOCK=1024)
        ctx.save_for_backward(gate_up)
        ctx.gelu = gelu
        return out

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        rows, size = grad.shape
        grad_gate_up, grid = torch.empty_like(gate_up), (rows, triton.cdiv(size, 1024))
        glu_backward[grid](gate_up, grad.contiguous(), grad_gate_up, size, GELU=ctx.gelu, BLOCK=1024)
        return grad_gate_up, None


def glu(gate_up: Tensor, gelu: bool) -> Tensor:
    return GLU.apply(gate_up, gelu)


def attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, head_dim: int, layout: Layout, cache=None, layer: int = 0,
    scores: Scores = Scores(),
) -> Tensor:  # fmt: skip
    """Packed sequences as one kernel; with a cache, or where the GPU is too small for it, as in plain PyTorch"""
    fits = tile_of(head_dim, qkv.dtype, shared_memory(qkv.device)) is not None
    if fits and cache is None and layout.edges is not None:
        return PackedAttention.apply(qkv, cos, sin, layout.edges, layout.columns, kv_heads, head_dim, scores)[0]
    return PLAIN.attention(qkv, cos, sin, kv_heads, head_dim, layout, cache, layer, scores)


FUSED = Pieces(AddNorm.apply, attention, glu)
