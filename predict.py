"""Price one description, or a file of them, each with a range that holds 80 % of such prices.

    python predict.py --ckpt out/ "Steel water bottle, 750 ml, double wall"
    python predict.py --ckpt out/ --file items.jsonl > prices.csv

The price is the median of what the digits and the head think together. A file is .jsonl, .csv or .parquet with `text`,
or `title` and more, in each row; or .txt with a text in each line. Each row of it gives a row, with its `id` where it
has one, and without a price where it has no text; they are written as they come.
"""

from pipeline.options import pricing_options

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds: --help and typing errors answer at once
    ARGUMENTS = pricing_options(__doc__)

import argparse
import csv
import os
import sys
from pathlib import Path
from typing import Iterator

from tqdm import tqdm

from common.cli import run_main
from common.screen import drop_output, listed, visible, write_utf8
from pipeline.models import pick_device, pick_dtype
from pipeline.predictor import Predictor
from pricing.data.items import Item, line_of, text_of
from pricing.data.rows import read_rows, read_text
from pricing.distribution.intervals import calibrated_range
from pricing.evaluation.cells import guarded
from pricing.evaluation.console import whole

CHUNK = 1024  # texts that are priced at a time, sorted by length; they are written together. Of members, four times


def read_texts(path: Path) -> tuple[list[str], list[str] | None]:
    """(a text for each row, "" for a blank one; the rows' ids, None where no row has one). Raises ValueError that names
    the file, and the row that is none."""
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        lines = read_text(path).removesuffix("\n").split("\n")
        rows = enumerate(({"text": line} for line in lines if line or len(lines) > 1), 1)
    else:
        rows = read_rows(path, need_price=False, blank=True)
    texts, ids, columns = [], [], {}
    for number, row in rows:
        try:
            texts.append(text_of(row))
            ids.append(line_of(row, "id"))
        except ValueError as reason:
            raise ValueError(f"{path}, row {number}: one of the {reason}") from None
        columns = columns or row
    if not any(texts):
        there = f"no row has a text; its columns are {listed(columns)}" if columns else "it is empty"
        raise ValueError(f"{path}: {there}")
    return texts, ids if any(ids) else None


def prices(predictor: Predictor, texts: list[str], args: argparse.Namespace) -> Iterator[tuple]:
    """(price, low, high) of each text in dollars, None of an empty one, in order; CHUNK texts at a time."""
    decode, origin = predictor.decoding(args.decode), predictor.origin
    known = [text for text in texts if text.strip()]
    items = [Item(str(n), text, text, 1.0, "", "test", origin=origin) for n, text in enumerate(known)]
    prompts, calibration = predictor.prompts(items), predictor.calibration(decode)
    chunk = CHUNK if len(predictor.paths) == 1 else 4 * CHUNK  # each member's adapter is loaded once a chunk
    todo = iter(texts)
    with tqdm(total=len(known), unit="text", dynamic_ncols=True, disable=not args.file) as bar:  # on standard error
        for start in range(0, len(known), chunk):
            prediction = predictor.predict(
                prompts[start : start + chunk], args.batch_tokens,
                on_batch=lambda indices, _: bar.update(len(indices)),
            )  # fmt: skip
            guess = prediction.median(decode)
            quantiles = prediction.quantiles(decode)
            low, high, calibrated = calibrated_range(quantiles, guess, args.interval / 100, *calibration)
            if not calibrated and start == 0:
                words = "the run has too few validation items: ranges are the model's own, not calibrated"
                print(words, file=sys.stderr)
            for priced in zip(guess, low, high, strict=True):
                while not next(todo).strip():
                    yield None
                yield priced
            sys.stdout.flush()
    yield from (None for _ in todo)


def write_file(predictor: Predictor, texts: list[str], ids: list[str] | None, args: argparse.Namespace) -> None:
    """CSV on standard output: a row for each text, flushed with each chunk. On a screen, what a terminal would obey is
    written out; into a file or a pipe all goes as it is."""
    write_utf8()
    shown = visible if sys.stdout.isatty() else str
    writer = csv.writer(sys.stdout)
    writer.writerow([*(["id"] if ids else []), "text", "price", "low", "high"])
    for number, priced in enumerate(prices(predictor, texts, args)):
        cells = [ids[number]] if ids else []
        cells = [shown(guarded(cell)) for cell in [*cells, texts[number]]]
        writer.writerow(cells + ([whole(dollars) for dollars in priced] if priced else [""] * 3))
    sys.stdout.flush()


def main(args: argparse.Namespace) -> None:
    if args.file:
        texts, ids = read_texts(args.file)
    else:  # a locale without UTF-8 hides what was typed
        texts, ids = [os.fsencode(text).decode("utf-8", "replace") for text in args.text], None
    if not args.file and not all(text.strip() for text in texts):
        raise ValueError("the text to price is empty")
    device = pick_device(args.device)
    predictor = Predictor(args.ckpt, device, pick_dtype(args.dtype, device), args.origin)
    try:
        if args.file:
            return write_file(predictor, texts, ids, args)
        for text, (price, low, high) in zip(texts, prices(predictor, texts, args), strict=True):
            title = visible(" ".join(text.split())[:80])
            print(f"${whole(price)}   ({args.interval} %: ${whole(low)} to ${whole(high)})   {title}")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough: `| head`
        drop_output()


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
