"""What a GGUF file says about the network -> config.json. read.py converts the rest.

An architecture of llama.cpp is a row of `ARCHITECTURES`. Its loader has constants in its code that the files therefore
do not hold; they are here too.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from llama.families import config_from_dict
from llama.rope import inverse_frequencies

QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """What `general.architecture` means: `model_type` in config.json, transformers' class, names that BLOCK lacks."""

    model_type: str
    causal_lm: str
    names: dict[str, str] = field(default_factory=dict)
    interleaved: bool = False  # rows of q and k
    norm_offset: bool = False  # norms hold 1 + weight
    gemma_27b: int = 0  # how many layers Gemma's 27B has, which alone scales its scores by C / H


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),  # Mistral too, which may have a window
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", QK_NORMS),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", GEMMA_NORMS, norm_offset=True, gemma_27b=46),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", QK_NORMS | GEMMA_NORMS, norm_offset=True, gemma_27b=62
    ),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM", {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    ),
}
SOFT_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # Gemma 2's


def architecture_of(fields: dict) -> Architecture:
    """Raises ValueError that names an architecture which is not in the table."""
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def config_from_gguf(fields: dict, tensors: dict) -> dict:
    """config.json as a dict, from GGUF metadata and the tensors by name (of which some are configuration).

    Raises ValueError that names what is missing or not supported.
    """
    architecture, prefix = architecture_of(fields), fields["general.architecture"] + "."
    given = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    try:
        heads, hidden = int(given["attention.head_count"]), int(given["embedding_length"])
        rotary = int(given.get("rope.dimension_count", given.get("attention.key_length", hidden // heads)))
        # A llama file may name its head_dim by this alone.
        head_dim = int(given.get("attention.key_length", rotary if architecture.interleaved else hidden // heads))
        if {rotary, int(given.get("attention.value_length", head_dim))} != {head_dim}:
            raise ValueError(f"rope.dimension_count and attention.value_length must be head_dim, {head_dim}")
        config = {
            "architectures": [architecture.causal_lm],
            "model_type": architecture.model_type,
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "hidden_size": hidden,
            "intermediate_size": int(given["feed_forward_length"]),
            "num_hidden_layers": int(given["block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(given.get("attention.head_count_kv", heads)),
            "head_dim": head_dim,
            "rms_norm_eps": round(float(given["attention.layer_norm_rms_epsilon"]), 12),
            "rope_theta": float(given.get("rope.freq_base", 10000.0)),
            "max_position_embeddings": int(given["context_length"]),
            "tie_word_embeddings": "output.weight" not in tensors,
            "torch_dtype": "float32",
        }
        if (kind := given.get("rope.scaling.type", "none")) != "none":
            config["rope_scaling"] = {"rope_type": kind, "factor": float(given["rope.scaling.factor"])}
        if architecture.norm_offset:
            config |= _gemma(architecture, given, config)
        elif window := given.get("attention.sliding_window"):
            config["sliding_window"] = int(window)
            config["model_type"] = "mistral" if architecture.interleaved else architecture.model_type
        if architecture.model_type == "phi3":
            config |= _phi3(given, tensors)
    except KeyError as missing:
        raise ValueError(f"metadata lacks {prefix}{missing.args[0]}") from None
    except TypeError:  # in files of models that were pruned, or whose layers differ
        lists = ", ".join(prefix + key for key, value in given.items() if isinstance(value, list))
        raise ValueError(f"a number for each layer is not supported, one for all of them is: {lists}") from None
    if "rope_freqs.weight" in tensors:
        config["rope_scaling"] = _llama31(_numbers(tensors["rope_freqs.weight"]), config)
    config_from_dict(config)  # what cannot be run is refused before any weight is read
    return config


def _numbers(tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(tensor.data, dtype=np.float32))


def _gemma(architecture: Architecture, given: dict, config: dict) -> dict:
    """Gemma's keys of config.json, with llama.cpp's constants where the file does not have them."""
    wide = config["num_hidden_layers"] == architecture.gemma_27b
    scalar = config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    second = architecture.model_type == "gemma2"
    pattern = given.get("attention.sliding_window_pattern", 2 if second else 6)
    if isinstance(pattern, list):  # by layer, in newer files
        kinds = {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    else:
        kinds = {"sliding_window_pattern": int(pattern)}
    caps = {key: given.get(key, default if second else None) for key, default in SOFT_CAPS.items()}
    local = {} if second else {"rope_local_base_freq": float(given.get("rope.freq_base_swa", 10000.0))}
    window = {"sliding_window": int(given["attention.sliding_window"])}
    return window | kinds | caps | local | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar}


def _phi3(given: dict, tensors: dict) -> dict:
    """LongRoPE's two lists of factors, which are tensors in a GGUF file; nothing where it has none."""
    if "rope_factors_long.weight" not in tensors:
        return {}
    rope = {f"{name}_factor": _numbers(tensors[f"rope_factors_{name}.weight"]).tolist() for name in ("short", "long")}
    if "rope.scaling.attn_factor" in given:
        rope["attention_factor"] = float(given["rope.scaling.attn_factor"])
    original = int(given["rope.scaling.original_context_length"])
    return {"rope_scaling": {"rope_type": "longrope", **rope}, "original_max_position_embeddings": original}


def _llama31(divisors: torch.Tensor, config: dict) -> dict:
    """Llama 3.1's five numbers of `rope_scaling`. Raises ValueError where they do not give the file's divisors."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = inverse_frequencies(config_from_dict(config))
    if not torch.allclose(
        inverse_frequencies(config_from_dict(config | {"rope_scaling": scaling})), plain / divisors, rtol=1e-3
    ):
        raise ValueError("rope_freqs.weight is not Llama 3.1's scaling of an 8,192 token context")
    return scaling
