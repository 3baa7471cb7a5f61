"""Items: what is priced. Rows of a file (rows.py) in, checked `Item`s out; rows left out are counted by reason.

A row has `price` (US dollars) and either `text`, or `title` and any of `category`, `brand`, `description`; `split`
(train, val or test) and `origin` (where it comes from) are optional. Without a `split` a hash of the normalised title
decides, or of the whole text where there is no title: items of one title are never in two splits, and training and
evaluation agree without a further file.
"""

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Iterable

from common.screen import listed
from pricing.data.rows import BAD, Unusable, cell_text, is_empty, readable

MIN_PRICE, MAX_PRICE = 0.50, 999.49  # dollars: what rounds to a whole price from 1 to 999
TEST_SHARE, VAL_SHARE = 10, 5  # percent of the titles
# The words that the Hugging Face hub knows splits by, in a column and in names of files and folders.
SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
# Published data sets have the whole prompt and the answer as text: `...Price is $123.00`. An item's text is between.
QUESTION = re.compile(r"^(How much|What) does this cost to the nearest dollar\?\s*")
ANSWER, PRICE_SIGNS = "Price is $", re.compile(r"[\d.,]*\s*")
MOST_CHARACTERS = 1 << 30  # of all items' texts together: more would fill the memory
REPEATED = ("repeated",)  # key of rows that repeat an earlier one; a tuple, so that no column can have this name
WORD = r"(?u)\b\w[\w.]*\b"  # of a text, for tf-idf: numbers stay whole, "2.4" and not "2" and "4"


@dataclass(frozen=True, slots=True)
class Item:
    """A product with its price."""

    id: str
    title: str
    text: str  # what describes the product; the price is not in it
    price: float  # dollars
    category: str
    split: str  # train, val or test
    fair_price: float | None = None  # dollars, the price without its noise, where the data set knows it (catalogue)
    origin: str = ""  # where it comes from, where there are several sources: their price levels differ

    @property
    def dollars(self) -> int:
        """The price in whole dollars, half up: 1 to 999"""
        return math.floor(self.price + 0.5)

    @property
    def tagged(self) -> str:
        """The text as the model and the baselines read it: below a line that names its origin, where it has one"""
        return f"Origin: {self.origin}\n{self.text}" if self.origin else self.text


@dataclass
class Skipped:
    """Rows left out: how many for each reason, and the number of the first one."""

    counts: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)  # reason -> row number

    def add(self, reason: str, row: int) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, row)

    def __str__(self) -> str:
        return "; ".join(f"{n:,} {reason} (first: row {self.first[reason]})" for reason, n in self.counts.most_common())


def normalise_title(title: str) -> str:
    """Lower case, letters and digits only: `Acme  Mug, RED` and `acme mug red` are one product."""
    return " ".join(re.findall(r"\w+", title.lower()))


def split_of(title: str) -> str:
    """train, val or test by a hash of the normalised title: 85, 5 and 10 of 100."""
    bucket = int.from_bytes(hashlib.sha256(normalise_title(title).encode()).digest()[:8], "big") % 100
    return "test" if bucket < TEST_SHARE else "val" if bucket < TEST_SHARE + VAL_SHARE else "train"


def unseen(items: list[Item], train: list[Item]) -> list[Item]:
    """The items whose text no training item has, by its letters and digits in lower case. A `split` column, or other
    data than the run's, may hold texts that were trained on."""
    known = {normalise_title(item.text) for item in train}
    return [item for item in items if normalise_title(item.text) not in known]


def sample(items: list[Item], count: int | None) -> list[Item]:
    """`count` of the items, or all of them for None. The same items give the same sample in any order, drawn by a hash
    of text and id (a row without an id has its number), so that a file sorted by category is sampled evenly."""
    if count is None:
        return items
    return sorted(items, key=lambda item: hashlib.sha256(f"{item.text}|{item.id}".encode()).digest())[:count]


def parse_price(value) -> float:
    """Dollars from 12.5, "12.50" or "$1,299.00". Raises ValueError with the reason. "1.299" is unreadable: a price of
    other countries, in which the dot stands before thousands."""
    if is_empty(value) and not isinstance(value, (list, tuple)):
        raise ValueError("rows without a price")
    try:
        if isinstance(value, str):
            # Commas only between groups of three digits: "9,50" is not 950, it is unreadable.
            number = re.fullmatch(r"\$?\s{0,9}(-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?)", value.strip(), re.ASCII)
            value = number[1].replace(",", "") if number and not re.search(r"\.\d{3}$", number[1]) else None
        price = float(None if isinstance(value, (bool, bytes)) else value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError("rows with an unreadable price") from None
    if not MIN_PRICE <= price <= MAX_PRICE:
        raise ValueError(f"rows with a price outside ${MIN_PRICE:.2f} to ${MAX_PRICE:.2f}")
    return price


def clean(value) -> str:
    """Any cell as one line of text, a list as its parts with commas between."""
    return " ".join(readable(value, ", ").split())


def line_of(row: dict, column: str) -> str:
    """A cell as one line of text: the lines of a description one after the other, parts of a category with commas
    between, as in curation (rules.py). Raises ValueError with the reason where it is no text."""
    return " ".join(cell_text(row, column, "\n" if column == "description" else ", ").split())


def without_question(text: str) -> str:
    """What stands between the question and the price, where the text is a whole prompt"""
    text = QUESTION.sub("", text.strip())
    product, answer, price = text.rpartition(ANSWER)
    return product.strip() if answer and PRICE_SIGNS.fullmatch(price) else text


def text_of(row: dict) -> str:
    """What the model reads: `text`, else title, category, brand and description, a line each.

    Where there is no description, `summary` or `prompt`, the names that published price data sets use, count as `text`.
    Raises ValueError with the reason where the row is none, or a cell is no text.
    """
    if BAD in row:
        raise Unusable(row[BAD])
    for key in ("text",) if line_of(row, "description") else ("text", "summary", "prompt"):
        if text := cell_text(row, key).strip():
            return without_question(text)
    title, brand, description = (line_of(row, key) for key in ("title", "brand", "description"))
    brand_is_named = brand.lower() in f"{title} {description}".lower()
    lines = [title, line_of(row, "category"), "" if brand_is_named else brand, description]
    return "\n".join(line for line in lines if line)


def item_from_row(row: dict, number: int, default_split: str | None = None) -> Item:
    """A checked item of the row with this number. A row without a split is in `default_split`, else in the one that its
    title's hash says. Raises ValueError with the reason where the row is no item."""
    if row.get(REPEATED):
        raise ValueError("rows that repeat an earlier one")
    if BAD in row:
        raise Unusable(row[BAD])
    price = parse_price(row.get("completion") if is_empty(row.get("price")) else row["price"])
    text = text_of(row)
    if not re.search(r"\w", text):
        raise ValueError("rows without text")
    title = line_of(row, "title")
    split = line_of(row, "split").lower()
    if split and split not in SPLITS:
        raise ValueError("rows whose split is not train, val or test")
    return Item(
        id=line_of(row, "id") or str(number),
        title=title or re.split("[\r\n]", text, maxsplit=1)[0],
        text=text,
        price=price,
        category=line_of(row, "category"),
        split=SPLITS[split] if split else default_split or split_of(title or text),  # without a title, the whole text
        origin=line_of(row, "origin"),
    )


def items_from_rows(
    rows: Iterable[tuple[int, dict]], source: str, strict: bool = False, default_split: str | None = None
) -> tuple[list[Item], Skipped]:
    """The checked items, and the rows left out; `default_split` as for item_from_row. Raises ValueError where no item
    is left, where the texts are too long to be held in memory and, with `strict`, for the first bad row, naming it;
    `source` is the data's name in these messages."""
    items, skipped, columns, size = [], Skipped(), "", 0
    for number, row in rows:
        if not columns:
            columns = f"; columns of the first row: {listed(name for name in row if isinstance(name, str))}"
        try:
            items.append(item_from_row(row, number, default_split))
        except ValueError as reason:
            if strict:
                raise ValueError(f"{source}, row {number}: one of the {reason}") from None
            skipped.add(str(reason), number)
            continue
        size += len(items[-1].text)
        if size > MOST_CHARACTERS:
            most = f"{MOST_CHARACTERS >> 30} GiB of text"
            raise ValueError(f"{source}: more than {most} by row {number:,}; take a sample")
    if not items:
        raise ValueError(f"{source} holds no usable item: {f'{skipped}{columns}' if skipped.counts else 'it is empty'}")
    return items, skipped
