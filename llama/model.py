"""A Llama (Touvron et al. 2023, arXiv 2302.13971; Llama 3, 2407.21783) in plain PyTorch, one class for all: Mistral,
Qwen2, Qwen3, Gemma 2, Gemma 3 and Phi-3 are rows of switches in llama/families.py.

    python -m pytest tests/llama/test_model.py       # logits, gradients and cached decoding against transformers
    python -m pytest tests/llama/test_families.py    # the same for each family, and each switch turned off

Shapes, here and everywhere: B batch, T tokens, N packed tokens, C hidden, H heads, K kv heads, D head_dim, V
vocabulary, R rank, O out, I in; F inside of the MLP, M positions asked for.

Names are Hugging Face's, so that loading is "strip `model.`". In Meta's own code the same are called:

    embed_tokens    tok_embeddings      q_proj k_proj v_proj o_proj     wq wk wv wo
    input_layernorm attention_norm      gate_proj up_proj down_proj     w1 w3 w2
    post_attention_layernorm ffn_norm   norm, lm_head                   norm, output

Precision: the residual stream is float32 and every norm is computed in float32; each linear runs in `compute_dtype`
(bfloat16 or float32); rotary angles, logits and loss are float32. See the table in docs/reading.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.attention import Layout, Scores, attend
from llama.config import LlamaConfig
from llama.logits import HeadFunction
from llama.rope import all_frequencies, apply_rotary, rotary_tables


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in float32; the result is in `dtype`.

    (Zhang and Sennrich 2019, arXiv 1910.07467). Gemma's 1 + weight is made when the weight is loaded (weights.py).
    """

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.dtype = eps, dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (Ainslie et al. 2023, arXiv 2305.13245).  (N, C) -> (N, C)"""

    def __init__(self, config: LlamaConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.layer, self.head_dim, self.kv_heads = layer, config.head_dim, config.num_key_value_heads
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:  # each head by itself, over D
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        scale = config.query_pre_attn_scalar**-0.5
        self.scores = Scores(scale, config.attn_logit_softcapping, config.windows[layer])

    def forward(self, x: Tensor, layout: Layout, rotary: tuple[Tensor, Tensor], cache=None) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, *rotary).to(v.dtype), apply_rotary(k, *rotary).to(v.dtype)
        return self.o_proj(attend(q, k, v, layout, cache, self.layer, self.scores))  # (N, H * D) -> (N, C)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))  (Shazeer 2020, arXiv 2002.05202).  (N, C) -> (N, C)

    act is SiLU; in Gemma it is GELU, by the approximation with tanh that Gemma learnt with.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        sizes, bias = (config.hidden_size, config.intermediate_size), config.mlp_bias
        self.gate_proj = nn.Linear(*sizes, bias=bias)
        self.up_proj = nn.Linear(*sizes, bias=bias)
        self.down_proj = nn.Linear(*sizes[::-1], bias=bias)
        self.gelu = config.glu == "geglu"

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)  # (N, F)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


class Block(nn.Module):
    """x = x + attention(norm(x)), then x = x + mlp(norm(x)): x is float32, the linears compute in `dtype`.

    Gemma norms what a sub-layer gives, too: x = x + norm(attention(norm(x))). Beware of the names: what stands before
    the MLP is `post_attention_layernorm` in Llama and `pre_feedforward_layernorm` in Gemma.
    """

    def __init__(self, config: LlamaConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, dtype)
        self.self_attn = Attention(config, layer, dtype)
        self.post_attention_layernorm = RMSNorm(size, eps, dtype)
        self.mlp = MLP(config)
        self.post_norms, self.window = config.post_norms, config.windows[layer]
        if self.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(size, eps, dtype)
            self.post_feedforward_layernorm = RMSNorm(size, eps, dtype)

    def forward(self, x: Tensor, layout: Layout, rotary: tuple[Tensor, Tensor], cache=None) -> Tensor:  # (N, C)
        if self.post_norms:
            x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), layout, rotary, cache))
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + self.self_attn(self.input_layernorm(x), layout, rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def run_layers(model: "Llama", x: Tensor, layout: Layout, cache=None, at: Tensor | None = None) -> Tensor:
    """The blocks one after the other, then the last norm.  (N, C) -> (N, C) float32, or (M, C) at the indices `at`"""
    rotary, local = rotary_tables(model.config, model.frequency, layout)
    for block in model.layers:
        x = block(x, layout, rotary if block.window is None else local, cache)
    return model.norm(x if at is None else x.index_select(0, at))


class Llama(nn.Module):
    """The whole network. Build it under `torch.device("meta")` and fill it with `llama.weights.load_weights`: the
    blocks' `nn.Linear` are shapes only, which it replaces by quantised linears (quant.quantise.quantise_linear).

    `run_layers` is the one door for another way through the same layers: fast/install.py puts fast/layers.py there.
    """

    def __init__(self, config: LlamaConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (Block(config, layer, compute_dtype) for layer in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.run_layers = run_layers
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, torch.float32)
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

    def hidden_states(self, tokens: Tensor, layout: Layout, cache=None, at: Tensor | None = None) -> Tensor:
        """(N,) token ids -> (N, C) float32, normed: what the head multiplies; (M, C) at the packed indices `at`.
        `cache` is a llama.cache.KVCache."""
        x = self.embed_tokens(tokens).float()  # (N, C)
        x = x * self.embedding_scale if self.config.scaled_embedding else x
        return self.run_layers(self, x, layout, cache, at)

    def head(self, x: Tensor) -> Tensor:
        """Logits, cap * tanh(logits / cap) in Gemma 2.  (M, C) float32 -> (M, V) float32"""
        logits = HeadFunction.apply(x, self.head_weight, self.head_scale)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens: Tensor, layout: Layout, at: Tensor | None = None, cache=None) -> Tensor:
        """Next-token logits after the tokens at the packed indices `at` (all when None).  (N,) -> (M, V) float32

        Ask only for the positions needed: at V = 128,256 the logits of 2,240 tokens would take 1.1 GB, forward alone.
        """
        return self.head(self.hidden_states(tokens, layout, cache, at))
