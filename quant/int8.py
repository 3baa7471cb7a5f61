"""LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), in plain PyTorch: the reference.

    python -m pytest tests/quant/test_int8.py       # holds it equal to bitsandbytes, and to the formulas in float64

A row of numbers becomes integers by its own absmax (max |x|), one float32 `scale` a row:

    scale = absmax / 127            code = round(x / scale), -127 to 127            x ~ code * scale

Rows of W (O, I) are what one output reads, rows of x (N, I) are tokens, so in y = x W^T both scales stand outside the
sum over I, which is one of integers, exact in int32:

    y[n, o] = scale_x[n] * scale_w[o] * sum_i code_x[n, i] * code_w[o, i]

What breaks this are outliers: from about 6.7 billion parameters on, a few columns of x hold values 20 times the others,
and one of them leaves its whole row few steps. Most lie in the same few columns, so a column with any |x| >= threshold
(6.0) stays out of the sum of integers, and is multiplied in the compute dtype by the dequantised weight:

    y = scale_x scale_w (code_x code_w^T)  +  x[:, outliers] dequantise(W)[:, outliers]^T

As in bitsandbytes a row's absmax is that of all its values below the threshold, those in outlier columns included.
Which columns are outliers is decided over all rows at once: what a token gives depends, a little, on what else is in
its batch. A NaN or infinity makes its column an outlier, with any threshold, and reaches its own row alone.

Quantising is computed in float32 whatever the dtype. bitsandbytes' CUDA functions for it take and give float16 alone,
which has other steps than bfloat16 and ends at 65,504, so `LinearInt8` runs the functions of this file, and of
bitsandbytes the product of integers. (bitsandbytes 0.50's CPU version of `int8_mm_dequant` multiplies by 6.200124e-05
where 1 / 127^2 is 6.2000124e-05: its results are 1.8e-5 larger.)
"""

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.linear import FrozenLinear


def quantise(x: Tensor, threshold: float = float("inf")) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row: code = round(127 x / absmax), scale = absmax / 127; halves round to even, a row of zeros stays one.

    (N, I) float -> codes (N, I) int8, scale (N,) float32, indices of the outlier columns (K,) int64, whose codes are 0.
    Raises ValueError for a dtype that is no float.
    """
    if not x.is_floating_point():
        raise ValueError(f"cannot quantise {x.dtype} to int8: floating point is needed")
    wide = x.float()
    size = wide.abs()
    columns = (~(size.amax(0) < threshold)).nonzero()[:, 0]  # (K,); `not below`: NaN is an outlier too
    low = size[:, columns]
    size[:, columns] = low.masked_fill(low >= threshold, 0)
    absmax = size.amax(1)  # (N,)
    # Times reciprocals, no divisions: bitsandbytes' rounding, on every device. The clamp keeps 0 * infinity out.
    codes = (wide * (absmax.clamp(min=1e-30).reciprocal() * 127)[:, None]).round_()
    codes[:, columns] = 0
    return codes.to(torch.int8), absmax * (1 / 127), columns


def quantise_weight(weight: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """A weight on `device`, quantised there a part at a time: its float32 never lies there whole.

    (O, I) float -> codes (O, I) int8, scale (O,) float32
    """
    parts = [quantise(rows.to(device)) for rows in weight.split(4096)]
    return torch.cat([codes for codes, _, _ in parts]), torch.cat([scale for _, scale, _ in parts])


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale, the product in float32, cast last.  (O, I) int8, (O,) float32 -> (O, I)"""
    return (codes * scale[:, None]).to(dtype)


def linear(x: Tensor, codes: Tensor, scale: Tensor, threshold: float, bias: Tensor | None = None) -> Tensor:
    """What LLM.int8() computes, all of it in float64: nothing is rounded but x to its codes.

    x (N, I), codes (O, I) int8, scale (O,), bias (O,) -> (N, O) float64
    """
    codes_x, scale_x, columns = quantise(x, threshold)
    weight = codes.double() * scale.double()[:, None]  # (O, I)
    y = (codes_x.double() * scale_x.double()[:, None]) @ weight.T + x[:, columns].double() @ weight[:, columns].T
    return y if bias is None else y + bias.double()


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes weight^T in int32, exact.  (N, I) int8, (O, I) int8 -> (N, O) int32"""
    outputs, odd_o, odd_i = len(weight), -len(weight) % 4, -weight.shape[1] % 4
    if weight.is_cuda and (odd_o or odd_i):  # cuBLASLt multiplies int8 in fours
        codes = pad(codes, (0, odd_i))
        weight = pad(weight, (0, odd_i, 0, odd_o))
    return bnb.int8_linear_matmul(codes, weight)[:, :outputs]


class LinearInt8(FrozenLinear):
    """The 8-bit linear, LLM.int8(): `weight` (O, I) int8 codes, `scale` (O,) float32, both from `quantise`.

    Columns of x with any |x| >= `threshold` are multiplied in the dtype of x; 0 for none.
    Raises ValueError for other dtypes, here or of x, and for a threshold below 0.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None, threshold: float = 6.0):
        super().__init__(*weight.shape, bias)
        if (weight.dtype, scale.dtype) != (torch.int8, torch.float32):
            raise ValueError(f"an int8 linear needs int8 codes and a float32 scale, got {weight.dtype}, {scale.dtype}")
        if not threshold >= 0:
            raise ValueError(f"the outlier threshold must be 0 (none) or greater, got {threshold}")
        self.threshold = threshold or float("inf")
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def check(self, x: Tensor) -> None:
        if x.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"an int8 linear computes in bfloat16 or float32, got {x.dtype}")

    def multiply(self, x: Tensor) -> Tensor:
        self.check(x)
        codes, scale, outliers = quantise(x, self.threshold)  # (N, I), (N,), (K,)
        y = integer_product(codes, self.weight)  # (N, O) int32
        y = (y * scale[:, None]).mul_(self.scale)  # float32
        if self.bias is not None:
            y += self.bias_in(x.dtype)
        y = y.to(x.dtype)
        if k := len(outliers):
            weight = dequantise(self.weight[:, outliers], self.scale, x.dtype)  # (O, K)
            # oneDNN keeps a kernel of about a MiB for every K that it meets, a thousand of them: zeros make few of many
            rest = (0, (1 << (k - 1).bit_length()) - k)
            y.addmm_(pad(x[:, outliers], rest), pad(weight, rest).T)
        return y

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return dequantise(self.weight, self.scale, dtype)  # (O, I)

    def stored_bytes(self) -> int:
        return sum(b.nbytes for b in self.buffers())

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)  # `.to(torch.bfloat16)` must not round it
        return self
