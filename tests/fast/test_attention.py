"""Packed attention as a Triton kernel, windows and soft caps included, against the plain piece of fast/layers.py.

    python -m pytest tests/fast/test_attention.py
    TRITON_INTERPRET=1 python -m pytest tests/fast/test_attention.py     # without a GPU, where Triton is installed

Without either all are skipped, and say so.
"""

import pytest
import torch
from kernel_helpers import DEVICE, DTYPES, both, close, kernels

from fast.layers import PLAIN
from llama.attention import Layout, Scores
from llama.rope import rotary_table


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths, heads, kv_heads, size",
    [
        ([5, 70, 1, 130], 4, 2, 16), ([3, 9], 6, 2, 24), ([1], 1, 1, 4),
        ([40, 7], 9, 3, 64), ([5, 35], 3, 3, 96), ([70, 3], 4, 1, 256),  # SmolLM2, Phi-3 mini, Gemma 3 270M
    ],
)  # fmt: skip
def test_attention(dtype, lengths, heads, kv_heads, size):
    layout = Layout.packed(lengths, DEVICE)
    frequency = 1e4 ** -(torch.arange(0, size, 2, device=DEVICE) / size)
    rotary = rotary_table(frequency, layout.positions)
    # Sequences without tokens at the end are what a batch with fewer items than its shape allows looks like.
    layout.edges = torch.cat([layout.edges, layout.edges[-1:].repeat(3)])
    qkv = torch.randn(sum(lengths), (heads + 2 * kv_heads) * size, device=DEVICE, dtype=dtype)
    for plain, fused in both("attention", [qkv], (*rotary, kv_heads, size, layout, None, 0)):
        close(fused, plain, dtype)


@kernels
def test_tiles_fit_the_gpu():
    """As compiled (Triton 3.6): float32, rows of 32, need 36, 68 and 132 KiB at 64, 128 and 256 numbers a head."""
    from fast.attention import tile_of

    kib, exact, half = 1024, torch.float32, torch.bfloat16
    hopper, ada, turing = 227 * kib, 99 * kib, 64 * kib
    assert [tile_of(size, half, hopper) for size in (64, 128, 256)] == [64, 64, 32]
    assert [tile_of(size, half, ada) for size in (64, 128, 256)] == [64, 64, 32]
    assert [tile_of(size, exact, hopper) for size in (64, 128, 256)] == [32, 32, 32]
    assert [tile_of(size, exact, ada) for size in (64, 128, 256)] == [32, 32, 16]
    assert [tile_of(size, exact, turing) for size in (64, 128, 256)] == [32, 16, None]


@kernels
def test_a_gpu_too_small_for_the_kernel_runs_the_plain_piece(monkeypatch):
    from fast import norm_glu as fused

    layout, qkv = Layout.packed([5, 9], DEVICE), torch.randn(14, 8 * 16, device=DEVICE)
    rotary = rotary_table(torch.rand(8, device=DEVICE), layout.positions)
    expected = attention_of(PLAIN, qkv, rotary, layout, Scores())
    monkeypatch.setattr(fused, "shared_memory", lambda device: 1024)
    monkeypatch.setattr(fused.PackedAttention, "apply", None)
    assert torch.equal(attention_of(fused.FUSED, qkv, rotary, layout, Scores()), expected)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scores",
    [
        Scores(window=40),  # wider than a tile of float32 queries, so that whole tiles are skipped and some begin late
        Scores(window=1),
        Scores(window=500),
        Scores(scale=0.3, softcap=1.5),
        Scores(scale=0.3, softcap=2.0, window=33),
    ],
    ids=str,
)
def test_windows_and_soft_caps(dtype, scores):
    layout = Layout.packed([5, 170, 1, 64], DEVICE)
    rotary = rotary_table(torch.rand(8, device=DEVICE), layout.positions)
    qkv = torch.randn(240, 8 * 16, device=DEVICE, dtype=dtype)
    plain_scores = attention_of(PLAIN, qkv, rotary, layout, Scores())
    assert scores.window == 500 or (attention_of(PLAIN, qkv, rotary, layout, scores) - plain_scores).abs().max() > 0.1
    for plain, fused in both("attention", [qkv], (*rotary, 2, 16, layout, None, 0, scores)):
        close(fused, plain, dtype)


def attention_of(pieces, qkv, rotary, layout, scores):
    return pieces.attention(qkv * 1, *rotary, 2, 16, layout, None, 0, scores)


@kernels
@pytest.mark.parametrize("name", ["plain", "fused"])
def test_a_poisoned_neighbour_moves_nothing(name):
    """Items lie side by side in memory: NaN in one must reach no other, forward or backward."""
    from fast.norm_glu import FUSED

    piece = (FUSED if name == "fused" else PLAIN).attention
    layout = Layout.packed([7, 66, 5], DEVICE)
    rotary = rotary_table(torch.rand(8, device=DEVICE), layout.positions)
    results = []
    for poison in (0.0, float("nan")):
        torch.manual_seed(0)
        qkv = torch.randn(78, 8 * 16, device=DEVICE)
        qkv[7:73] += poison
        qkv.requires_grad_()
        out = piece(qkv * 1, *rotary, 2, 16, layout, None, 0)
        out.backward(torch.ones_like(out))
        results.append((out.detach(), qkv.grad))
    for clean, poisoned in zip(*results, strict=True):
        outside = [*range(7), *range(73, 78)]
        assert torch.equal(clean[outside], poisoned[outside]) and poisoned[7:73].isnan().any()
