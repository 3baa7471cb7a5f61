"""Other people's guesses of the same items: from a file, and those that the reference project published.

    python evaluate.py --ckpt out/ --guesses me=mine.csv gpt_4o=published_guesses.csv

A file has a header line, a column `guess`, or one that has the name itself, in dollars, and the items' `id` (or `n`).
Without a column of ids its rows are taken in the order of predictions.csv. Where it has a column `price` or `truth`,
these must be the items' prices: ids such as 1, 2, 3 fit any data.
"""

import csv
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.screen import listed
from pricing.data import reference
from pricing.data.items import Item, normalise_title, without_question
from pricing.evaluation.cells import unguarded

# The first five of the reference's 2,000 test items, by the sha256 of their words: by these its test is recognised.
FIRST = {"49e2e75bb96f6268", "62c0a0dd24f1cf4a", "0539dbc847b719f9", "290e721dd86c90eb", "f67b47305eec42cd"}
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Guesses:
    """Of some of the test items. Where only the mean error was published, `guess` is None and `metrics` has it."""

    name: str
    items: list[int]  # which of the test items
    guess: np.ndarray | None = None  # (items,) dollars
    metrics: dict | None = None


def read_guesses(given: str, items: list[Item]) -> Guesses:
    """What `NAME=FILE.csv` says of the test items. Raises ValueError that names the file, and the row, where it does
    not fit them."""
    name, _, path = given.partition("=")
    rows, columns = read_table(Path(path))
    column = next((wanted for wanted in ("guess", name) if wanted in columns), None)
    if column is None:
        raise ValueError(f"{path} has no column guess or {name}; it has {listed(columns)}")
    key = next((wanted for wanted in ("id", "n") if wanted in columns), None)
    if key:
        by_id = {}
        for number, row in rows:
            row[key] = unguarded(row[key] or "")
            if by_id.setdefault(row[key], (number, row))[0] != number:
                raise ValueError(f"{path}, row {number}: {key} {row[key]} stands in row {by_id[row[key]][0]} already")
        if missing := [item.id for item in items if item.id not in by_id]:
            lacking = f"{len(missing):,} of the {len(items):,} items, the first is {key} {missing[0]}"
            raise ValueError(f"{path} lacks {lacking}")
        rows = [by_id[item.id] for item in items]
    elif len(rows) != len(items):
        counts = f"{len(rows):,} rows for {len(items):,} items"
        raise ValueError(f"{path} has {counts}; a column id would say which they are")
    guesses = []
    for (number, row), item in zip(rows, items, strict=True):
        guesses.append(dollars(row, column, path, number))
        for truth in {"price", "truth"} & set(columns):
            if abs(dollars(row, truth, path, number) - item.price) > 0.01:
                wrong = f"{truth} is {row[truth]}, the item's price is {item.price:.2f}"
                raise ValueError(f"{path}, row {number}: {wrong}: guesses of other items?")
    return Guesses(name, list(range(len(items))), np.array(guesses))


def read_table(path: Path) -> tuple[list[tuple[int, dict]], list[str]]:
    """(number, row) of each row of a CSV file, and its columns. Raises ValueError where it is none."""
    if not path.is_file():
        raise ValueError(f"--guesses: {path} does not exist")
    with open(path, encoding="utf-8-sig", newline="") as lines:
        try:
            reader = csv.DictReader(lines, strict=True)
            return list(enumerate(reader, 1)), list(reader.fieldnames or [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from None


def dollars(row: dict, column: str, path, number: int) -> float:
    """A cell as a number. Raises ValueError where it is none."""
    try:
        value = float(str(row[column]).replace("$", "").replace(",", "") if row[column] is not None else "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{path}, row {number}: {column} is {row[column]!r}, which is no price in dollars")
    return value


# ---- what the reference project published ---------------------------------------------------------------------------


def digest(text: str) -> str:
    return hashlib.sha256(normalise_title(text).encode()).hexdigest()[:16]


def is_reference(items: list[Item]) -> bool:
    """Are some of the first test items of the reference's among these? By their texts, whatever file they come from."""
    return any(digest(item.text) in FIRST for item in items)


def published_guesses(items: list[Item]) -> list[Guesses]:
    """What others guessed of the reference's test items among `items`: item by item where that was published, else
    their mean error, where `items` are just those it was measured on. Raises OSError where it cannot be fetched."""
    tests = reference.published_tests()
    numbers, known, result = {}, [], []  # text -> its numbers, from 1: four texts stand there twice
    for number, item in enumerate(tests["data"], 1):
        text = without_question(item["text"])
        numbers.setdefault(normalise_title(text), []).append(number)
    for i, item in enumerate(items):
        if alike := numbers.get(normalise_title(item.text)):
            known.append((i, alike.pop(0)))
    by_item = {"human": reference.human_guesses(), "Llama 3.1 8B, QLoRA on 400,000 items": tests["guesses"]}
    for name, guesses in by_item.items():
        which = [(i, number) for i, number in known if number <= len(guesses)]
        if which:
            guess = np.array([guesses[number - 1] for _, number in which], float)
            result.append(Guesses(f"{name} (published)", [i for i, _ in which], guess))
    if {number for _, number in known} == set(range(1, 251)) and len(items) == 250:
        result += [Guesses(f"{name} (published)", list(range(250)), None, row) for name, row in PUBLISHED.items()]
    return result
