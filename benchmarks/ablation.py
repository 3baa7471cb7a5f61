"""One lever at a time: train and price for every row of a table, beside the first row, on validation items.

    python -m benchmarks.ablation --rows benchmarks/ablation.json --data pc-parts --epochs 10 --out ablation/
    python -m benchmarks.ablation --rows benchmarks/final.json --data pc-parts --epochs 10 --split test --out final/

Options of train.py on the command line are all rows' own (benchmarks/README.md names the recipe's). A row is a name and
further options, which take precedence; behind the word `evaluate` stand those of evaluate.py:
`{"plain": [], "three epochs": ["--epochs", "3"], "its mean": ["--epochs", "3", "evaluate", "--decode", "mean"]}`. Rows
that only decode otherwise share one training. The differences to the first row are paired, item by item, with
their 95 % interval. Written after every row: a run cut short keeps what it measured.
"""

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from common.cli import run_main
from pricing.evaluation.compare import paired_errors
from pricing.evaluation.console import table
from pricing.evaluation.metrics import paired_difference


def options_of(row: list[str]) -> tuple[list[str], list[str]]:
    """(options of train.py, of evaluate.py)"""
    at = row.index("evaluate") if "evaluate" in row else len(row)
    return row[:at], row[at + 1 :]


def run(*arguments: str, gpu: str | None = None) -> float:
    """Seconds that a script took. Raises ValueError with its last line where it failed."""
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return time.perf_counter() - started


def gpu_of(number: int) -> str | None:
    """What CUDA_VISIBLE_DEVICES is for a job, the GPUs in turn; None (as it is) where there is no GPU."""
    gpus = torch.cuda.device_count()
    visible = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))  # "" would hide them all
    return (visible[number % gpus] if len(visible) == gpus else str(number % gpus)) if gpus else None


def measure(out: Path, training: list[str], rows: dict, split: str, gpu: str | None, done):
    """Train once, price for each of `rows`; `done(name, what was measured)` after each."""
    try:
        seconds = run("train.py", *training, "--out", out, gpu=gpu)
    except ValueError as error:
        for name in rows:
            done(name, {"failed": str(error)})
        return
    for name, row in rows.items():
        try:
            run(
                "evaluate.py", "--ckpt", out, "--quiet", "--no-untuned", "--split", split, *options_of(row)[1], gpu=gpu
            )  # fmt: skip
            shutil.copytree(out / ("report" if split == "test" else "report_val"), report_of(out.parent, name))
            metrics = json.loads((report_of(out.parent, name) / "metrics.json").read_text())
            kept = {key: metrics[key] for key in ("mae", "mae_ci95", "median_error", "rmsle", "hits", "ratio")}
            kept |= {key: metrics.get(key) for key in ("coverage", "n", "train_items", "comparison")}
            done(name, kept | {"options": row, "train_seconds": round(seconds, 1)})
        except (ValueError, OSError, KeyError) as error:
            done(name, {"failed": str(error)})


def report_of(out: Path, name: str) -> Path:
    return out / "reports" / re.sub(r"\W+", "_", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="JSON: a name and a list of options for each row")
    parser.add_argument("--split", default="val", choices=["val", "test"], help="which items are priced")
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="directory of the runs and of table.json")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, on the GPUs in turn")
    args, common = parser.parse_known_args()  # what is left goes to every train.py
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    rows, measured = json.loads(args.rows.read_text()), {}
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f"{args.rows} must hold an object: a name and a list of options for each row")
    if args.out.exists() or len({report_of(args.out, name) for name in rows}) < len(rows):
        raise ValueError(f"{args.out} exists already, or two of the rows are named alike but for signs")
    args.out.mkdir(parents=True)
    # More threads than cores wait for one another by spinning: four pricings at once on two cores took eight times as
    # long.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    first, lock, free = next(iter(rows)), threading.Lock(), queue.Queue()
    for number in range(args.jobs):
        free.put(gpu_of(number))
    groups: dict[tuple, dict] = {}
    for name, row in rows.items():
        groups.setdefault(tuple(options_of(row)[0]), {})[name] = row

    def done(name: str, what: dict) -> None:
        with lock:
            measured[name] = what
            for other, row in measured.items():
                if other != first and "mae" in row and "mae" in measured.get(first, {}):
                    errors = paired_errors(report_of(args.out, other), report_of(args.out, first))
                    row["against_first"] = paired_difference(*errors)
            (args.out / "table.json").write_text(json.dumps(measured, indent=1) + "\n")
            print(f"{name}: " + (f"${what['mae']:.2f}" if "mae" in what else what["failed"]), flush=True)

    def work(number: int, training: tuple, group: dict) -> None:
        gpu = free.get()
        try:
            measure(args.out / f"run{number:02d}", [*common, *training], group, args.split, gpu, done)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(work, number, *parts) for number, parts in enumerate(groups.items())]
    for one in waiting:
        one.result()  # raises what a row did not expect
    show({name: measured[name] for name in rows if name in measured})
    if failed := [name for name in rows if "failed" in measured[name]]:
        raise ValueError(f"{len(failed)} of {len(rows)} rows failed: {', '.join(failed)}")


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
    run_main(main)
