"""The first stage of curation, done by several processes: raw files in, and the records that pass the rules out.

A file is read in blocks of a few megabytes, never whole. `sift`, in a worker, turns a block into a `Block`: how many
records were left out for each reason, and for those that pass the rules an item's columns, the shingles and the keys.
"""

import gzip
import hashlib
import json
import os
import re
import signal
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow
import pyarrow.parquet

from common.screen import listed
from pricing.curation.duplicates import band_keys, parts, shingles_of, words_in
from pricing.curation.rules import NO_JSON, WRONG_KIND, Preset, Rejected, category_name, item_of
from pricing.data.items import clean
from pricing.data.rows import Unusable

BLOCK_BYTES, LONGEST_LINE = 1 << 21, 1 << 26
BLOCK_RECORDS = 1024  # of a Parquet file
COLUMNS = ["title", "price", "description", "features", "details", "store", "main_category", "parent_asin"]
NEEDED = ["title", "price"]


@dataclass(frozen=True)
class Options:
    """What a candidate depends on, besides its record."""

    preset: Preset
    near: float  # least Jaccard similarity of near-duplicates; 0: they are not searched
    seed: int


@dataclass
class Block:
    """The result of `sift` for some records of one file."""

    records: int = 0
    counts: Counter = field(default_factory=Counter)  # records left out, by reason
    first: dict = field(default_factory=dict)  # reason -> number of the record, from 1
    rows: list = field(default_factory=list)  # (id or ":" and its number, title, text, category, price in dollars)
    keys: np.ndarray | None = None  # (rows, 2 + bands): hashes of the text's and the title's words, and the bands
    shingles: np.ndarray | None = None
    sizes: np.ndarray | None = None


def category_of(path: Path) -> str:
    """Appliances of `meta_Appliances.jsonl.gz` or `raw_meta_Appliances/full-00000-of-00001.parquet`; else ''."""
    for name in (path.name, path.parent.name):
        if match := re.match(r"(?:raw_)?meta_([A-Za-z_]+)", name):
            return category_name(match[1])
    return ""


def check_input(path: Path) -> None:
    """Raises ValueError, in one line, for a file that is missing, of another kind or without the columns NEEDED: before
    hours of work, not after."""
    if not path.is_file():
        raise ValueError(f"{path} {'is a directory: name the files in it' if path.is_dir() else 'does not exist'}")
    if not path.name.lower().endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise ValueError(f"{path}: expected .jsonl, .jsonl.gz or .parquet")
    if path.suffix.lower() == ".parquet":
        try:
            names = pyarrow.parquet.ParquetFile(path).schema_arrow.names
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no readable Parquet file: {error}; fetch it again") from None
        if missing := [name for name in NEEDED if name not in names]:
            raise ValueError(f"{path} lacks the column {missing[0]}; it has {listed(names)}: is it raw_meta_*?")


def blocks_of(path: Path) -> Iterator[bytes | pyarrow.RecordBatch]:
    """Whole lines, about BLOCK_BYTES at a time, or batches of a Parquet file. Raises ValueError where it is damaged."""
    if path.suffix.lower() == ".parquet":
        try:
            file = pyarrow.parquet.ParquetFile(path, pre_buffer=False)  # otherwise the whole file is kept in memory
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            yield from file.iter_batches(BLOCK_RECORDS, columns=columns, use_threads=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no readable Parquet file: {error}; fetch it again") from None
        return
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        rest, number = b"", 0
        while True:
            number += 1
            try:
                read = file.read(BLOCK_BYTES)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                place = f"about {number * BLOCK_BYTES / 1e6:,.0f} MB in"
                raise ValueError(f"{path} is cut short or damaged {place} ({error}); fetch it again") from None
            if not read:
                break
            lines, end, rest_of_read = read.rpartition(b"\n")
            if end:
                yield rest + lines + end
                rest = rest_of_read
            else:
                rest += read
                if len(rest) > LONGEST_LINE:
                    raise ValueError(f"{path} has a line of more than {LONGEST_LINE >> 20} MiB: it is not JSONL")
        if rest:
            yield rest


def parse(block: bytes | pyarrow.RecordBatch) -> Iterator:
    """The records of a block; NO_JSON for a line that is not JSON. Empty lines do not count."""
    if isinstance(block, pyarrow.RecordBatch):
        yield from block.to_pylist()
        return
    for line in block.split(b"\n"):
        if line and not line.isspace():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield NO_JSON


def hash_of(words: list[bytes]) -> int:
    """64 bits of a hash of a text's words"""
    return int.from_bytes(hashlib.blake2b(b" ".join(words), digest_size=8).digest(), "little")


def sift(block: bytes | pyarrow.RecordBatch, category: str, options: Options) -> Block:
    """Apply the rules to each record; shingles and keys of those that pass. Runs in a worker."""
    result, texts, hashes = Block(), [], []
    for record in parse(block):
        result.records += 1
        try:
            if record is NO_JSON:
                raise Rejected(NO_JSON)
            title, text, price, its_category = item_of(record, options.preset, category)
            row = (clean(record.get("parent_asin")) or f":{result.records}", title, text, its_category)
        except (Rejected, Unusable, RecursionError) as rejected:
            reason = rejected.args[0] if isinstance(rejected, Rejected) else WRONG_KIND
            result.counts[reason] += 1
            result.first.setdefault(reason, result.records)
            continue
        # Half a surrogate pair, which JSON allows, cannot be encoded: it becomes a question mark.
        result.rows.append((*(part.encode(errors="replace").decode() for part in row), price))
        texts.append(words_in(text))
        hashes.append((hash_of(texts[-1]), hash_of(words_in(title))))
    result.shingles, result.sizes = shingles_of(texts)
    result.keys = np.array(hashes, np.uint64).reshape(len(texts), 2)
    if options.near:
        bands = band_keys(parts(result.shingles, result.sizes), options.near, options.seed)
        result.keys = np.hstack([result.keys, bands])
    return result


def start_worker() -> None:
    """Ignore Ctrl-C, which the first process handles, and end when that process has ended, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def sifted(path: Path, options: Options, pool: ProcessPoolExecutor | None, ahead: int) -> Iterator[Block]:
    """`sift` of the blocks of a file, in order: by the pool, at most `ahead` at a time, or here without one."""
    blocks, category = blocks_of(path), category_of(path)
    if pool is None:
        yield from (sift(block, category, options) for block in blocks)
        return
    waiting = deque()
    for block in blocks:
        waiting.append(pool.submit(sift, block, category, options))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
