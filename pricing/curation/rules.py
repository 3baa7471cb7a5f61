"""The rules of curation: which raw records become items, how their text is written, and which items are drawn.

A raw record is one line of Amazon-Reviews-2023's `raw_meta_*`: `title`, `price`, `description` and `features` (lists
of lines), `details` (an object, or the same as a string of JSON), `store`, `main_category`, `parent_asin`. The two
editions of the reference project curate it in two ways:

                     first                                      second
    text             title, description, features, details      the same, and category and store, each on a line with
                                                                its label
    long enough      > 300 characters, > 150 tokens             >= 600 characters
    cut at           160 tokens                                 110 tokens
    part numbers     words of 7 or more characters that         runs of 7 or more capitals and digits (`PART_NUMBER`)
                     hold a digit
    drawn            per whole dollar: all from $240 up, else   820,000 in all, with probability in proportion to
                     at most 1,200, Automotive 1 : others 5     ((price - least) / (most - least))^2, Tools x 0.5,
                                                                Automotive x 0.05
    splits           400,000 train, 2,000 test                  800,000 train, 10,000 val, 10,000 test

`second-lite` is `second` with 20,000, 1,000 and 1,000. In the second edition a language model rewrites each text; here
the five lines are the record's own words. Tokens are counted without a tokeniser, see `token_rule`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from pricing.data.items import clean, parse_price

# Why a record is left out: it is broken (BAD), or it breaks a rule (RULES). The first reason that applies is counted.
NO_JSON, NO_OBJECT = "records that are not JSON", "records that are not an object"
NO_FIELD, NO_TITLE = "records that lack the field `price`", "records without a title"
UNREADABLE, WRONG_KIND = "records with an unreadable price", "records with fields of another type"
BAD = (NO_JSON, NO_OBJECT, NO_FIELD, NO_TITLE, UNREADABLE, WRONG_KIND)
NO_PRICE, OUTSIDE = "without a price", "with a price outside $0.50 to $999.49"
FEW_CHARACTERS, FEW_TOKENS = "with too few characters", "with too few tokens"
RULES = (NO_PRICE, OUTSIDE, FEW_CHARACTERS, FEW_TOKENS)

# The second edition's pattern, unchanged. Its lookaheads scan to the end of the line, so a run of only capitals or
# only digits matches too if the other kind follows anywhere after it.
PART_NUMBER = re.compile(r"\b(?=[A-Z0-9]{7,}\b)(?=.*[A-Z])(?=.*\d)[A-Z0-9]+\b")
SEVEN = re.compile(r"[A-Z0-9]{7}")  # a cheap test before PART_NUMBER
DIGIT = re.compile(r"\d")
BRACKETS = {ord(character): " " for character in ':[]"{}【】'}
# Details that do not describe the product: entries that are dropped (second), words dropped from names (first).
DROPPED = ("Part Number", "Best Sellers Rank", "Batteries Included?", "Batteries Required?", "Item model number")
BATTERIES = ("Batteries Included?", "Batteries Required?")
NAMES = re.compile(r"By Manufacturer|Best Sellers|Date First|Package|Number of|Number|Product |Item")
# About the tokens that a tokeniser such as Llama 3's gives for English: up to eight letters or a run of punctuation,
# with the space before; three digits; a space before digits; a line end; a letter that is not Latin.
LATIN = "A-Za-z\xc0-\u024f"
TOKEN = rf"(?> ?+[{LATIN}]{{1,8}}+|[0-9]{{1,3}}+| ?+[^A-Za-z0-9\s\xc0-\U0010ffff]++|[ \n\u0250-\U0010ffff])"


class Rejected(Exception):
    """A record is left out; the argument is the reason, one of BAD or RULES."""


@dataclass(frozen=True)
class Preset:
    """One edition's rules. `write(record, category)` gives the text of a record or raises Rejected; it must have
    `least_tokens` and is cut at `most_tokens`."""

    write: Callable[[dict, str], str]
    least_tokens: int
    most_tokens: int
    sizes: tuple[int, int, int]  # train, val, test
    per_dollar: int | None  # items drawn for each whole dollar below `all_from`; None: no such bound
    all_from: int  # dollars
    drawn: int | None  # items drawn in all; None: no bound
    power: float  # of the price, scaled to 0..1, in an item's weight
    weights: dict = field(default_factory=dict)  # by category; 1 for the others

    def weight(self, prices: np.ndarray, categories: list[str], low: float, high: float) -> np.ndarray:
        """((price - low) / (high - low))^power * the category's weight, for prices in dollars."""
        scaled = ((prices - low) / max(high - low, 1e-9)) ** self.power if self.power else np.ones(len(prices))
        return scaled * np.array([self.weights.get(category, 1.0) for category in categories])


def words_of(value) -> str:
    """Any value of `details` as words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {words_of(inner)}" for name, inner in value.items())
    return ", ".join(words_of(inner) for inner in value) if isinstance(value, list) else str(value)


def lines_of(record: dict, name: str) -> list[str]:
    """The lines of `description` or `features`. Raises Rejected where it is not a list of strings."""
    value = record.get(name)
    lines = [value] if isinstance(value, str) else value or []
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise Rejected(WRONG_KIND)
    return lines


def details_of(record: dict) -> dict:
    """`details`, which in Parquet files is a string of JSON. Raises Rejected where it is not an object."""
    value = record.get("details")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except ValueError:
            raise Rejected(WRONG_KIND) from None
    if not isinstance(value or {}, dict):
        raise Rejected(WRONG_KIND)
    return {name: entry for name, entry in (value or {}).items() if entry is not None}


def write_first(record: dict, category: str) -> str:
    """The first edition's text: title, then description, features and details. Raises Rejected for 300 characters or
    fewer without the title."""

    def scrub(text: str) -> str:
        words = text.translate(BRACKETS).split()
        return " ".join([w for w in words if len(w) < 7 or w.isalpha() or not DIGIT.search(w)])

    details = details_of(record)
    entries = [f"{NAMES.sub('', name)} {words_of(value)}" for name, value in details.items() if name not in BATTERIES]
    parts = [*lines_of(record, "description"), *lines_of(record, "features"), ", ".join(entries)]
    contents = "\n".join(part for part in parts if part)
    if len(contents) <= 300:
        raise Rejected(FEW_CHARACTERS)
    return f"{scrub(record['title'])}\n{scrub(contents[: 160 * 7])}"  # enough for 160 tokens


def write_second(record: dict, category: str) -> str:
    """The second edition's text: five labelled lines. Raises Rejected below 600 characters of title, description,
    features and details."""
    details = {name: value for name, value in details_of(record).items() if name not in DROPPED}
    entries = "; ".join(f"{name}: {words_of(value)}" for name, value in details.items())
    parts = [record["title"], *(" ".join(lines_of(record, name)) for name in ("description", "features")), entries]
    parts = [" ".join(part.split())[:3000] for part in parts]
    parts = [" ".join(PART_NUMBER.sub("", part).split()) if SEVEN.search(part) else part for part in parts]
    if sum(map(len, parts)) + sum(map(bool, parts)) - 1 < 600:  # with line ends between them
        raise Rejected(FEW_CHARACTERS)
    title, description, features, entries = parts
    brand = clean(record.get("store")) or clean(details.get("Brand"))
    labelled = dict(Title=title, Category=category, Brand=brand, Description=f"{description} {features}".strip())
    return "\n".join(f"{label}: {part}" for label, part in (labelled | {"Details": entries}).items() if part)


@lru_cache
def token_rule(least: int, most: int) -> re.Pattern:
    """A pattern that matches a text of at least `least` tokens, up to the end of its token `most` or of its last one.

    A token is a match of TOKEN. For each token of cl100k_base, on which Llama 3's tokeniser is built, it counts 0.96 on
    15,489 texts of pc-parts, 0.95 on 5,000 of the catalogue, 1.04 on descriptions of Python packages and 1.10 on their
    licences; for nine texts of ten of each kind the ratio is from 0.81 to 1.18. Words that are neither English nor
    numbers take more tokens than it counts.
    """
    return re.compile(f"{TOKEN}{{{least},{most}}}+")


def item_of(record, preset: Preset, category: str) -> tuple[str, str, float, str]:
    """(title, text, price in dollars, category) of a raw record. `category` is the file's; where it is empty, the
    record's `main_category` is used. Raises Rejected with the reason."""
    if not isinstance(record, dict):
        raise Rejected(NO_OBJECT)
    if "price" not in record:
        raise Rejected(NO_FIELD)
    value = record["price"]
    if value is None or value in ("", "None", "null", "—"):
        raise Rejected(NO_PRICE)
    try:
        price = parse_price(value)
    except ValueError as reason:
        raise Rejected(OUTSIDE if "outside" in str(reason) else UNREADABLE) from None
    title = record.get("title")
    if not isinstance(title, str) or not re.search(r"\w", title):
        raise Rejected(NO_TITLE)
    category = category or category_name(clean(record.get("main_category")))
    text = token_rule(preset.least_tokens, preset.most_tokens).match(preset.write(record, category))
    if not text:
        raise Rejected(FEW_TOKENS)
    return " ".join(title.split()), text[0], price, category


def category_name(name: str) -> str:
    """`Tools_and_Home_Improvement` and `Tools & Home Improvement` are one: Tools and Home Improvement."""
    return " ".join(name.replace("_", " ").replace("&", " and ").split())


FIRST = Preset(
    write=write_first,
    least_tokens=151,
    most_tokens=160,
    sizes=(400_000, 0, 2_000),
    per_dollar=1_200,
    all_from=240,
    drawn=None,
    power=0,
    weights={"Automotive": 0.2},  # 1 : 5
)
SECOND = Preset(
    write=write_second,
    least_tokens=1,
    most_tokens=110,
    sizes=(800_000, 10_000, 10_000),
    per_dollar=None,
    all_from=1_000,
    drawn=820_000,
    power=2,
    weights={"Tools and Home Improvement": 0.5, "Automotive": 0.05},
)
PRESETS = {"first": FIRST, "second": SECOND, "second-lite": replace(SECOND, sizes=(20_000, 1_000, 1_000))}
