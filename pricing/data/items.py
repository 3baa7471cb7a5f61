"""Items: what is priced. Rows of JSONL, CSV or Parquet in, checked `Item`s out; rows left out are counted by reason.

A row has `price` (US dollars) and either `text`, or `title` and any of `category`, `brand`, `description`; `split`
(train, val or test) and `origin` (where it comes from) are optional. Without a `split` a hash of the normalised title
decides, or of the whole text where there is no title: items of one title are never in two splits, and training and
evaluation agree without a further file.
"""

import csv
import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, Iterator

MIN_PRICE, MAX_PRICE = 0.50, 999.49  # dollars: what rounds to a whole price from 1 to 999
TEST_SHARE, VAL_SHARE = 10, 5  # percent of the titles
SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "dev": "val", "test": "test"}
# Published data sets have the whole prompt and the answer as text: `...Price is $123.00`. An item's text is between.
QUESTION = re.compile(r"^(How much|What) does this cost to the nearest dollar\?\s*")
ANSWER = re.compile(r"\s*Price is \$[\d.,]*\s*$")
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python reads a byte that is not UTF-8 (surrogateescape)
REPEATED = ("repeated",)  # key of rows that repeat an earlier one; a tuple, so that no column can have this name
WORD = r"(?u)\b\w[\w.]*\b"  # of a text, for tf-idf: numbers stay whole, "2.4" and not "2" and "4"


@dataclass(frozen=True)
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
    """Dollars from 12.5, "12.50" or "$1,299.00". Raises ValueError with the reason."""
    if value is None or value == "":
        raise ValueError("rows without a price")
    try:
        if isinstance(value, str):
            # Commas only between groups of three digits: "9,50" is not 950, it is unreadable.
            number = re.fullmatch(r"\s*\$?\s*(-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?)\s*", value, re.ASCII)
            value = number[1].replace(",", "") if number else None
        price = float(None if isinstance(value, bool) else value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError("rows with an unreadable price") from None
    if not MIN_PRICE <= price <= MAX_PRICE:  # NaN fails this too
        raise ValueError(f"rows with a price outside ${MIN_PRICE:.2f} to ${MAX_PRICE:.2f}")
    return price


def readable(value) -> str:
    """Any cell as text that can be encoded in UTF-8: half a surrogate pair, which JSON allows, becomes "?\""""
    return str(value).encode("utf-8", "replace").decode() if value is not None else ""


def clean(value) -> str:
    """Any cell as one line of text."""
    return " ".join(readable(value).split())


def text_of(row: dict) -> str:
    """What the model reads: `text`, else title, category, brand and description, a line each.

    Where there is no description, `summary` or `prompt`, the names that published price data sets use, count as `text`.
    Raises ValueError with the reason where a cell is not in UTF-8.
    """
    if any(isinstance(cell, str) and NOT_UTF8.search(cell) for cell in row.values()):
        raise ValueError("rows that are not in UTF-8")
    for key in ("text",) if clean(row.get("description")) else ("text", "summary", "prompt"):
        if clean(row.get(key)):
            return ANSWER.sub("", QUESTION.sub("", readable(row[key]).strip())).strip()
    title, brand, description = (clean(row.get(key)) for key in ("title", "brand", "description"))
    brand_is_named = brand.lower() in f"{title} {description}".lower()
    lines = [title, clean(row.get("category")), "" if brand_is_named else brand, description]
    return "\n".join(line for line in lines if line)


def item_from_row(row: dict, number: int) -> Item:
    """A checked item of the row with this number. Raises ValueError with the reason where the row is no item."""
    if not isinstance(row, dict):
        raise ValueError("rows that are not an object")
    if row.get(REPEATED):
        raise ValueError("rows that repeat an earlier one")
    price = parse_price(row.get("price", row.get("completion")))
    text = text_of(row)
    if not re.search(r"\w", text):
        raise ValueError("rows without text")
    title = clean(row.get("title"))
    split = clean(row.get("split")).lower()
    if split and split not in SPLITS:
        raise ValueError("rows whose split is not train, val or test")
    return Item(
        id=clean(row.get("id")) or str(number),
        title=title or text.splitlines()[0],
        text=text,
        price=price,
        category=clean(row.get("category")),
        split=SPLITS[split] if split else split_of(title or text),  # without a title, the whole text
        origin=clean(row.get("origin")),
    )


def read_text(path: Path) -> str:
    """A whole text file. Raises ValueError where it is not in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}); save it in UTF-8") from None


def read_rows(path: str | Path, need_price: bool = True) -> Iterator[tuple[int, dict | None]]:
    """(number, row) of each row of a JSONL, CSV or Parquet file, from 1: in JSONL the line's number, in CSV counted
    from the line after the header. The row is None where a line is not JSON. Bytes that are not UTF-8 are left for
    text_of to find.

    `need_price`: a CSV file must have the column `price`. Raises ValueError that names the file, and the line where
    possible, for a file that is missing, of another kind or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {path} {'is a directory' if path.is_dir() else 'does not exist'}")
    kind = path.suffix.lower()
    with open(path, "rb") as handle:
        if handle.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path} is in UTF-16; save it in UTF-8")
    if kind in (".jsonl", ".ndjson"):
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError):  # not JSON, or a number too long or nested too deeply
                        yield number, None
    elif kind == ".csv":
        csv.field_size_limit(2**31 - 1)
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)  # or an open quotation mark would swallow the rows after it
            try:
                if need_price and "price" not in (names := reader.fieldnames or []):
                    columns = "the first line must name the columns, `price` among them, with commas between"
                    raise ValueError(f"{path}: {columns}; it names {', '.join(map(repr, map(readable, names)))}")
                yield from enumerate(reader, 1)
            except csv.Error as error:
                where = f"{path}, line {reader.line_num + 1}"
                raise ValueError(f"{where}: {error}; is a quotation mark left open?") from None
    elif kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            number = 0
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is no readable Parquet file: {error}") from None
    else:
        raise ValueError(f"{path}: expected .jsonl, .csv or .parquet")


def items_from_rows(rows: Iterable[tuple[int, dict]], source: str, strict: bool = False) -> tuple[list[Item], Skipped]:
    """The checked items, and the rows left out. Raises ValueError where no item is left and, with `strict`, for the
    first bad row, naming it; `source` is the data's name in these messages."""
    items, skipped, columns = [], Skipped(), ""
    for number, row in rows:
        if not columns and isinstance(row, dict):
            columns = f"; columns of the first row: {', '.join(map(str, row))}"
        try:
            items.append(item_from_row(row, number))
        except ValueError as reason:
            if strict:
                raise ValueError(f"{source}, row {number}: one of the {reason}") from None
            skipped.add(str(reason), number)
    if not items:
        raise ValueError(f"{source} holds no usable item: {f'{skipped}{columns}' if skipped.counts else 'it is empty'}")
    return items, skipped
