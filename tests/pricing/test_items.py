"""Items: prices, texts and splits, with hand-computed expectations; rows left out, and files that are refused."""

import csv
import json

import numpy as np
import pytest

from pricing.data import sources
from pricing.data.items import (
    Item,
    item_from_row,
    items_from_rows,
    normalise_title,
    parse_price,
    sample,
    split_of,
    unseen,
)
from pricing.data.prompt import load_prompt
from pricing.data.rows import read_rows


def row(**changes):
    return {"title": "Steel mug", "price": 12.5, "description": "330 ml"} | changes


def items_of(*texts):
    return [Item(str(n), t, t, 10.0 + n, "", "train") for n, t in enumerate(texts)]


@pytest.mark.parametrize(
    "value, dollars", [(12.5, 12.5), ("12.50", 12.5), ("$999.49", 999.49), (" $120 ", 120.0), (1, 1.0)]
)
def test_prices_that_are_read(value, dollars):
    assert parse_price(value) == dollars


@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "without a price"),
        ("", "without a price"),
        ("N/A", "unreadable"),
        ([3], "unreadable"),
        ("9,50", "unreadable"),
        (0, "outside"),
        ("$1,299.00", "outside"),
        (999.50, "outside"),
        (-5, "outside"),
        (float("nan"), "without a price"),
        ("nan", "unreadable"),
        ("1_2", "unreadable"),
        (True, "unreadable"),
        (10**400, "unreadable"),
    ],
)
def test_prices_that_are_not(value, reason):
    with pytest.raises(ValueError, match=reason):
        parse_price(value)


@pytest.mark.parametrize("price, dollars", [(0.50, 1), (1.49, 1), (2.50, 3), (999.49, 999), (99.5, 100)])
def test_whole_dollars_round_half_up_into_1_to_999(price, dollars):
    assert Item("1", "t", "t", price, "", "train").dollars == dollars


def test_bad_rows_are_counted_by_reason_or_named_with_strict(tmp_path):
    path = tmp_path / "items.jsonl"
    lines = [json.dumps(row()), "{not json", json.dumps(row(price=0)), json.dumps(row(price="N/A")), json.dumps([1])]
    lines += [json.dumps({"price": 5}), "", json.dumps(row(split="holdout")), json.dumps(row(price=0.2))]
    path.write_text("\n".join(lines) + "\n")
    items, skipped = items_from_rows(read_rows(path), str(path))
    assert len(items) == 1
    assert sum(skipped.counts.values()) == 7
    assert "2 rows with a price outside $0.50 to $999.49 (first: row 3)" in str(skipped)
    assert "2 rows that are not an object (first: row 2)" in str(skipped)
    with pytest.raises(ValueError, match="items.jsonl, row 2: one of the rows that are not an object"):
        items_from_rows(read_rows(path), str(path), strict=True)


def test_what_no_file_can_hold_spoils_no_other_row(tmp_path):
    """Half an emoji, a number of 5,000 digits and lists 100,000 deep, all of them legal JSON"""
    path = tmp_path / "items.jsonl"
    half = '{"title": "caf\\ud83d mug", "price": 12}', '{"text": "mug \\ud83d", "price": 12, "id": "\\udc00"}'
    path.write_text("\n".join([*half, '{"price": ' + "9" * 5000 + "}", "[" * 100_000, json.dumps(row())]))
    items, skipped = items_from_rows(read_rows(path), str(path))
    assert [item.title for item in items] == ["caf? mug", "mug ?", "Steel mug"] and items[1].id == "?"
    assert str(skipped) == "2 rows that are not an object (first: row 3)"
    assert len(sample(items, 2)) == 2


def test_what_is_not_in_utf8_is_counted_and_named(tmp_path):
    line = '{"title": "caf\xe9 mug", "price": 12}\n'
    for name, head, line in (("a.jsonl", "", line), ("a.csv", "title,price\n", "caf\xe9,12\n")):
        (tmp_path / name).write_bytes((head + line + line.replace("\xe9", "e")).encode("latin-1"))
        items, skipped = items_from_rows(read_rows(tmp_path / name), name)
        assert [item.title[:4] for item in items] == ["cafe"]
        assert str(skipped) == "1 rows that are not in UTF-8 (first: row 1)"
    (tmp_path / "b.csv").write_text("title;price\nmug;5\n", encoding="utf-16")
    with pytest.raises(ValueError, match="b.csv is in UTF-16; save it in UTF-8"):
        list(read_rows(tmp_path / "b.csv"))
    (tmp_path / "ask.txt").write_bytes("Was f\xfcr {text}\nPreis: $".encode("latin-1"))
    with pytest.raises(ValueError, match="ask.txt is not in UTF-8 .* at byte 5"):
        load_prompt(str(tmp_path / "ask.txt"))
    (tmp_path / "ask.txt").write_text("Was kostet {text}?\nPreis: $", encoding="utf-8-sig")
    assert load_prompt(str(tmp_path / "ask.txt")).startswith("Was")


def test_csv_of_another_kind_swallows_nothing(tmp_path):
    (tmp_path / "a.csv").write_text('title,price\n"open, 5\nmug,6\n"cup",7\n')
    with pytest.raises(ValueError, match="a.csv, line 2: .*; is a quotation mark left open"):
        list(read_rows(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("title;price\nmug;6\n")
    with pytest.raises(ValueError, match="with commas between; it names 'title;price'"):
        list(read_rows(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("title,price\n" + "mug " * 50_000 + ",6\n")  # more than csv's own limit
    assert len(list(read_rows(tmp_path / "a.csv"))) == 1
    (tmp_path / "b.jsonl").write_text('{"Name": "mug", "PRICE": 6}')
    with pytest.raises(ValueError, match="columns of the first row: Name, PRICE"):
        items_from_rows(read_rows(tmp_path / "b.jsonl"), "b.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n", '{"price": 0}\n'])
def test_nothing_usable_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="empty.jsonl holds no usable item"):
        items_from_rows(read_rows(path), str(path))


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl does not exist"):
        list(read_rows(tmp_path / "nowhere.jsonl"))
    (tmp_path / "items.xlsx").write_text("")
    with pytest.raises(ValueError, match="expected .jsonl, .csv or .parquet"):
        list(read_rows(tmp_path / "items.xlsx"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="bad.parquet is no readable Parquet file"):
        list(read_rows(tmp_path / "bad.parquet"))
    (tmp_path / "open.csv").write_text('title,price\n"a' + "b" * 200_000)
    with pytest.raises(ValueError, match="open.csv, line \\d+: .* is a quotation mark left open"):
        list(read_rows(tmp_path / "open.csv"))
    (tmp_path / "bad.csv").write_text("title,cost\na,1\n")
    with pytest.raises(ValueError, match="the first line must name the columns"):
        list(read_rows(tmp_path / "bad.csv"))
    with pytest.raises(ValueError, match="--data takes"):
        sources.load_items(str(tmp_path / "no.jsonl"), 10, 0)


def test_jsonl_csv_and_parquet_give_the_same_items(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        row(category="Kitchen", brand="Acme", price=12.5),
        row(title='Lamp, "tall"\nblue', brand="", category="Light", price=40.0),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    with open(tmp_path / "a.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, ["title", "price", "description", "category", "brand"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [items_from_rows(read_rows(tmp_path / f"a.{kind}"), kind)[0] for kind in ("jsonl", "csv", "parquet")]
    assert read[0] == read[1] == read[2]
    assert read[0][0].text == "Steel mug\nKitchen\nAcme\n330 ml"
    assert read[0][1].text == 'Lamp, "tall" blue\nLight\n330 ml'


def test_a_published_prompt_gives_neither_question_nor_price_away():
    text = "How much does this cost to the nearest dollar?\n\nA mug, Price is $ on the label\n\nPrice is $13.00"
    assert item_from_row({"text": text, "price": 13}, 1).text == "A mug, Price is $ on the label"
    item = item_from_row(
        {"prompt": "What does this cost to the nearest dollar?\n\nA mug\n\nPrice is $", "completion": "13.00"}, 1
    )
    assert (item.text, item.price) == ("A mug", 13.0)


def test_variants_of_a_title_never_straddle_the_split():
    variants = ["Acme Mug, RED", "acme  mug red", "ACME-MUG: Red!"]
    assert len({normalise_title(v) for v in variants}) == 1
    for n in range(200):
        assert len({split_of(f"{v} {n}") for v in variants}) == 1
    shares = [sum(split_of(f"item {n}") == s for n in range(20000)) / 20000 for s in ("train", "val", "test")]
    np.testing.assert_allclose(shares, [0.85, 0.05, 0.10], atol=0.01)


def test_rows_without_a_title_are_split_by_their_whole_text():
    rows = [{"price": 5, "category": "mug", "description": f"number {n}"} for n in range(300)]
    assert {item_from_row(r, n).split for n, r in enumerate(rows)} == {"train", "val", "test"}


def test_a_summary_column_does_not_push_title_and_description_out():
    assert item_from_row(row(summary="short"), 1).text == "Steel mug\n330 ml"
    assert item_from_row({"title": "t", "summary": "long text", "price": 3}, 1).text == "long text"
    assert item_from_row(row(text="  "), 1).text == "Steel mug\n330 ml"


def test_a_sample_does_not_depend_on_the_order_of_the_file():
    items = items_of(*(f"text {n}" for n in range(50)))
    chosen = sample(items, 10)
    assert chosen == sample(items[::-1], 10) and len(chosen) == 10 and chosen != items[:10]


def test_a_text_that_is_trained_on_is_not_new():
    train, others = items_of("Red mug, 1 l", "blue mug"), items_of("red MUG 1 l", "green mug")
    assert unseen(others, train) == others[1:] and unseen(others, []) == others


def test_a_column_of_any_name_throws_no_row_away():
    assert item_from_row(row(repeated="no"), 1).title == "Steel mug"


def test_the_split_column_decides_where_it_is_there():
    assert item_from_row(row(split="validation"), 1).split == "val"
    assert {item_from_row(row(title=f"t{n}", split="test"), n).split for n in range(50)} == {"test"}
