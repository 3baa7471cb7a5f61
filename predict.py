"""Price one description, or a file of them, each with a range that holds 80 % of such prices.

    python predict.py --ckpt out/ "Steel water bottle, 750 ml, double wall"
    python predict.py --ckpt out/ --file items.jsonl > prices.csv

The price is the median of what the digits and the head think together. A file is .jsonl, .csv or .parquet with `text`,
or `title` and more, in each row; or .txt with a text in each line.
"""

from pipeline.options import pricing_options

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds: --help and typing errors answer at once
    ARGUMENTS = pricing_options(__doc__)

import argparse
import csv
import sys
from pathlib import Path

from tqdm import tqdm

from common.cli import run_main
from pipeline.models import pick_device, pick_dtype
from pipeline.predictor import Predictor
from pricing.data.items import Item, text_of
from pricing.data.rows import read_rows, read_text
from pricing.distribution.intervals import calibrated_range

CHUNK = 5000  # texts whose distributions over 1,000 prices are held at a time: 40 MB for each member


def read_texts(path: Path) -> list[str]:
    """One text a row. Raises ValueError that names the file and the row without text."""
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        rows = [(n, {"text": line}) for n, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    else:
        rows = read_rows(path, need_price=False)
    texts = []
    for number, row in rows:
        try:
            text = text_of(row) if isinstance(row, dict) else ""
        except ValueError as reason:
            raise ValueError(f"{path}, row {number}: one of the {reason}") from None
        if not text:
            raise ValueError(f"{path}, row {number}: no text to price")
        texts.append(text)
    if not texts:
        raise ValueError(f"{path} is empty")
    return texts


def main(args: argparse.Namespace) -> None:
    texts = read_texts(args.file) if args.file else args.text
    if any(not text.strip() for text in texts):
        raise ValueError("the text to price is empty")

    device = pick_device(args.device)
    predictor = Predictor(args.ckpt, device, pick_dtype(args.dtype, device))
    decode = predictor.decoding(args.decode)
    origin = predictor.origin(args.origin)
    items = [
        Item(str(n), text.strip().splitlines()[0], text, 1.0, "", "test", origin=origin) for n, text in enumerate(texts)
    ]
    prompts, calibration, rows = predictor.prompts(items), predictor.calibration(decode), []
    bar = tqdm(total=len(texts), unit="text", dynamic_ncols=True, disable=not args.file)  # on standard error
    for start in range(0, len(texts), CHUNK):
        prediction = predictor.predict(
            prompts[start : start + CHUNK], args.batch_tokens,
            on_batch=lambda indices, _: bar.update(len(indices)),
        )  # fmt: skip
        guess = prediction.median(decode)
        low, high, calibrated = calibrated_range(prediction.quantiles(decode), guess, args.interval / 100, *calibration)
        rows += zip(texts[start : start + CHUNK], guess, low, high, strict=True)
    bar.close()
    if not calibrated:
        print("the run has too few validation items: ranges are the model's own, not calibrated", file=sys.stderr)
    if args.file:
        writer = csv.writer(sys.stdout)
        writer.writerow(["text", "price", "low", "high"])
        writer.writerows([text, f"{price:.0f}", f"{low:.0f}", f"{high:.0f}"] for text, price, low, high in rows)
    else:
        for text, price, low, high in rows:
            title = " ".join(text.split())[:80]
            print(f"${price:.0f}   ({args.interval} %: ${low:.0f} to ${high:.0f})   {title}")


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
