"""Price one description, or a file of them, with an 80 % range.

    python predict.py --ckpt out/ "Steel water bottle, 750 ml, double wall"
    python predict.py --ckpt out/ --file items.jsonl > prices.csv

The head that `python -m pricing.head` trained prices them, where the checkpoint has one; else the median of the model's
distribution over whole dollars does. A file is .jsonl, .csv or .parquet with `text`, or `title` and more, in each row;
or .txt with a text in each line.
"""

import argparse
import csv
import sys
from pathlib import Path

from pricer import (
    add_batch_argument,
    add_model_arguments,
    distributions,
    head_states,
    load_run,
    open_head,
    pick_device,
    pick_dtype,
    read_run,
    run_main,
)
from pricing.decode import PriceTree, pick
from pricing.head import FILE
from pricing.intervals import SHARE, central_range, widen
from pricing.items import read_rows, text_of
from pricing.prompt import encode_prompt


def read_texts(path: Path) -> list[str]:
    """One text a row. Raises ValueError that names the file and the row without text."""
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        texts = [
            (n, line.strip()) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()
        ]
    else:
        texts = [(n, text_of(row) if isinstance(row, dict) else "") for n, row in read_rows(path, need_price=False)]
    for number, text in texts:
        if not text:
            raise ValueError(f"{path}, row {number}: no text to price")
    if not texts:
        raise ValueError(f"{path} is empty")
    return [text for _, text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="*", help="what to price")
    parser.add_argument("--ckpt", default="out", help="the directory that train.py wrote (default: out)")
    parser.add_argument("--file", type=Path, help="a file of texts; writes CSV: text, price, low, high in dollars")
    parser.add_argument("--decode", choices=["head", "median"], help="default: head where there is one, else median")
    add_batch_argument(parser)
    add_model_arguments(parser)
    args = parser.parse_args()
    if bool(args.text) == bool(args.file):
        parser.error("give a text or --file, one of the two")
    texts = read_texts(args.file) if args.file else args.text
    if any(not text.strip() for text in texts):
        raise ValueError("the text to price is empty")

    head = args.decode == "head" or (args.decode is None and (Path(args.ckpt) / FILE).is_file())
    run, device = read_run(args.ckpt), pick_device(args.device)
    head = open_head(args.ckpt) if head else None
    model, tokenizer = load_run(args.ckpt, run, device, pick_dtype(args.dtype, device))
    prompts = [encode_prompt(text, tokenizer, run["options"]["max_tokens"], run["prompt"]) for text in texts]
    if head:
        states = head_states(model, prompts, head.settings, args.batch_tokens)
        rows = zip(texts, head.median(states), *head.interval(states), strict=True)
    else:
        p = distributions(model, PriceTree.build(tokenizer.encode_answer), prompts, args.batch_tokens, prune=0.0)
        offset = run.get("intervals", {}).get("offsets", {}).get(f"{100 * SHARE:.0f}", 0.0)  # calibrated by train.py
        rows = zip(texts, pick(p, "median"), *widen(*central_range(p), offset), strict=True)
    if args.file:
        writer = csv.writer(sys.stdout)
        writer.writerow(["text", "price", "low", "high"])
        writer.writerows([text, f"{price:.0f}", f"{low:.0f}", f"{high:.0f}"] for text, price, low, high in rows)
    else:
        for text, price, low, high in rows:
            title = " ".join(text.split())[:80]
            print(f"${price:.0f}   (80 %: ${low:.0f} to ${high:.0f})   {title}")


if __name__ == "__main__":
    run_main(main)
