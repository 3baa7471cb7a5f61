"""The one call that quantises: a weight as it was read from a file becomes a frozen linear that stores 4, 8 or 16 bits.

    linear = quantise_linear(weight, bias, bits=4)          llama/weights.py calls it for each matrix as it is read

Nothing else quantises: `.to(device)` only moves, and a base model is never saved in its quantised form.
"""

import torch
from torch import Tensor

from quant.int8 import LinearInt8, quantise_weight
from quant.linear import FrozenLinear, Linear16, LinearNF4

BITS = (4, 8, 16)  # what `quantise_linear` and `train.py --bits` take


def quantise_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    blocksize: int = 64,
    double_quant: bool = True,
    outlier_threshold: float = 6.0,
) -> FrozenLinear:
    """The one place where a linear is quantised: (O, I) float -> a FrozenLinear on the same device.

    `bits` 4: NF4 of the weight as given; 8: int8, a scale a row; 16: no quantisation, kept in `dtype`. `blocksize` and
    `double_quant` are for 4 bits, `outlier_threshold` for 8.
    Raises ValueError for other `bits` and for a weight with NaN or infinity.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    if bits == 8:
        return LinearInt8(*quantise_weight(weight, weight.device), bias, outlier_threshold)
    return Linear16(weight.to(dtype), bias) if bits == 16 else LinearNF4(weight, bias, blocksize, double_quant)
