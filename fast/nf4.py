"""Nested NF4 to 16 bits in one pass, for several linears at once.

    python -m pytest tests/fast/test_linears.py     # equal to bitsandbytes in every bit
    python -m benchmarks.kernels                    # against copy speed

bitsandbytes turns absmax from 8 bits into float32 in a pass of its own; this kernel reads 0.52 bytes and writes 2 for a
weight, once. Every bit is the same: enable_fp_fusion=False, because a fused multiply-add would round once where the
definition (quant/nf4.py) rounds twice.
"""

import torch
from torch import Tensor

from quant.linear import FrozenLinear, LinearNF4

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def nf4_kernel(
        packed, absmax, code_of_absmax, absmax_of_absmax, offset, code, out, n,
        HALF: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # of 2 * HALF weights that share one absmax
        start = block.to(tl.int64) * HALF  # bytes
        scale = tl.load(absmax + block, mask=start * 2 < n, other=0)
        if NESTED:  # quant/nf4.py: absmax = dynamic_map[u8] * absmax_absmax + offset
            scale = tl.load(code_of_absmax + scale) * tl.load(absmax_of_absmax + block // 256, mask=start * 2 < n)
            scale += tl.load(offset + block // 256, mask=start * 2 < n)
        at = start[:, None] + tl.arange(0, HALF)[None, :]
        byte = tl.load(packed + at, mask=at * 2 < n, other=0)
        value = tl.interleave(tl.load(code + (byte >> 4)), tl.load(code + (byte & 15))) * scale[:, None]
        to = 2 * start[:, None] + tl.arange(0, 2 * HALF)[None, :]
        tl.store(out + to, value.to(out.dtype.element_ty), mask=to < n)


class JoinedNF4:
    """The NF4 weights of linears one below the other, as one: their bytes are joined, and each linear keeps a view.

    Needs NF4 on a GPU, and in every linear whole blocks of 256 absmax, each of `blocksize` weights: `fits` tells.
    """

    @staticmethod
    def fits(linears: list[FrozenLinear]) -> bool:
        return all(
            isinstance(linear, LinearNF4)
            and linear.packed.is_cuda
            and (not linear.state.nested or linear.state.absmax.numel() % 256 == 0)
            and linear.out_features * linear.in_features % linear.state.blocksize == 0
            for linear in linears
        )

    def __init__(self, linears: list[LinearNF4]):
        def join(parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            return whole, whole.split([len(part) for part in parts])

        states = [linear.state for linear in linears]
        self.blocksize, self.nested, self.code = states[0].blocksize, states[0].nested, states[0].code
        self.packed, views = join([linear.packed for linear in linears])
        self.absmax, absmax_views = join([state.absmax for state in states])
        for linear, view, absmax in zip(linears, views, absmax_views, strict=True):
            linear.packed, linear.state.absmax = view, absmax
        if self.nested:
            self.code_of_absmax = states[0].state2.code
            self.absmax_of_absmax, views = join([state.state2.absmax for state in states])
            for state, view in zip(states, views, strict=True):
                state.state2.absmax = view
            self.offset = torch.cat([s.offset.expand(len(s.state2.absmax)) for s in states])  # one for each of those

    def dequantise_into(self, out: Tensor) -> Tensor:
        """All weights in out's dtype  # (O, I)"""
        nested = (self.code_of_absmax, self.absmax_of_absmax, self.offset) if self.nested else (self.absmax,) * 3
        blocks = 32  # a program: on an H100 within 10 % of copy speed from 4096 x 4096 on
        grid = (triton.cdiv(triton.cdiv(out.numel(), self.blocksize), blocks),)
        nf4_kernel[grid](
            self.packed, self.absmax, *nested, self.code, out, out.numel(),
            HALF=self.blocksize // 2, NESTED=self.nested, BLOCKS=blocks, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return out
