"""The report's files and fields, what the page says, and two reports compared."""

import csv
import json
import re

import numpy as np
import pytest

from pricing.data.items import Item
from pricing.evaluation.cells import guarded, unguarded
from pricing.evaluation.compare import compare_reports, read_predictions
from pricing.evaluation.console import show_guess, table, whole
from pricing.evaluation.guesses import read_guesses
from pricing.evaluation.metrics import paired_difference, score
from pricing.evaluation.report import comparison_table, headline, write_predictions, write_report


@pytest.fixture
def report(tmp_path):
    """30 items, guessed 33 % too high at first and 2 % in the end; ranges that hold the first ten only."""
    truth = np.arange(10.0, 301.0, 10.0)
    texts = [f"item {n} <i>\ntext & more" for n in range(30)]
    items = [Item(str(n), f"<b>item {n}</b>", texts[n], truth[n], "c", "test") for n in range(30)]
    guess = truth * np.linspace(1.33, 1.02, 30)
    interval = truth - 5, np.where(np.arange(30) < 10, truth, truth - 1)
    metrics = score(truth, guess, 60.0, ["c"] * 30, 0, interval) | {"seconds": 1.0, "decode": "median", "share": 0.8}
    above = paired_difference(np.abs(truth - 60), np.abs(truth - guess))
    other = score(truth, np.full(30, 60.0), 60.0, ["c"] * 30) | {"seconds": 2.0, "above": above}
    write_report(tmp_path, metrics, items, guess, interval, {"fine-tuned": metrics, "other": other}, "about <this>")
    return tmp_path


def test_files_and_fields(report):
    pictures = {"scatter.png", "comparison.png"}
    assert {p.name for p in report.iterdir()} == pictures | {"metrics.json", "predictions.csv", "report.html"}
    assert all((report / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    fields = "n mae mae_ci95 median_error rmsle r2 hits green yellow red parse_failures constant_mae ratio seconds "
    fields += "decode bands categories coverage width share"
    assert set(fields.split()) <= set(json.loads((report / "metrics.json").read_text()))
    with open(report / "predictions.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["id", "title", "truth", "guess", "low", "high", "error", "colour"]
    assert list(rows[0].values()) == ["0", "<b>item 0</b>", "10.00", "13.30", "5.00", "10.00", "3.30", "green"]


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(report):
    page = (report / "report.html").read_text()
    assert page.count('src="data:image/png') == 2 and "http" not in page
    assert "text &amp; more" in page and "about &lt;this&gt;" in page
    assert "text & more" not in page and "<i>" not in page


def test_the_page_says_what_a_reader_looks_for(report):
    page = (report / "report.html").read_text()
    metrics = json.loads((report / "metrics.json").read_text())
    assert f"${metrics['mae']:.2f}</span> off on average, over 30 products" in page
    truth = np.arange(10.0, 301.0, 10.0)
    assert f"The best of the other predictors here, other, is off by ${np.abs(truth - 60).mean():.2f}." in page
    assert "The 80% ranges hold the true price of 33.3% of the items" in page
    assert "<td>$400-1000</td>" not in page and "<td>$0-50</td><td>4</td>" in page
    lists = page.split("The twenty worst")[1].split("The twenty best")
    listed = [[int(n) for n in re.findall(r"<b>item (\d+) &lt;i&gt;</b>", part)] for part in lists]
    errors = truth * np.linspace(0.33, 0.02, 30)
    assert listed[0] == sorted(range(30), key=lambda n: -errors[n])[:20]
    assert listed[1] == list(range(29, 9, -1))  # the share of the price by which a guess is off falls from item to item


def test_the_table_is_sorted_and_shows_the_paired_difference():
    plain = {"median_error": 1.0, "rmsle": 0.5, "hits": 0.5, "ratio": 0.25, "seconds": 3.0}
    above = {"difference": -4.5, "ci95": [-6.0, 0.25]}
    header, rows = comparison_table({"fine-tuned": plain | {"mae": 20.0}, "b": plain | {"mae": 15.5, "above": above}})
    assert [len(header)] * 2 == [len(row) for row in rows] and header[-1] == "above fine-tuned (95%)"
    assert rows[0] == ["b", "$15.50", "$1.00", "0.500", "50.0%", "0.250", "3.0", "-$4.50 (-6.00 to +0.25)"]
    assert rows[1][0] == "fine-tuned" and rows[1][-1] == ""


# ---- two reports ---------------------------------------------------------------------------------------------------


def predictions(directory, prices, guesses, names=None):
    directory.mkdir()
    names = names or [f"title {n}" for n in range(len(prices))]
    items = [Item(str(n), name, name, price, "", "test") for n, (name, price) in enumerate(zip(names, prices))]
    low = np.array(prices)
    write_predictions(directory / "predictions.csv", items, np.array(guesses, dtype=float), low, low)
    return directory


def test_compared_by_hand(tmp_path):
    """Errors 11 and 53 against 10 and 50, the second file in another order."""
    a = predictions(tmp_path / "a", [100.0, 200.0], [111, 147])
    b = predictions(tmp_path / "b", [100.0, 200.0], [90, 250])
    lines = (b / "predictions.csv").read_text().splitlines()
    (b / "predictions.csv").write_text("\n".join([lines[0], lines[2], lines[1]]) + "\n")
    words = compare_reports(a, b)
    assert f"{a}  off by $32.00 on average\n{b}  off by $30.00 on average" in words
    assert f"2 items: +$2.00 (95 % interval +$1.00 to +$3.00): {b} is better on such items; what another seed" in words
    assert f"-$2.00 (95 % interval -$3.00 to -$1.00): {b} is better" in compare_reports(b, a)
    c = predictions(tmp_path / "c", [100.0, 200.0], [120, 225])  # errors 20 and 25: better by 28, worse by 9
    assert compare_reports(a, c).endswith("no difference that these items can show")


def test_items_of_one_title_are_compared_as_one(tmp_path):
    """Two titles whose errors differ by 1 and by 3: a draw may leave out the second, however often it stands there."""
    names = ["mug", *["Desk, oak"] * 20, *["desk OAK"] * 20]
    a = predictions(tmp_path / "a", [100.0] * 41, [111, *[153] * 40], names)
    b = predictions(tmp_path / "b", [100.0] * 41, [110, *[150] * 40], names)
    assert "over the same 41 items: +$2.95 (95 % interval +$1.00 to +$3.00)" in compare_reports(a, b)


def test_items_that_repeat_are_all_counted(tmp_path):
    a = predictions(tmp_path / "a", [10.0, 10.0], [12, 14], ["same", "same"])
    b = predictions(tmp_path / "b", [10.0, 10.0], [10, 10], ["same", "same"])
    for directory in (a, b):
        text = (directory / "predictions.csv").read_text().replace("\n1,same", "\n0,same")
        (directory / "predictions.csv").write_text(text)
    assert "over the same 2 items: +$3.00" in compare_reports(a, b)


@pytest.mark.parametrize(
    "prices, names, counts",
    [
        ([10.0], ["x"], "1 are only in the first, 0 only in the second"),
        ([10.0, 20.0], ["x", "z"], "1 are only in the first, 1 only in the second"),
        ([10.0, 21.0], ["x", "y"], "1 are only in the first, 1 only in the second"),
    ],
)
def test_different_items_are_refused(tmp_path, prices, names, counts):
    a = predictions(tmp_path / "a", [10.0, 20.0], [1, 1], ["x", "y"])
    b = predictions(tmp_path / "b", prices, [1] * len(prices), names)
    with pytest.raises(ValueError, match=f"priced different items .{counts}"):
        compare_reports(a, b)


def test_what_is_no_report_is_refused(tmp_path):
    good = predictions(tmp_path / "a", [10.0], [1])
    with pytest.raises(ValueError, match="nowhere is not a report of evaluate.py"):
        compare_reports(good, tmp_path / "nowhere")
    bad = predictions(tmp_path / "b", [10.0], [1])
    for content, words in (
        ("", "has no item"),
        ("id,title,truth,error\n0,t,1,abc\n", "damaged or of another version"),
        ("id,title,truth\n0,t,1\n", "damaged or of another version"),
        ("id,title,truth,error\n0,t\n", "damaged or of another version"),
    ):
        (bad / "predictions.csv").write_text(content)
        with pytest.raises(ValueError, match=words):
            compare_reports(good, bad)


TITLES = [
    "=1+2", "+1", "-5 mm bolt", "@home", "\tx", "\rx", "'=1", "''=1", "'quoted' mug", " =1", "plain", "", "\uff1d1",
    'a "b", c\nd', "a=b",
]  # fmt: skip


def test_no_title_runs_as_a_formula_and_none_is_changed(tmp_path):
    """What a spreadsheet sees begins with no sign of a formula; what compare.py reads is what was written."""
    assert [unguarded(guarded(title)) for title in TITLES] == TITLES
    a = predictions(tmp_path / "a", [10.0] * len(TITLES), range(len(TITLES)), TITLES)
    with open(a / "predictions.csv", newline="", encoding="utf-8") as handle:
        cells = [row["title"] for row in csv.DictReader(handle)]
    assert not any(cell.lstrip(" ")[:1] in tuple("=+-@\t\r\uff1d") for cell in cells if cell)
    assert cells[8] == "'quoted' mug" and cells[10:12] == ["plain", ""] and cells[14] == "a=b"
    assert [title for _, title, _ in read_predictions(a)] == TITLES


def test_guesses_are_found_by_ids_that_were_guarded(tmp_path):
    items = [Item(name, "t", "t", 10.0, "", "test") for name in ("-5", "x")]
    write_predictions(tmp_path / "p.csv", items, np.array([7.0, 8.0]), np.ones(2), np.ones(2))
    assert "'-5" in (tmp_path / "p.csv").read_text()
    assert read_guesses(f"me={tmp_path / 'p.csv'}", items[::-1]).guess.tolist() == [8, 7]


def test_no_price_of_0_dollars_is_shown():
    assert [whole(dollars) for dollars in (0.0, 0.5, 1.4, 999.49)] == ["1", "1", "1", "999"]
    assert "guess    $1  truth    $0.60" in show_guess("mug \x1b[31m", 0.6, 0.5, "green")
    assert show_guess("mug \x1b[31m", 0.6, 0.5, "green").endswith("mug \\x1b[31m")
    assert table(["a"], [["b\x1b"]]).endswith("b\\x1b")


def test_the_last_lines_tell_of_what_is_no_guessing():
    part = {"share": 0.25, "mae_with": 1.0, "mae_without": 30.5}
    metrics = dict(n=8, seconds=1.0, mae=20.0, mae_ci95=[1, 2], ratio=0.5, constant_mae=40.0, coverage=0.8, share=0.8)
    metrics |= {"leaks": {"share": 0.0}, "stated": part, "parse_failures": 0}
    assert "25% of them have their price in their text, which is no guessing: off by $1.00, the others by $30.50" in (
        headline(metrics, 50.0)
    )
    assert "in their text" not in headline(metrics | {"stated": {"share": 0.0}}, 50.0)
