"""`python -m llama.gguf model.gguf out_dir/`: GGUF to a Hugging Face style directory."""

import argparse
import sys

from llama.gguf.read import convert

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GGUF to a Hugging Face style directory")
    parser.add_argument("gguf", help="the .gguf file")
    parser.add_argument("out", help="the directory to write; must not exist")
    arguments = parser.parse_args()
    try:
        convert(arguments.gguf, arguments.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
