"""A directory whose files are known by their sha256: what has changed, is missing or foreign is named.

    python -m pytest tests/common/test_manifest.py
"""

import json
import os
import shutil

import pytest

from common.files import SAVED, update_directory
from common.manifest import MANIFEST, _written, read_whole, seal, verify

OWNED = ("a", "b", "c", "run.json", "state/s")


def save(out, text):
    with update_directory(out, [*OWNED, MANIFEST], last=MANIFEST) as part:
        (part / "state").mkdir()
        for name in ("a", "b", "state/s"):
            (part / name).write_text(text * 100)
        (part / "run.json").write_text(json.dumps({"options": {"model": "here", "rank": 4}, "steps": 3}, indent=2))
        seal(part, OWNED)


@pytest.fixture
def out(tmp_path):
    save(tmp_path / "out", "old")
    return tmp_path / "out"


def test_a_whole_directory_passes_with_the_users_own_files_in_it(out, capsys):
    (out / "thesis.txt").write_text("mine")
    (out / "state" / "complete").write_text("")
    assert verify(out) and capsys.readouterr().err == ""


def test_every_bit_and_byte_counts(out):
    for name in ("a", "b", "state/s", "run.json", MANIFEST):
        whole = (out / name).read_bytes()
        half = len(whole) // 2
        flipped = whole[:half] + bytes([whole[half] ^ 4]) + whole[half + 1 :]
        for changed in (whole[:-1], whole + b"\n", flipped, whole[:half], b""):
            (out / name).write_bytes(changed)
            with pytest.raises(ValueError, match=f"{name} (has changed since it was saved|is damaged)") as error:
                verify(out)
            assert "\n" not in str(error.value) and "put back a copy" in str(error.value)
        (out / name).write_bytes(whole)
        assert verify(out)


@pytest.mark.parametrize("name", ["a", "run.json", "state/s"])
def test_a_missing_file_is_named(out, name):
    (out / name).unlink()
    with pytest.raises(ValueError, match=f"{out / name} is missing, which manifest.json lists"):
        verify(out)


def test_a_file_of_another_run_is_named(out):
    (out / "c").write_text("of another")
    with pytest.raises(ValueError, match=f"{out / 'c'} is no part of this run"):
        verify(out)


def test_a_link_or_a_name_that_leads_out_is_refused(out, tmp_path):
    shutil.move(out / "a", tmp_path / "a")
    (out / "a").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="leads out of"):
        verify(out)
    (out / "a").unlink()
    shutil.move(tmp_path / "a", out / "a")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"]["../x"] = {"sha256": manifest.pop("sha256")}
    (out / MANIFEST).write_bytes(_written(manifest))
    with pytest.raises(ValueError, match="leads out of"):
        verify(out)


def test_where_the_base_model_lies_may_be_changed_aloud_and_nothing_else(out, capsys):
    record = json.loads((out / "run.json").read_text())
    record["options"]["model"] = "there"
    (out / "run.json").write_text(json.dumps(record))
    assert verify(out) and "run.json names there; it was saved with here" in capsys.readouterr().err
    record["steps"] = 4
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="run.json has changed"):
        verify(out)


def test_a_directory_without_a_manifest_is_of_an_earlier_version(tmp_path):
    assert verify(tmp_path) is None and read_whole(tmp_path, lambda: 7) == 7


def test_what_is_saved_while_it_is_read_is_read_again(out):
    seen = []

    def read():
        first = (out / "a").read_text()
        if not seen:
            save(out, "new")
        seen.append((first, (out / "b").read_text()))
        return seen[-1]

    assert read_whole(out, read) == ("new" * 100, "new" * 100) and len(seen) == 2


def test_what_fails_because_it_was_saved_meanwhile_is_read_again_and_else_not(out):
    calls = []

    def read(saving):
        calls.append(1)
        if len(calls) == 1 and saving:
            save(out, "new")
        if len(calls) == 1 or not saving:
            raise ValueError("these do not fit")
        return "whole"

    assert read_whole(out, lambda: read(True)) == "whole" and len(calls) == 2
    with pytest.raises(ValueError, match="these do not fit"):
        read_whole(out, lambda: read(False))
    assert len(calls) == 3


def test_a_save_that_was_killed_halfway_is_finished_by_who_reads(out):
    rename, replace = os.rename, os.replace
    calls = []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    os.replace = failing
    try:
        with pytest.raises(KeyboardInterrupt):
            save(out, "new")
    finally:
        os.replace, os.rename = replace, rename
    assert (out / SAVED).is_dir()
    assert read_whole(out, lambda: {(out / name).read_text()[:3] for name in ("a", "b", "state/s")}) == {"new"}
    assert not (out / SAVED).exists()
