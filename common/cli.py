"""What the commands share: a parser whose help shows the examples, and errors that are one line.

    def main() -> None:
        parser = make_parser(__doc__)
        parser.add_argument("--out", default="out", help="directory to write")
        args = parser.parse_args()
        ...

    if __name__ == "__main__":
        run_main(main)

It imports nothing slow (torch, above all), so that `--help` and a mistyped option are answered at once.
"""

import argparse
import os
import signal
import sys
from typing import Callable

from common import __version__
from common.screen import drop_output, tolerate_any_sign, visible

EXAMPLES = "examples:\n"
MOST_MESSAGE = 2000  # characters of an error
UNTOLD = (None, False, argparse.SUPPRESS)  # defaults that say nothing to a reader


class Help(argparse.RawDescriptionHelpFormatter):
    """Examples as they were typed, everything else wrapped; defaults where there are any."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(EXAMPLES):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = "default" in text or any(action.default is value for value in UNTOLD) or action.default == []
        if told or not (action.option_strings or action.nargs in (argparse.OPTIONAL, argparse.ZERO_OR_MORE)):
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line too."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (--help says what there is)\n")


def make_parser(doc: str, prog: str | None = None) -> Parser:
    """A parser from a script's docstring: its first paragraph describes the command, its indented blocks of command
    lines (`    python ...`) are the examples at the end of `--help`. `--version` is there. `prog` is for `python -m`,
    where argparse knows only the file's name."""
    first, *others = doc.strip("\n").split("\n\n")
    examples = "\n".join(block.rstrip("\n") for block in others if block.startswith("    python "))
    parser = Parser(
        prog=prog, description=" ".join(first.split()), formatter_class=Help,
        epilog=EXAMPLES + examples if examples else None,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def run_main(main: Callable[[], None]) -> None:
    """Run a command: what a user can mend ends in one line and exit code 2, without a traceback (DEBUG=1 shows it)."""
    tolerate_any_sign()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output is gone; as other commands, without a word
        drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("\nstopped; nothing half-written is left behind", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        out_of_memory = is_out_of_memory(error)
        if os.environ.get("DEBUG") or not (out_of_memory or isinstance(error, (ValueError, OSError))):
            raise
        message = " ".join(str(error).split())
        if out_of_memory:
            message = "out of GPU memory; lower --batch-tokens (with --accumulate to make up for it) or give a "
            message += "--memory-budget: " + " ".join(str(error).split())[:160]
        if len(message) > MOST_MESSAGE:
            message = f"{message[:MOST_MESSAGE]} ... ({len(message) - MOST_MESSAGE:,} more characters)"
        print(f"error: {visible(message)}", file=sys.stderr)
        sys.exit(2)


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch found no room on the GPU. A command that never imported torch cannot have raised that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
