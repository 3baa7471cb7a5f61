"""The reference project's own test, and rows of its kind to train on.

    python train.py --bits 4 --data reference           items 1 to 250 are the test, as in the project's own figures
    python train.py --bits 4 --data reference:2000      all its 2,000 test items are; fewer rows are left to train on

Raw files of two public repositories (MIT licence), listed in reference.json by commit and sha256, are fetched once. One
holds the 2,000 test items in published order, their texts cut at 160 of Llama's tokens, with the published 8B model's
guesses; one a person's guesses of the first 250. The others are chat examples that people made from the same listings:
another choice of products, at other price levels. So each row has an origin: `reference` is the test's own kind, and
the only one that is validated on.
"""

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Iterator
from urllib.parse import quote

from common.hub import cache_directory, download
from pricing.data.items import QUESTION, REPEATED, normalise_title, split_of
from pricing.data.rows import readable

NAME, OWN_KIND, MOST = "reference", "reference", 2000
FILES = json.loads(Path(__file__).with_name("reference.json").read_text(encoding="utf-8"))
RAW_URL = "https://raw.githubusercontent.com/{repo}/{commit}/{path}"
SHA256 = hashlib.sha256("".join(file["sha256"] for file in FILES).encode()).hexdigest()  # of all of it, for run.json
LEAD = re.compile(r"^[^\n]*\?\s*\n\s*\n")  # a question and an empty line stand before the product
LABEL = re.compile(r"^Title:?\s+")
LISTS = re.compile(r"\[[\"']|[\"']\]|[\"'], [\"']")  # of Python, as people printed them: ['a', "b"]


def fetch(kind: str) -> list[tuple[dict, Path]]:
    """(its entry in reference.json, its path in the user's cache) of every raw file of this kind: test, guesses or
    train. Raises OSError where one cannot be fetched."""
    folder, fetched = cache_directory() / NAME, []
    for file in (file for file in FILES if file["kind"] == kind):
        url = RAW_URL.format(**file | {"path": quote(file["path"])})
        path = folder / f"{file['sha256'][:16]}-{Path(file['path']).name}"
        fetched.append((file, download(url, file["sha256"], path)))
    return fetched


def test_count(data: str) -> int | None:
    """250 for `reference`, n for `reference:n`; None for other names. Raises ValueError for an n outside 1 to 2,000."""
    name, _, count = data.partition(":")
    if name != NAME or Path(data).exists():
        return None
    if count and not (count.isascii() and count.isdigit() and 1 <= int(count) <= MOST):
        raise ValueError(f"--data {data}: the test has {MOST:,} items; write {NAME}:N with N from 1 to {MOST}")
    return int(count or 250)


def published_tests() -> dict:
    """The raw file of the test: `data` (each with text, price, category) and `guesses` of the published 8B model"""
    [(_, path)] = fetch("test")
    return json.loads(path.read_text(encoding="utf-8"))


def human_guesses() -> list[float]:
    """A person's guesses of items 1 to 250, dollars"""
    [(_, path)] = fetch("guesses")
    with open(path, encoding="utf-8", newline="") as lines:
        return [float(row[1]) for row in csv.reader(lines)]


def product_of(message: str) -> str:
    """What describes the product in the question of a chat example, without the words around it"""
    text = readable(message).strip()
    if "Title:" in text:
        text = LISTS.sub(" ", LABEL.sub("", text[text.index("Title:") :]))
    else:
        text = LEAD.sub("", QUESTION.sub("", text))
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def chat_rows(path: Path, origin: str, split: str) -> Iterator[dict]:
    """A row of each chat example of a file. The price is the number at the answer's end."""
    for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        *_, question, answer = json.loads(line)["messages"]
        text, price = product_of(question["content"]), re.search(r"[\d,.]+\s*$", answer["content"])
        category = re.search(r"^Category: (.+)$", text, re.MULTILINE)
        yield {
            "title": text.split("\n")[0], "text": text, "price": price and price[0].strip(), "split": split,
            "category": category[1] if category else "", "origin": origin,
        }  # fmt: skip


def rows(tests: int) -> Iterator[tuple[int, dict]]:
    """(number, row): the 2,000 items in published order, of which the first `tests` are the test, then the chat
    examples. An example whose title and price an earlier one has, too, is marked with REPEATED.

    Validation items are of the test's own kind: a tenth of the other items of the 2,000, by title; where none is left,
    the chat examples that were made for validation.
    """
    for number, item in enumerate(published_tests()["data"], 1):
        text = QUESTION.sub("", item["text"])
        held_out = "test" if number <= tests else "val" if split_of(text.split("\n")[0]) == "test" else "train"
        own = {"id": str(number), "title": text.split("\n")[0], "split": held_out, "origin": OWN_KIND}
        yield number, item | own
    seen = set()
    for file, path in fetch("train"):
        validates = tests == MOST and file["origin"] == OWN_KIND and "validation" in path.name
        for row in chat_rows(path, file["origin"], "val" if validates else "train"):
            number += 1
            key = normalise_title(row["title"]), row["price"]
            yield number, row | {"id": f"chat {number - MOST}", REPEATED: key in seen}
            seen.add(key)
