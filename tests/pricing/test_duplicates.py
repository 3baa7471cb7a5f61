"""Near-duplicates and leaks beside brute force."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import shared
from datasketch import MinHash
from raw_records import families, jaccard, made_up, pairs, record, rows_of, variant, write

from pricing.curation import leaks as leaks_module
from pricing.curation.curate import curate
from pricing.curation.duplicates import band_keys, bands_for, parts, shingles_of, words_in
from pricing.curation.leaks import leaks
from pricing.curation.rules import FIRST, SECOND, item_of


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_near_duplicates_are_those_of_brute_force(tmp_path, threshold):
    rng = random.Random(1)
    texts = families(rng, 100, 160)
    records = [record(n, title=made_up(rng, 3), description=[t], features=[], details={}) for n, t in enumerate(texts)]
    path, preset = write(tmp_path / "a.jsonl", records), replace(FIRST, sizes=(10**6, 0, 0))
    report = curate([path], tmp_path / "a.parquet", preset, near=threshold)
    ids = {row["id"] for row in rows_of(tmp_path / "a.parquet")}
    sets = [pairs(item_of(r, FIRST, "")[1]) for r in records]
    alike = [[m for m in range(n) if jaccard(sets[n], sets[m]) >= threshold] for n in range(len(sets))]
    gone = [n for n, r in enumerate(records) if r["parent_asin"] not in ids]
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
