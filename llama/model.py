"""A Llama (Touvron et al. 2023, arXiv 2302.13971; Llama 3, 2407.21783) in plain PyTorch, one class for all: Mistral,
Qwen2, Qwen3, Gemma 2, Gemma 3 and Phi-3 are rows of switches in llama/config.py.

    python -m pytest tests/test_model.py       # logits, gradients and cached decoding against transformers
    python -m pytest tests/test_families.py    # the same for each family, and each switch turned off

Shapes, here and everywhere: B batch, T tokens, N packed tokens, C hidden, H heads, K kv heads, D head_dim, V
vocabulary, R rank, O out, I in.

Names are Hugging Face's, so that loading is "strip `model.`". In Meta's own code the same are called:

    embed_tokens    tok_embeddings      q_proj k_proj v_proj o_proj     wq wk wv wo
    input_layernorm attention_norm      gate_proj up_proj down_proj     w1 w3 w2
    post_attention_layernorm ffn_norm   norm, lm_head                   norm, output

Precision: the residual stream is float32 and every norm is computed in float32; each linear runs in `compute_dtype`
(bfloat16 or float32); rotary angles, logits and loss are float32. See the table in README.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.attention import KVCache, Layout, Scores, attend
from llama.config import LlamaConfig
from llama.rope import all_frequencies, apply_rotary, changes_with_length, rotary_tables

HEAD_CHUNK = 16384  # rows of lm_head at a time: 256 MiB in float32 at C = 4096, where the whole head would take 2 GiB


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + delta in float32, and its RMSNorm, x / sqrt(mean(x^2) + eps) * weight, in `dtype`.  (N, C) -> (N, C) twice

    (Zhang and Sennrich 2019, arXiv 1910.07467). `delta` is what the last sub-layer adds to the residual stream.
    """
    x = x if delta is None else x + delta
    return x, F.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)


def rotate_heads(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k turned to their positions, v as it is.  (N, (H + 2K) D) -> (N, H, D), (N, K, D), (N, K, D)"""
    qkv = qkv.unflatten(-1, (-1, head_dim))  # (N, H + 2K, D)
    turned = apply_rotary(qkv[:, :-kv_heads], cos, sin).to(qkv.dtype)  # (N, H + K, D)
    return turned[:, :-kv_heads].contiguous(), turned[:, -kv_heads:].contiguous(), qkv[:, -kv_heads:].contiguous()


def attention(
    qkv, cos, sin, kv_heads: int, head_dim: int, layout: Layout, cache: KVCache | None, layer: int, scores=Scores()
) -> Tensor:
    """Heads turned, then attention within each sequence.  (N, (H + 2K) D) -> (N, H * D)"""
    return attend(*rotate_heads(qkv, cos, sin, kv_heads, head_dim), layout, cache, layer, scores)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.  (N, 2F) -> (N, F)  (Shazeer 2020, arXiv 2002.05202)"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, by the approximation with tanh that Gemma learnt with.  (N, 2F) -> (N, F)"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


# What is no matrix product. `Llama.fuse_pieces` puts one kernel each in their place.
PIECES = {"add_norm": add_norm, "attention": attention, "swiglu": swiglu, "geglu": geglu}


class RMSNorm(nn.Module):
    """Holds the weight, into which llama/weights.py has put the 1 of Gemma's 1 + weight; see add_norm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.pieces = eps, PIECES

    def forward(self, x: Tensor, delta: Tensor | None = None, dtype: torch.dtype = torch.float32):
        return self.pieces["add_norm"](x, delta, self.weight, self.eps, dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.  (N, C) -> (N, C), or (M, C) at the packed indices `at`"""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.kv_heads = layer, config.head_dim, config.num_key_value_heads
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        bias, self.pieces = config.attention_bias, PIECES
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm, self.widths = config.qk_norm, [width, kv_width, kv_width]
        scale, window = config.query_pre_attn_scalar**-0.5, config.windows[layer]
        self.scores = Scores(scale, config.attn_logit_softcapping, window)

    def qkv(self, x: Tensor) -> Tensor:  # (N, C) -> (N, (H + 2K) D); quant/fast.py puts one product in its place
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    def norm_heads(self, qkv: Tensor) -> Tensor:
        """Each head of q and of k normed by itself, over D.  (N, (H + 2K) D) -> the same"""
        q, k, v = qkv.split(self.widths, dim=-1)

        def norm(heads: Tensor, by: RMSNorm) -> Tensor:
            return by(heads.reshape(-1, self.head_dim), dtype=heads.dtype)[1].view(heads.shape)

        return torch.cat([norm(q, self.q_norm), norm(k, self.k_norm), v], dim=-1)

    def forward(self, x: Tensor, layout: Layout, rotary, cache: KVCache | None, at: Tensor | None) -> Tensor:
        qkv, heads = self.qkv(x), (self.kv_heads, self.head_dim)
        qkv = self.norm_heads(qkv) if self.qk_norm else qkv
        y = self.pieces["attention"](qkv, *rotary, *heads, layout, cache, self.layer, self.scores)  # (N, H * D)
        return self.o_proj(y if at is None else y.index_select(0, at))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), or gelu.  (N, C) -> (N, C)"""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        sizes, bias = (config.hidden_size, config.intermediate_size), config.mlp_bias
        self.gate_proj = nn.Linear(*sizes, bias=bias)
        self.up_proj = nn.Linear(*sizes, bias=bias)
        self.down_proj = nn.Linear(*sizes[::-1], bias=bias)
        self.pieces, self.glu = PIECES, config.glu

    def gate_up(self, x: Tensor) -> Tensor:  # (N, C) -> (N, 2F); quant/fast.py puts one product in its place
        return torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.pieces[self.glu](self.gate_up(x)))


class Block(nn.Module):
    """x = x + attention(norm(x)), then x = x + mlp(norm(x)): x is float32, what goes into the linears is in `dtype`.

    The second sum is left to the next norm, which reads both terms anyway: a block takes and returns (x, delta), whose
    sum is the residual stream. In the last block only the rows `at` go on after attention: nobody reads the others.

    Gemma norms what a sub-layer gives, too: x = x + norm(attention(norm(x))). Beware of the names: what stands before
    the MLP is `post_attention_layernorm` in Llama and `pre_feedforward_layernorm` in Gemma.
    """

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.post_norms, self.window = config.post_norms, config.windows[layer]
        if self.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, delta, dtype, layout, rotary, cache=None, at=None) -> tuple[Tensor, Tensor]:
        x, normed = self.input_layernorm(x, delta, dtype)  # (N, C)
        attended = self.self_attn(normed, layout, rotary, cache, at)  # (N, C) or (M, C)
        x = x if at is None else x.index_select(0, at)
        if not self.post_norms:
            x, normed = self.post_attention_layernorm(x, attended, dtype)
            return x, self.mlp(normed)
        attended = self.post_attention_layernorm(attended, dtype=dtype)[1]
        x, normed = self.pre_feedforward_layernorm(x, attended, dtype)
        return x, self.post_feedforward_layernorm(self.mlp(normed), dtype=dtype)[1]


def exact_terms(x: Tensor) -> Tensor:
    """float32 as the sum of three bfloat16 terms, 8 bits of the 24 each.  (M, C) -> (3M, C) bfloat16"""
    high = x.bfloat16()
    middle = (x - high).bfloat16()
    return torch.cat([high, middle, (x - high - middle).bfloat16()])


def head_product(x: Tensor, rows: Tensor) -> Tensor:
    """x rows^T, accumulated in float32.  (M, C) float32, (n, C) -> (M, n) float32

    The tensor cores multiply bfloat16 only, but exactly, and add in float32: three products of x's terms give the
    float32 product 20 times sooner than the GPU's float32 units.
    """
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(exact_terms(x), rows.bfloat16().T, out_dtype=torch.float32).view(3, len(x), -1).sum(0)
    return x @ rows.float().T


class HeadFunction(torch.autograd.Function):
    """logits = x W^T in float32, for a frozen W (V, C): cast chunk by chunk, never whole.  (M, C) -> (M, V)

    Float32 because the answer's logits lie near 36, where a bfloat16 step is 0.25: prices would move by it.
    W is bfloat16, float32, or int8 with one `scale` (V,) a row.
    """

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.weight, ctx.scale = weight, scale
        logits = torch.cat([head_product(x, rows) for rows in weight.split(HEAD_CHUNK)], dim=1)  # (M, V)
        return logits if scale is None else logits.mul_(scale)

    @staticmethod
    def backward(ctx, g):
        grad, g = 0, g if ctx.scale is None else g * ctx.scale
        for part, rows in zip(g.split(HEAD_CHUNK, dim=1), ctx.weight.split(HEAD_CHUNK), strict=True):
            grad = grad + head_product(part, rows.T)  # (M, C)
        return grad, None, None


class Llama(nn.Module):
    """The whole network. Build it under `torch.device("meta")` and fill it with `llama.weights.load_weights`."""

    def __init__(self, config: LlamaConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_scale = None  # (V,) float32 where lm_head is int8 (quant.int8.quantise_weight)
        # Not in state_dict, and computed on the CPU even when the rest is built on `meta`.
        with torch.device("cpu"):
            self.register_buffer("frequency", all_frequencies(config), persistent=False)
            # Gemma's sqrt(C), rounded as it was in training: 55.5 in bfloat16 where 3072^0.5 is 55.43.
            scale = torch.tensor(config.hidden_size**0.5 if config.scaled_embedding else 1.0).to(compute_dtype)
            self.embedding_scale = scale.item()

    @property
    def device(self) -> torch.device:
        return self.frequency.device

    @property
    def head_weight(self) -> Tensor:
        """(V, C), shared with the embedding when tied"""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def fuse_pieces(self) -> None:
        """Each of PIECES as one kernel, from llama/fused.py (CUDA and Triton)"""
        from fast.norm_glu import FUSED

        for module in self.modules():
            if hasattr(module, "pieces"):
                module.pieces = FUSED

    def hidden_states(
        self, tokens: Tensor, layout: Layout, cache: KVCache | None = None, at: Tensor | None = None
    ) -> Tensor:
        """(N,) token ids -> (N, C) float32, normed: what the head multiplies; (M, C) at the packed indices `at`"""
        full, local = rotary_tables(self.config, self.frequency, layout)
        x, delta = self.embed_tokens(tokens).float(), None  # (N, C)
        x = x * self.embedding_scale if self.config.scaled_embedding else x
        for block in self.layers:
            last, rotary = block is self.layers[-1], full if block.window is None else local
            x, delta = self.run_block(block, x, delta, self.compute_dtype, layout, rotary, cache, at if last else None)
        return self.norm(x, delta)[1]

    def run_block(self, block: Block, *args):
        """Where a training step may put recomputation in place of keeping what backward needs"""
        return block(*args)

    def head(self, x: Tensor) -> Tensor:
        """Logits, cap * tanh(logits / cap) in Gemma 2.  (M, C) float32 -> (M, V) float32"""
        logits = HeadFunction.apply(x, self.head_weight, self.head_scale)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens: Tensor, layout: Layout, at: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Next-token logits after the tokens at the packed indices `at` (all when None).  (N,) -> (M, V) float32

        Ask only for the positions needed: at V = 128,256 the logits of 2,240 tokens would take 1.1 GB, forward alone.
        """
        return self.head(self.hidden_states(tokens, layout, cache, at))

    @torch.no_grad()
    def next_token(self, x: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (M, C) -> natural log-probabilities of the tokens `choices` (M, k), and the likeliest of all
        (M,).

        The softmax runs over the whole vocabulary, a few rows at a time, so that (M, V) never exists.
        """
        log_probs, top = [], []
        for rows in x.split(max(1, 2**26 // self.config.vocab_size)):  # 256 MiB of float32 logits
            logits = self.head(rows)
            log_probs.append(logits[:, choices] - logits.logsumexp(dim=-1, keepdim=True))
            top.append(logits.argmax(dim=-1))
        return torch.cat(log_probs), torch.cat(top)

    @torch.no_grad()
    def read_prefix(self, tokens: list[int]) -> KVCache:
        """What many prompts begin with, read once; see `prefill`."""
        cache = KVCache([len(tokens)], len(self.layers), self.device)
        self.hidden_states(torch.tensor(tokens, device=self.device), cache.layout, cache, cache.layout.last)
        cache.tokens = tokens
        return cache

    @torch.no_grad()
    def prefill(
        self, prompts: list[list[int]], choices: Tensor, prefix: KVCache | None = None
    ) -> tuple[Tensor, Tensor, KVCache]:
        """Read B prompts (after `prefix`, where given). What comes next, as in `next_token`: (B, k) and (B,), and the
        cache to go on from; its `states` (B, C) are what the head reads at their ends."""
        longest = max(map(len, prompts))
        if prefix and changes_with_length(self.config, len(prefix.tokens), len(prefix.tokens) + longest):
            prompts, prefix = [prefix.tokens + p for p in prompts], None  # its keys would be turned otherwise
        cache = KVCache([len(p) for p in prompts], len(self.layers), self.device, prefix)
        tokens = torch.tensor([t for p in prompts for t in p], device=self.device)  # (N,)
        x = cache.states = self.hidden_states(tokens, cache.layout, cache, cache.layout.last)  # (B, C)
        return *self.next_token(x, choices), cache

    @torch.no_grad()
    def extend(self, cache: KVCache, tokens: Tensor, parents: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Add n tree nodes a row, tokens (B, n), parents (B, n) as in KVCache.grow. What follows each: (B, n, k), (B,
        n)"""
        cache.grow(parents)
        log_probs, top = self.next_token(self.hidden_states(tokens.reshape(-1), cache.layout, cache), choices)
        return log_probs.view(*tokens.shape, -1), top.view(tokens.shape)
