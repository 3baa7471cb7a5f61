"""Rows of files that are not as they should be: each kind of trouble, and a neighbour of it.

    python -m pytest tests/pricing/test_rows.py
"""

import json
import time
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from common.screen import listed
from pricing.data import rows
from pricing.data.items import items_from_rows, parse_price, without_question
from pricing.data.rows import read_rows

NAN = float("nan")


def items_of(path, content=None):
    if content is not None:
        path.write_bytes(content.encode())
    return items_from_rows(read_rows(path), path.name)


def parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# ---- columns that shift ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["Lamp,1,299.00,4", "Bolt, M8,12.50,4.5", '"Bolt","12.50",4,,x'])
def test_a_row_with_more_cells_than_the_header_is_left_out(tmp_path, row):
    items, skipped = items_of(tmp_path / "a.csv", f"title,price,stars\n{row}\nMug,12.99,5\n")
    assert [(item.title, item.price) for item in items] == [("Mug", 12.99)]
    assert str(skipped) == "1 rows with more cells than the header (first: row 1)"


@pytest.mark.parametrize("row", ["Mug,12.99,", "Mug,12.99,,, ", "Mug,12.99"])
def test_surplus_cells_that_are_empty_do_no_harm(tmp_path, row):
    assert items_of(tmp_path / "a.csv", f"title,price\n{row}\n")[0][0].price == 12.99


@pytest.mark.parametrize("header", ["title,price,price", "title,price, price ", "title,Title,price,title"])
def test_a_csv_column_named_twice_is_an_error(tmp_path, header):
    twice = "'title'" if header.endswith("title") else "'price'"
    with pytest.raises(ValueError, match=f"a.csv has two columns of the name {twice}; rename one"):
        items_of(tmp_path / "a.csv", f"{header}\nMug,5,6,7\n")
    assert items_of(tmp_path / "a.csv", " title,price ,,\nMug,5,,\n")[0][0].title == "Mug"  # no names are not one name


def test_a_key_or_parquet_column_named_twice(tmp_path):
    table = '{"title": "Mug", "price": 5, "price": 6}', '{"title": "Cup", "price": 7}'
    items, skipped = items_of(tmp_path / "a.jsonl", "\n".join(table))
    assert len(items) == 1 and str(skipped) == "1 rows that name 'price' twice (first: row 1)"
    columns = [pyarrow.array(["Mug"]), *[pyarrow.array([5.0])] * 2]
    table = pyarrow.Table.from_arrays(columns, ["title", "price", "price"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has two columns of the name 'price'"):
        items_of(tmp_path / "a.parquet")


# ---- cells that are no text ------------------------------------------------------------------------------------------


def test_nan_is_an_empty_cell_in_jsonl_and_parquet(tmp_path):
    table = [
        {"title": "Mug", "description": NAN, "category": NAN, "brand": NAN, "id": NAN, "split": NAN, "price": 5.0},
        {"title": NAN, "description": NAN, "price": 6.0},
        {"title": "Cup", "price": NAN},
        {"title": "Jug", "text": NAN, "price": NAN, "completion": "7.00"},
    ]
    items, skipped = items_of(tmp_path / "a.jsonl", "\n".join(map(json.dumps, table)))
    assert [(item.id, item.title, item.text, item.category) for item in items] == [
        ("1", "Mug", "Mug", ""), ("4", "Jug", "Jug", ""),
    ]  # fmt: skip
    assert skipped.counts == {"rows without text": 1, "rows without a price": 1} and "nan" not in str(items)
    columns = {"title": ["Mug", "Cup"], "brand": [NAN, NAN], "category": [None, None], "price": [5.0, NAN]}
    items, skipped = items_of(parquet(tmp_path / "a.parquet", columns))
    assert items[0].text == "Mug" and items[0].category == "" and skipped.counts == {"rows without a price": 1}


def test_the_word_nan_is_a_word(tmp_path):
    items, _ = items_of(tmp_path / "a.csv", "title,price\nNan,5\n")
    assert items[0].title == "Nan"
    for value, reason in ((Decimal("NaN"), "without a price"), ("nan", "unreadable"), ("inf", "unreadable")):
        with pytest.raises(ValueError, match=reason):
            parse_price(value)


def test_lists_are_joined_and_empty_ones_are_empty(tmp_path):
    table = [
        {"title": "Mug", "description": [], "category": [""], "price": 5},
        {"title": "Cup", "description": ["A nice cup.", None, "Blue."], "category": ["Home", "Kitchen"], "price": 6},
        {"text": ["A jug", "of glass"], "description": [], "price": 7},
    ]
    expected = ["Mug", "Cup\nHome, Kitchen\nA nice cup. Blue.", "A jug\nof glass"]
    assert [item.text for item in items_of(tmp_path / "a.jsonl", "\n".join(map(json.dumps, table)))[0]] == expected
    columns = {"title": ["Mug", "Cup"], "description": [[], ["A nice cup.", "Blue."]], "price": [5, 6]}
    items, _ = items_of(parquet(tmp_path / "a.parquet", columns))
    assert [item.text for item in items] == ["Mug", "Cup\nA nice cup. Blue."]


@pytest.mark.parametrize("cell, kind", [({"name": "Acme"}, "an object"), ([{"name": "Acme"}], "an object")])
@pytest.mark.parametrize("column", ["brand", "description", "text", "category", "id", "split", "title"])
def test_objects_are_refused_by_column(tmp_path, column, cell, kind):
    row = {"title": "Mug", "price": 5, column: cell}
    with pytest.raises(ValueError, match=f"1 rows whose column '{column}' is {kind}, not text .first: row 1"):
        items_of(tmp_path / "a.jsonl", json.dumps(row))
    row = {"title": "Mug", "price": 5, "unused": cell}
    assert items_of(tmp_path / "a.jsonl", json.dumps(row))[0][0].text == "Mug"


def test_structs_and_binary_text_in_parquet_are_refused_by_column(tmp_path):
    for column, cells, kind in (("brand", [{"a": 1}], "an object"), ("title", [b"Mug"], "binary")):
        with pytest.raises(ValueError, match=f"column '{column}' is {kind}, not text"):
            items_of(parquet(tmp_path / "a.parquet", {"title": ["Mug"], "price": [5.0]} | {column: cells}))
    with pytest.raises(ValueError, match="1 rows with an unreadable price"):
        items_of(parquet(tmp_path / "a.parquet", {"title": ["Mug"], "price": [b"5.0"]}))


@pytest.mark.parametrize("text", ["1.299", "12.990", "$999.000", " .125 ", "1,299.000"])
def test_three_digits_behind_the_only_dot_are_no_cents(text):
    with pytest.raises(ValueError, match="unreadable"):
        parse_price(text)


@pytest.mark.parametrize("text, dollars", [("12.5", 12.5), ("12.", 12), ("12.9900", 12.99), (1.299, 1.299)])
def test_other_numbers_of_digits_are(text, dollars):
    assert parse_price(text) == dollars


# ---- files of other kinds, and far too large ones --------------------------------------------------------------------


def test_completion_is_a_price_in_csv_too(tmp_path):
    prompt = "What does this cost to the nearest dollar?\n\nMug\n\nPrice is $"
    csv_items, _ = items_of(tmp_path / "a.csv", f'prompt,completion\n"{prompt}",12.00\n')
    assert csv_items == items_of(tmp_path / "a.jsonl", json.dumps({"prompt": prompt, "completion": "12.00"}))[0]
    assert (csv_items[0].text, csv_items[0].price) == ("Mug", 12)


@pytest.mark.parametrize("name, words", [("a.json", "write one object a line"), ("a.jsonl.gz", "unpack it first")])
def test_files_of_other_kinds_are_told_what_to_do(tmp_path, name, words):
    with pytest.raises(ValueError, match=f"{name}: expected .jsonl, .csv or .parquet; {words}"):
        items_of(tmp_path / name, "[]")


def test_a_message_names_a_few_of_many_columns(tmp_path):
    row = {f"column {n} " + "x" * 90: 1 for n in range(9000)}
    for path, content in ((tmp_path / "a.jsonl", json.dumps(row)), (tmp_path / "a.csv", ",".join(row) + "\n1\n")):
        with pytest.raises(ValueError) as error:
            items_of(path, content)
        assert "column 0" in str(error.value) and "8,988 more" in str(error.value) and len(str(error.value)) < 900
    assert listed(["a", "b\x1b[2J"]) == "a, b\\x1b[2J"


def test_white_space_without_end_takes_no_time(tmp_path):
    space, started = " " * 1_000_000, time.perf_counter()
    table = [{"text": f"Mug{space}Price is $x", "price": 5}, {"title": "Mug", "price": f"{space}x"}]
    table += [{"text": "Mug" + "\n" * 1_000_000 + "x", "price": f"$5{space}"}, {"text": space, "price": 5}]
    items, skipped = items_of(tmp_path / "a.jsonl", "\n".join(map(json.dumps, table)))
    assert len(items) == 2 and time.perf_counter() - started < 1
    assert skipped.counts == {"rows with an unreadable price": 1, "rows without text": 1}
    assert without_question(f"Mug{space}Price is $12.50{space}") == "Mug"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_cell_that_is_far_too_long_costs_no_other_row(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(rows, "MOST_LINE", 3 << 20)
    texts, path = ["Mug", "x" * (5 << 19), "Cup"], tmp_path / f"a.{kind}"
    if kind == "jsonl":
        texts[1] *= 2  # longer than any line may be
        path.write_text("\n".join(json.dumps({"title": text, "price": 5}) for text in texts))
    elif kind == "csv":
        path.write_text("title,price\n" + "".join(f"{text},5\n" for text in texts))
    else:
        parquet(path, {"title": texts, "price": [5] * 3})
    items, skipped = items_of(path)
    assert [item.title for item in items] == ["Mug", "Cup"]
    assert str(skipped) == "1 rows with more than 1 MiB of text in a cell (first: row 2)"


def test_a_csv_line_that_never_ends_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_LINE", 1 << 10)
    with pytest.raises(ValueError, match="a.csv, line 3: more than"):
        items_of(tmp_path / "a.csv", "title,price\nMug,5\n" + "x" * 3000)


def test_parquet_that_unpacks_without_end_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", {"title": ["x" * (80 << 20)], "price": [5]})
    with pytest.raises(ValueError, match="a.parquet: column 'title' holds 80 MiB in 1 rows"):
        items_of(path)
    path = parquet(tmp_path / "a.parquet", {"title": ["Mug"] * 3_000_000, "price": [5] * 3_000_000})
    assert path.stat().st_size < 1 << 16
    with pytest.raises(ValueError, match="a.parquet has 3,000,000 rows; 2,000,000 are read at most"):
        items_of(path)
    monkeypatch.setattr(rows, "MOST_ROWS", 3)
    with pytest.raises(ValueError, match="a.csv has more than 3 rows; take a sample"):
        items_of(tmp_path / "a.csv", "title,price\n" + "Mug,5\n" * 4)


def test_more_text_than_memory_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pricing.data.items.MOST_CHARACTERS", 100)
    with pytest.raises(ValueError, match="a.csv: more than 0 GiB of text by row 3; take a sample"):
        items_of(tmp_path / "a.csv", "title,price\n" + f"{'x' * 40},5\n" * 4)


def test_a_date_in_the_year_12000_is_one_line(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"title": ["Mug"], "price": [5], "d": pyarrow.array([3_700_000], "date32")})
    with pytest.raises(ValueError, match="a.parquet: a cell that cannot be read"):
        items_of(path)


@pytest.mark.parametrize("sign", ["\u2028", "\u0085", "\x0c", "\x1d"])
def test_only_line_ends_end_lines(tmp_path, sign):
    row = json.dumps({"text": f"Mug{sign}blue", "price": 5}, ensure_ascii=False) if sign > " " else None
    if row and sign != "\x1d":
        assert len(items_of(tmp_path / "a.jsonl", f"{row}\r\n{row}\n")[0]) == 2
    assert len(items_of(tmp_path / "a.csv", f"title,price\nMug{sign}blue,5\nCup,6\n")[0]) == 2
