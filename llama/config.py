"""LlamaConfig: what the network reads. families.py makes one from a checkpoint's config.json.

    config = config_from_directory(model)        # llama/families.py
    model = Llama(config)                        # llama/model.py

Names of sizes are Hugging Face's. A number that a model family fixes in its code is a field here too, so that the
network asks for no family by name.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the context (`rope_type: llama3`); see rope.py."""

    factor: float  # how much longer the context becomes
    low_freq_factor: float  # wavelengths above original / low_freq_factor are divided by `factor`
    high_freq_factor: float  # wavelengths below original / high_freq_factor stay
    original_max_position_embeddings: int  # tokens


@dataclass(frozen=True)
class LinearRope:
    """Every angle divided by `factor` (`rope_type: linear`, in Gemma 3 from 4B on)."""

    factor: float


@dataclass(frozen=True)
class LongRope:
    """Phi-3's stretching (`rope_type: longrope`, once `su`): a divisor for each pair of numbers; see rope.py."""

    short_factor: tuple[float, ...]  # (D/2,) for sequences within the original context
    long_factor: tuple[float, ...]  # (D/2,) for longer ones
    original_max_position_embeddings: int  # tokens
    attention_factor: float  # cos and sin are multiplied by it, for short sequences too


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of one network. Raises ValueError, in one line, where they do not fit together."""

    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # width of the gated MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K, divides H
    head_dim: int  # D, even; C / H unless the checkpoint says otherwise
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | LinearRope | LongRope | None
    max_position_embeddings: int  # tokens
    tie_word_embeddings: bool  # lm_head shares embed_tokens
    attention_bias: bool  # biases on q, k, v
    output_bias: bool  # bias on o
    mlp_bias: bool  # biases on gate, up, down
    query_pre_attn_scalar: float  # scores are divided by its root; D unless the checkpoint says otherwise
    windows: tuple[int | None, ...]  # for each layer, how many tokens a token sees, itself included; None: all
    local_rope_theta: float | None  # theta of the layers with a window, where it differs
    attn_logit_softcapping: float | None  # scores s become cap * tanh(s / cap)
    final_logit_softcapping: float | None  # the same for logits
    qk_norm: bool  # RMSNorm of each head of q and k, before the rotation
    norm_offset: bool  # RMSNorm multiplies by 1 + weight
    post_norms: bool  # sub-layers are normed at both ends
    scaled_embedding: bool  # embeddings are multiplied by sqrt(C)
    fused_projections: bool  # the file holds q, k, v as `qkv_proj` and gate, up as `gate_up_proj`
    glu: str  # "swiglu" or "geglu"

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if isinstance(self.rope_scaling, LongRope):
            for name in ("short_factor", "long_factor"):
                if (n := len(getattr(self.rope_scaling, name))) != self.head_dim // 2:
                    raise ValueError(f"{name} has {n} numbers, head_dim {self.head_dim} needs {self.head_dim // 2}")
