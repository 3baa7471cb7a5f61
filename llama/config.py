"""What a checkpoint's `config.json` says about the network; anything this code would have to guess is refused by
name."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the context (`rope_type: llama3`); see rope.py."""

    factor: float  # how much longer the context becomes
    low_freq_factor: float  # wavelengths above original / low_freq_factor are divided by `factor`
    high_freq_factor: float  # wavelengths below original / high_freq_factor stay
    original_max_position_embeddings: int  # tokens


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # width of the SwiGLU
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K, divides H
    head_dim: int  # D, even; C / H unless the checkpoint says otherwise
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int  # tokens
    tie_word_embeddings: bool  # lm_head shares embed_tokens
    attention_bias: bool  # biases on q, k, v, o
    mlp_bias: bool  # biases on gate, up, down

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @staticmethod
    def from_dict(raw: dict) -> "LlamaConfig":
        """Hugging Face's keys, both before and since transformers 5 (which moved rope_theta into `rope_parameters`)."""
        if raw.get("model_type") != "llama":
            raise ValueError(f"model_type {raw.get('model_type')!r} is not supported; supported: llama")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
        if raw.get("quantization_config"):
            raise ValueError(
                "the checkpoint is already quantised (quantization_config); use the original 16-bit weights"
            )
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ValueError(f"rope_type {kind!r} is not supported; supported: default, llama3")
        try:
            heads = raw["num_attention_heads"]
            return LlamaConfig(
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                rms_norm_eps=raw["rms_norm_eps"],
                rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
                rope_scaling=RopeScaling(*(rope[k] for k in RopeScaling.__annotations__)) if kind == "llama3" else None,
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                attention_bias=raw.get("attention_bias", False),
                mlp_bias=raw.get("mlp_bias", False),
            )
        except KeyError as missing:
            raise ValueError(f"config.json lacks {missing}") from None

    @staticmethod
    def from_directory(directory: str | Path) -> "LlamaConfig":
        """Raises ValueError that names the file when it is missing, no JSON, or describes another network."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: {directory} is no Hugging Face style model directory")
        try:
            return LlamaConfig.from_dict(json.loads(path.read_text()))
        except ValueError as error:  # json.JSONDecodeError is one too
            raise ValueError(f"{path}: {error}") from None
