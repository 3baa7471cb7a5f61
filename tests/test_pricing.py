"""Items, splits, prompts, packing, metrics and reports, with hand-computed expectations."""

import csv
import json
import math
import zipfile

import numpy as np
import pytest
from conftest import shared

from llama.tokenizer import Tokenizer
from pricing import sources
from pricing.baselines import BASELINES
from pricing.batch import batches, by_length, pack
from pricing.items import (
    Item,
    item_from_row,
    items_from_rows,
    normalise_title,
    parse_price,
    read_rows,
    sample,
    split_of,
)
from pricing.metrics import band_of, bootstrap_interval, colour, score
from pricing.prompt import PROMPT, Example, encode_items, encode_prompt
from pricing.report import write_report


def row(**changes):
    return {"title": "Steel mug", "price": 12.5, "description": "330 ml"} | changes


# ---- items ---------------------------------------------------------------------------------------------------------


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
        (float("nan"), "outside"),
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
    assert "2 rows that are no object (first: row 2)" in str(skipped)
    with pytest.raises(ValueError, match="items.jsonl, row 2: one of the rows that are no object"):
        items_from_rows(read_rows(path), str(path), strict=True)


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


def test_no_title_is_in_two_splits():
    items, _, _ = sources.load_items("catalogue", 4000, 0)
    splits = {}
    for item in items:
        splits.setdefault(normalise_title(item.title), set()).add(item.split)
    assert len(splits) > 3000 and all(len(s) == 1 for s in splits.values())


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


def test_the_split_column_decides_where_it_is_there():
    assert item_from_row(row(split="validation"), 1).split == "val"
    assert {item_from_row(row(title=f"t{n}", split="test"), n).split for n in range(50)} == {"test"}


def test_folders_of_hub_files_take_the_split_from_the_name(tmp_path):
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"):
        (tmp_path / name).write_text(json.dumps(row(title=name)) + "\n")
    items, _ = items_from_rows(sources.folder_rows(tmp_path), "hub")
    assert sorted(item.split for item in items) == ["test", "train"]


# ---- pc-parts ------------------------------------------------------------------------------------------------------


def test_pc_parts_equal_the_known_list(tmp_path, monkeypatch):
    """Downloaded (here from a file URL), checked, written out: the 15,489 items of the shared file, no more, no
    less."""
    archive, known = shared("pc-part-dataset-jsonl.zip"), shared("pc_parts.jsonl")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "PC_PARTS_URL", archive.as_uri())
    items, skipped, identity = sources.load_items("pc-parts", 0, 0)
    expected = [json.loads(line) for line in known.read_text().splitlines()]
    assert sorted((i.text, i.price) for i in items) == sorted(
        ("\n".join(" ".join(e[part].split()) for part in ("title", "category", "description") if e[part]), e["price"])
        for e in expected
    )
    assert identity["items"] == 15489 and sum(skipped.counts.values()) == 66_778 - 15_489
    assert not any("price per gb" in item.text for item in items)
    assert sum(item.split == "test" for item in items) >= 1000
    assert [p.suffix for p in tmp_path.iterdir()] == [".zip"]  # nothing half-written left


def test_pc_parts_rows_by_hand(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        part = {
            "name": "Fan",
            "price": 9.5,
            "price_per_gb": 1,
            "rpm": [500, 900],
            "pwm": True,
            "noise_level": None,
            "size": 120,
        }
        archive.writestr(
            "data/case-fan.jsonl", "\n".join([json.dumps(part)] * 2 + [json.dumps(part | {"price": None})])
        )
    rows = list(sources.pc_parts_rows(tmp_path / "a.zip"))
    fan = {"title": "Fan", "category": "case fan", "description": "rpm: 500 / 900; pwm: yes; size: 120", "price": 9.5}
    assert rows[0] == (1, fan | {"repeated": False})
    items, skipped = items_from_rows(rows, "parts")
    assert len(items) == 1
    assert skipped.counts == {"rows that repeat an earlier one": 1, "rows without a price": 1}


def test_a_changed_or_unreachable_download_leaves_nothing(tmp_path):
    (tmp_path / "source").write_text("something else")
    target = tmp_path / "cache" / "file.zip"
    with pytest.raises(OSError, match="has sha256 .* expected"):
        sources.download((tmp_path / "source").as_uri(), "0" * 64, target)
    with pytest.raises(OSError, match="cannot fetch"):
        sources.download((tmp_path / "absent").as_uri(), "0" * 64, target)
    assert list(target.parent.iterdir()) == []


# ---- prompt and batch ----------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tiny_directory):
    return Tokenizer.from_directory(tiny_directory)


def items_of(*texts):
    return [Item(str(n), t, t, 10.0 + n, "", "train") for n, t in enumerate(texts)]


def test_the_mask_covers_exactly_the_answer(tokenizer):
    items = items_of("a mug", "Price is $99.00 printed on the box\n\nPrice is $", "lamp")
    examples = encode_items(items, tokenizer, max_tokens=200)
    batch = pack(examples)
    start = 0
    for item, example, length in zip(items, examples, batch.lengths, strict=False):
        assert tokenizer.decode(example.prompt) == PROMPT.replace("{text}", item.text)
        assert tokenizer.decode(example.answer) == f"{item.dollars}.00"
        assert batch.tokens[start : start + length] == example.prompt + example.answer[:-1]
        predicted = {
            a + 1 - start: t for a, t in zip(batch.at, batch.targets, strict=True) if start <= a < start + length
        }
        whole = example.prompt + example.answer
        assert predicted == {i: whole[i] for i in range(len(example.prompt), len(whole))}
        start += length
    assert len(batch.tokens) % 128 == 0 and sum(batch.lengths) == len(batch.tokens)
    assert max(batch.at) < batch.real_tokens  # the filler is not learnt


def test_long_texts_are_cut_but_never_the_question(tokenizer):
    full = encode_prompt("x" * 500, tokenizer, 10_000)
    ids = encode_prompt("x" * 500, tokenizer, 100)
    assert len(ids) == 100 and len(full) > 500
    assert tokenizer.decode(ids).startswith("How much does this cost") and tokenizer.decode(ids).endswith(
        "xx\n\nPrice is $"
    )
    with pytest.raises(ValueError, match="the question alone takes"):
        encode_prompt("x" * 500, tokenizer, 20)


def test_every_epoch_has_every_item_once_and_resumes_anywhere():
    examples = [Example([n], [n], float(n)) for n in range(23)]
    stream = batches(examples, 5, seed=3)
    epochs = [[next(stream) for _ in range(5)] for _ in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(e.price for _, batch in epoch for e in batch) == list(range(23))
        assert {n for n, _ in epoch} == {number}
    assert epochs[0] != epochs[1]
    flat = [batch for epoch in epochs for batch in epoch]
    for start in (0, 3, 5, 12):
        resumed = batches(examples, 5, seed=3, start=start)
        assert [next(resumed) for _ in range(15 - start)] == flat[start:]
    assert next(batches(examples, 5, seed=4)) != flat[0]


def test_batches_by_length_cover_all_longest_first():
    prompts = [[0] * n for n in (3, 9, 1, 7, 5)]
    order = list(by_length(prompts, 2))
    assert order == [[1, 3], [4, 0], [2]]


# ---- metrics and report --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "truth, guess, expected",
    [
        (100, 139, "green"),
        (100, 140, "yellow"),
        (500, 401, "green"),
        (500, 400, "yellow"),
        (100, 179, "yellow"),
        (100, 180, "red"),
        (500, 300, "red"),
    ],
)
def test_colours(truth, guess, expected):
    assert colour(truth, guess) == expected


def test_score_by_hand():
    truth, guess = np.array([10.0, 100.0, 400.0]), np.array([20.0, 150.0, 300.0])
    m = score(truth, guess, constant=110.0, categories=["a", "b", "a"])
    assert m["n"] == 3
    assert m["mae"] == pytest.approx(160 / 3)
    assert m["median_error"] == 50
    assert m["constant_mae"] == pytest.approx((100 + 10 + 290) / 3)
    assert m["ratio"] == pytest.approx(160 / 400)
    logs = [math.log(11) - math.log(21), math.log(101) - math.log(151), math.log(401) - math.log(301)]
    assert m["rmsle"] == pytest.approx(math.sqrt(sum(x * x for x in logs) / 3))
    assert m["r2"] == pytest.approx(1 - 12600 / ((160**2) + 70**2 + 230**2))
    assert (m["green"], m["yellow"], m["red"]) == (1, 2, 0) and m["hits"] == pytest.approx(1 / 3)
    assert m["bands"] == {
        "$0-50": {"n": 1, "mae": 10},
        "$100-200": {"n": 1, "mae": 50},
        "$400-1000": {"n": 1, "mae": 100},
    }
    assert m["categories"] == {"a": {"n": 2, "mae": 55}, "b": {"n": 1, "mae": 50}}
    low, high = m["mae_ci95"]
    assert 10 <= low < m["mae"] < high <= 100


def test_interval_is_seeded_and_near_the_normal_one():
    values = np.random.default_rng(1).normal(50, 20, 2000)
    low, high = bootstrap_interval(values)
    assert [low, high] == bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.12)


def test_bands_at_their_borders():
    assert [band_of(p) for p in (0.5, 49.99, 50, 399.99, 400, 999.49)] == [
        "$0-50",
        "$0-50",
        "$50-100",
        "$200-400",
        "$400-1000",
        "$400-1000",
    ]


def test_scores_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="cannot score"):
        score(np.array([]), np.array([]), 1.0, [])
    with pytest.raises(ValueError, match="guess 2 is no number"):
        score(np.array([1.0, 2.0]), np.array([1.0, np.nan]), 1.0, ["", ""])


def test_baselines_learn_from_training_items_only():
    train = [
        Item(str(n), "t", f"{'gold' if n % 2 else 'tin'} ring {n}", 500.0 if n % 2 else 10.0, "", "train")
        for n in range(40)
    ]
    test = [Item("x", "t", "gold ring", 480.0, "", "test"), Item("y", "t", "tin ring", 12.0, "", "test")]
    assert BASELINES["constant: mean"](train, test).tolist() == [255, 255]
    assert BASELINES["constant: median"](train + [train[0]], test).tolist() == [10, 10]
    ridge = BASELINES["ridge on tf-idf"](train, test)
    assert ridge[0] > 300 and ridge[1] < 30


def test_report_files_and_their_fields(tmp_path):
    items = [Item(str(n), f"<b>item {n}</b>", "text & more", 10.0 * (n + 1), "c", "test") for n in range(12)]
    truth = np.array([i.price for i in items])
    guess = truth * 1.3
    metrics = score(truth, guess, 60.0, ["c"] * 12) | {"seconds": 1.0, "decode": "median"}
    write_report(
        tmp_path, metrics, items, guess, (guess - 5, guess + 5), {"fine-tuned": metrics, "other": metrics}, "about"
    )
    assert {p.name for p in tmp_path.iterdir()} == {
        "metrics.json",
        "predictions.csv",
        "scatter.png",
        "comparison.png",
        "report.html",
    }
    fields = "n mae mae_ci95 median_error rmsle r2 hits green yellow red parse_failures constant_mae ratio seconds "
    fields += "decode bands categories"
    assert set(fields.split()) <= set(json.loads((tmp_path / "metrics.json").read_text()))
    with open(tmp_path / "predictions.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["id", "title", "truth", "guess", "low", "high", "error", "colour"]
    assert rows[11]["error"] == "36.00" and rows[11]["colour"] == "green" and rows[11]["title"] == "<b>item 11</b>"
    page = (tmp_path / "report.html").read_text()
    assert 'src="data:image/png' in page and "http" not in page.replace("http-equiv", "")
    assert "text &amp; more" in page
    assert (tmp_path / "scatter.png").read_bytes()[:4] == b"\x89PNG"
