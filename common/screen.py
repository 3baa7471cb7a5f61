"""What reaches a terminal: text of other people, made harmless, and signs that the terminal lacks, replaced.

    print(visible(title))          # an escape sequence in a title is shown, not obeyed

Titles, categories and names of columns come from files that anybody may have written. An escape sequence in one could
clear the screen or rename the window, a backspace hide what stands before it, a bidirectional override turn a price
round. In files everything stays as it is: there it does nothing.
"""

import os
import re
import sys

# C0 controls but for tab and line feed, DEL, C1; marks, overrides and isolates of bidirectional text; two line ends.
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""The text with each sign that a terminal would obey written out: \x1b for an escape, \u202e for an override"""
    return UNSAFE.sub(lambda sign: ascii(sign[0])[1:-1], text)


def listed(names, most: int = 12, longest: int = 40) -> str:
    """Names of columns for a message, short however many and however long they are: a, b and 3 more"""
    names = [str(name) for name in names]
    shown = [name if len(name) <= longest else name[: longest - 3] + "..." for name in names[:most]]
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return visible(", ".join(shown)) + rest


def tolerate_any_sign() -> None:
    """On standard output and error, a sign that the terminal's encoding lacks becomes "?", and ends no run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def write_utf8() -> None:
    """Standard output that goes into a file or a pipe is in UTF-8, whatever the locale says."""
    if hasattr(sys.stdout, "reconfigure") and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")


def drop_output() -> None:
    """After a broken pipe: nothing more is written to standard output, not even what Python still holds back."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
