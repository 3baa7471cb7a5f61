"""A checkpoint's `config.json` -> LlamaConfig; what this code would have to guess is refused by name.

A family has no class of its own, it is a row of `FAMILIES`: what transformers' code does for a `model_type` without a
key of config.json saying so. A key that the family ignores, or that this code does not compute, is an error and never
a silent default.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from llama.config import LinearRope, LlamaConfig, LongRope, RopeScaling


@dataclass(frozen=True)
class Family:
    """What a `model_type` means beyond the keys of its config.json."""

    bias: str = "config"  # on q, k, v, o as `attention_bias` says; "qkv": on q, k, v; "none"
    qk_norm: bool = False  # RMSNorm of each head of q and k, before the rotation
    norm_offset: bool = False  # RMSNorm multiplies by 1 + weight
    post_norms: bool = False  # sub-layers are normed at both ends
    scaled_embedding: bool = False  # multiplied by sqrt(C)
    fused_projections: bool = False  # the file holds q, k, v as `qkv_proj` and gate, up as `gate_up_proj`
    glu: str = "swiglu"
    tied: bool = False  # where config.json does not say
    explicit_head_dim: bool = False  # C / H would be a guess
    soft_caps: tuple[str, ...] = ()  # keys that config.json must hold, a number or null
    # Layers with a sliding window: "none"; "all" where there is a width; "late": from max_window_layers on where
    # use_sliding_window; "pattern": all but each `pattern`-th. `layer_types` in config.json goes before the last two.
    windows: str = "none"
    pattern: int = 0
    rope_types: tuple[str, ...] = ("default", "llama3", "linear")
    local_rope: bool = False  # layers with a window have a theta of their own


GEMMA = dict(
    norm_offset=True, post_norms=True, scaled_embedding=True, glu="geglu", tied=True, explicit_head_dim=True,
    windows="pattern", rope_types=("default", "linear"),
)  # fmt: skip
FAMILIES = {
    "llama": Family(),  # Llama 2, 3, 3.1, 3.2 and SmolLM2
    "mistral": Family(bias="none", windows="all"),
    "qwen2": Family(bias="qkv", windows="late"),  # Qwen2.5 too
    "qwen3": Family(qk_norm=True, windows="late", explicit_head_dim=True),
    "gemma2": Family(**GEMMA, pattern=2, soft_caps=("attn_logit_softcapping", "final_logit_softcapping")),
    "gemma3_text": Family(**GEMMA, pattern=6, qk_norm=True, soft_caps=("final_logit_softcapping",), local_rope=True),
    "phi3": Family(bias="none", fused_projections=True, windows="all", rope_types=("default", "longrope", "su")),
}
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
# Switches of these families' code that this network does not have, with the values at which they do nothing.
NEUTRAL = {
    "partial_rotary_factor": (None, 1, 1.0),  # Phi-4 mini turns three quarters of a head
    "use_bidirectional_attention": (None, False),
}


def config_from_directory(directory: str | Path) -> LlamaConfig:
    """Raises ValueError that names config.json where it is missing, no JSON, or describes another network."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {directory} is no Hugging Face style model directory")
    try:
        return config_from_dict(json.loads(path.read_text()))
    except ValueError as error:  # json.JSONDecodeError is one too
        raise ValueError(f"{path}: {error}") from None


def config_from_dict(raw: dict) -> LlamaConfig:
    """From Hugging Face's keys, both before and since transformers 5 (which moved rope_theta into `rope_parameters`).

    Raises ValueError in one line that names the key.
    """
    family = FAMILIES.get(raw.get("model_type"))
    if family is None:
        raise ValueError(f"model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        raise ValueError(
            "the checkpoint is already quantised (quantization_config); use the original 16-bit weights"
        )
    _refuse(raw, family)
    try:
        heads, scaling = raw["num_attention_heads"], _rope(raw, family)
        head_dim = raw["head_dim"] if family.explicit_head_dim else raw.get("head_dim")
        head_dim = head_dim or raw["hidden_size"] // heads
        bias = bool(raw.get("attention_bias", False))
        caps = {key: raw[key] for key in family.soft_caps}  # null is a value, a missing key an error
        gemma = family.norm_offset
        return LlamaConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rms_norm_eps=raw["rms_norm_eps"],
            **scaling,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            tie_word_embeddings=raw.get("tie_word_embeddings", family.tied),
            attention_bias=bias or family.bias == "qkv",
            output_bias=bias,
            mlp_bias=raw.get("mlp_bias", False),
            query_pre_attn_scalar=raw["query_pre_attn_scalar"] if gemma else head_dim,
            windows=_windows(raw, family),
            attn_logit_softcapping=caps.get("attn_logit_softcapping"),
            final_logit_softcapping=caps.get("final_logit_softcapping"),
            qk_norm=family.qk_norm,
            norm_offset=family.norm_offset,
            post_norms=family.post_norms,
            scaled_embedding=family.scaled_embedding,
            fused_projections=family.fused_projections,
            glu=family.glu,
        )
    except KeyError as missing:
        raise ValueError(f"config.json lacks {missing}") from None


def _refuse(raw: dict, family: Family) -> None:
    """Raises ValueError for a key that asks for what we, or transformers' code for this family, do not compute."""
    wanted = ACTIVATIONS[family.glu]
    # Gemma's files may hold both keys: transformers reads hidden_activation and ignores hidden_act.
    key = "hidden_activation" if family.glu == "geglu" else "hidden_act"
    if raw.get(key, wanted) != wanted:
        raise ValueError(f"{key} {raw[key]!r} is not supported; supported: {wanted}")
    neutral = dict(NEUTRAL)
    if family.bias != "config":
        neutral |= {"attention_bias": (None, False)}
    if raw["model_type"] != "llama":
        neutral |= {"mlp_bias": (None, False)}
    if "attn_logit_softcapping" not in family.soft_caps:
        neutral |= {"attn_logit_softcapping": (None,)}
    if "final_logit_softcapping" not in family.soft_caps:
        neutral |= {"final_logit_softcapping": (None,)}
    if family.windows == "none":
        neutral |= {"sliding_window": (None,)}
    for key, values in neutral.items():
        if raw.get(key) not in values:
            raise ValueError(f"{key} {raw[key]!r} is not supported for model_type {raw['model_type']}")


def _windows(raw: dict, family: Family) -> tuple[int | None, ...]:
    """The width in tokens of each layer's sliding window, None for full attention."""
    layers, kinds = raw["num_hidden_layers"], raw.get("layer_types")
    if family.windows in ("none", "all"):
        if kinds and len(set(kinds)) > 1:
            raise ValueError(f"mixed layer_types are not supported for model_type {raw['model_type']}")
        # Mistral's first release has a window, later ones say null: a missing key would be a guess.
        width = raw["sliding_window"] if raw["model_type"] == "mistral" else raw.get("sliding_window")
        return (width,) * layers
    if family.windows == "late" and not raw.get("use_sliding_window", False):
        return (None,) * layers  # Qwen's files give a width all the same
    if not kinds and family.windows == "late":
        kinds = ["full_attention" if i < raw["max_window_layers"] else "sliding_attention" for i in range(layers)]
    if not kinds:
        pattern = raw.get("sliding_window_pattern", family.pattern)
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types {kinds!r} is not supported: {layers} of sliding_attention or full_attention")
    return tuple(raw["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)


def _rope(raw: dict, family: Family) -> dict:
    """rope_theta, rope_scaling and local_rope_theta, wherever the release of transformers put them."""
    rope, local_theta = raw.get("rope_parameters") or raw.get("rope_scaling") or {}, None
    if family.local_rope:
        local = rope.get("sliding_attention") or {"rope_theta": raw.get("rope_local_base_freq")}
        rope = rope.get("full_attention") or {"rope_theta": raw.get("rope_theta")} | rope
        if (kind := local.get("rope_type", "default")) != "default":
            raise ValueError(f"rope_type {kind!r} of sliding_attention is not supported; supported: default")
        if not (local_theta := local.get("rope_theta")):
            raise KeyError("rope_local_base_freq")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in family.rope_types:
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(family.rope_types)}")
    if rope.get("partial_rotary_factor") not in NEUTRAL["partial_rotary_factor"]:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported")
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(*(rope[k] for k in RopeScaling.__annotations__))
    elif kind == "linear":
        scaling = LinearRope(rope["factor"])
    elif kind in ("longrope", "su"):
        scaling = _long_rope(raw, rope)
    theta = rope.get("rope_theta") or raw.get("rope_theta") or (None if family.local_rope else 10000.0)
    if not theta:
        raise KeyError("rope_theta")
    return {
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "local_rope_theta": float(local_theta) if local_theta else None,
    }


def _long_rope(raw: dict, rope: dict) -> LongRope:
    """Phi-3's stretching. Its files write the original context outside of rope_scaling, and no `factor`: that is the
    ratio of the two contexts."""
    original = raw.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]
    factor = rope.get("factor") or raw["max_position_embeddings"] / original
    attention = rope.get("attention_factor")
    if attention is None:  # LongRoPE (Ding et al. 2024, arXiv 2402.13753), as in Phi-3's own code
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRope(tuple(rope["short_factor"]), tuple(rope["long_factor"]), original, attention)
