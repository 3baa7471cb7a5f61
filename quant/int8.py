"""LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), in plain PyTorch: the reference.

    python -m pytest tests/test_int8.py       # holds it equal to bitsandbytes, and to the formulas in float64

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
which has other steps than bfloat16 and ends at 65,504, so quant/linear.py runs this file, and of bitsandbytes the
product of integers. (bitsandbytes 0.50's CPU version of `int8_mm_dequant` multiplies by 6.200124e-05 where 1 / 127^2 is
6.2000124e-05: its results are 1.8e-5 larger.)
"""

import torch
from torch import Tensor


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
