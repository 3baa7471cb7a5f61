"""Rotary positions and causal attention over packed sequences, in Triton.

    python -m pytest tests/fast/test_attention.py       # against the plain rotation and `attend`

FlashAttention's algorithm (Dao et al. 2022, arXiv 2205.14135): a tile of queries meets one tile of keys after another,
keeping the softmax's running maximum and sum, so the (T, T) scores never exist; backward computes them again from the
saved log-sum-exp. What is special here is the input: product texts of about a hundred tokens, side by side in the
fused q, k, v product, which is read where it lies. q and k are turned in place, their gradients turned back in place,
and a kv head's gradient sums over its query heads inside the kernel: q, k, v never exist apart, nothing is copied.

A soft cap (CAP, s -> CAP * tanh(s / CAP), slope 1 - (capped / CAP)^2) and a sliding window (WINDOW tokens, the querying
one included) are constants of the kernel, 0 for none: what they cost, only the layers pay that have them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def turn_kernel(qkv, cos, sin, heads, width, sign, HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr):
    """The first `heads` heads of a token, (a, b) -> (a cos - b sin, b cos + a sin), in place; back with sign -1"""
    token, pair = tl.program_id(0).to(tl.int64), tl.arange(0, PAIRS)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    inside = (pair < HALF) & (head < heads)
    at = qkv + token * width + head * 2 * HALF + pair
    c = tl.load(cos + token * HALF + pair, pair < HALF, other=0.0)
    s = tl.load(sin + token * HALF + pair, pair < HALF, other=0.0) * sign
    a, b = tl.load(at, inside, other=0.0).to(tl.float32), tl.load(at + HALF, inside, other=0.0).to(tl.float32)
    tl.store(at, (a * c - b * s).to(qkv.dtype.element_ty), inside)
    tl.store(at + HALF, (b * c + a * s).to(qkv.dtype.element_ty), inside)


@triton.jit
def load_rows(base, token, stride, inside, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Rows `token` of a head  # (tile, D)"""
    at = tl.arange(0, DIM)[None, :]
    return tl.load(base + token[:, None] * stride + at, inside[:, None] & (at < SIZE), other=0.0)


@triton.jit
def store_rows(base, token, stride, inside, value, SIZE: tl.constexpr, DIM: tl.constexpr):
    at = tl.arange(0, DIM)[None, :]
    mask = inside[:, None] & (at < SIZE)
    tl.store(base + token[:, None] * stride + at, value.to(base.dtype.element_ty), mask)


@triton.jit
def capped(scores, CAP: tl.constexpr):
    """CAP * tanh(scores / CAP); tanh(x) = 2 sigmoid(2x) - 1"""
    if CAP > 0:
        scores = CAP * (2 * tl.sigmoid(scores * (2 / CAP)) - 1)
    return scores


@triton.jit
def within(row, col, WINDOW: tl.constexpr):
    """Whether the query `row` sees the key `col`"""
    seen = col <= row
    if WINDOW > 0:
        seen = seen & (row - col < WINDOW)
    return seen


@triton.jit
def forward_kernel(
    qkv, edges, out, lse, heads, kv_heads, scale,
    SIZE: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    sequence, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(edges + sequence).to(tl.int64), tl.load(edges + sequence + 1)
    length = end - start
    if tile * TILE < length:
        width, kv_head = (heads + 2 * kv_heads) * SIZE, heads + head // (heads // kv_heads)
        row = tile * TILE + tl.arange(0, TILE)
        q = load_rows(qkv + head * SIZE, start + row, width, row < length, SIZE, DIM)
        # Finite: a row whose window begins beyond the first tile meets a tile of -inf, and -inf - -inf would be NaN.
        top = tl.full([TILE], -1e30, tl.float32)
        total, y = tl.zeros([TILE], tl.float32), tl.zeros([TILE, DIM], tl.float32)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(tile * TILE - WINDOW + 1, 0) // TILE * TILE
        for first in range(begin, tl.minimum((tile + 1) * TILE, length), TILE):
            col = first + tl.arange(0, TILE)
            k = load_rows(qkv + kv_head * SIZE, start + col, width, col < length, SIZE, DIM)
            v = load_rows(qkv + (kv_head + kv_heads) * SIZE, start + col, width, col < length, SIZE, DIM)
            scores = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, CAP)
            scores = tl.where(within(row[:, None], col[None, :], WINDOW), scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weight, fade = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
            top, total = higher, total * fade + tl.sum(weight, 1)
            y = tl.dot(weight.to(v.dtype), v, y * fade[:, None], input_precision=PRECISION)
        store_rows(out + head * SIZE, start + row, heads * SIZE, row < length, y / total[:, None], SIZE, DIM)
        tl.store(lse + (start + row) * heads + head, top + tl.log(total), row < length)


@triton.jit
def backward_q_kernel(
    qkv, edges, out, lse, mean, grad, grad_qkv, heads, kv_heads, scale,
    SIZE: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    sequence, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(edges + sequence).to(tl.int64), tl.load(edges + sequence + 1)
    length = end - start
    if tile * TILE < length:
        width, kv_head = (heads + 2 * kv_heads) * SIZE, heads + head // (heads // kv_heads)
        row = tile * TILE + tl.arange(0, TILE)
        token, inside = start + row, row < length
        q = load_rows(qkv + head * SIZE, token, width, inside, SIZE, DIM)
        g = load_rows(grad + head * SIZE, token, heads * SIZE, inside, SIZE, DIM)
        y = load_rows(out + head * SIZE, token, heads * SIZE, inside, SIZE, DIM)
        average = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1)  # of the weights' gradients, by weight
        tl.store(mean + token * heads + head, average, inside)
        level = tl.load(lse + token * heads + head, inside, other=0.0)
        dq = tl.zeros([TILE, DIM], tl.float32)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(tile * TILE - WINDOW + 1, 0) // TILE * TILE
        for first in range(begin, tl.minimum((tile + 1) * TILE, length), TILE):
            col = first + tl.arange(0, TILE)
            k = load_rows(qkv + kv_head * SIZE, start + col, width, col < length, SIZE, DIM)
            v = load_rows(qkv + (kv_head + kv_heads) * SIZE, start + col, width, col < length, SIZE, DIM)
            scores = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, CAP)
            weight = tl.where(within(row[:, None], col[None, :], WINDOW), tl.exp(scores - level[:, None]), 0.0)
            slope = weight * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - average[:, None]) * scale
            if CAP > 0:
                slope *= 1 - (scores / CAP) * (scores / CAP)
            dq = tl.dot(slope.to(k.dtype), k, dq, input_precision=PRECISION)
        store_rows(grad_qkv + head * SIZE, token, width, inside, dq, SIZE, DIM)


@triton.jit
def backward_kv_kernel(
    qkv, edges, out, lse, mean, grad, grad_qkv, heads, kv_heads, scale,
    SIZE: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(edges + sequence).to(tl.int64), tl.load(edges + sequence + 1)
    length = end - start
    if tile * TILE < length:
        width, group = (heads + 2 * kv_heads) * SIZE, heads // kv_heads
        col = tile * TILE + tl.arange(0, TILE)
        token, inside = start + col, col < length
        at_k, at_v = (heads + kv_head) * SIZE, (heads + kv_heads + kv_head) * SIZE
        k = load_rows(qkv + at_k, token, width, inside, SIZE, DIM)
        v = load_rows(qkv + at_v, token, width, inside, SIZE, DIM)
        dk, dv = tl.zeros([TILE, DIM], tl.float32), tl.zeros([TILE, DIM], tl.float32)
        for head in range(kv_head * group, (kv_head + 1) * group):
            end_row = length
            if WINDOW > 0:
                end_row = tl.minimum(length, (tile + 1) * TILE + WINDOW - 1)
            for first in range(tile * TILE, end_row, TILE):
                row = first + tl.arange(0, TILE)
                seen = row < length
                q = load_rows(qkv + head * SIZE, start + row, width, seen, SIZE, DIM)
                g = load_rows(grad + head * SIZE, start + row, heads * SIZE, seen, SIZE, DIM)
                level = tl.load(lse + (start + row) * heads + head, seen, other=float("inf"))  # weight 0 past the end
                average = tl.load(mean + (start + row) * heads + head, seen, other=0.0)
                scores = capped(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale, CAP)
                weight = tl.exp(scores - level[None, :])
                weight = tl.where(within(row[None, :], col[:, None], WINDOW), weight, 0.0)
                dv = tl.dot(weight.to(g.dtype), g, dv, input_precision=PRECISION)
                slope = weight * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - average[None, :]) * scale
                if CAP > 0:
                    slope *= 1 - (scores / CAP) * (scores / CAP)
                dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=PRECISION)
        store_rows(grad_qkv + at_k, token, width, inside, dk, SIZE, DIM)
        store_rows(grad_qkv + at_v, token, width, inside, dv, SIZE, DIM)


def dim_of(head_dim: int) -> int:
    """Numbers of a head in the kernels: a power of two, of which tl.dot asks for 16"""
    return max(16, triton.next_power_of_2(head_dim))


def tile_of(head_dim: int, dtype: torch.dtype, shared: int) -> int | None:
    """Rows of q, or of k, at a time. `shared`: bytes of shared memory that a block of the GPU's threads may have.

    backward_kv_kernel holds four tiles of numbers and one of weights there (as compiled for float32, rows of 32: 36,
    68 and 132 KiB at head_dim 64, 128 and 256). None where even 16 rows do not fit: a T4, float32, 256 numbers a head.
    """
    first = 64 if dtype != torch.float32 and head_dim <= 128 else 32  # at 256 numbers, 64 rows would spill registers
    fitting = (t for t in (first, 32, 16) if 4 * t * dim_of(head_dim) * dtype.itemsize + 4 * t * t <= shared)
    return next(fitting, None)


def shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may have; without a GPU (Triton's interpreter), as on an H100"""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232448


def turn(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, sign: float) -> None:
    pairs = triton.next_power_of_2(head_dim // 2)
    turn_kernel[(len(qkv), triton.cdiv(heads, 8))](
        qkv, cos, sin, heads, qkv.shape[1], sign, HALF=head_dim // 2, PAIRS=pairs, HEADS=8, num_warps=2
    )


class PackedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v, causal, within each sequence.  qkv (N, (H + 2K) D), edges (S + 1,) -> (N, H D)

    `longest` bounds the length of a sequence. cos, sin (N, 1, D/2) turn q and k (llama/rope.py), in place: qkv is
    used up. `scores` is llama.attention.Scores: scale, soft cap and window.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, edges: Tensor, longest: int, kv_heads, head_dim, scores):
        if not qkv.is_contiguous():  # it is turned where it lies
            raise ValueError("q, k, v must lie in memory without gaps: call contiguous()")
        heads = qkv.shape[1] // head_dim - 2 * kv_heads
        exact, tile = qkv.dtype == torch.float32, tile_of(head_dim, qkv.dtype, shared_memory(qkv.device))
        ctx.grid, ctx.heads = (len(edges) - 1, triton.cdiv(longest, tile)), (heads, kv_heads)
        ctx.scale = scores.scale or head_dim**-0.5
        narrow = scores.window is not None and scores.window < longest
        ctx.constants = dict(
            SIZE=head_dim, DIM=dim_of(head_dim), TILE=tile, PRECISION="ieee" if exact else "tf32",
            CAP=float(scores.softcap or 0), WINDOW=scores.window if narrow else 0,
            num_warps=4, num_stages=1,  # the fastest of 27 on an H100: nothing to pipeline in two or three tiles
        )  # fmt: skip
        turn(qkv, cos, sin, heads + kv_heads, head_dim, 1.0)
        ctx.mark_dirty(qkv)
        ctx.set_materialize_grads(False)  # nobody asks for the gradient of what qkv has become
        out, lse = qkv.new_empty(len(qkv), heads * head_dim), cos.new_empty(len(qkv), heads)
        forward_kernel[(ctx.grid[0], heads, ctx.grid[1])](
            qkv, edges, out, lse, heads, kv_heads, ctx.scale, **ctx.constants
        )
        ctx.save_for_backward(qkv, cos, sin, edges, out, lse)
        return out, qkv

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        qkv, cos, sin, edges, out, lse = ctx.saved_tensors
        (heads, kv_heads), size = ctx.heads, ctx.constants["SIZE"]
        grad, grad_qkv, mean = grad.contiguous(), torch.empty_like(qkv), torch.empty_like(lse)
        arguments = qkv, edges, out, lse, mean, grad, grad_qkv, heads, kv_heads, ctx.scale
        backward_q_kernel[(ctx.grid[0], heads, ctx.grid[1])](*arguments, **ctx.constants)
        backward_kv_kernel[(ctx.grid[0], kv_heads, ctx.grid[1])](*arguments, **ctx.constants)
        turn(grad_qkv, cos, sin, heads + kv_heads, size, -1.0)
        return grad_qkv, None, None, None, None, None, None, None
