"""The layer loop of llama/model.py, written for speed: `FastLayers` takes the place of `run_layers`, whole.

    python -m pytest tests/fast/test_layers.py      # against the textbook model, forward and backward

    textbook                                        here
    x + attention(norm(x)), then x + mlp(norm(x))   the sum is left to the next norm, which reads both terms anyway:
                                                    a block takes and returns (x, delta), whose sum is the stream
    all rows through the last block                 behind its attention only the rows `at` go on: nobody reads others
    seven linears a block                           four: q, k, v and gate, up are merged (fast/linears.py)
    norm, rotation, attention, SwiGLU               on a GPU a Triton kernel each (fast/norm_glu.py)
    everything is kept for backward                 with a small --memory-budget blocks run twice (fast/offload.py)

The sums are the same; the order of a few additions is not.
"""

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.linears import MergedLinear, Scratch, cast_factors
from fast.offload import Recompute
from llama.attention import Layout, Scores, attend
from llama.model import Block, Llama, RMSNorm
from llama.rope import apply_rotary, rotary_tables
from lora.optim import FlatParameter


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + delta in float32, and its RMSNorm in `dtype`.  (N, C) -> (N, C) twice"""
    x = x if delta is None else x + delta
    return x, F.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)


def attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, head_dim: int, layout: Layout, cache=None, layer: int = 0,
    scores: Scores = Scores(),
) -> Tensor:  # fmt: skip
    """q and k turned to their positions, then attention within each sequence.  (N, (H + 2K) D) -> (N, H * D)"""
    heads = qkv.unflatten(-1, (-1, head_dim))  # (N, H + 2K, D)
    turned = apply_rotary(heads[:, :-kv_heads], cos, sin).to(qkv.dtype)  # (N, H + K, D)
    q, k = turned[:, :-kv_heads].contiguous(), turned[:, -kv_heads:].contiguous()
    return attend(q, k, heads[:, -kv_heads:].contiguous(), layout, cache, layer, scores)


def glu(gate_up: Tensor, gelu: bool) -> Tensor:
    """act(gate) * up.  (N, 2F) -> (N, F)"""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


class Pieces(NamedTuple):
    """What is no matrix product, in plain PyTorch (PLAIN) or in Triton (fast.norm_glu.FUSED)"""

    add_norm: Callable
    attention: Callable
    glu: Callable


PLAIN = Pieces(add_norm, attention, glu)


class FastBlock:
    """A Block's linears, merged, and its pieces; the weights stay where they are."""

    def __init__(self, block: Block, scratch: Scratch, pieces: Pieces, kernels: bool):
        attn, mlp = block.self_attn, block.mlp
        self.block, self.pieces = block, pieces
        self.qkv = MergedLinear([attn.q_proj, attn.k_proj, attn.v_proj], scratch, kernels)
        self.o = MergedLinear([attn.o_proj], scratch, kernels)
        self.gate_up = MergedLinear([mlp.gate_proj, mlp.up_proj], scratch, kernels)
        self.down = MergedLinear([mlp.down_proj], scratch, kernels)
        self.linears = [self.qkv, self.o, self.gate_up, self.down]

    def norm(self, x: Tensor, norm: RMSNorm, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + delta, and its norm.  (N, C) -> (N, C) twice"""
        return self.pieces.add_norm(x, delta, norm.weight, norm.eps, norm.dtype)

    def norm_heads(self, qkv: Tensor) -> Tensor:
        """Each head of q and of k normed by itself, over D.  (N, (H + 2K) D) -> the same"""
        attn = self.block.self_attn
        q, k, v = qkv.split([base.out_features for base in self.qkv.bases], dim=-1)
        q = self.norm(q.reshape(-1, attn.head_dim), attn.q_norm)[1].view(q.shape)
        k = self.norm(k.reshape(-1, attn.head_dim), attn.k_norm)[1].view(k.shape)
        return torch.cat([q, k, v], dim=-1)

    def attend(self, x: Tensor, layout: Layout, rotary, cache, at: Tensor | None, factors: dict) -> Tensor:
        """(N, C) -> (N, C), or (M, C) at the packed indices `at`"""
        attn, qkv = self.block.self_attn, self.qkv(x, factors.get(self.qkv))  # (N, (H + 2K) D)
        qkv = self.norm_heads(qkv) if attn.qk_norm else qkv
        heads = attn.kv_heads, attn.head_dim
        y = self.pieces.attention(qkv, *rotary, *heads, layout, cache, attn.layer, attn.scores)  # (N, H * D)
        return self.o(y if at is None else y.index_select(0, at), factors.get(self.o))

    def mlp(self, x: Tensor, factors: dict) -> Tensor:
        """(N, C) -> (N, C)"""
        gate_up = self.gate_up(x, factors.get(self.gate_up))  # (N, 2F)
        return self.down(self.pieces.glu(gate_up, self.block.mlp.gelu), factors.get(self.down))

    def __call__(self, x, delta, layout, rotary, cache, at, factors: dict) -> tuple[Tensor, Tensor]:
        """(x, delta) -> (x, delta): the residual stream before and behind the block, as two terms"""
        block = self.block
        x, normed = self.norm(x, block.input_layernorm, delta)  # (N, C)
        attended = self.attend(normed, layout, rotary, cache, at, factors)  # (N, C) or (M, C)
        x = x if at is None else x.index_select(0, at)
        if not block.post_norms:
            x, normed = self.norm(x, block.post_attention_layernorm, attended)
            return x, self.mlp(normed, factors)
        attended = self.norm(attended, block.post_attention_layernorm)[1]
        x, normed = self.norm(x, block.pre_feedforward_layernorm, attended)
        return x, self.norm(self.mlp(normed, factors), block.post_feedforward_layernorm)[1]


class FastLayers:
    """Takes the place of llama.model.run_layers; `flat` holds the LoRA factors that are being trained, if any are."""

    def __init__(
        self, model: Llama, pieces: Pieces = PLAIN, kernels: bool = False, flat: FlatParameter | None = None,
        recompute: Recompute | None = None,
    ):  # fmt: skip
        scratch = Scratch()
        self.pieces, self.kernels, self.flat, self.recompute = pieces, kernels, flat, recompute
        self.blocks = [FastBlock(block, scratch, pieces, kernels) for block in model.layers]
        self.linears = [linear for block in self.blocks for linear in block.linears]

    def keep(self, blocks: int, dtype: torch.dtype) -> None:
        """Hold the dequantised weights of the first `blocks` blocks for good"""
        for block in self.blocks[:blocks]:
            for linear in block.linears:
                linear.keep(dtype)

    def __call__(self, model: Llama, x: Tensor, layout: Layout, cache=None, at: Tensor | None = None) -> Tensor:
        """(N, C) -> (N, C) float32, or (M, C) at the packed indices `at`"""
        rotary, local = rotary_tables(model.config, model.frequency, layout)
        training = self.flat is not None and torch.is_grad_enabled()
        factors = cast_factors(self.flat, self.linears, model.compute_dtype) if training else {}
        delta = None
        for number, block in enumerate(self.blocks):
            table = rotary if block.block.window is None else local
            rest = layout, table, cache, at if block is self.blocks[-1] else None, factors
            if self.recompute and torch.is_grad_enabled():
                x, delta = self.recompute(number, block, x, delta, *rest)
            else:
                x, delta = block(x, delta, *rest)
        norm = model.norm
        return self.pieces.add_norm(x, delta, norm.weight, norm.eps, norm.dtype)[1]
