"""Memory against speed: our training step under one budget after the other, what was planned beside what was used.

    python -m benchmarks.memory --shape 8b --budgets 40GiB 16GiB 8GiB 5.2GiB --json memory.json

Each budget runs in a process of its own, on the workload of train_speed.py.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, median

from benchmarks.random_model import directory_of
from benchmarks.shapes import SHAPES
from benchmarks.train_speed import measure_alone, settings_of
from pricing.evaluation.console import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--model", type=Path, help="directory (default: random weights of the shape, kept for later)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step, on average")
    parser.add_argument("--budgets", nargs="+", default=["40GiB", "16GiB", "8GiB", "5.2GiB"])
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8, 16])
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--time-limit", type=int, default=200, help="seconds for one budget")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    args = parser.parse_args()
    model = args.model or directory_of(args.shape)
    rows, results = [], []
    for budget in args.budgets:
        print(f"---- {budget}", file=sys.stderr, flush=True)
        asked = argparse.Namespace(**vars(args), warmup=3, rank=None, alpha=None, targets=None, memory_budget=budget)
        settings = settings_of(asked, model) | {"impl": "ours", "checkpointing": "none"}
        row = measure_alone(settings, args.time_limit)
        results.append({"batch": args.batch, "budget": budget} | row)
        if "failed" in row:
            rows.append([budget, row["failed"], "-", "-", "-"])
            continue
        speed = 1000 * mean(row["tokens"]) / median(row["step_ms"])
        step_ms = f"{median(row['step_ms']):.1f}"
        rows.append([budget, row["settings"], f"{row['peak_gib']:.2f}", step_ms, f"{speed:,.0f}"])
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(["budget", "plan", "peak GiB", "step ms", "tokens/s"], rows))


if __name__ == "__main__":
    main()
