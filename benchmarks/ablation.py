"""One lever at a time: train and price for every row of a table, beside the first row, on validation items.

    python -m benchmarks.ablation --rows benchmarks/ablation.json --data pc-parts --out ablation/
    python -m benchmarks.ablation --rows benchmarks/final.json --data pc-parts --split test --out final/

A row is a name and options of train.py; behind the word `head` those of pricing.head, which is then trained
afterwards; behind the word `evaluate` those of evaluate.py:
`{"plain": [], "three epochs": ["--epochs", "3"], "its mean": ["--epochs", "3", "evaluate", "--decode", "mean"]}`. Rows
that only decode otherwise share one training. The differences to the first row are paired, item by item, with
their 95 % interval. Written after every row: a run cut short keeps what it measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pricing.console import table
from pricing.metrics import paired_difference
from pricing.report import paired_errors


def options_of(row: list[str]) -> tuple[list[str], list[str] | None, list[str]]:
    """(options of train.py, of pricing.head or None, of evaluate.py)"""
    at = row.index("evaluate") if "evaluate" in row else len(row)
    begins = row.index("head") if "head" in row else None
    return row[: at if begins is None else begins], None if begins is None else row[begins + 1 : at], row[at + 1 :]


def run(*arguments: str, gpu: int | None = None) -> float:
    """Seconds that a script took. Raises ValueError with its last line where it failed."""
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return time.perf_counter() - started


def measure(out: Path, training: list[str], head: list[str] | None, rows: dict, split: str, gpu: int | None, done):
    """Train once, price for each of `rows`; `done(name, what was measured)` after each."""
    try:
        seconds = run("train.py", *training, "--out", out, gpu=gpu)
        if head is not None:
            seconds += run("-m", "pricing.head", "--ckpt", out, *head, gpu=gpu)
    except ValueError as error:
        for name in rows:
            done(name, {"failed": str(error)})
        return
    for name, row in rows.items():
        try:
            run(
                "evaluate.py", "--ckpt", out, "--quiet", "--no-untuned", "--split", split, *options_of(row)[2], gpu=gpu
            )  # fmt: skip
            shutil.copytree(out / ("report" if split == "test" else "report_val"), report_of(out.parent, name))
            metrics = json.loads((report_of(out.parent, name) / "metrics.json").read_text())
            kept = {key: metrics[key] for key in ("mae", "mae_ci95", "median_error", "rmsle", "hits", "ratio")}
            kept |= {key: metrics.get(key) for key in ("coverage", "n", "train_items", "comparison")}
            done(name, kept | {"options": row, "train_seconds": round(seconds, 1)})
        except ValueError as error:
            done(name, {"failed": str(error)})


def report_of(out: Path, name: str) -> Path:
    return out / f"report of {name}".replace(" ", "_").replace("/", "_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="JSON: a name and a list of options for each row")
    parser.add_argument("--split", default="val", choices=["val", "test"], help="which items are priced")
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="directory of the runs and of table.json")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, on the GPUs in turn")
    args, common = parser.parse_known_args()  # what is left goes to every train.py
    rows, measured = json.loads(args.rows.read_text()), {}
    if args.out.exists():
        raise SystemExit(f"error: {args.out} exists; name another directory")
    args.out.mkdir(parents=True)
    first, gpus, lock = next(iter(rows)), torch.cuda.device_count(), threading.Lock()
    groups: dict[tuple, dict] = {}
    for name, row in rows.items():
        training, head, _ = options_of(row)
        groups.setdefault((tuple(training), head and tuple(head)), {})[name] = row

    def done(name: str, what: dict) -> None:
        with lock:
            measured[name] = what
            for other, row in measured.items():
                if other != first and "mae" in row and "mae" in measured.get(first, {}):
                    errors = paired_errors(report_of(args.out, other), report_of(args.out, first))
                    row["against_first"] = paired_difference(*errors)
            (args.out / "table.json").write_text(json.dumps(measured, indent=1) + "\n")
            print(f"{name}: " + (f"${what['mae']:.2f}" if "mae" in what else what["failed"]), flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for number, ((training, head), group) in enumerate(groups.items()):
            gpu, out = number % gpus if gpus else None, args.out / f"run{number:02d}"
            pool.submit(measure, out, [*common, *training], head, group, args.split, gpu, done)
    show({name: measured[name] for name in rows if name in measured})


def show(measured: dict[str, dict]) -> None:
    cells = []
    for name, row in measured.items():
        if "failed" in row:
            cells.append([f"{name}: {row['failed'][:80]}"] + ["-"] * 6)
            continue
        against = row.get("against_first")
        difference = ""
        if against:
            low, high = against["ci95"]
            difference = f"{against['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        cells.append([
            name, f"${row['mae']:.2f}", difference, f"{row['rmsle']:.3f}",
            f"{row['hits']:.1%}", f"{row['coverage']:.1%}", f"{row['train_seconds']:.0f}",
        ])  # fmt: skip
    print(table(["row", "mean error", "against the first", "RMSLE", "hits", "coverage", "seconds"], cells))


if __name__ == "__main__":
    main()
