"""Rows of JSONL, CSV and Parquet files, read a piece at a time, and their cells as text.

    for number, row in read_rows("items.jsonl"): ...

What cannot be a row is yielded all the same, with the reason under the key BAD, so that whoever reads counts or names
it. Whatever a file holds, a bounded piece of it is in memory: lines and cells that are longer than any text are
passed over, Parquet is read in small batches, and after MOST_ROWS rows it ends in an error.
"""

import csv
import json
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Iterator

from common.screen import listed, visible

BAD = ("bad",)  # key under which a row has the reason why it is none; a tuple, so that no column can have this name
MOST_TEXT = 1 << 20  # characters of a cell
MOST_LINE = 16 << 20  # characters of a line
MOST_ROWS = 2_000_000  # of a file
BATCH_ROWS = 1024  # of Parquet
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python reads a byte that is not UTF-8 (surrogateescape)
LONG = "rows with more than 1 MiB of text in a cell"
SURPLUS = "rows with more cells than the header"


class Unusable(ValueError):
    """Why a row is none; the argument is the reason, in the plural."""


def is_empty(value) -> bool:
    """Does the cell hold nothing? None, NaN, "" and a list of such."""
    if isinstance(value, (list, tuple)):
        return all(is_empty(part) for part in value)
    return value is None or (isinstance(value, str) and not value.strip()) or is_nan(value)


def is_nan(value) -> bool:
    return (isinstance(value, float) and math.isnan(value)) or (isinstance(value, Decimal) and value.is_nan())


def readable(value, join: str = "\n") -> str:
    """Any cell as text that can be encoded in UTF-8: half a surrogate pair, which JSON allows, becomes "?". None and
    NaN are "", a list its parts joined. Raises Unusable for what is no text: an object, or bytes."""
    if isinstance(value, (list, tuple)):
        return join.join(filter(None, (readable(part, join) for part in value)))
    if isinstance(value, (dict, bytes)):
        raise Unusable("an object" if isinstance(value, dict) else "binary")
    return "" if value is None or is_nan(value) else str(value).encode("utf-8", "replace").decode()


def cell_text(row: dict, column: str, join: str = "\n") -> str:
    """The cell of a row as text, "" where there is none. Raises Unusable, naming the column, where it is no text, is
    not in UTF-8 or is too long."""
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, str) and value.isascii() and len(value) <= MOST_TEXT:
        return value
    if isinstance(value, str) and NOT_UTF8.search(value):
        raise Unusable("rows that are not in UTF-8")
    try:
        text = readable(value, join)
    except Unusable as kind:
        raise Unusable(f"rows whose column {column!r} is {kind}, not text") from None
    except RecursionError:
        raise Unusable(f"rows whose column {column!r} is nested too deeply") from None
    if len(text) > MOST_TEXT:
        raise Unusable(LONG)
    return text


def read_text(path: Path) -> str:
    """A whole text file, its line ends as "\\n". Raises ValueError where it is not in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}); save it in UTF-8") from None


def read_rows(path: str | Path, need_price: bool = True, blank: bool = False) -> Iterator[tuple[int, dict]]:
    """(number, row) of each row of a JSONL, CSV or Parquet file, from 1: in JSONL the line's number, in CSV counted
    from the line after the header. A row that is none has the reason under BAD. Bytes that are not UTF-8 are left for
    cell_text to find.

    `need_price`: a CSV file must have a column `price` or `completion`. `blank`: an empty line is a row, too, an empty
    one. Raises ValueError that names the file, and the line where possible, for a file that is missing, of another kind
    or damaged, that names a column twice or has more than MOST_ROWS rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {path} {'is a directory' if path.is_dir() else 'does not exist'}")
    kind = path.suffix.lower()
    if kind not in READERS:
        raise ValueError(f"{path}: expected .jsonl, .csv or .parquet" + ADVICE.get(kind, ""))
    with open(path, "rb") as handle:
        if handle.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path} is in UTF-16; save it in UTF-8")
    for number, row in READERS[kind](path, need_price):
        if number > MOST_ROWS:
            raise ValueError(f"{path} has more than {MOST_ROWS:,} rows; take a sample of them")
        if row is not None or blank:
            yield number, row or {}


def bounded_lines(lines) -> Iterator[str | None]:
    """The lines of an opened text file; None for one of more than MOST_LINE characters, which is passed over."""
    while line := lines.readline(MOST_LINE + 1):
        if len(line) <= MOST_LINE:
            yield line
            continue
        while line and not line.endswith("\n"):
            line = lines.readline(MOST_LINE)
        yield None


def pairs_once(pairs: list[tuple]) -> dict:
    """A JSON object; one that names a key twice says so under BAD."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        row[BAD] = f"rows that name {listed(repr(name) for name in row if names.count(name) > 1)} twice"
    return row


def jsonl_rows(path: Path, need_price: bool) -> Iterator[tuple[int, dict | None]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(bounded_lines(lines), 1):
            if line is None or not line.strip():
                yield number, {BAD: LONG} if line is None else None
                continue
            try:
                row = json.loads(line, object_pairs_hook=pairs_once)
            except (ValueError, RecursionError):  # not JSON, or a number too long or nested too deeply
                row = None
            yield number, row if isinstance(row, dict) else {BAD: "rows that are not an object"}


def csv_rows(path: Path, need_price: bool) -> Iterator[tuple[int, dict | None]]:
    csv.field_size_limit(MOST_LINE)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(whole_lines(path, lines), strict=True)  # or an open quotation mark would swallow rows
        begin = 0  # the line that the last whole row ended in
        try:
            names = [name.strip() for name in next(reader, [])]
            check_names(path, [name for name in names if name])
            if need_price and not {"price", "completion"} & set(names):
                columns = "the first line must name the columns, `price` among them, with commas between"
                raise ValueError(f"{path}: {columns}; it names {listed(map(repr, map(readable, names)))}")
            begin = reader.line_num
            for number, cells in enumerate(reader, 1):
                begin = reader.line_num
                row = dict(zip(names, cells, strict=False)) if cells else None
                if any(map(str.strip, cells[len(names) :])):  # an unquoted comma: whose cell is whose, nobody knows
                    row[BAD] = SURPLUS
                yield number, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {begin + 1}: {error}; is a quotation mark left open?") from None


def whole_lines(path: Path, lines) -> Iterator[str]:
    """Raises ValueError for a line that is too long: in CSV it may be the middle of a row"""
    for number, line in enumerate(bounded_lines(lines), 1):
        if line is None:
            raise ValueError(f"{path}, line {number}: more than {MOST_LINE >> 20} MiB in a line")
        yield line


def check_names(path: Path, names: list[str]) -> None:
    """Raises ValueError where two columns have one name."""
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{path} has two columns of the name {listed(map(repr, map(readable, twice)))}; rename one")


def parquet_rows(path: Path, need_price: bool) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            check_names(path, file.schema_arrow.names)
            check_sizes(path, file.metadata)
            number = 0
            for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
                kept = [shorten(column) for column in batch.columns]
                batch = pyarrow.RecordBatch.from_arrays([column for column, _ in kept], batch.schema.names)
                too_long = set().union(*(rows for _, rows in kept))
                for place, row in enumerate(python_rows(path, batch)):
                    number += 1
                    yield number, row | {BAD: LONG} if place in too_long else row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable Parquet file: {visible(str(error))}") from None


def python_rows(path: Path, batch) -> list[dict]:
    """Raises ValueError for what Python has no value for, such as a date in the year 12000."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: a cell that cannot be read: {visible(str(error))}") from None


def shorten(column) -> tuple:
    """(a column of a Parquet batch with null in place of texts of more than MOST_TEXT bytes, which rows had those)"""
    import pyarrow
    import pyarrow.compute as pc

    kinds = pyarrow.types
    if not any(is_kind(column.type) for is_kind in (kinds.is_string, kinds.is_large_string, kinds.is_binary)):
        return column, set()
    long = pc.fill_null(pc.greater(pc.binary_length(column), MOST_TEXT), False)
    rows = {place for place, is_long in enumerate(long.to_pylist()) if is_long}
    return (pc.if_else(long, None, column), rows) if rows else (column, rows)


def check_sizes(path: Path, metadata) -> None:
    """Raises ValueError for more than MOST_ROWS rows, and for texts so long that reading one of them would fill the
    memory: by what the file says of itself, before any of it is unpacked."""
    if metadata.num_rows > MOST_ROWS:
        raise ValueError(f"{path} has {metadata.num_rows:,} rows; {MOST_ROWS:,} are read at most: take a sample")
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            column = metadata.row_group(group).column(place)
            if column.total_uncompressed_size > max(column.num_values, 64) * MOST_TEXT:
                name, size = listed([repr(column.path_in_schema)]), column.total_uncompressed_size >> 20
                raise ValueError(f"{path}: column {name} holds {size:,} MiB in {column.num_values:,} rows, no texts")


READERS = {".jsonl": jsonl_rows, ".ndjson": jsonl_rows, ".csv": csv_rows, ".parquet": parquet_rows}
TO_JSONL = "pandas.read_json(FILE).to_json('items.jsonl', orient='records', lines=True)"
ADVICE = {
    ".json": f"; write one object a line into a .jsonl file, such as by {TO_JSONL}",
    ".gz": "; unpack it first, by gunzip",
    ".zip": "; unpack it first, by unzip",
    ".tsv": "; save it with commas between, as .csv",
    ".xlsx": "; save it as .csv, in UTF-8",
}
