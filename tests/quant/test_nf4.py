"""NF4 in plain PyTorch against bitsandbytes, bit for bit."""

import bitsandbytes.functional as bnb
import pytest
import torch

from quant import nf4

SHAPES = [(64, 64), (576, 1536), (192, 576), (100, 70), (7, 90)]


def both(weight, blocksize=64, double_quant=True):
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4")
    state.dtype = torch.float32
    return packed, state, nf4.quantise(weight, blocksize, double_quant)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_packed_bytes_and_values_equal_bitsandbytes(shape, dtype, double_quant):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.03 * torch.rand(shape[0], 1)).to(dtype)
    packed, state, ours = both(weight, double_quant=double_quant)
    assert ours.packed.dtype == torch.uint8
    assert torch.equal(packed, ours.packed)
    assert torch.equal(state.absmax, ours.absmax)
    assert torch.equal(bnb.dequantize_4bit(packed, state), nf4.dequantise(ours))


@pytest.mark.parametrize("blocksize", [64, 128, 256])
def test_other_block_sizes(blocksize):
    weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(1))
    packed, state, ours = both(weight, blocksize)
    assert torch.equal(packed, ours.packed)
    assert torch.equal(bnb.dequantize_4bit(packed, state), nf4.dequantise(ours))


def test_a_cast_comes_last():
    ours = nf4.quantise(torch.randn(64, 128, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(nf4.dequantise(ours, torch.bfloat16), nf4.dequantise(ours).to(torch.bfloat16))


def test_maps_equal_bitsandbytes():
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())
    assert torch.equal(nf4.NF4_CODE, bnb.get_4bit_type("nf4", device="cpu"))


def test_each_value_becomes_the_nearest_code():
    """Brute force in float64 over one block of many values."""
    weight = torch.linspace(-1, 1, 6400).view(1, -1)
    ours = nf4.quantise(weight, blocksize=6400 * 2 // 2, double_quant=False)
    index = torch.cat([ours.packed >> 4, ours.packed & 0xF], 1).view(-1)
    nearest = (weight.double().view(-1, 1) - nf4.NF4_CODE.double()).abs().argmin(1)
    assert (index != nearest).sum() == 0


def test_size_and_error_are_what_the_paper_says():
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(3))
    ours = nf4.quantise(weight)
    size = sum(t.nbytes for t in (ours.packed, ours.absmax, ours.absmax_absmax, ours.offset))
    assert abs(size * 8 / weight.numel() - 4.127) < 0.001  # bits a weight
    error = (nf4.dequantise(ours) - weight).norm() / weight.norm()
    assert 0.08 < error < 0.10


def test_zeros_survive_and_nan_is_refused():
    assert torch.equal(nf4.dequantise(nf4.quantise(torch.zeros(64, 64), double_quant=False)), torch.zeros(64, 64))
    with pytest.raises(ValueError, match="NaN"):
        nf4.quantise(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("double_quant", [False, True])
def test_cuda_kernels_differ_only_on_the_border_of_two_codes(double_quant):
    """Bytes are allowed to differ only where a weight lies on the border of two codes (the kernel divides
    otherwise)."""
    weight = torch.randn(576, 1536, generator=torch.Generator().manual_seed(4)).cuda() * 0.03
    packed, state, ours = both(weight, double_quant=double_quant)
    assert (packed != ours.packed).float().mean() < 1e-5
    ours.packed = packed
    assert (state.absmax != ours.absmax).float().mean() < 1e-3
    same = nf4.NF4Tensor(
        packed, state.absmax, weight.shape, 64, state.offset, state.state2.absmax if double_quant else None
    )
    torch.testing.assert_close(bnb.dequantize_4bit(packed, state), nf4.dequantise(same), rtol=1e-6, atol=1e-9)
