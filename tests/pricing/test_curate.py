"""Curation: each rule of both presets on records built to break it, with counts worked out by hand; duplicates and
leaks beside brute force; draws beside numpy's; resuming, bad input, memory."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import shared
from datasketch import MinHash

from pricing.curation import curate as curate_module
from pricing.curation import leaks as leaks_module
from pricing.curation import raw
from pricing.curation.curate import curate, main
from pricing.curation.duplicates import band_keys, bands_for, parts, shingles_of, words_in
from pricing.curation.leaks import leaks
from pricing.curation.rules import FIRST, PRESETS, SECOND, Rejected, item_of, token_rule
from pricing.curation.selection import BEYOND, NOT_DRAWN, OPEN, TEST, TRAIN, VAL, draw, split
from pricing.data.items import normalise_title
from pricing.data.sources import load_items

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def made_up(rng: random.Random, count: int) -> str:
    """`count` words of three letters: a token each, no digits, hardly ever the same pair of them twice"""
    return " ".join("".join(rng.choices(LETTERS, k=3)) for _ in range(count))


def record(number: int = 0, **changes) -> dict:
    """A raw record that passes both editions' rules: 160 words, unlike every other number's."""
    rng = random.Random(number)
    return {
        "main_category": "Appliances",
        "title": made_up(rng, 4),
        "price": 12.5,
        "description": [made_up(rng, 100)],
        "features": [made_up(rng, 40), made_up(rng, 20)],
        "details": {"Colour": "red"},
        "store": "Acme",
        "parent_asin": f"B{number:04}",
    } | changes


def write(path: Path, records) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


def rows_of(path: Path) -> list[dict]:
    return pyarrow.parquet.read_table(path).to_pylist()


def pairs(text: str) -> set:
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:])) or set(words)


def jaccard(one: set, other: set) -> float:
    return len(one & other) / len(one | other) if one | other else 0.0


def variant(text: str, rng: random.Random, changed: int) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), changed):
        words[place] = made_up(rng, 1)
    return " ".join(words)


# ---- rules ---------------------------------------------------------------------------------------------------------

BAD_KIND = "records with fields of another type"
BAD = [
    (lambda r: "{no json", "records that are not JSON"),
    (lambda r: json.dumps(r)[:-40], "records that are not JSON"),
    (lambda r: "[" * 100_000, "records that are not JSON"),
    (lambda r: [r], "records that are not an object"),
    (lambda r: {k: v for k, v in r.items() if k != "price"}, "records that lack the field `price`"),
    (lambda r: r | {"price": "from 12.99"}, "records with an unreadable price"),
    (lambda r: r | {"price": 10**400}, "records with an unreadable price"),
    (lambda r: r | {"title": " "}, "records without a title"),
    (lambda r: r | {"title": None}, "records without a title"),
    (lambda r: r | {"description": 7}, BAD_KIND),
    (lambda r: r | {"features": [None]}, BAD_KIND),
    (lambda r: r | {"details": "{'a': 1}"}, BAD_KIND),
    (lambda r: r | {"details": ["a"]}, BAD_KIND),
    (lambda r: r | {"details": json.loads('{"a":' * 400 + "1" + "}" * 400)}, BAD_KIND),
]
LEFT = [
    (lambda r: r | {"price": None}, "without a price"),
    (lambda r: r | {"price": "None"}, "without a price"),
    (lambda r: r | {"price": 0.49}, "with a price outside $0.50 to $999.49"),
    (lambda r: r | {"price": "$1,000.00"}, "with a price outside $0.50 to $999.49"),
    (lambda r: r | {"description": [], "features": []}, "with too few characters"),
]
PASS = [
    lambda r: r,
    lambda r: r | {"price": "$999.49"},
    lambda r: r | {"price": 0.5},
    lambda r: r | {"details": json.dumps(r["details"])},
    lambda r: r | {"description": r["description"][0]},
    lambda r: r | {"store": None, "details": None, "main_category": None},
]
LONG_WORDS = (lambda r: r | {"description": ["abcdefgh " * 80], "features": []}, "with too few tokens")  # 80 tokens


@pytest.mark.parametrize("preset", ["first", "second"])
def test_every_record_is_counted_by_the_first_rule_that_it_breaks(tmp_path, preset):
    broken = LEFT + ([LONG_WORDS] if preset == "first" else [])
    cases = [case for case, _ in BAD + broken] + PASS
    lines = [case(record(number)) for number, case in enumerate(cases)]
    lines += ["", "   "]  # no records
    path = write(tmp_path / "meta_Appliances.jsonl", lines)
    report = curate([path], tmp_path / "items.parquet", PRESETS[preset])
    expected = Counter(reason for _, reason in BAD + broken)
    assert {k: v for k, v in (report["broken"] | report["rules"]).items() if v} == expected
    assert report["records"] == len(cases) and report["candidates"] == len(PASS) == sum(report["items"].values())
    assert report["first"]["records with an unreadable price"] == "meta_Appliances.jsonl, record 6"
    assert [row["id"] for row in rows_of(tmp_path / "items.parquet")] == [
        f"B{number:04}" for number in range(len(cases) - len(PASS), len(cases))
    ]
    assert json.loads((tmp_path / "items.json").read_text()) == {k: v for k, v in report.items() if k != "seconds"}


def reason_of(raw_record: dict, preset) -> str:
    try:
        item_of(raw_record, preset, "")
    except Rejected as rejected:
        return rejected.args[0]
    return ""


def test_the_length_rules_to_the_character_and_the_token():
    def first(description: str) -> str:
        return reason_of(record(title="Mug", description=[description], features=[], details={}), FIRST)

    assert first("a " * 150) == "with too few characters"  # 300
    assert first("a " * 150 + "a") == ""  # 301, and 153 tokens with the title's and its line end's
    assert first("aaa " * 148) == "with too few tokens"  # 150 with those two
    assert first("aaa " * 149) == ""

    def second(description: str) -> str:
        return reason_of(record(title="Mug", description=[description], features=[], details={}), SECOND)

    assert second("a" * 595) == "with too few characters"  # 3 + a line end + 595
    assert second("a" * 596) == ""
    assert second("a" * 589 + " AB12345") == "with too few characters"  # counted without the part number


def test_the_text_of_the_first_edition_by_hand():
    details = {
        "Item Weight": "2 pounds",
        "Batteries Included?": "No",
        "Best Sellers Rank": {"Toys & Games": 1315213, "Puzzles": 17},
        "Is Discontinued By Manufacturer": "No",
    }
    body = " ".join(["word"] * 140)
    title, text, price, category = item_of(
        record(
            title="Kettle  WX1234567 [2 pack]", description=[f"Part ab12cd ab12cd, abc1234 {body}"],
            features=["Stainless: 18\u201310"], details=details, price="$12.00",
        ),
        FIRST, "Home & Kitchen",
    )  # fmt: skip
    assert (title, price, category) == ("Kettle WX1234567 [2 pack]", 12.0, "Home & Kitchen")
    # Tokens: 5 up to the line end, 4 up to cd, 140, then Stainles, s, _, 18, -, 10, Weight, _, 2, pounds and the comma.
    assert text == f"Kettle 2 pack\nPart ab12cd {body} Stainless 18\u201310 Weight 2 pounds,"
    assert token_rule(160, 160).fullmatch(text) and not token_rule(161, 161).match(text)
    whole = FIRST.write(record(title="Kettle", description=[body[:280]], features=["abc12345"], details=details), "")
    assert whole.endswith("Weight 2 pounds, Rank Toys & Games Puzzles 17, Is Discontinued No")


def test_the_text_of_the_second_edition_by_hand():
    body = " ".join(["word"] * 130)
    details = {"Brand": "Bolt", "Part Number": "x", "Item Weight": "2 pounds", "Best Sellers Rank": {"Toys": 3}}
    raw_record = record(
        title="Kettle WX12345 AB12CD wx12345", description=[body, "Two."], details=details, store="", price=12,
        features=["STAINLESS steel 18/10", "STAINLESS"],
    )  # fmt: skip
    text = SECOND.write(raw_record, "Home and Kitchen")
    # STAINLESS goes where a digit follows on its line, and stays where none does: the edition's pattern has it so.
    assert text == (
        "Title: Kettle AB12CD wx12345\nCategory: Home and Kitchen\nBrand: Bolt\n"
        f"Description: {body} Two. steel 18/10 STAINLESS\n"
        "Details: Brand: Bolt; Item Weight: 2 pounds"
    )
    cut = item_of(raw_record, SECOND, "Home and Kitchen")[1]
    assert text.startswith(cut) and token_rule(110, 110).fullmatch(cut)
    assert "Brand: Acme\n" in SECOND.write(record(), "")
    assert SECOND.write(record(description=["a " * 4000]), "").count("a") < 1700  # a field is read up to 3,000


@pytest.mark.parametrize(
    "text, tokens",
    [("", 0), ("Steel mug", 2), ("12345", 2), ("a 12", 3), ("unbelievable", 2), ("18/10, red", 5), ("a\nb", 3),
     ("\u6f22\u5b57", 2)],
)  # fmt: skip
def test_tokens_by_hand(text, tokens):
    assert token_rule(tokens, tokens).fullmatch(text)
    assert not token_rule(tokens + 1, tokens + 1).match(text)


def test_text_that_cannot_be_written_as_it_is(tmp_path):
    dashes = record(2, title="_", description=["- " * 400], features=[], details={})  # not a word in it
    lines = [record(0, title="_"), record(1, title="half \ud83d pair", parent_asin=None), dashes]
    path = write(tmp_path / "meta_Toys_and_Games.jsonl", lines)
    curate([path], tmp_path / "items.parquet", replace(FIRST, sizes=(10, 0, 0)))
    rows = rows_of(tmp_path / "items.parquet")
    assert [row["title"] for row in rows] == ["_", "half ? pair", "_"]
    assert rows[1]["id"] == "meta_Toys_and_Games:2" and rows[1]["category"] == "Toys and Games"


# ---- files ---------------------------------------------------------------------------------------------------------


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


# ---- duplicates and leaks ------------------------------------------------------------------------------------------


def families(rng: random.Random, count: int, words: int) -> list[str]:
    """Texts in families of one to five with 0 to 30 words changed, shuffled: similarities of all sizes."""
    texts = []
    for _ in range(count):
        first = made_up(rng, words)
        changed = [int(words / 3 * rng.random() ** 2) for _ in range(rng.randrange(5))]
        texts += [first, *(variant(first, rng, count) for count in changed)]
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_near_duplicates_are_those_of_brute_force(tmp_path, threshold):
    rng = random.Random(1)
    texts = families(rng, 100, 160)
    records = [record(n, title=made_up(rng, 3), description=[t], features=[], details={}) for n, t in enumerate(texts)]
    path, preset = write(tmp_path / "a.jsonl", records), replace(FIRST, sizes=(10**6, 0, 0))
    report = curate([path], tmp_path / "a.parquet", preset, near=threshold)
    kept = {row["id"] for row in rows_of(tmp_path / "a.parquet")}
    sets = [pairs(item_of(r, FIRST, "")[1]) for r in records]
    alike = [[m for m in range(n) if jaccard(sets[n], sets[m]) >= threshold] for n in range(len(sets))]
    gone = [n for n, r in enumerate(records) if r["parent_asin"] not in kept]
    assert len(gone) > 25 and len(gone) == report["left_out"]["that are near-duplicates of an earlier one"]
    assert all(alike[n] for n in gone)  # nothing goes without a reason
    assert not any(set(alike[n]) - set(gone) for n in set(range(len(sets))) - set(gone))  # and no pair is left


def test_candidates_meet_as_often_as_the_bands_promise():
    rng, threshold = random.Random(2), 0.8
    bands, rows = bands_for(threshold)
    assert (bands, rows) == (18, 5) and 1 - (1 - threshold**rows) ** bands >= 0.999
    texts = [made_up(rng, 100).split() for _ in range(300)]
    changed = [variant(" ".join(t), rng, 14).split() for t in texts]  # 28 of 99 pairs at most: J about 0.57
    one, other = (parts(*shingles_of([[w.encode() for w in t] for t in side])) for side in (texts, changed))
    alike = np.mean([len(np.intersect1d(a, b)) / len(np.union1d(a, b)) for a, b in zip(one, other)])
    met = (band_keys(one, threshold, 0) == band_keys(other, threshold, 0)).any(axis=1).mean()
    assert met == pytest.approx(1 - (1 - alike**rows) ** bands, abs=0.08)
    assert not np.array_equal(band_keys(one[:5], threshold, 0), band_keys(one[:5], threshold, 1))  # seeded


def test_a_whole_array_of_hashes_is_hashed_as_datasketch_does_one_by_one():
    hashes = parts(*shingles_of([words_in(made_up(random.Random(0), 50))]))[0]
    bands, rows = bands_for(0.8)
    minhash = MinHash(num_perm=bands * rows, seed=5, hashfunc=int)
    for value in hashes.tolist():
        minhash.update(value)
    alike = MinHash(num_perm=bands * rows, seed=5, hashfunc=lambda h: h)
    alike.update_batch([hashes])
    assert np.array_equal(minhash.hashvalues, alike.hashvalues)


def test_shingles_by_hand():
    def count(texts, **how):
        return shingles_of([words_in(text) for text in texts], **how)[1].tolist()

    assert words_in("Acme Mug, RED_x \u00e9t\u00e9-3") == "acme mug red x \u00e9t\u00e9 3".encode().split()
    assert count(["a b a b a", "one", "", "a b c"]) == [2, 1, 0, 2]
    assert count(["a b a b a", "one", "", "a b c"], single=True) == [2, 1, 0, 3]
    flat, sizes = shingles_of([words_in(text) for text in ("a b c d", "", "c d a b", "x")])
    one, none, other, alone = parts(flat, sizes)
    assert len(np.intersect1d(one, other)) == 2 and not len(none) and len(alone) == 1  # a b and c d, not b c or d a
    assert not shingles_of([])[0].size


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("words", [1, 4, 30])
def test_leaks_are_those_of_brute_force(threshold, words):
    texts = families(random.Random(words), 150, max(words, 3))
    texts = [" ".join(text.split()[:words]) for text in texts] + ["", "   ", texts[0]]
    train, test = texts[::2], texts[1::2] + [""]
    sets = [pairs(text) for text in train]
    expected = [n for n, text in enumerate(test) if any(jaccard(pairs(text), other) >= threshold for other in sets)]
    assert leaks(train, test, threshold) == expected
    assert leaks(iter(train), test, threshold) == expected
    if words == 30:
        assert 0 < len(expected) < len(test)


def test_leaks_in_small_steps_are_the_same(monkeypatch):
    texts = families(random.Random(9), 100, 20)
    whole = leaks(texts[::2], texts[1::2], 0.5)
    monkeypatch.setattr(leaks_module.slices, "__defaults__", (7,))
    assert leaks(texts[::2], texts[1::2], 0.5) == whole and len(whole) > 20
    lengths = np.array([3, 0, 3, 4, 9, 1, 1])
    assert [(s.start, s.stop) for s in leaks_module.slices(lengths, 6)] == [(0, 3), (3, 4), (4, 5), (5, 7)]
    assert leaks_module.within(lengths).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, *range(9), 0, 0]


def test_leaks_of_nothing_and_of_the_same():
    assert leaks([], ["a b"]) == leaks(["a b"], []) == leaks([""], [""]) == []
    assert leaks(["x", "Acme mug, red"], ["acme MUG red", "blue"]) == [0]
    for threshold in (0.2, 1.1, float("nan")):
        with pytest.raises(ValueError, match="0.3 to 1"):
            leaks(["a"], ["a"], threshold)


def test_leaks_of_real_texts_are_those_of_brute_force():
    texts = [json.loads(line) for line in shared("pc_parts.jsonl").read_text().splitlines()[:1500]]
    texts = [f"{t['title']} {t['category']} {t['description']}" for t in texts]
    train, test = [pairs(text) for text in texts[200:]], [pairs(text) for text in texts[:200]]
    expected = [n for n, own in enumerate(test) if any(jaccard(own, other) >= 0.8 for other in train)]
    assert leaks(texts[200:], texts[:200], 0.8) == expected and len(expected) > 10


def leaking_records() -> list[dict]:
    """Families by text with titles of their own, and by title with texts of their own."""
    rng, records = random.Random(3), []
    for number in range(400):
        text, title = made_up(rng, 160), made_up(rng, 24)
        for member in range(3):
            own_title = made_up(rng, 4) if number % 2 else variant(title, rng, 1)
            own_text = variant(text, rng, 3) if number % 2 else made_up(rng, 160)
            changes = dict(title=own_title, description=[own_text], features=[], details={})
            records.append(record(len(records), **changes))
    return records


def brute_leaks(rows: list[dict]) -> dict:
    """{split: [rows with a near-duplicate on another side, by text, by title, in all]}, with val and test apart"""
    kinds = [[pairs(row["text"]) for row in rows], [set(row["title"].split()) for row in rows]]
    splits, counts = [row["split"] for row in rows], {}
    flags = np.zeros((3, len(rows)), bool)
    for kind, sets in enumerate(kinds):
        by = {}
        for n, own in enumerate(sets):
            for element in own:
                by.setdefault(element, []).append(n)
        for n, own in enumerate(sets):
            for m in {m for element in own for m in by[element] if m < n and splits[m] != splits[n]}:
                if jaccard(own, sets[m]) >= 0.8:
                    flags[kind, [n, m]] = True
    flags[2] = flags[0] | flags[1]
    for name in ("train", "val", "test"):
        here = np.array([s == name for s in splits])
        counts[name] = dict(zip(("text", "title", "any"), (flags & here).sum(1).tolist()))
    return counts


def test_leaks_between_the_splits_are_counted_and_removed(tmp_path):
    path = write(tmp_path / "a.jsonl", leaking_records())
    preset = replace(FIRST, sizes=(10**6, 10**6, 10**6))  # 85, 5 and 10 %
    reported = curate([path], tmp_path / "kept.parquet", preset, near=0, leaks="report")
    rows = rows_of(tmp_path / "kept.parquet")
    assert len(rows) == 1200 and reported["leaking"] == brute_leaks(rows)
    assert min(reported["leaking"]["test"][kind] for kind in ("text", "title")) > 30
    removed = curate([path], tmp_path / "clean.parquet", preset, near=0, leaks="remove")
    clean = rows_of(tmp_path / "clean.parquet")
    assert removed["leaking"] == reported["leaking"]  # as it was before
    assert not any(sum(kinds.values()) for kinds in brute_leaks(clean).values())
    assert [r for r in clean if r["split"] == "test"] == [r for r in rows if r["split"] == "test"]
    assert {r["id"] for r in rows} - {r["id"] for r in clean} <= {r["id"] for r in rows if r["split"] != "test"}
    lost = removed["left_out"]["that are near-duplicates of a held-out item"]
    assert lost == len(rows) - len(clean) and lost >= reported["leaking"]["train"]["any"]


def test_the_same_words_are_exact_duplicates_and_the_first_stays(tmp_path):
    loud = {k: [v.upper() for v in record(1)[k]] for k in ("description", "features")}
    records = [record(1), record(2), record(1, parent_asin="B9", price=99.0, title=record(1)["title"].title(), **loud)]
    report = curate([write(tmp_path / "a.jsonl", records)], tmp_path / "a.parquet", SECOND, near=0)
    assert report["left_out"]["with the same words as an earlier one"] == 1
    assert [row["id"] for row in rows_of(tmp_path / "a.parquet")] == ["B0001", "B0002"]


# ---- draw and split ------------------------------------------------------------------------------------------------


class Fake:
    """Candidates in memory: prices, categories and keys"""

    def __init__(self, prices, categories, titles=None):
        rng = np.random.default_rng(0)
        self.table = pyarrow.RecordBatch.from_pydict({"price": np.array(prices, float), "category": list(categories)})
        self.hashes = rng.integers(0, 2**64, len(prices), dtype=np.uint64)
        self.titles = rng.integers(0, 2**64, len(prices), dtype=np.uint64) if titles is None else titles

    def batches(self, columns):
        for start in range(0, len(self.table), 1000):
            yield start, self.table.slice(start, 1000).select(columns)

    def keys(self, column, start, count):
        return self.hashes[start : start + count]

    def column(self, column):
        return [(start, self.titles[start : start + 1500]) for start in range(0, len(self.titles), 1500)]


def test_the_first_edition_draws_by_the_dollar():
    counts = {10.0: 2000, 10.49: 500, 9.5: 100, 10.5: 30, 239.0: 1201, 239.5: 1500, 500.0: 1300}
    prices = [price for price, count in counts.items() for _ in range(count)]
    fate = np.zeros(len(prices), np.uint8)
    fate[:100] = 1  # gone before
    draw(Fake(prices, ["Toys and Games"] * len(prices)), fate, FIRST, 0)
    left = Counter(np.floor(np.array(prices)[fate == OPEN] + 0.5).astype(int).tolist())
    assert left == {10: 1200, 11: 30, 239: 1200, 240: 1500, 500: 1300} and (fate[:100] == 1).all()


@pytest.mark.parametrize("preset", [replace(FIRST, per_dollar=3000), replace(SECOND, drawn=3000)])
def test_draws_beside_numpys(preset):
    """Shares of Automotive and mean prices are those of numpy's own drawing by weight without replacement."""
    rng = np.random.default_rng(1)
    count = 10_000
    prices = np.full(count, 25.0) if preset.per_dollar else np.round(0.5 + 998 * rng.random(count) ** 3, 2)
    categories = rng.choice(["Automotive", "Tools and Home Improvement", "Appliances"], count, p=[0.6, 0.2, 0.2])
    if preset.per_dollar:
        weight = np.where(categories == "Automotive", 1.0, 5.0)
    else:
        weight = ((prices - prices.min()) / (prices.max() - prices.min())) ** 2
        weight *= np.select([categories == "Automotive", categories == "Tools and Home Improvement"], [0.05, 0.5], 1.0)
    ours, theirs = [], []
    for seed in range(5):
        fate = np.zeros(count, np.uint8)
        draw(Fake(prices, categories), fate, preset, seed)
        assert np.bincount(fate).tolist() == [3000] + [0] * (NOT_DRAWN - 1) + [7000]
        for found, chosen in (
            (ours, fate == OPEN), (theirs, rng.choice(count, 3000, replace=False, p=weight / weight.sum())),
        ):  # fmt: skip
            kinds = [np.mean(categories[chosen] == c) for c in ("Automotive", "Tools and Home Improvement")]
            found.append([*kinds, prices[chosen].mean() / 1000])
    np.testing.assert_allclose(np.mean(ours, 0), np.mean(theirs, 0), atol=0.012)
    assert np.mean(ours, 0)[0] < 0.45  # of 0.6 before


def test_draws_are_seeded_and_room_for_all_keeps_all():
    prices = np.linspace(1, 999, 5000)
    drawn = []
    for seed in (0, 0, 1):
        fate = np.zeros(5000, np.uint8)
        draw(Fake(prices, [""] * 5000), fate, replace(SECOND, drawn=1000), seed)
        drawn.append(fate)
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    fate = np.zeros(5000, np.uint8)
    draw(Fake(prices, [""] * 5000), fate, SECOND, 0)
    assert (fate == OPEN).all()  # the cheapest too, whose weight is 0


def test_splits_have_their_sizes_and_no_title_is_on_two_sides():
    titles = np.random.default_rng(0).integers(0, 3000, 10_000).astype(np.uint64)  # 3,000 titles
    whole = []
    for seed in (0, 1):
        fate = np.zeros(10_000, np.uint8)
        split(Fake([1.0] * 10_000, [""] * 10_000, titles), fate, (7000, 200, 600), seed)
        sizes = np.bincount(fate, minlength=9)
        for code, size in ((TEST, 600), (VAL, 200), (TRAIN, 7000), (BEYOND, 2200)):
            assert size - 30 < sizes[code] < size + 60  # a border moves by the items of one title
        assert all(len(set(fate[titles == title])) == 1 for title in np.unique(titles))
        whole.append(fate)
    assert (whole[0] != whole[1]).any()
    for sizes in ((10**6, 10**6, 10**6), (900, 0, 20), (5, 1, 0)):
        expected = (850, 50, 100) if sizes[0] == 10**6 else sizes
        fate = np.zeros(1000, np.uint8)
        split(Fake([1.0] * 1000, [""] * 1000), fate, sizes, 0)
        assert tuple(np.bincount(fate, minlength=9)[[TRAIN, VAL, TEST]]) == expected


def test_titles_and_prices_of_a_whole_run(tmp_path):
    """Same title, other text: one side. And --sizes and --seed do what they say."""
    titles = [record(n // 3)["title"] for n in range(600)]
    records = [record(n, title=title.upper() if n % 2 else title) for n, title in enumerate(titles)]
    path = write(tmp_path / "a.jsonl", records)
    seen = []
    for seed in ("0", "1"):
        out = tmp_path / f"{seed}.parquet"
        main([str(path), "--out", str(out), "--sizes", "300", "20", "40", "--seed", seed, "--workers", "1"])
        rows = rows_of(out)
        sides = {}
        for row in rows:
            sides.setdefault(normalise_title(row["title"]), set()).add(row["split"])
        assert len(sides) > 100 and all(len(side) == 1 for side in sides.values())
        counts = Counter(row["split"] for row in rows)
        for name, size in (("train", 300), ("val", 20), ("test", 40)):
            assert size - 6 < counts[name] < size + 6
        seen.append({row["id"]: row["split"] for row in rows})
    assert seen[0] != seen[1]


# ---- stopping, going on, bad input ---------------------------------------------------------------------------------


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
    for name, said in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path / name), "--out", str(tmp_path / "out.parquet"), "--workers", workers])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and re.match(f"error: .*{said}", error), (name, error)
        assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    "options, said",
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
def test_bad_options_end_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.jsonl", [record(0)])
    (tmp_path / "there.parquet").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["--out", "out.parquet", *options, "good.jsonl"])
    assert stopped.value.code == 2 and re.search(f"^error: .*{said}", capsys.readouterr().err)
    assert not (tmp_path / "out.parquet").exists() and (tmp_path / "there.parquet").read_text() == ""


def test_the_terminal_says_what_the_json_says(tmp_path, capsys):
    unpriced = [record(n, price=None) for n in range(9)]
    path = write(tmp_path / "a.jsonl", [*(record(n) for n in range(40)), "{", *unpriced])
    main([str(path), "--out", str(tmp_path / "o.parquet"), "--max-tokens", "50", "--workers", "1"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("50 records read -1 that are not JSON (first: a.jsonl, record 41) -9 without a price")
    assert "40 candidates 40 items 34 train 2 val 4 test" in said
    assert all(token_rule(50, 50).fullmatch(row["text"]) for row in rows_of(tmp_path / "o.parquet"))


# ---- memory --------------------------------------------------------------------------------------------------------

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
    said, peaks = [made_up(rng, 4) for _ in range(20_000)], []
    for count in (9_000, 36_000):
        path = tmp_path / f"meta_{count}.jsonl"
        with open(path, "w") as file:
            for number in range(count):
                words = " ".join(rng.choices(said, k=80))
                file.write(f'{{"title": "{words[:60]}", "price": {number % 998 + 1}, "description": ["{words}"]}}\n')
        command = [sys.executable, "-c", MEASURE, str(path), "--out", str(tmp_path / f"{count}.parquet")]
        command += ["--workers", "1", "--preset", "first"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout.split()[-1]) / 1024)  # MiB
        assert pyarrow.parquet.read_metadata(tmp_path / f"{count}.parquet").num_rows > 0.8 * count
    assert peaks[1] - peaks[0] < 20, peaks
