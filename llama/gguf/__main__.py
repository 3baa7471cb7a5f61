"""GGUF to a Hugging Face style directory.

    python -m llama.gguf model.gguf out_dir/
"""

from common.cli import make_parser, run_main


def main() -> None:
    parser = make_parser(__doc__, prog="python -m llama.gguf")
    parser.add_argument("gguf", help="the .gguf file")
    parser.add_argument("out", help="the directory to write; must not exist")
    args = parser.parse_args()
    from llama.gguf.read import convert  # imports torch: --help needs none

    convert(args.gguf, args.out)


if __name__ == "__main__":
    run_main(main)
