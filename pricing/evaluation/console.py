"""What the scripts print: colours, the first example with its loss mask, a priced item, a table."""

import os
import sys

from common.screen import visible
from pricing.data.prompt import Example

CODES = {"green": "32", "yellow": "33", "red": "31", "learnt": "1;35", "dim": "2"}


def paint(text: str, colour: str) -> str:
    """The text in an ANSI colour of CODES; plain in files and pipes, unless FORCE_COLOR is set, and always plain with
    NO_COLOR (no-color.org)."""
    if os.environ.get("NO_COLOR") or not (sys.stdout.isatty() or os.environ.get("FORCE_COLOR")):
        return text
    return f"\033[{CODES[colour]}m{text}\033[0m"


def show_example(example: Example, tokenizer, learnt: int) -> str:
    """The decoded prompt and answer. The first `learnt` tokens of the answer, which carry the loss, stand in [brackets]
    and in colour."""
    answer = "".join(f"[{tokenizer.decode([token])}]" for token in example.answer[:learnt])
    rest = tokenizer.decode(example.answer[learnt:])
    return "  | " + (visible(tokenizer.decode(example.prompt)) + paint(answer, "learnt") + rest).replace("\n", "\n  | ")


def whole(dollars: float) -> str:
    """A guess or the end of a range as text: whole dollars, at least 1, the least price that is learnt"""
    return f"{max(dollars, 1):.0f}"


def show_guess(title: str, truth: float, guess: float, colour: str) -> str:
    """One line about a priced item; truth and guess in dollars"""
    line = f"guess {f'${whole(guess)}':>5}  truth {f'${truth:.2f}':>8}  off by {f'${abs(guess - truth):.2f}':>8}"
    return f"{paint(line, colour)}  {visible(title[:60])}"


def signed(dollars: float) -> str:
    """A difference in dollars: +$3.20 or -$0.50"""
    return f"{'-' if dollars < 0 else '+'}${abs(dollars):.2f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lines of columns as wide as their widest cell; the first column is aligned left, the others right."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in widths], *rows]:
        lines.append(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    return "\n".join(lines)
