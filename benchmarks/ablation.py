"""One lever at a time: train and price for every row of a table, beside the first row, on validation items.

    python -m benchmarks.ablation --rows benchmarks/ablation.json --data pc-parts --out ablation/
    python -m benchmarks.ablation --rows final.json --split test --out final/          once, with what was chosen

A row is a name and options of train.py, and behind the word `evaluate` those of evaluate.py:
`{"plain": [], "three epochs": ["--epochs", "3"], "its mean": ["--epochs", "3", "evaluate", "--decode", "mean"]}`. Rows
that only decode otherwise share one training. The differences to the first row are paired, item by item, with
their 95 % interval. Written after every row: a run cut short keeps what it measured.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pricing.console import table
from pricing.metrics import paired_difference
from pricing.report import paired_errors


def options_of(row: list[str]) -> tuple[list[str], list[str]]:
    """(options of train.py, options of evaluate.py): the latter follow the word `evaluate`"""
    at = row.index("evaluate") if "evaluate" in row else len(row)
    return row[:at], row[at + 1 :]


def run(*arguments: str) -> float:
    """Seconds that a script took. Raises ValueError with its last line where it failed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="JSON: a name and a list of options for each row")
    parser.add_argument("--split", default="val", choices=["val", "test"], help="which items are priced")
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="directory of the runs and of table.json")
    args, common = parser.parse_known_args()  # what is left goes to every train.py
    rows, trained, measured = json.loads(args.rows.read_text()), {}, {}
    args.out.mkdir(parents=True, exist_ok=True)
    first = None
    for number, (name, row) in enumerate(rows.items()):
        training, evaluating = options_of(row)
        key = tuple(training)
        try:
            if key not in trained:
                out = args.out / f"run{number:02d}"
                trained[key] = out, run("train.py", *common, *training, "--out", out)
            out, seconds = trained[key]
            run("evaluate.py", "--ckpt", out, "--quiet", "--no-untuned", "--split", args.split, *evaluating)
        except ValueError as error:
            measured[name] = {"failed": str(error)}
            continue
        report = args.out / f"report{number:02d}"  # another row may price with the same run
        shutil.rmtree(report, ignore_errors=True)
        shutil.copytree(out / ("report" if args.split == "test" else "report_val"), report)
        metrics = json.loads((report / "metrics.json").read_text())
        kept = {key: metrics[key] for key in ("mae", "mae_ci95", "median_error", "rmsle", "hits", "ratio", "coverage")}
        measured[name] = kept | {"options": row, "train_seconds": round(seconds, 1), "n": metrics["n"]}
        if first:
            measured[name]["against_first"] = paired_difference(*paired_errors(report, first))
        first = first or report
        (args.out / "table.json").write_text(json.dumps(measured, indent=1) + "\n")
        print(f"{name}: ${metrics['mae']:.2f}", flush=True)
    show(measured)


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
