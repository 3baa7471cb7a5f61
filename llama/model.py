"""A Llama (Touvron et al. 2023, arXiv 2302.13971; Llama 3, 2407.21783) in plain PyTorch, one class for all.

    python -m pytest tests/test_model.py       # logits, gradients and cached decoding against transformers

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

from llama.attention import KVCache, Layout, attend
from llama.config import LlamaConfig
from llama.rope import apply_rotary, inverse_frequencies, rotary_table

HEAD_CHUNK = 16384  # rows of lm_head in float32 at a time: 256 MiB at C = 4096, where the whole head would take 2 GiB


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32.  (N, C) -> (N, C) float32  (Zhang and Sennrich 2019,
    1910.07467)"""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.  (N, C) -> (N, C)"""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, layout: Layout, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        q, k = apply_rotary(q, *rotary).to(x.dtype), apply_rotary(k, *rotary).to(x.dtype)
        return self.o_proj(attend(q, k, v, layout, cache, self.layer))  # (N, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).  (N, C) -> (N, C)  (Shazeer 2020, arXiv 2002.05202)"""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        sizes, bias = (config.hidden_size, config.intermediate_size), config.mlp_bias
        self.gate_proj = nn.Linear(*sizes, bias=bias)
        self.up_proj = nn.Linear(*sizes, bias=bias)
        self.down_proj = nn.Linear(*sizes[::-1], bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): x stays float32, what goes into the linears is in `dtype`."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, dtype, layout, rotary, cache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x).to(dtype), layout, rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x).to(dtype))


class HeadFunction(torch.autograd.Function):
    """logits = x W^T in float32, for a frozen W (V, C) of any dtype: cast chunk by chunk, never whole.  (M, C) -> (M,
    V)

    Float32 because the answer's logits lie near 36, where a bfloat16 step is 0.25: prices would move by it.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return torch.cat([x @ rows.float().T for rows in weight.split(HEAD_CHUNK)], dim=1)  # (M, V)

    @staticmethod
    def backward(ctx, g):
        (weight,) = ctx.saved_tensors
        grad = 0
        for part, rows in zip(g.split(HEAD_CHUNK, dim=1), weight.split(HEAD_CHUNK), strict=True):
            grad = grad + part @ rows.float()  # (M, C)
        return grad, None


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
        # Not in state_dict, and computed on the CPU even when the rest is built on `meta`.
        with torch.device("cpu"):
            self.register_buffer("frequency", inverse_frequencies(config), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, C), shared with the embedding when tied"""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden_states(self, tokens: Tensor, layout: Layout, cache: KVCache | None = None) -> Tensor:
        """(N,) token ids -> (N, C) float32, normed: what the head multiplies"""
        rotary = rotary_table(self.frequency, layout.positions)
        x = self.embed_tokens(tokens).float()  # (N, C)
        for block in self.layers:
            x = block(x, self.compute_dtype, layout, rotary, cache)
        return self.norm(x)

    def forward(self, tokens: Tensor, layout: Layout, at: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Next-token logits after the tokens at the packed indices `at` (all when None).  (N,) -> (M, V) float32

        Ask only for the positions needed: at V = 128,256 the logits of 2,240 tokens would take 1.1 GB, forward alone.
        """
        x = self.hidden_states(tokens, layout, cache)
        return HeadFunction.apply(x if at is None else x[at], self.head_weight)

    @torch.no_grad()
    def next_token(self, x: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (M, C) -> natural log-probabilities of the tokens `choices` (M, k), and the likeliest of all
        (M,).

        The softmax runs over the whole vocabulary, a few rows at a time, so that (M, V) never exists.
        """
        log_probs, top = [], []
        for rows in x.split(max(1, 2**24 // self.config.vocab_size)):  # 64 MiB of float32 logits
            logits = HeadFunction.apply(rows, self.head_weight)
            log_probs.append(logits[:, choices] - logits.logsumexp(dim=-1, keepdim=True))
            top.append(logits.argmax(dim=-1))
        return torch.cat(log_probs), torch.cat(top)

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]], choices: Tensor) -> tuple[Tensor, Tensor, KVCache]:
        """Read B prompts. What comes next, as in `next_token`: (B, k) and (B,), and the cache to go on from."""
        device = self.embed_tokens.weight.device
        cache = KVCache([len(p) for p in prompts], len(self.layers), device)
        tokens = torch.tensor([t for p in prompts for t in p], device=device)  # (N,)
        x = self.hidden_states(tokens, cache.layout, cache)[cache.layout.last]  # (B, C)
        return *self.next_token(x, choices), cache

    @torch.no_grad()
    def extend(self, cache: KVCache, tokens: Tensor, parents: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Add n tree nodes a row, tokens (B, n), parents (B, n) as in KVCache.grow. What follows each: (B, n, k), (B,
        n)"""
        cache.grow(parents)
        log_probs, top = self.next_token(self.hidden_states(tokens.reshape(-1), cache.layout, cache), choices)
        return log_probs.view(*tokens.shape, -1), top.view(tokens.shape)
