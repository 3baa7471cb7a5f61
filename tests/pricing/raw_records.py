"""Made-up raw records for the tests of curation, and what they are read back as."""

import json
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def made_up(rng: random.Random, count: int) -> str:
    """`count` words of three letters: a token each, no digits, hardly ever the same pair of them twice"""
    return " ".join("".join(rng.choices(LETTERS, k=3)) for _ in range(count))


def record(number: int = 0, **changes) -> dict:
    """A raw record that passes both editions' rules: 160 words, unlike every other number's."""
    rng = random.Random(number)
    return {
        "main_category": "Appliances",
        "title": made_up(rng, 4),
        "price": 12.5,
        "description": [made_up(rng, 100)],
        "features": [made_up(rng, 40), made_up(rng, 20)],
        "details": {"Colour": "red"},
        "store": "Acme",
        "parent_asin": f"B{number:04}",
    } | changes


def write(path: Path, records) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


def rows_of(path: Path) -> list[dict]:
    return pyarrow.parquet.read_table(path).to_pylist()


def pairs(text: str) -> set:
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:])) or set(words)


def jaccard(one: set, other: set) -> float:
    return len(one & other) / len(one | other) if one | other else 0.0


def variant(text: str, rng: random.Random, changed: int) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), changed):
        words[place] = made_up(rng, 1)
    return " ".join(words)


def families(rng: random.Random, count: int, words: int) -> list[str]:
    """Texts in families of one to five with 0 to 30 words changed, shuffled: similarities of all sizes."""
    texts = []
    for _ in range(count):
        first = made_up(rng, words)
        changed = [int(words / 3 * rng.random() ** 2) for _ in range(rng.randrange(5))]
        texts += [first, *(variant(first, rng, count) for count in changed)]
    rng.shuffle(texts)
    return texts
