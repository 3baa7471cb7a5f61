"""What other people's text does on a terminal, and what a terminal without UTF-8 does to us: nothing.

    python -m pytest tests/common/test_screen.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.screen import visible

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "sign, shown",
    [
        ("\x1b", r"\x1b"), ("\0", r"\x00"), ("\b", r"\x08"), ("\r", r"\r"), ("\x9b", r"\x9b"), ("\x7f", r"\x7f"),
        ("\u202e", r"\u202e"), ("\u2066", r"\u2066"), ("\u200f", r"\u200f"), ("\u2028", r"\u2028"), ("\x85", r"\x85"),
    ],
)  # fmt: skip
def test_signs_that_a_terminal_obeys_are_written_out(sign, shown):
    assert visible(f"a{sign}[2Jb") == f"a{shown}[2Jb"


def test_other_signs_stay():
    text = "Größe 5 – 中文 \U0001f600, שלום\n\ttabbed \\x1b ~"
    assert visible(text) == text


def command(code, **environment):
    script = f"from common.cli import run_main\ndef main():\n    {code}\nrun_main(main)"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | environment, capture_output=True
    )


@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_sign_that_the_terminal_lacks_is_replaced(locale):
    done = command("print('gold \\u2013 \\ud800 $5')", **locale)
    assert done.returncode == 0 and done.stdout == b"gold ? ? $5\n", done
    done = command("raise ValueError('gold \\u2013 is no price')", **locale)
    assert done.returncode == 2 and done.stderr == b"error: gold ? is no price\n"


def test_an_error_obeys_no_item_and_stays_short():
    done = command("raise ValueError('a title \\x1b[2J\\u202e' + 'x' * 90_000)")
    assert done.returncode == 2 and rb"error: a title \x1b[2J\u202e" in done.stderr and b"\x1b" not in done.stderr
    assert len(done.stderr) < 2200 and done.stderr.count(b"\n") == 1


def test_a_reader_that_has_gone_is_no_error():
    script = "from common.cli import run_main\nrun_main(lambda: [print('line ' * 50) for _ in range(9000)])"
    pipe = f"{sys.executable} -c \"{script}\" | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.endswith("\n141\n")
