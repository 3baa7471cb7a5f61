"""The head's product, chunk by chunk, against a float64 product: forward and backward.

    python -m pytest tests/llama/test_logits.py
"""

import pytest
import torch

from llama import logits
from llama.logits import HeadFunction, exact_terms
from quant.int8 import quantise_weight

M, C, V = 7, 48, 101
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def head_of(kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight (V, C) as it is stored, scale (V,) or None)"""
    weight = torch.randn(V, C, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    weight *= torch.linspace(0.1, 3, V)[:, None]  # so that int8's scales differ
    if kind == "int8":
        return quantise_weight(weight, torch.device(DEVICE))
    return weight.to(DEVICE, {"bfloat16": torch.bfloat16, "float32": torch.float32}[kind]), None


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("chunk", [1, 40, V, 16384])  # a row each; two whole chunks and a short one; one
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8"])
def test_logits_and_gradient_are_those_of_a_float64_product(kind, chunk, monkeypatch):
    monkeypatch.setattr(logits, "HEAD_CHUNK", chunk)
    weight, scale = head_of(kind)
    assert weight.dtype == getattr(torch, kind) and (scale is None) == (kind != "int8")
    draw = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(shape, generator=draw).to(DEVICE) for shape in ((M, C), (M, V)))
    x *= 30  # logits of an answer lie near 36, and far above: bfloat16 would be off by whole units
    x.requires_grad_()
    y = HeadFunction.apply(x, weight, scale)
    y.backward(grad)
    exact = weight.double() * (1 if scale is None else scale.double()[:, None])
    expected, gradient = x.detach().double() @ exact.T, grad.double() @ exact
    assert y.dtype == x.grad.dtype == torch.float32 and y.shape == (M, V)
    assert relative(y, expected) < 1e-6 and relative(x.grad, gradient) < 1e-6
    # Rounding x to bfloat16 would be seen.
    assert relative(x.detach().bfloat16().double() @ exact.T, expected) > 1e-3


def test_the_whole_weight_is_never_cast(monkeypatch):
    """Only a part at a time is there in float32, forward and backward."""
    monkeypatch.setattr(logits, "HEAD_CHUNK", 40)
    product, seen = logits.head_product, []
    monkeypatch.setattr(logits, "head_product", lambda x, rows: seen.append(tuple(rows.shape)) or product(x, rows))
    weight, scale = head_of("bfloat16")
    HeadFunction.apply(torch.randn(M, C, device=DEVICE, requires_grad=True), weight, scale).sum().backward()
    assert seen == [(40, C), (40, C), (21, C), (C, 40), (C, 40), (C, 21)]


def test_the_weight_gets_no_gradient():
    """Frozen: a head that is tied to a trained embedding gives none either."""
    weight = head_of("float32")[0].requires_grad_()
    HeadFunction.apply(torch.randn(M, C, device=DEVICE, requires_grad=True), weight, None).sum().backward()
    assert weight.grad is None


def test_three_bfloat16_terms_are_a_float32_exactly():
    """8 bits of its 24 each; what a GPU multiplies"""
    x = torch.randn(M, C, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 6, C)
    terms = exact_terms(x)
    assert terms.dtype == torch.bfloat16 and terms.shape == (3 * M, C)
    assert torch.equal(terms.double().view(3, M, C).sum(0), x.double())
