"""A run that is trained once for all tests of the scripts (the fixture `place`), and how a script is called.

A plugin (tests/conftest.py names it), no second conftest.py: `from conftest import ...` must mean the first.
"""

import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer_json, hugging_face_model, tiny_config

from common.manifest import seal
from pipeline.checkpoint import OWNED
from pricing.data.items import items_from_rows
from pricing.data.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
CACHE = tempfile.TemporaryDirectory()  # not the user's
WORDS = {"tin": 8, "brass": 45, "silver": 260, "gold": 820}


def run(*arguments, code=0):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "QLORA_CACHE": CACHE.name}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout, result.stderr


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A tiny model, a data file whose price is told by one word, and a trained run."""
    place = tmp_path_factory.mktemp("end_to_end")
    hugging_face_model(tiny_config(vocab_size=256, tie_word_embeddings=True), place / "model")
    (place / "model" / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    rng = random.Random(0)
    rows = []
    for n in range(700):
        word = rng.choice(list(WORDS))
        price = round(WORDS[word] * rng.uniform(0.9, 1.1), 2)
        rows.append({"title": f"{word} {n}", "price": price, "category": "ring", "description": " ".join([word] * 8)})
    (place / "items.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"title": "x", "price": "N/A"}\n')
    options = ["--lr", "5e-3", "--epochs", "8", "--batch-tokens", "2048", "--val-items", "20", "--max-tokens", "140"]
    out, _ = run(
        "train.py", "--model", place / "model", "--data", place / "items.jsonl", "--out", place / "out", *options
    )
    (place / "train.txt").write_text(out)
    run("evaluate.py", "--ckpt", place / "out", "--quiet")
    return place


def seal_again(ckpt):
    """As if a run had been saved as it lies there now, and not come to its end"""
    (ckpt / "state" / "complete").unlink(missing_ok=True)
    seal(ckpt, OWNED[:-2])


def priced_items(place):
    """(test, train) of the module's data"""
    items, _ = items_from_rows(read_rows(place / "items.jsonl"), "items")
    return [[item for item in items if item.split == split] for split in ("test", "train")]


def metrics_of(place, out="out"):
    return json.loads((place / out / "report" / "metrics.json").read_text())


def guesses(ckpt) -> np.ndarray:
    """Of report/predictions.csv: guess, low, high, by id"""
    rows = sorted(csv.DictReader(open(ckpt / "report" / "predictions.csv", newline="")), key=lambda row: row["id"])
    return np.array([[float(row[key]) for key in ("guess", "low", "high")] for row in rows])
