"""The cache, checked downloads, and one line for each way in which the hub refuses.

    python -m pytest tests/common/test_hub.py
"""

import hashlib
import multiprocessing
import os
import time

import huggingface_hub
import pytest
from huggingface_hub import errors

from common import hub


def test_the_cache_goes_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    assert hub.cache_directory() == tmp_path
    monkeypatch.setenv("QLORA_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hub.cache_directory() == tmp_path / "home" / ".cache" / "qlora-pricer"


def test_a_directory_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    assert hub.once("made", lambda out: out.mkdir()) == tmp_path / "cache" / "made"
    assert hub.once("made", lambda out: pytest.fail("made twice")).is_dir()


def make_in_child(barrier, log):
    def make(out):
        with open(log, "a") as handle:
            handle.write("made\n")
        time.sleep(0.3)  # the others come meanwhile
        out.mkdir(exist_ok=True)

    barrier.wait()
    hub.once("made", make)


def test_several_processes_at_once_make_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    children = [context.Process(target=make_in_child, args=(barrier, tmp_path / "log")) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_download_is_checked_and_fetched_once(tmp_path):
    (tmp_path / "source").write_text("the file")
    url, target = (tmp_path / "source").as_uri(), tmp_path / "cache" / "file.zip"
    digest = hashlib.sha256(b"the file").hexdigest()
    assert hub.sha256(tmp_path / "source") == digest
    assert hub.download(url, digest, target) == target and target.read_text() == "the file"
    (tmp_path / "source").unlink()
    assert hub.download(url, digest, target).read_text() == "the file"
    assert os.listdir(target.parent) == ["file.zip"]


def test_a_changed_or_unreachable_download_leaves_nothing(tmp_path):
    (tmp_path / "source").write_text("something else")
    target = tmp_path / "cache" / "file.zip"
    with pytest.raises(OSError, match="has sha256 .* expected"):
        hub.download((tmp_path / "source").as_uri(), "0" * 64, target)
    with pytest.raises(OSError, match="cannot fetch"):
        hub.download((tmp_path / "absent").as_uri(), "0" * 64, target)
    assert list(target.parent.iterdir()) == []


def made(error_name):
    return getattr(errors, error_name).__new__(getattr(errors, error_name))


@pytest.mark.parametrize(
    "kind, error, words",
    [
        ("model", made("GatedRepoError"), "org/name is gated: accept its licence on its page, then log in with `hf"),
        ("model", made("RepositoryNotFoundError"), "no model 'org/name' on the hub, or it is private: check the name"),
        ("model", made("HfHubHTTPError"), "cannot fetch org/name from the hub: HfHubHTTPError"),
        ("model", made("LocalEntryNotFoundError"), "cannot fetch org/name from the hub: LocalEntryNotFoundError"),
        ("model", ConnectionError("no route to it\nand more"), "cannot fetch org/name from the hub: no route to it$"),
        ("data set", made("GatedRepoError"), "data set org/name is gated: accept its terms on its page, then log in"),
        ("data set", made("RepositoryNotFoundError"), "no data set 'org/name' on the hub, or it is private: check"),
        ("data set", ConnectionError("no route"), "cannot fetch data set org/name from the hub: no route$"),
    ],
)
def test_refusals_of_the_hub_are_one_line(kind, error, words, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(OSError, match=f"^{words}") as raised:
        hub.snapshot("org/name", kind, ["*.json"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind, word", [("model", "model"), ("data set", "dataset")])
def test_a_snapshot_asks_for_the_files_named(kind, word, tmp_path, monkeypatch):
    def fetch(repo, *, repo_type, allow_patterns):
        assert (repo, repo_type, allow_patterns) == ("org/name", word, ["*.json"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert hub.snapshot("org/name", kind, ["*.json"]) == tmp_path


@pytest.mark.parametrize("damage", [b"replaced", b"", b"the fil"])
def test_a_cached_file_that_was_replaced_or_cut_is_fetched_again(tmp_path, damage):
    (tmp_path / "source").write_text("the file")
    url, target = (tmp_path / "source").as_uri(), tmp_path / "cache" / "file.zip"
    digest = hashlib.sha256(b"the file").hexdigest()
    hub.download(url, digest, target)
    target.write_bytes(damage)
    assert hub.download(url, digest, target).read_text() == "the file"
    target.write_bytes(damage)
    (tmp_path / "source").unlink()
    with pytest.raises(OSError, match="cannot fetch"):
        hub.download(url, digest, target)


def test_a_tilde_in_the_caches_name_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QLORA_CACHE", "~/models")
    assert hub.cache_directory() == tmp_path / "models"
