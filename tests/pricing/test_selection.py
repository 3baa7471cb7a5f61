"""Draws beside numpy's, and the split."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from raw_records import record, rows_of, write

from pricing.curation.curate import main
from pricing.curation.rules import FIRST, SECOND
from pricing.curation.selection import BEYOND, NOT_DRAWN, OPEN, TEST, TRAIN, VAL, draw, split
from pricing.data.items import normalise_title


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
        for means, chosen in (
            (ours, fate == OPEN), (theirs, rng.choice(count, 3000, replace=False, p=weight / weight.sum())),
        ):  # fmt: skip
            kinds = [np.mean(categories[chosen] == c) for c in ("Automotive", "Tools and Home Improvement")]
            means.append([*kinds, prices[chosen].mean() / 1000])
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
