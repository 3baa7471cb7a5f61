"""GGUF files: read into a Hugging Face style directory (read.py; config.py and tokenizer.py are its parts)."""
