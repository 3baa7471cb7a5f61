"""The config.json of every shape that the benchmarks know.

FAMILIES hold what the published files say about the network's sizes and what it computes, each from
`https://huggingface.co/ID/blob/main/config.json` with its id in PUBLISHED. They were written down from memory, without
a look at the pages: what stands for them is that transformers' models built from them have exactly as many parameters
as were published (tests/pipeline/test_benchmarks_families.py).
"""

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def llama3_rope(factor: float) -> dict:
    """Llama 3.1 stretches the context 8 times, 3.2 (1B and 3B) 32 times"""
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


PHI3 = {  # the 4k releases: the 128k ones differ in the rotary factors alone
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 32064,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "pad_token_id": 32000,
}
PUBLISHED = {  # name -> id on the hub
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "gemma-2-9b": "google/gemma-2-9b",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi-3-medium": "microsoft/Phi-3-medium-4k-instruct",
}
FAMILIES = {
    "llama-3.2-1b": LLAMA
    | dict(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, intermediate_size=8192, head_dim=64,
        tie_word_embeddings=True, rope_scaling=llama3_rope(32.0),
    ),
    "llama-3.2-3b": LLAMA
    | dict(
        hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, intermediate_size=8192,
        tie_word_embeddings=True, rope_scaling=llama3_rope(32.0),
    ),
    "llama-3.1-8b": LLAMA
    | dict(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336,
        tie_word_embeddings=False, rope_scaling=llama3_rope(8.0),
    ),
    "qwen2.5-7b": dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=152064, hidden_size=3584,
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0, max_position_embeddings=131072,
        use_sliding_window=False, sliding_window=131072, max_window_layers=28, tie_word_embeddings=False,
    ),
    "gemma-2-9b": dict(  # tied, though its file does not say so: Gemma's default
        model_type="gemma2", architectures=["Gemma2ForCausalLM"], vocab_size=256000, hidden_size=3584,
        num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8, intermediate_size=14336, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=8192,
        attention_bias=False, sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "phi-3-mini": PHI3
    | dict(
        hidden_size=3072, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=8192
    ),
    "phi-3-medium": PHI3
    | dict(
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=10, intermediate_size=17920
    ),
}  # fmt: skip


def tiny(config: dict) -> dict:
    """The same switches on three layers of 64, to run on a CPU; windows shorter than the benchmark's sequences."""
    grouped = config["num_key_value_heads"] < config["num_attention_heads"]
    small = dict(
        vocab_size=1500, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, head_dim=16,
        num_key_value_heads=2 if grouped else 4, sliding_window=64, pad_token_id=0,
    )  # fmt: skip
    return config | {key: value for key, value in small.items() if key in config}


SHAPES = FAMILIES | {f"{name}-tiny": tiny(config) for name, config in FAMILIES.items()}
SHAPES |= {
    "8b": FAMILIES["llama-3.1-8b"],
    "14b": LLAMA  # Phi-3-medium's sizes as a Llama, whose unfused linears the peers can train
    | dict(
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=10, intermediate_size=17920,
        vocab_size=32064, tie_word_embeddings=False, rope_scaling=llama3_rope(8.0),
    ),
    "3b": FAMILIES["llama-3.2-3b"],
    "smollm2": LLAMA  # SmolLM2-135M's
    | dict(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        head_dim=64, vocab_size=49152, tie_word_embeddings=True, rope_theta=100000.0, rope_scaling=None,
        max_position_embeddings=8192,
    ),
    "tiny": LLAMA
    | dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=8, intermediate_size=96, head_dim=16, vocab_size=1500,
        tie_word_embeddings=False, rope_scaling=llama3_rope(8.0),
    ),
}  # fmt: skip
