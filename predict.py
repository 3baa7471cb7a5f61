"""Price one description, or a file of them, each with a range that holds 80 % of such prices.

    python predict.py --ckpt out/ "Steel water bottle, 750 ml, double wall"
    python predict.py --ckpt out/ --file items.jsonl > prices.csv

The price is the median of what the digits and the head think together. A file is .jsonl, .csv or .parquet with `text`,
or `title` and more, in each row; or .txt with a text in each line.
"""

import csv
import sys
from pathlib import Path

from tqdm import tqdm

from common.cli import Parser, run_main
from pipeline.models import pick_device, pick_dtype
from pipeline.options import add_batch_argument, add_model_arguments
from pipeline.predictor import Run
from pricing.data.items import Item, read_rows, read_text, text_of
from pricing.distribution.intervals import SHARES, calibrated_range

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


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="*", help="what to price")
    parser.add_argument("--ckpt", default="out", help="the directory that train.py wrote (default: out)")
    parser.add_argument("--file", type=Path, help="a file of texts; writes CSV: text, price, low, high in dollars")
    parser.add_argument(
        "--decode", choices=["median", "head", "blend"],
        help="median of the digits' distribution, the head's, or both blended (default, where there is a head)",
    )  # fmt: skip
    shares = [round(100 * share) for share in SHARES]
    parser.add_argument("--interval", type=int, default=80, choices=shares, help="per cent of prices a range holds")
    add_batch_argument(parser)
    add_model_arguments(parser)
    args = parser.parse_args()
    if bool(args.text) == bool(args.file):
        parser.error("give a text or --file, one of the two")
    texts = read_texts(args.file) if args.file else args.text
    if any(not text.strip() for text in texts):
        raise ValueError("the text to price is empty")

    device = pick_device(args.device)
    run = Run(args.ckpt, device, pick_dtype(args.dtype, device))
    decode = run.decoding(args.decode)
    items = [Item(str(n), text.strip().splitlines()[0], text, 1.0, "", "test") for n, text in enumerate(texts)]
    prompts, held, rows = run.prompts(items), run.held(decode), []
    bar = tqdm(total=len(texts), unit="text", dynamic_ncols=True, disable=not args.file)  # on standard error
    for start in range(0, len(texts), CHUNK):
        found = run.forecast(
            prompts[start : start + CHUNK], args.batch_tokens,
            on_batch=lambda indices, _: bar.update(len(indices)),
        )  # fmt: skip
        guess = found.median(decode)
        low, high, calibrated = calibrated_range(found.quantiles(decode), guess, args.interval / 100, *held)
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
    run_main(main)
