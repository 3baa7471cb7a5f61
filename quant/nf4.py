"""NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), in plain PyTorch: the reference.

    python -m pytest tests/quant/test_nf4.py        # holds it equal to bitsandbytes, bit for bit

A weight matrix is read row by row as one long line of numbers and cut into blocks of 64. For each block:

    1. absmax = max |w|                                  one float32 a block
    2. each w / absmax, now in [-1, 1], becomes the index (0..15) of the nearest of 16 code values
    3. two indices share a byte: the first in the high half, the second in the low half

Trained weights are nearly normal, so the 16 code values follow the quantiles of a normal distribution (the outermost
cut at a finite probability: QLoRA, appendix E), scaled to [-1, 1], with an exact 0: close together where weights are
many, far apart where they are few. Going back is a table look-up and a product:

    w ~ code[index] * absmax[block]

Cost: 4 bits + 32 / 64 bits of absmax = 4.5 bits a weight. Double quantisation stores the absmax themselves in 8 bits:
their mean (`offset`) is taken off, blocks of 256 of them share one float32 absmax, and each becomes the nearest of 256
values of a signed dynamic map (dense near 0, Dettmers 2015, arXiv 1511.04561). That leaves 4 + 8/64 + 32/(64*256) =
4.127 bits.

Everything is computed in float32, whatever the dtype of the weight; a cast to the compute dtype comes last.
`quant/linear.py` does not run this file: it calls bitsandbytes' kernels, and tests/quant/test_nf4.py shows that both
agree, on a CPU in every bit, on CUDA up to values that lie on the border of two codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Quantiles of N(0, 1), scaled to [-1, 1]; eight above 0 and seven below (QLoRA, appendix E).
NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)  # (16,) fmt: skip
ABSMAX_BLOCKSIZE = 256  # absmax values that share one float32 in double quantisation, as in bitsandbytes


@dataclass
class NF4Tensor:
    """A matrix in NF4. `double_quant` is what bitsandbytes calls `compress_statistics`."""

    packed: Tensor  # (ceil(numel / 2), 1) uint8, two indices a byte, the first in the high half
    absmax: Tensor  # (blocks,) float32, or uint8 indices into the dynamic map with double quantisation
    shape: torch.Size  # of the matrix: (O, I)
    blocksize: int  # weights that share one absmax
    offset: Tensor | None = None  # () float32, the mean of the absmax (double quantisation only)
    absmax_absmax: Tensor | None = None  # (ceil(blocks / 256),) float32 (double quantisation only)


def dynamic_map() -> Tensor:
    """The 256 signed values of the 8-bit dynamic map, rising, in [-1, 1]  # (256,)

    For each of seven powers of ten, 10^-6 to 10^0, the interval [0.1, 1] is split evenly into 2^i parts
    (i = 0..6) and the middles are taken with both signs; then 0 and 1. Each power of ten has half the parts of the
    one above in a tenth of its width, so the spacing still shrinks towards 0.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        values += (10.0 ** (i - 6) * middles).tolist() + (-(10.0 ** (i - 6)) * middles).tolist()
    return torch.tensor(sorted(values))


def nearest(x: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest code value: how many of the midpoints between neighbours lie below x."""
    return torch.bucketize(x, (code[:-1] + code[1:]) / 2)


def in_blocks(x: Tensor, blocksize: int) -> Tensor:
    """One long line cut into rows of `blocksize`, the last filled up with zeros  # (blocks, blocksize)"""
    line = x.reshape(-1).float()
    return torch.nn.functional.pad(line, (0, -line.numel() % blocksize)).view(-1, blocksize)


def quantise(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Tensor:
    """(O, I) float -> NF4. Raises ValueError on NaN or infinity, which no code value can stand for."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"cannot quantise a weight of shape {tuple(weight.shape)} that holds NaN or infinity")
    blocks = in_blocks(weight, blocksize)  # (blocks, blocksize)
    absmax = blocks.abs().amax(dim=1)  # (blocks,)
    # A block of zeros has absmax 0: the clamp keeps 0 / 0 out. Times the reciprocal, not a division: bitsandbytes'
    # rounding.
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    index = nearest(scaled, NF4_CODE.to(weight.device)).to(torch.uint8).view(-1)[: weight.numel()]
    if index.numel() % 2:
        index = torch.cat([index, index.new_full((1,), 7)])  # 7 is the code value 0
    packed = (index[0::2] << 4 | index[1::2]).unsqueeze(1)  # (ceil(numel / 2), 1)
    if not double_quant:
        return NF4Tensor(packed, absmax, weight.shape, blocksize)

    offset = absmax.mean()
    centred = in_blocks(absmax - offset, ABSMAX_BLOCKSIZE)  # (blocks / 256, 256)
    absmax_absmax = centred.abs().amax(dim=1)
    scaled = centred * (1.0 / absmax_absmax.clamp(min=1e-38))[:, None]
    if weight.device.type == "cpu":
        # bitsandbytes' CUDA kernel compares exactly; its CPU kernel (since 0.50) looks the index up in a table of
        # 65,536 steps over [-1, 1], which moves a few absmax in a thousand to the second nearest value. So must we.
        scaled = ((scaled + 1) * 0.5 * 65535 + 0.5).floor() * (2 / 65535) - 1
    absmax8 = nearest(scaled, dynamic_map().to(weight.device)).to(torch.uint8).view(-1)[: absmax.numel()]
    return NF4Tensor(packed, absmax8, weight.shape, blocksize, offset, absmax_absmax)


def dequantise(q: NF4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """NF4 -> (O, I): code[index] * absmax, the product in float32, cast last."""
    absmax = q.absmax
    if q.offset is not None:
        scale = q.absmax_absmax.repeat_interleave(ABSMAX_BLOCKSIZE)[: absmax.numel()]
        absmax = dynamic_map().to(absmax.device)[absmax.int()] * scale + q.offset  # (blocks,)
    index = torch.cat([q.packed >> 4, q.packed & 0xF], dim=1).view(-1)[: q.shape.numel()]
    values = NF4_CODE.to(index.device)[index.int()]  # (O * I,)
    return (values * absmax.repeat_interleave(q.blocksize)[: values.numel()]).view(q.shape).to(dtype)
