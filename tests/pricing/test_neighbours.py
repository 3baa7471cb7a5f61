"""Neighbours: the nearest by a brute-force definition, never the item itself, and a file that holds them all."""

import numpy as np
import pytest
from conftest import shared

from pricing.data.items import Item
from pricing.data.neighbours import Index, build, price_line, vectoriser
from pricing.data.sources import load_items


def item(title: str, price: float, text: str = "", split: str = "train") -> Item:
    return Item(title, title, text or title, price, "", split)


TRAIN = [
    item("red steel mug", 10),
    item("blue steel mug", 12),
    item("Blue steel MUG!", 13, "a mug, of steel, in blue, 300 ml"),
    item("gold ring", 900),
    item("gold ring box", 30),
    item("usb cable", 5),
]


def test_nearest_first_and_only_what_shares_a_word():
    rows, similarity = build(TRAIN).nearest([item("gold ring of steel", 1, split="test"), item("xyzzy", 1)], 4)
    assert rows[0, 0] == 3 and rows[0, 1] == 4 and set(rows[0, 2:]) <= {0, 1, 2}
    assert (np.diff(similarity[0]) <= 0).all() and 0 < similarity[0, 0] < 1
    assert rows[1].tolist() == [-1] * 4 and similarity[1].tolist() == [0] * 4


def test_never_the_item_itself_nor_one_of_its_title_or_text():
    index = build(TRAIN)
    rows, _ = index.nearest(TRAIN, 5)
    assert all(number not in row for number, row in enumerate(rows.tolist()))
    assert 2 not in rows[1] and 1 not in rows[2]  # one title, but for capitals and the "!"
    assert rows[1, 0] == 0 and rows[0, 0] in (1, 2)
    renamed = item("another name", 1, "a mug, of steel, in blue, 300 ml", split="test")
    assert 2 not in index.nearest([renamed], 5)[0]  # the same text under another title


def test_the_earlier_of_equals_come_first():
    index = build([Item(str(n), f"t{n}", "blue pen" if n else "red pen", 1.0 + n, "", "train") for n in range(400)])
    rows, _ = index.nearest([Item("x", "x", "a blue one", 5.0, "", "test")], 5)
    assert rows.tolist() == [[1, 2, 3, 4, 5]]


def test_as_brute_force_has_it_in_any_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in range(40)]
    train = [item(f"t{n} " + " ".join(rng.choice(words, 6)), float(n + 1)) for n in range(90)]
    asked = [item(f"q{n} " + " ".join(rng.choice(words, 6)), 1.0, split="test") for n in range(20)]
    fitted = vectoriser().fit([i.text for i in train])
    cosine = (fitted.transform([i.text for i in asked]) @ fitted.transform([i.text for i in train]).T).toarray()
    expected = np.sort(cosine, axis=1)[:, ::-1][:, :7]
    rows, similarity = build(train).nearest(asked, 7)
    np.testing.assert_allclose(similarity, expected, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosine, rows, axis=1), expected, atol=1e-6)
    monkeypatch.setattr("pricing.data.neighbours.CELLS", 270)  # three items at a time
    again = build(train).nearest(asked, 7)
    assert np.array_equal(again[0], rows) and np.array_equal(again[1], similarity)


def test_the_line_for_the_prompt():
    assert price_line([12.5, 15.2, 240.49]) == "Similar products cost $13, $15 and $240."
    assert price_line([9.0, 8.0]) == "Similar products cost $9 and $8."
    assert price_line([0.6]) == "A similar product costs $1." and price_line([]) == ""


def test_saved_and_loaded_it_finds_the_same_without_pickle(tmp_path):
    index = build(TRAIN + [item("Käse – 3.5 % fat", 4)])
    index.save(tmp_path / "neighbours.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["neighbours.npz"]
    with np.load(tmp_path / "neighbours.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
    loaded = Index.load(tmp_path / "neighbours.npz")
    assert loaded.words == index.words
    asked = [*TRAIN, item("käse ring", 1, split="test"), item("mug box", 1, split="test")]
    for one, other in zip(index.nearest(asked, 3), loaded.nearest(asked, 3), strict=True):
        assert np.array_equal(one, other)


def test_bad_input_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="training items; got test, val items"):
        build([*TRAIN, item("a b", 1, split="test"), item("c d", 1, split="val")])
    with pytest.raises(ValueError, match="got no items"):
        build([])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        build(TRAIN).nearest(TRAIN, 0)
    path = tmp_path / "neighbours.npz"
    with pytest.raises(ValueError, match="does not exist"):
        Index.load(path)
    build(TRAIN).save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"no zip at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="holds no neighbours") as error:
            Index.load(path)
        assert "\n" not in str(error.value)


def test_on_real_parts_it_is_far_better_than_a_constant():
    items, _, _ = load_items(str(shared("pc_parts.jsonl")), 0, 0)
    train = [i for i in items if i.split == "train"][::4]
    test = [i for i in items if i.split == "test"][::4]
    truth = np.array([i.price for i in test])
    index = build(train)
    error = np.abs(np.median(index.prices[index.nearest(test, 5)[0]], axis=1) - truth).mean()
    assert error < 0.7 * np.abs(np.median([i.price for i in train]) - truth).mean()
