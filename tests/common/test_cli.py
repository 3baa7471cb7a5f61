"""Parsers from docstrings, and commands whose errors are one line.

    python -m pytest tests/common/test_cli.py
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import __version__
from common.cli import make_parser, run_main

ROOT = Path(__file__).resolve().parents[2]
DOC = """Do one thing to a file: that takes a sentence which is longer than a terminal is wide, and goes on
in a second line.

    python do.py --out a      one way
    python do.py              another, on a line of its own that is far longer than a terminal is wide, and stays so

    W = a table that is no command

How it is read.
"""


def parser():
    parser = make_parser(DOC, prog="do.py")
    parser.add_argument("file", nargs="*", help="what to read")
    parser.add_argument("--out", default="there", help="where to write")
    parser.add_argument("--also", nargs="*", default=[], help="what to read too")
    parser.add_argument("--limit", default=None, help="how much")
    parser.add_argument("--strict", action="store_true", help="or else")
    parser.add_argument("--zero", type=int, default=0, help="how many")
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--double", action=argparse.BooleanOptionalAction, default=True, help="twice")
    return parser


def test_help_shows_the_examples_as_they_stand(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = parser().format_help()
    examples = shown[shown.index("examples:\n") :].splitlines()
    assert examples[1:] == [line for line in DOC.splitlines() if line.startswith("    python")]
    assert "a table that is no command" not in shown and "How it is read" not in shown
    described = shown[: shown.index("options:")]
    assert "Do one thing to a file" in described and max(map(len, described.splitlines())) <= 80


def test_help_shows_defaults_that_say_something(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = " ".join(parser().format_help().split())
    assert "where to write (default: there)" in shown and "how many (default: 0)" in shown
    assert "(default: None)" not in shown and "(default: False)" not in shown and "(default: [])" not in shown
    assert "default: a GPU if there is one" in shown and "(default: auto)" not in shown
    assert shown.count("twice (default: True)") == 1


def test_a_docstring_without_examples_has_no_heading():
    assert "examples" not in make_parser("One sentence.").format_help()


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"do.py {__version__}\n"


def test_a_mistyped_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--uot", "a"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and "--uot" in error


@pytest.mark.parametrize("error", [ValueError("two\nlines"), OSError("two\nlines"), FileNotFoundError("two\nlines")])
def test_what_a_user_can_mend_is_one_line(error, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: two lines\n"
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(type(error)):
        run_main(main)


def test_what_only_we_can_mend_keeps_its_traceback(monkeypatch):
    def main():
        raise RuntimeError("a fault")

    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(RuntimeError):
        run_main(main)


def test_ctrl_c_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    assert stopped.value.code == 130 and capsys.readouterr().err == "\nstopped; nothing half-written is left behind\n"


def test_out_of_memory_names_the_flags_that_avoid_it(capsys, monkeypatch):
    monkeypatch.delenv("DEBUG", raising=False)

    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "--batch-tokens" in error and "--memory-budget" in error and "Tried to allocate" in error


def test_common_imports_nothing_slow():
    script = "import sys, common.cli, common.files, common.hub, pipeline.hub, llama.gguf.__main__\n"
    script += "print(*{'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("command", ["llama.gguf", "lora.merge"])
def test_commands_of_packages_answer_in_one_line(command, tmp_path):
    def run(*words):
        command_line = [sys.executable, "-m", command, *words]
        return subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0 and f"    python -m {command} " in shown.stdout and "None" not in shown.stdout
    assert run("--version").stdout == f"python -m {command} {__version__}\n"
    absent = [str(tmp_path / "absent"), str(tmp_path / "out")]
    given = absent if command == "llama.gguf" else ["--ckpt", absent[0], "--base", absent[0], "--out", absent[1]]
    for done in (run("--frm", "x"), run(*given)):
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "absent" in done.stderr and not (tmp_path / "out").exists()
