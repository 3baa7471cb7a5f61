"""Cross-validate options on the reference's items: every row of a table is trained once a fold, and priced there.

    python -m benchmarks.cross_validation --rows benchmarks/reference.json --epochs 4 --batch-tokens 4096 --out cv/

The 2,000 items are cut into folds by title; each fold is priced by a model that has seen the other folds and the chat
examples. `--first 251` (the default) leaves items 1 to 250, the test, out: settings are chosen by what is left. Rows
are as in benchmarks/ablation.py; in their options `{folds}` is the directory of the folds' files and `{fold}` a number:
`--data {folds}/own{fold}.jsonl` trains on the test's own kind alone, `{folds}/balanced{fold}.jsonl` repeats the chat
examples until each band of prices weighs as much as in the test's own kind. Differences to the first row are paired,
item by item, over all folds. Written after every row: a run cut short keeps what it measured. Needs no GPU, but hours
without one.
"""

import argparse
import csv
import json
import os
import queue
import shutil
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.ablation import gpu_of, options_of, run
from common.cli import run_main
from pricing.data.items import Item, normalise_title, sample, split_of
from pricing.data.sources import load_sources, without_repeats
from pricing.evaluation.console import table
from pricing.evaluation.metrics import band_of, paired_difference, score

COLUMNS = ("id", "title", "text", "price", "category", "origin", "split")
KEPT = ("n", "mae", "mae_ci95", "median_error", "rmsle", "hits", "ratio", "coverage")


def fold_items(items: list[Item], fold_of: dict[str, int], fold: int) -> list[Item]:
    """The items with their splits in one fold; a twentieth of its training items, by title and of the test's own kind,
    is for validation. Training items that nearly repeat a held-out one are left out."""
    split = []
    for item in items:
        title = normalise_title(item.title)
        held_out = "test" if fold_of.get(title) == fold else "val" if split_of(item.title) == "val" else "train"
        split.append(replace(item, split=held_out if item.id.isdigit() else "train"))
    [kept] = without_repeats([split])
    return kept


def balanced(items: list[Item]) -> list[Item]:
    """The items, those of other kinds repeated or sampled by price band until they are spread as the test's own kind"""
    train = [item for item in items if item.split == "train"]
    own = Counter(band_of(item.price) for item in train if item.id.isdigit())
    bands = defaultdict(list)
    for item in (item for item in train if not item.id.isdigit()):
        bands[band_of(item.price)].append(item)
    size, chosen = sum(map(len, bands.values())), [item for item in items if item.id.isdigit()]
    for band, part in bands.items():
        whole, rest = divmod(round(size * own[band] / own.total()), len(part))
        chosen += part * whole + sample(part, rest)
    return chosen


def write_folds(out: Path, folds: int, first: int) -> None:
    """fold0.jsonl, own0.jsonl, balanced0.jsonl and so on: rows as train.py reads them"""
    items = [item for item in load_sources("reference:2000").items if not item.id.isdigit() or int(item.id) >= first]
    titles = sorted({normalise_title(item.title) for item in items if item.id.isdigit()})
    order = np.random.default_rng(0).permutation(titles)
    fold_of = {str(title): n * folds // len(titles) for n, title in enumerate(order)}
    for fold in range(folds):
        kept = fold_items(items, fold_of, fold)
        own = [item for item in kept if item.id.isdigit()]
        for name, rows in (("fold", kept), ("own", own), ("balanced", balanced(kept))):
            lines = [json.dumps({column: getattr(item, column) for column in COLUMNS}) + "\n" for item in rows]
            (out / f"{name}{fold}.jsonl").write_text("".join(lines))


def measure(out: Path, common: list[str], row: list[str], fold: int, gpu: str | None) -> list[dict]:
    """The lines of predictions.csv of one fold. Raises ValueError where a script failed."""
    words = [word.replace("{folds}", str(out)).replace("{fold}", str(fold)) for word in row]
    training, evaluation = options_of(words)
    directory = out / f"run-{threading.get_ident()}-{fold}"
    data = [] if "--data" in training else ["--data", out / f"fold{fold}.jsonl"]
    try:
        run("train.py", *common, *data, *training, "--out", directory, gpu=gpu)
        run("evaluate.py", "--ckpt", directory, "--quiet", "--no-untuned", *evaluation, gpu=gpu)
        learnt_from = json.loads((directory / "report" / "metrics.json").read_text())["train_items"]
        with open(directory / "report" / "predictions.csv", newline="", encoding="utf-8") as lines:
            return [line | {"train_items": learnt_from} for line in csv.DictReader(lines)]
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def scored(rows: list[dict]) -> dict:
    """Metrics over all folds; the constant is the mean price of the items themselves"""
    truth, guess, low, high = (np.array([float(row[k]) for row in rows]) for k in ("truth", "guess", "low", "high"))
    titles = [normalise_title(row["title"]) for row in rows]
    metrics = score(truth, guess, float(truth.mean()), [""] * len(rows), interval=(low, high), groups=titles)
    items = sum(row["train_items"] for row in rows) / len(rows)
    return {"train_items": round(items)} | {key: metrics[key] for key in KEPT}


def against(rows: list[dict], first: list[dict]) -> dict:
    """The paired difference to the first row's errors"""
    errors = {row["id"]: float(row["error"]) for row in first}
    titles = [normalise_title(row["title"]) for row in rows]
    return paired_difference(
        np.array([float(row["error"]) for row in rows]), np.array([errors[row["id"]] for row in rows]), titles
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="JSON: a name and a list of options for each row")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--first", type=int, default=251, help="the first of the 2,000 items that takes part")
    parser.add_argument("--out", type=Path, required=True, help="directory of the folds, table.json and guesses.json")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, on the GPUs in turn")
    args, common = parser.parse_known_args()  # what is left goes to every train.py
    rows = json.loads(args.rows.read_text())
    if args.out.exists():
        raise ValueError(f"{args.out} exists already; choose another name")
    args.out.mkdir(parents=True)
    write_folds(args.out, args.folds, args.first)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    free, lock, names = queue.Queue(), threading.Lock(), list(rows)
    parts: dict[str, dict[int, list]] = {name: {} for name in rows}
    measured: dict[str, dict] = {}
    for number in range(args.jobs):
        free.put(gpu_of(number))

    def work(name: str, fold: int) -> None:
        gpu = free.get()
        try:
            result = measure(args.out, common, rows[name], fold, gpu)
        except (ValueError, OSError) as error:
            result = [{"failed": str(error)}]
        finally:
            free.put(gpu)
        with lock:
            parts[name][fold] = result
            if len(parts[name]) == args.folds:
                note(name)

    def note(name: str) -> None:
        lines = [line for fold in range(args.folds) for line in parts[name][fold]]
        failed = [line["failed"] for line in lines if "failed" in line]
        measured[name] = {"failed": failed[0]} if failed else scored(lines) | {"options": rows[name]}
        if names[0] in measured and not failed and "mae" in measured[names[0]]:
            first = [line for fold in parts[names[0]].values() for line in fold]
            measured[name]["against_first"] = against(lines, first)
        (args.out / "table.json").write_text(json.dumps(measured, indent=1) + "\n")
        guesses = {n: {line["id"]: line["guess"] for fold in parts[n].values() for line in fold} for n in measured
                   if "mae" in measured[n]}  # fmt: skip
        (args.out / "guesses.json").write_text(json.dumps(guesses))
        print(f"{name}: " + (f"${measured[name]['mae']:.2f}" if not failed else failed[0]), flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(work, name, fold) for name in names for fold in range(args.folds)]
    for one in waiting:
        one.result()
    show({name: measured[name] for name in names if "mae" in measured[name]})


def show(measured: dict[str, dict]) -> None:
    cells = []
    for name, row in measured.items():
        low, high = row["mae_ci95"]
        cells.append([
            name, f"${row['mae']:.2f} ({low:.2f} to {high:.2f})", f"{row['rmsle']:.3f}", f"{row['hits']:.1%}",
            f"{row['coverage']:.1%}",
        ])  # fmt: skip
        if difference := row.get("against_first"):
            cells[-1].append("{:+.2f} ({:+.2f} to {:+.2f})".format(difference["difference"], *difference["ci95"]))
        else:
            cells[-1].append("")
    print(table(["row", "mean error", "RMSLE", "hits", "in range", "against the first"], cells))


if __name__ == "__main__":
    run_main(main)
