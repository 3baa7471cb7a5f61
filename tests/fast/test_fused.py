"""The fast path against the readable one, forward and backward.

    python -m pytest tests/test_fused.py
    TRITON_INTERPRET=1 python -m pytest tests/test_fused.py      # the kernels without a GPU, where Triton is installed

Without a GPU the Triton kernels are skipped, and say so; groups of linears are tested everywhere.
"""

import os

import pytest
import torch
from conftest import hugging_face_model, our_model, tiny_config

from fast import install as door
from fast.layers import PLAIN
from fast.nf4 import JoinedNF4
from fast.offload import HostEmbedding
from fast.plan import Plan
from llama.attention import Layout, Scores
from llama.model import Llama
from llama.rope import rotary_table
from lora.inject import inject, lora_layers
from lora.optim import FlatParameter
from quant.linear import LinearNF4

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRET), reason="Triton kernels need a GPU, or TRITON_INTERPRET=1"
)
# Off the GPU the kernels compute in float32; on it bfloat16 too, where one rounding is 2^-8.
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]


def close(a, b, dtype=torch.float32):
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    error = (a.float() - b.float()).norm() / b.float().norm()
    assert error < tolerance, error


def both(name, inputs, extra):
    """Outputs and input gradients of a piece, plain and fused"""
    from fast.norm_glu import FUSED

    results = []
    for pieces in (PLAIN, FUSED):
        given = [None if x is None else x.clone().requires_grad_() for x in inputs]
        out = getattr(pieces, name)(*[None if x is None else x * 1 for x in given], *extra)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        torch.autograd.backward(out, [torch.randn_like(o) for o in out])
        results.append([*out, *(x.grad for x in given if x is not None)])
    return zip(*results, strict=True)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [True, False])
def test_add_norm(dtype, add):
    x, delta = torch.randn(5, 48, device=DEVICE), torch.randn(5, 48, device=DEVICE, dtype=dtype) if add else None
    for plain, fused in both("add_norm", [x, delta], (torch.rand(48, device=DEVICE), 1e-5, dtype)):
        assert fused.dtype == plain.dtype
        close(fused, plain, dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_swiglu_and_geglu(dtype, gelu):
    for plain, fused in both("glu", [2 * torch.randn(5, 2 * 1100, device=DEVICE, dtype=dtype)], (gelu,)):
        close(fused, plain, dtype)


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


def test_without_triton_or_a_compiler_no_kernel_runs(tiny, monkeypatch):
    """On a GPU; the merged linears stay, what lies between them is plain PyTorch, and nothing is recorded."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(door.shutil, "which", lambda name: None)
    monkeypatch.setattr(Llama, "device", torch.device("cuda"))
    for triton, missing in ((None, "(no Triton)"), (object(), "(no C compiler")):
        model = our_model(tiny[1])
        monkeypatch.setattr(door, "triton", triton)
        assert missing in door.install(model) and model.run_layers.pieces is PLAIN and not door.can_record(model)
        assert all(linear.joined is None for linear in model.run_layers.linears)
    monkeypatch.setenv("CC", "cc")
    assert door.kernels_missing() is None


def test_rows_of_an_embedding_in_the_hosts_memory(monkeypatch):
    """Tokens may be a slice; without Triton's kernel the rows are copied."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    embedding = HostEmbedding(torch.randn(50, 24), DEVICE == "cuda")
    tokens = torch.randint(0, 50, (6, 4), device=DEVICE)[:, 1]
    for kernels in (False, embedding.kernels):
        embedding.kernels = kernels
        assert torch.equal(embedding(tokens).cpu(), embedding.weight[tokens.cpu()])


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
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads_that_are_no_residual(dtype):
    """q and k norms and Gemma's norms after a sub-layer read the compute dtype, with nothing to add"""
    inputs, weight = [torch.randn(7, 32, device=DEVICE, dtype=dtype), None], torch.rand(32, device=DEVICE)
    for plain, fused in both("add_norm", inputs, (weight, 1e-5, dtype)):
        close(fused, plain, dtype)


@kernels
@pytest.mark.parametrize("name, inputs", [("add_norm", 1), ("add_norm", 2), ("glu", 1)])
def test_rows_with_gaps_between_them(name, inputs):
    """What the pieces read may be a slice, as a lone kv head's keys are one of q, k, v."""
    from fast.norm_glu import FUSED

    results = []
    for pieces in (PLAIN, FUSED):
        torch.manual_seed(0)
        wide = [torch.randn(7, 96, device=DEVICE, requires_grad=True) for _ in range(inputs)]
        given = [x[:, 32:64] for x in wide]
        if name == "add_norm":
            extra = [None] * (2 - inputs) + [torch.rand(32, device=DEVICE), 1e-5, torch.float32]
            out = pieces.add_norm(*given, *extra)[1]
        else:
            out = getattr(pieces, name)(*given, True)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE))
        results.append([out, *(x.grad for x in wide)])
    for plain, fused in zip(*results, strict=True):
        close(fused, plain)


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


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.skipif(DEVICE == "cpu", reason="the packed kernel needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_nf4_weights_equal_bitsandbytes(nested, dtype):
    linears = [
        LinearNF4(torch.randn(o, 1024, device=DEVICE) * (i + 1) * 0.01, double_quant=nested)
        for i, o in enumerate((1024, 256, 512))
    ]
    apart = torch.cat([linear.dequantise(dtype) for linear in linears])
    assert JoinedNF4.fits(linears)
    joined = JoinedNF4(linears)
    assert torch.equal(joined.dequantise_into(torch.full_like(apart, float("nan"))), apart)
    assert torch.equal(torch.cat([linear.dequantise(dtype) for linear in linears]), apart)  # through their views


def gradients(directory, bits, targets, fast, keep=False, dtype=torch.float32):
    torch.manual_seed(0)
    model = our_model(directory, bits=bits, dtype=dtype).to(DEVICE)
    model.frequency = model.frequency.to(DEVICE)
    inject(model, rank=4, alpha=6, targets=targets)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    factors = FlatParameter(lora_layers(model))
    if fast:
        door.install(model, Plan(keep=2 if keep else 0), factors)
    torch.manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (15,), device=DEVICE)
    logits = model(tokens, Layout.packed([5, 7, 3], DEVICE), torch.tensor([3, 4, 10, 14], device=DEVICE))
    logits.backward(torch.randn_like(logits))
    return logits.detach(), factors.parameter.grad


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,down_proj"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_model_of_merged_linears_equals_the_readable_one(tmp_path, bits, targets, keep):
    hugging_face_model(tiny_config(attention_bias=True), tmp_path / "m")
    plain, fast = (gradients(tmp_path / "m", bits, targets, fast, keep) for fast in (False, True))
    for a, b in zip(fast, plain, strict=True):
        # 8 bits: outlier columns go by all rows at once, and the textbook's last block is given more of them.
        close(a, b, torch.bfloat16 if bits == 8 else torch.float32)
