"""Curation as a whole: kinds of files, a run that is stopped and goes on, bad input, memory."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from raw_records import families, made_up, record, rows_of, write

from pricing.curation import curate as curate_module
from pricing.curation import raw
from pricing.curation.curate import curate, main
from pricing.curation.rules import FIRST, SECOND, token_rule
from pricing.data.sources import load_items

# ---- files ----------------------------------------------------------------------------------------------------------


def test_jsonl_gz_and_parquet_give_the_same_items_and_train_reads_them(tmp_path):
    records = [record(n, price=None if n % 3 else 20.0 + n) for n in range(60)]
    plain = write(tmp_path / "meta_Automotive.jsonl", records)
    packed = tmp_path / "meta_Automotive.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    folder = tmp_path / "raw_meta_Automotive"
    folder.mkdir()
    # The hub's Parquet files hold prices and details as strings, and columns that nobody needs.
    table = [r | {"price": str(r["price"]), "details": json.dumps(r["details"]), "images": [1]} for r in records]
    shard = folder / "full-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), shard, row_group_size=7)
    read = []
    for path in (plain, packed, shard):
        out = tmp_path / f"{len(read)}.parquet"
        report = curate([path], out, SECOND)
        assert report["rules"]["without a price"] == 40
        read.append(rows_of(out))
    assert read[0] == read[1] == read[2] and len(read[0]) == 20
    assert set(read[0][0]) == {"id", "title", "text", "category", "price", "split"}
    assert {row["category"] for row in read[0]} == {"Automotive"}
    items, skipped, _ = load_items(str(tmp_path / "0.parquet"), 0, 0, strict=True)
    assert not skipped.counts
    assert [(i.id, i.title, i.text, i.price, i.category, i.split) for i in items] == [
        tuple(row[key] for key in ("id", "title", "text", "price", "category", "split")) for row in read[0]
    ]


def test_blocks_end_where_lines_end(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [f'"{"x" * (n % 50)}"' for n in range(500)])
    path.write_text(path.read_text() + '"no line end"')
    monkeypatch.setattr(raw, "BLOCK_BYTES", 37)
    lines = [line for block in raw.blocks_of(path) for line in raw.parse(block)]
    assert lines == [*("x" * (n % 50) for n in range(500)), "no line end"]
    monkeypatch.setattr(raw, "LONGEST_LINE", 100)
    (tmp_path / "long.jsonl").write_text("x" * 1000)
    with pytest.raises(ValueError, match="long.jsonl has a line of more than"):
        list(raw.blocks_of(tmp_path / "long.jsonl"))


# ---- stopping, going on, bad input ----------------------------------------------------------------------------------


def three_inputs(folder: Path) -> list[Path]:
    rng = random.Random(4)
    texts, paths = families(rng, 120, 160), []
    for number, name in enumerate(("Appliances", "Electronics", "Automotive")):
        records = [
            record(n, title=made_up(rng, 5), price=1 + n % 900, description=[text], features=[], details={})
            for n, text in enumerate(texts) if n % 3 == number
        ]  # fmt: skip
        paths.append(write(folder / f"meta_{name}.jsonl", [*records, "{broken", record(price=None)]))
    return paths


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    paths = three_inputs(tmp_path)
    preset = replace(SECOND, sizes=(200, 10, 30), drawn=250)
    whole = curate(paths, tmp_path / "whole.parquet", preset)
    assert min(whole["items"].values()) > 0 and min(whole["left_out"].values()) >= 0
    out, opened = tmp_path / "again.parquet", []
    read = raw.blocks_of

    def stopped(path):
        opened.append(path.name)
        for number, block in enumerate(read(path)):
            if stop == path.name and number:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(raw, "blocks_of", stopped)
    monkeypatch.setattr(raw, "BLOCK_BYTES", 10_000)
    for stop, expected in (
        ("meta_Electronics.jsonl", ["meta_Appliances.jsonl", "meta_Electronics.jsonl"]),
        ("meta_Automotive.jsonl", ["meta_Electronics.jsonl", "meta_Automotive.jsonl"]),
        ("", ["meta_Automotive.jsonl"]),
    ):
        opened.clear()
        try:
            curate(paths, out, preset)
        except KeyboardInterrupt:
            assert stop and not out.exists()
        assert opened == expected
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert out.with_suffix(".json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_run_killed_between_its_renames_is_gone_on_with(tmp_path, renames):
    paths = three_inputs(tmp_path)
    preset = replace(SECOND, sizes=(200, 10, 30), drawn=250)
    out = tmp_path / "items.parquet"
    child = os.fork()
    if not child:
        done, move = [], os.replace

        def moving(source, target):
            if len(done) == renames:
                os.kill(os.getpid(), 9)
            move(source, target)
            done.append(target)
            if len(done) == 2:
                os.kill(os.getpid(), 9)

        os.replace = moving
        curate(paths, out, preset)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert [out.with_suffix(".json").exists(), out.exists()] == [renames > 0, renames > 1]
    if renames == 2:  # nothing was left to do but to clear away
        with pytest.raises(ValueError, match="exists; choose another name"):
            curate(paths, out, preset)
    else:
        curate(paths, out, preset)
    curate(paths, tmp_path / "whole.parquet", preset)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert out.with_suffix(".json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not [path for path in tmp_path.glob(".*") if ".part-" not in path.name]


def test_a_changed_input_or_rule_is_read_again(tmp_path, monkeypatch):
    paths, opened = three_inputs(tmp_path), []
    read = raw.blocks_of
    monkeypatch.setattr(raw, "blocks_of", lambda path: opened.append(path.name) or read(path))
    monkeypatch.setattr(curate_module, "find_leaks", lambda *_: 1 / 0)  # a stop behind the reading

    def names(*arguments, **options) -> list[str]:
        opened.clear()
        with pytest.raises(ZeroDivisionError):
            curate(paths, tmp_path / "out.parquet", *arguments, **options)
        return list(opened)

    everything = [path.name for path in paths]
    assert names(FIRST) == everything and names(FIRST) == [] and names(replace(FIRST, sizes=(9, 9, 9))) == []
    os.utime(paths[1], (1, 1))
    assert names(FIRST) == [paths[1].name]
    assert names(replace(FIRST, write=SECOND.write)) == everything and names(SECOND) == everything
    assert names(SECOND, near=0.7) == everything and names(SECOND, seed=1) == everything


def test_two_workers_write_the_same_bytes_as_one(tmp_path, monkeypatch):
    paths = three_inputs(tmp_path)
    monkeypatch.setattr(raw, "BLOCK_BYTES", 20_000)
    reports = [curate(paths, tmp_path / f"{w}.parquet", SECOND, workers=w) for w in (1, 2)]
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    assert [r.pop("seconds") and r for r in reports][0] == reports[1]


def test_strict_names_the_first_broken_record(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "BLOCK_BYTES", 3000)  # a record or two in each block
    lines = [record(0), record(1, price=None), record(2), "", record(3, price="about 5"), record(4), "{"]
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(ValueError, match="a.jsonl, record 4: one of the records with an unreadable price"):
        curate([path], tmp_path / "out.parquet", SECOND, strict=True)
    with monkeypatch.context() as patch:  # read through without --strict, then stopped
        patch.setattr(curate_module, "find_leaks", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            curate([path], tmp_path / "out.parquet", SECOND)
    with pytest.raises(ValueError, match="a.jsonl, record 4: one of the records with an unreadable price"):
        curate([path], tmp_path / "out.parquet", SECOND, strict=True)
    report = curate([path], tmp_path / "out.parquet", SECOND)
    assert report["first"]["records that are not JSON"] == "a.jsonl, record 6"


def bad_inputs(folder: Path) -> dict[str, str]:
    """File name: what the error must say"""
    good = write(folder / "good.jsonl", [record(n) for n in range(20)])
    (folder / "folder.jsonl").mkdir()
    (folder / "items.csv").write_text("title,price\n")
    (folder / "short.jsonl.gz").write_bytes(gzip.compress(good.read_bytes())[:-2000])
    (folder / "not.jsonl.gz").write_bytes(good.read_bytes())
    (folder / "not.parquet").write_bytes(b"PAR1 no")
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"], "cost": [1]}), folder / "cost.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"title": [], "price": []}), folder / "none.parquet")
    (folder / "empty.jsonl").write_text("\n\n")
    write(folder / "reviews.jsonl", [{"rating": 5, "title": "Good", "text": "..."}] * 3)
    write(folder / "unpriced.jsonl", [record(n, price=None) for n in range(3)])
    return {
        "absent.jsonl": "absent.jsonl does not exist",
        "folder.jsonl": "folder.jsonl is a directory: name the files in it",
        "items.csv": "items.csv: expected .jsonl, .jsonl.gz or .parquet",
        "short.jsonl.gz": "short.jsonl.gz is cut short or damaged .*; fetch it again",
        "not.jsonl.gz": "not.jsonl.gz is cut short or damaged .*; fetch it again",
        "not.parquet": "not.parquet is no readable Parquet file",
        "cost.parquet": "cost.parquet lacks the column price; it has title, cost",
        "none.parquet": "none.parquet has no records: it is empty",
        "empty.jsonl": "empty.jsonl has no records: it is empty",
        "reviews.jsonl": "reviews.jsonl has no readable records .3 records that lack the field `price`.*raw_meta",
        "unpriced.jsonl": "no item is left to train on: 3 without a price",
    }


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_input_ends_in_one_line_and_exit_code_2(tmp_path, capsys, workers):
    cases = bad_inputs(tmp_path)
    if workers == "2":  # what happens in the pool, once
        cases = {name: cases[name] for name in ("short.jsonl.gz", "reviews.jsonl")}
    for name, message in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path / name), "--out", str(tmp_path / "out.parquet"), "--workers", workers])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and re.match(f"error: .*{message}", error), (name, error)
        assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--out", "out.csv"], "must end in .parquet"),
        (["--out", "there.parquet"], "there.parquet exists"),
        (["--near", "0.1"], "share 0.3 to 1"),
        (["--sizes", "0", "1", "1"], "TRAIN must be at least 1"),
        (["--preset", "first", "--max-tokens", "100"], "at least 151"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["good.jsonl"], "named twice"),
    ],
)
def test_bad_options_end_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.jsonl", [record(0)])
    (tmp_path / "there.parquet").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["--out", "out.parquet", *options, "good.jsonl"])
    assert stopped.value.code == 2 and re.search(f"^error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out.parquet").exists() and (tmp_path / "there.parquet").read_text() == ""


def test_the_terminal_says_what_the_json_says(tmp_path, capsys):
    unpriced = [record(n, price=None) for n in range(9)]
    path = write(tmp_path / "a.jsonl", [*(record(n) for n in range(40)), "{", *unpriced])
    main([str(path), "--out", str(tmp_path / "o.parquet"), "--max-tokens", "50", "--workers", "1"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("50 records read -1 that are not JSON (first: a.jsonl, record 41) -9 without a price")
    assert "40 candidates 40 items 34 train 2 val 4 test" in printed
    assert all(token_rule(50, 50).fullmatch(row["text"]) for row in rows_of(tmp_path / "o.parquet"))


def test_the_earlier_names_of_the_commands_still_work(tmp_path):
    root = Path(__file__).resolve().parents[2]
    for module, words, code, line in (
        ("pricing.curate", [tmp_path / "no.jsonl", "--out", tmp_path / "a.parquet"], 2, "no.jsonl does not exist"),
        ("pricing.curation", [tmp_path / "no.jsonl", "--out", tmp_path / "a.parquet"], 2, "no.jsonl does not exist"),
        ("pricing.catalogue", ["1"], 0, '"fair_price": '),
    ):
        result = subprocess.run(
            [sys.executable, "-m", module, *map(str, words)], cwd=root, capture_output=True, text=True
        )
        assert result.returncode == code and line in result.stdout + result.stderr


# ---- memory ---------------------------------------------------------------------------------------------------------


MEASURE = """
import re, sys
from pricing.curation.curate import main
main(sys.argv[1:])
# Not ru_maxrss, which starts at that of the process that started this one.
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_input(tmp_path):
    """27,000 texts more are 27 MB, their shingles 15 MB and their keys 4 MB; memory may differ by a few MB."""
    rng = random.Random(5)
    vocabulary, peaks = [made_up(rng, 4) for _ in range(20_000)], []
    for count in (9_000, 36_000):
        path = tmp_path / f"meta_{count}.jsonl"
        with open(path, "w") as file:
            for number in range(count):
                words = " ".join(rng.choices(vocabulary, k=80))
                file.write(f'{{"title": "{words[:60]}", "price": {number % 998 + 1}, "description": ["{words}"]}}\n')
        command = [sys.executable, "-c", MEASURE, str(path), "--out", str(tmp_path / f"{count}.parquet")]
        command += ["--workers", "1", "--preset", "first"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout.split()[-1]) / 1024)  # MiB
        assert pyarrow.parquet.read_metadata(tmp_path / f"{count}.parquet").num_rows > 0.8 * count
    assert peaks[1] - peaks[0] < 20, peaks
