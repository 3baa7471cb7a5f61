"""A minimal Llama: config, rope, attention, model, and what feeds it: weights, tokenizer, GGUF."""
