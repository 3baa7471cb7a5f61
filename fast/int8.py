"""LLM.int8(), written for speed: what LinearInt8 (quant/int8.py) computes, in fixed shapes and few passes.

    python -m pytest tests/quant/test_int8.py  # equal to LinearInt8, forward and backward

How many columns are outliers is known on the GPU only, and a CUDA graph has no shapes that change: so the GPU itself
decides how far a loop runs. Four kernels around bitsandbytes' product of integers:

    outlier_kernel    flags the columns with any |x| >= threshold
    blocks_kernel     lists the blocks of BLOCK neighbouring columns in which a flag is up, and counts them
    codes_kernel      a row of x -> its codes and scale, 0 in flagged columns
    finish_kernel     a tile of int32 sums -> times both scales, plus x W^T over the listed blocks (x masked to its
                      outliers, W dequantised in the kernel, on the tensor cores), plus bias

The outliers' product costs what their blocks take of the 16-bit product: next to nothing for the inputs of q, k, v, o,
gate and up, where SmolLM2 has none to four outlier columns in 1,129 tokens of the catalogue, and up to the whole of it
for down_proj's, where 84 of 1,536 are outliers in an average block and 548 in the last. It is added in float32 before
the one rounding, where LinearInt8 rounds twice; all else is the same numbers. Backward dequantises W in one pass, or
reads what `MergedLinear.keep` holds.
"""

import torch
from torch import Tensor

from quant.int8 import LinearInt8, integer_product

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 32  # neighbouring columns of x that are multiplied in the compute dtype if one of them is an outlier
ROWS = 4096  # tokens whose int32 sums exist at once


if triton is not None:

    @triton.jit
    def outlier_kernel(x, flags, n, size, threshold, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
        row = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
        value = tl.abs(tl.load(x + row * size + column, (row < n) & (column < size), other=0.0).to(tl.float32))
        below = tl.min((value < threshold).to(tl.int32), 0)  # NaN is below nothing
        tl.store(flags + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 1, below == 0)  # all who write write 1

    @triton.jit
    def blocks_kernel(flags, blocks, count, amount, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
        block = tl.arange(0, BLOCKS)
        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        up = tl.max(tl.load(flags + at, block[:, None] < amount, other=0).to(tl.int32), 1)
        tl.store(blocks + tl.cumsum(up, 0) - 1, block, up > 0)
        tl.store(count, tl.sum(up, 0))

    @triton.jit
    def codes_kernel(x, flags, codes, scale, size, threshold, COLUMNS: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
        value = tl.load(x + row * size + column, column < size, other=0.0).to(tl.float32)
        inside = tl.load(flags + column, column < size, other=1) == 0
        value = tl.where(tl.abs(value) < threshold, value, 0.0)
        absmax = tl.max(tl.abs(value), 0)
        tl.store(scale + row, absmax * 0.007874015748031496)  # 1 / 127
        value *= tl.div_rn(1.0, tl.maximum(absmax, 1e-30)) * 127.0
        value = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no room for a fraction, halves go to even
        tl.store(codes + row * size + column, tl.where(inside, value, 0.0).to(tl.int8), column < size)

    @triton.jit
    def finish_kernel(
        sums, x, weight, scale_x, scale, bias, flags, blocks, count, y, n, outputs, size,
        HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        there, wanted = row < n, out < outputs
        at = row.to(tl.int64)[:, None] * outputs + out[None, :]
        inside = there[:, None] & wanted[None, :]
        scale_out = tl.load(scale + out, wanted, other=0.0)
        total = tl.load(sums + at, inside, other=0).to(tl.float32)
        total = total * tl.load(scale_x + row, there, other=0.0)[:, None] * scale_out[None, :]
        if HAS_BIAS:
            total += tl.load(bias + out, wanted, other=0.0).to(tl.float32)[None, :]
        for i in range(0, tl.load(count)):
            column = tl.load(blocks + i) * BLOCK + tl.arange(0, BLOCK)
            apart = tl.load(flags + column) != 0  # columns past the last are never flagged
            part = tl.load(
                x + row.to(tl.int64)[:, None] * size + column[None, :], there[:, None] & apart[None, :], other=0.0
            )
            codes = tl.load(
                weight + out.to(tl.int64)[:, None] * size + column[None, :], wanted[:, None] & apart[None, :], other=0
            )
            wide = (codes.to(tl.float32) * scale_out[:, None]).to(part.dtype)  # rounded as `dequantise` rounds it
            total = tl.dot(part, tl.trans(wide), total, input_precision="ieee")
        tl.store(y + at, total.to(y.dtype.element_ty), inside)

    @triton.jit
    def dequantise_kernel(weight, scale, out, size, COLUMNS: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        codes = tl.load(weight + row * size + column, column < size, other=0).to(tl.float32)
        value = codes * tl.load(scale + row)
        tl.store(out + row * size + column, value.to(out.dtype.element_ty), column < size)


def outlier_blocks(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """flags (I, filled up to whole blocks) int8, indices of the blocks with a flag (the first `count` hold), count"""
    amount = triton.cdiv(x.shape[1], BLOCK)
    flags = torch.zeros(amount * BLOCK, dtype=torch.int8, device=x.device)
    blocks = torch.empty(amount, dtype=torch.int32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    outlier_kernel[(amount, triton.cdiv(len(x), 128))](x, flags, *x.shape, threshold, TOKENS=128, BLOCK=BLOCK)
    most = max(16, triton.next_power_of_2(amount))
    blocks_kernel[(1,)](flags, blocks, count, amount, BLOCKS=most, BLOCK=BLOCK, num_warps=8)
    return flags, blocks, count


def fused_multiply(x: Tensor, linear: LinearInt8) -> Tensor:
    """LinearInt8.multiply in fixed shapes.  (N, I) -> (N, O)"""
    n, size, outputs = *x.shape, linear.out_features
    x = x.contiguous()
    outliers = outlier_blocks(x, linear.threshold)
    codes, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(n, device=x.device)
    codes_kernel[(n,)](
        x, outliers[0], codes, scale, size, linear.threshold, COLUMNS=triton.next_power_of_2(size),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    y, bias = torch.empty(n, outputs, dtype=x.dtype, device=x.device), linear.bias_in(x.dtype)
    tile = 128 if x.dtype == torch.bfloat16 else 32  # float32 is multiplied without the tensor cores
    for part in range(0, n, ROWS):
        rows = slice(part, part + ROWS)
        sums = integer_product(codes[rows], linear.weight).contiguous()
        finish_kernel[(triton.cdiv(len(sums), tile), triton.cdiv(outputs, tile))](
            sums, x[rows], linear.weight, scale[rows], linear.scale, scale if bias is None else bias, *outliers,
            y[rows], len(sums), outputs, size, HAS_BIAS=bias is not None, TOKENS=tile, OUTPUTS=tile, BLOCK=BLOCK,
            num_warps=tile // 16,
        )  # fmt: skip
    return y


class JoinedInt8(LinearInt8):
    """The int8 weights of linears one below the other, as one: x is quantised once for all. Each keeps a view."""

    def __init__(self, linears: list[LinearInt8], kernels: bool):
        weight, scale = torch.cat([one.weight for one in linears]), torch.cat([one.scale for one in linears])
        sizes, bias = [one.out_features for one in linears], None
        if any(one.bias is not None for one in linears):
            bias = torch.cat([scale.new_zeros(one.out_features) if one.bias is None else one.bias for one in linears])
        super().__init__(weight, scale, bias, linears[0].threshold)
        for one, rows, scales in zip(linears, weight.split(sizes), scale.split(sizes), strict=True):
            one.weight, one.scale = rows, scales
        self.fused = kernels and weight.is_cuda

    def multiply(self, x: Tensor) -> Tensor:
        self.check(x)
        return fused_multiply(x, self) if self.fused else super().multiply(x)

    def dequantise_into(self, out: Tensor) -> Tensor:
        """All weights in out's dtype  # (O, I)"""
        if not self.fused:
            return out.copy_(self.dequantise(out.dtype))
        outputs, size = out.shape
        dequantise_kernel[(outputs, triton.cdiv(size, 1024))](self.weight, self.scale, out, size, COLUMNS=1024)
        return out
