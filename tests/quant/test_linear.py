"""The quantised linear, forward and backward, against the dequantised linear in float64."""

import pytest
import torch

from quant.linear import FrozenLinearFunction, Linear16, LinearNF4
from quant.quantise import quantise_linear

N, I, O, R, SCALING = 10, 64, 96, 4, 2.0


def parts(bits, dtype=torch.float32, bias=True):
    g = torch.Generator().manual_seed(0)
    weight, b = torch.randn(O, I, generator=g) * 0.1, torch.randn(O, generator=g) if bias else None
    linear = quantise_linear(weight, b, bits=bits, dtype=dtype)
    x, lora_A, lora_B = (torch.randn(s, generator=g) for s in ((N, I), (R, I), (O, R)))
    return linear, x.to(dtype), lora_A, lora_B, torch.randn(N, O, generator=g).to(dtype)


def reference(linear, x, x_lora, lora_A, lora_B, grad):
    """The same in float64 by plain autograd, W dequantised once."""
    leaves = [t.detach().double().requires_grad_() for t in (x, x_lora, lora_A, lora_B)]
    weight, bias = linear.dequantise(torch.float32).double(), linear.bias
    y = (
        leaves[0] @ weight.T
        + SCALING * (leaves[1] @ leaves[2].T) @ leaves[3].T
        + (0 if bias is None else bias.double())
    )
    return y, torch.autograd.grad(y, leaves, grad.double())


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_in_float32(bits, bias):
    linear, x, lora_A, lora_B, grad = parts(bits, bias=bias)
    x_lora = x * 0.5  # apart from x, as dropout makes it: the two gradients must not be mixed up
    leaves = [t.clone().requires_grad_() for t in (x, x_lora, lora_A, lora_B)]
    y = linear(*leaves, SCALING)
    y.backward(grad)
    expected, gradients = reference(linear, x, x_lora, lora_A, lora_B, grad)
    # Float32 sums of 64 to 96 terms near 10: what is left depends on the order in which a machine adds them.
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 16])
def test_bfloat16_stays_within_its_rounding(bits):
    linear, x, lora_A, lora_B, grad = parts(bits, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, lora_A, lora_B)]
    y = linear(leaves[0], leaves[0], *leaves[1:], SCALING)
    y.backward(grad)
    expected, (gx, gl, gA, gB) = reference(linear, x, x, lora_A, lora_B, grad)
    assert y.dtype == torch.bfloat16 and leaves[1].grad.dtype == torch.float32
    for got, want in ((y, expected), (leaves[0].grad, gx + gl), (leaves[1].grad, gA), (leaves[2].grad, gB)):
        assert (got.double() - want).norm() / want.norm() < 0.01


def test_without_lora_it_is_a_plain_linear():
    linear, x, _, _, grad = parts(4)
    x.requires_grad_()
    y = linear(x)
    y.backward(grad)
    weight = linear.dequantise(torch.float32)
    torch.testing.assert_close(y, x @ weight.T + linear.bias)
    torch.testing.assert_close(x.grad, grad @ weight)


def test_gradients_against_finite_differences():
    """float64 end to end: the function's own formulas, nothing rounded."""
    g = torch.Generator().manual_seed(1)
    linear = Linear16(
        torch.randn(6, 5, generator=g, dtype=torch.float64), torch.randn(6, generator=g, dtype=torch.float64)
    )
    leaves = [
        torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (4, 5), (2, 5), (6, 2))
    ]

    def numeric(x, x_lora, A, B):
        return FrozenLinearFunction.apply(x, x_lora, A, B, 1.5, linear)

    y = numeric(*leaves)
    probe = torch.randn(y.shape, generator=g, dtype=torch.float64)
    got = torch.autograd.grad(y, leaves, probe)
    for leaf, gradient in zip(leaves, got, strict=True):
        step = 1e-6
        flat = leaf.data.view(-1)
        for k in range(flat.numel()):
            flat[k] += step
            up = (numeric(*leaves) * probe).sum()
            flat[k] -= 2 * step
            down = (numeric(*leaves) * probe).sum()
            flat[k] += step
            assert abs((up - down) / (2 * step) - gradient.view(-1)[k]) < 1e-5  # LoRA gradients come back in float32


def test_backward_keeps_no_16_bit_weight():
    """Between forward and backward, autograd may hold x_lora, x_lora A^T, A and B: nothing of the size of W."""
    linear, x, lora_A, lora_B, _ = parts(4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x.requires_grad_(), x, lora_A.requires_grad_(), lora_B.requires_grad_(), SCALING)
    assert {tuple(t.shape) for t in saved} == {(N, I), (N, R), (R, I), (O, R)}


def test_packed_weight_is_uint8_untrainable_and_unchanged_by_a_step():
    linear, x, lora_A, lora_B, grad = parts(4)
    before = linear.packed.clone()
    lora_A.requires_grad_(), lora_B.requires_grad_()
    linear(x, x, lora_A, lora_B, SCALING).backward(grad)
    torch.optim.AdamW([lora_A, lora_B], lr=0.1).step()
    assert linear.packed.dtype == torch.uint8 and linear.packed.numel() == O * I // 2
    assert not list(linear.parameters())
    assert torch.equal(linear.packed, before)


def test_quantising_is_never_a_side_effect_of_moving():
    linear, *_ = parts(16)
    assert isinstance(linear.to("cpu"), Linear16)
    packed = parts(4)[0]
    values = packed.dequantise(torch.float32)
    assert torch.equal(packed.to(torch.bfloat16).dequantise(torch.float32), values)  # absmax is not rounded along


def test_moving_takes_the_quantisation_state_along():
    linear = parts(4)[0].to("meta")
    assert linear.packed.is_meta and linear.state.absmax.is_meta and linear.state.state2.absmax.is_meta


def test_stored_bytes_count_absmax():
    linear = quantise_linear(torch.randn(1024, 1024), bits=4)
    assert isinstance(linear, LinearNF4)
    assert abs(linear.stored_bytes() * 8 / 1024**2 - 4.127) < 0.001


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [4, 16])
def test_cuda_computes_what_the_cpu_does(bits):
    linear, x, lora_A, lora_B, grad = parts(bits)
    results = []
    for device in ("cpu", "cuda"):
        linear = linear.to(device)
        leaves = [t.detach().to(device).requires_grad_() for t in (x, lora_A, lora_B)]
        y = linear(leaves[0], leaves[0], *leaves[1:], SCALING)
        y.backward(grad.to(device))
        results.append([y.cpu(), *(t.grad.cpu() for t in leaves)])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=1e-4, atol=1e-4)


def test_bad_bits_and_nan_are_refused():
    with pytest.raises(ValueError, match="bits must be one of"):
        quantise_linear(torch.randn(8, 8), bits=3)
    with pytest.raises(ValueError, match="NaN"):
        quantise_linear(torch.full((8, 8), float("nan")))
