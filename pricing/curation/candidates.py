"""Candidates: the records that passed the rules, on disk between the stages of curation, so that memory stays small.

Each input has its own directory, written under another name and renamed when whole. So a run that was stopped goes on
with the first input that it had not finished.

    rows.parquet    id, title, text, category, price
    keys-00 ...     a file for each column of keys, 8 bytes a candidate
    shingles        the shingles of all candidates (duplicates.py), one set after the other, 4 bytes each
    ends            where each candidate's set ends in that file, 8 bytes a candidate
    summary.json    how many records were read, and how many were left out for each reason
"""

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from common.files import write_directory
from pricing.curation.duplicates import bands_for
from pricing.curation.raw import Block, Options, category_of, sifted, start_worker
from pricing.curation.rules import BAD

SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("id", "title", "text", "category")] + [("price", pyarrow.float64())]
)
GROUP_ROWS, CHUNK_ROWS = 8192, 4096  # candidates written, and read again, at a time
FORMAT = 2  # raise it when candidates are made or stored in another way: those of earlier runs are then not used


def identity(path: Path, options: Options) -> str:
    """The name of an input's directory: it changes with the file, its time of change, the rules and FORMAT."""
    status, preset = path.stat(), options.preset
    rules = (preset.write.__name__, preset.least_tokens, preset.most_tokens, options.near, options.seed)
    parts = (str(path.resolve()), status.st_size, status.st_mtime_ns, category_of(path), rules, FORMAT)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def keep_input(path: Path, out: Path, *rest) -> None:
    """Write the candidates of one input into the directory `out`, whole or not at all; `rest` as for `fill`."""
    with write_directory(out) as part:
        fill(path, part, *rest)


def fill(
    path: Path, part: Path, blocks: Iterator[Block], near: float, strict: bool, advance: Callable[[int], None]
) -> None:
    """Write the candidates of one input into the directory `part`; `advance(records)` after each block, for a progress
    bar.

    Raises ValueError for an input without a readable record and, if `strict`, for the first broken record (BAD).
    """
    total, rows, end, stem = Block(), [], 0, path.name.split(".")[0]
    columns = 2 + (bands_for(near)[0] if near else 0)
    with ExitStack() as stack, pyarrow.parquet.ParquetWriter(part / "rows.parquet", SCHEMA) as table:
        keys = [stack.enter_context(open(part / f"keys-{column:02}", "wb")) for column in range(columns)]
        shingles, ends = (stack.enter_context(open(part / name, "wb")) for name in ("shingles", "ends"))
        for block in blocks:
            for reason, number in block.first.items():
                total.first.setdefault(reason, total.records + number)
            if strict:
                check_sound(path, total.first)
            for row in block.rows:
                own = f"{stem}:{total.records + int(row[0][1:])}" if row[0].startswith(":") else row[0]
                rows.append((own, *row[1:]))
            for column, file in enumerate(keys):
                block.keys[:, column].tofile(file)
            block.shingles.tofile(shingles)
            (end + np.cumsum(block.sizes)).tofile(ends)
            end += len(block.shingles)
            total.records += block.records
            total.counts += block.counts
            advance(block.records)
            if len(rows) >= GROUP_ROWS:
                table.write_table(table_of(rows), GROUP_ROWS)
                rows = []
        table.write_table(table_of(rows), GROUP_ROWS)
    if not total.records:
        raise ValueError(f"{path} has no records: it is empty")
    if sum(total.counts[reason] for reason in BAD) == total.records:
        reasons = "; ".join(f"{n:,} {reason}" for reason, n in total.counts.most_common())
        raise ValueError(f"{path} has no readable records ({reasons}): is it raw_meta_* of Amazon-Reviews-2023?")
    summary = {"file": path.name, "records": total.records, "counts": total.counts, "first": total.first}
    (part / "summary.json").write_text(json.dumps(summary) + "\n")


def check_sound(path: Path, first: dict[str, int]) -> None:
    """Raises ValueError that names the first broken record; `first` maps each reason to the number of its first one."""
    if broken := [(number, reason) for reason, number in first.items() if reason in BAD]:
        number, reason = min(broken)
        raise ValueError(f"{path}, record {number}: one of the {reason}")


def table_of(rows: list[tuple]) -> pyarrow.Table:
    """Rows of the columns of SCHEMA as a table"""
    return pyarrow.table(list(zip(*rows)) or [[]] * len(SCHEMA), schema=SCHEMA)


def read_inputs(inputs: list[Path], work: Path, options: Options, workers: int, strict: bool) -> list[Path]:
    """The directory of candidates of each input, below `work`; those that an earlier run finished are used again.

    Raises ValueError as `keep_input` and `raw.blocks_of` do, OSError when a worker dies.
    """
    directories = [work / identity(path, options) for path in inputs]
    for other in set(work.iterdir()) - {*directories, work / "lock"}:  # of other options, or not finished
        shutil.rmtree(other) if other.is_dir() else other.unlink()
    todo = [(path, out) for path, out in zip(inputs, directories) if not out.is_dir()]
    if len(todo) < len(inputs):
        print(f"{len(inputs) - len(todo)} of {len(inputs)} inputs were finished earlier and are not read again")
    for path, out in zip(inputs, directories):
        if strict and out.is_dir():
            check_sound(path, json.loads((out / "summary.json").read_text())["first"])
    pool = nullcontext()
    if workers > 1 and todo:
        # spawn, not fork: pyarrow and tqdm start threads, and a forked child of a process with threads may hang.
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    with pool as running, tqdm(unit=" records", unit_scale=True, disable=None) as bar:
        try:
            for path, out in todo:
                bar.set_description(path.name)
                blocks = sifted(path, options, running, 2 * workers)
                keep_input(path, out, blocks, options.near, strict, bar.update)
        except BrokenProcessPool:
            raise OSError("a worker process died, out of memory? Run the same command with fewer --workers") from None
        except BaseException:
            if running:
                running.shutdown(wait=False, cancel_futures=True)
            raise
    return directories


class Candidates:
    """The candidates of all inputs, numbered from 0 in the order of the inputs, read from disk a part at a time."""

    def __init__(self, directories: list[Path]):
        self.directories = directories
        self.summaries = [json.loads((d / "summary.json").read_text()) for d in directories]
        self.starts = [0, *accumulate((d / "ends").stat().st_size // 8 for d in directories)]
        self.files = [(open(d / "shingles", "rb"), open(d / "ends", "rb")) for d in directories]

    def __len__(self) -> int:
        return self.starts[-1]

    def __enter__(self) -> "Candidates":
        return self

    def __exit__(self, *_) -> None:
        for pair in self.files:
            for file in pair:
                file.close()

    def column(self, column: int) -> "Column":
        """One column of keys, in the form that `duplicates.buckets` takes"""
        return Column(self, column)

    def keys(self, column: int, start: int, count: int) -> np.ndarray:
        """The keys of the candidates from `start` on, `count` of them or as many as their input has  # (n,) uint64"""
        number = bisect_right(self.starts, start) - 1
        offset = 8 * (start - self.starts[number])
        return np.fromfile(self.directories[number] / f"keys-{column:02}", np.uint64, count, offset=offset)

    def shingles(self, row: int) -> np.ndarray:
        """The set of shingles of one candidate  # (n,) uint32"""
        number = bisect_right(self.starts, row) - 1
        shingles, ends = (file.fileno() for file in self.files[number])
        row = int(row) - self.starts[number]
        pair = os.pread(ends, 16, 8 * row - 8) if row else bytes(8) + os.pread(ends, 8, 0)
        start, end = np.frombuffer(pair, np.int64).tolist()
        return np.frombuffer(os.pread(shingles, 4 * (end - start), 4 * start), np.uint32)

    def shingle_chunks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(number of the first candidate, the shingles of it and the next ones, how many each has), a part at a time"""
        for start, (shingles, ends) in zip(self.starts, self.files):
            shingles.seek(0)
            ends.seek(0)
            end = 0
            while len(chunk := np.fromfile(ends, np.int64, CHUNK_ROWS)):
                sizes = np.diff(chunk, prepend=end)
                yield start, np.fromfile(shingles, np.uint32, sizes.sum()), sizes
                start, end = start + len(chunk), chunk[-1]

    def batches(self, columns: list[str]) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        """(number of the first candidate, the columns of it and the next ones), a part at a time"""
        for start, directory in zip(self.starts, self.directories):
            # Without these options pyarrow reads ahead and keeps in memory what it has read.
            file = pyarrow.parquet.ParquetFile(directory / "rows.parquet", pre_buffer=False)
            for batch in file.iter_batches(CHUNK_ROWS, columns=columns, use_threads=False):
                yield start, batch
                start += len(batch)


@dataclass(frozen=True)
class Column:
    """One column of keys. Each iteration yields (number of the first candidate, the keys of it and the next ones)."""

    candidates: Candidates
    column: int

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        start = 0
        while start < len(self.candidates):
            chunk = self.candidates.keys(self.column, start, 1 << 16)
            yield start, chunk
            start += len(chunk)
