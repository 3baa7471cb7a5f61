"""llama.cpp's GGUF files -> Hugging Face style directories: read.py, with config.py and tokenizer.py for its parts."""
