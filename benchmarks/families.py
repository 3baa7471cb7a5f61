"""Every family at its real size: bytes computed and measured, and the training step, as the table of docs/speed.md.

    python -m benchmarks.families --json families.json                   7 models, 4, 8 and 16 bits, on a GPU
    python -m benchmarks.families --computed                             bytes by formula: no GPU, nothing is written
    python -m benchmarks.families --show families.json more.json         what such files hold, as one table
    python -m benchmarks.families --models phi-3-mini-tiny --bits 4      a try on a CPU

The config.json has the published sizes (shapes.py), the weights are random, in a directory that is gone before the next
model's is written. Bytes of a model that lies ready to train, by formula (fast.plan.Estimate; I columns of a linear):

    linears  4 bits: 1/2 + 1/64 + 4/(64 * 256) a weight     8 bits: 1 + 4/I     16 bits: 2
    biases, embedding and head (one where they are tied) 2 a number, norms 4

Beside them stands what loading left allocated (torch.cuda.memory_allocated). The step is that of train_speed.py
(`ours`: batch 16, LoRA of rank 32 on attention, a recorded CUDA graph), given just the memory to trade nothing for
anything: no weight stays dequantised and no block is run again. Each row is measured in a process of its own. What
fails is a row that says why.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Iterator

import torch

from benchmarks.random_model import tensors_of, write_apart
from benchmarks.shapes import FAMILIES, PUBLISHED, SHAPES
from benchmarks.train_speed import measure_alone, new_report, one_line, settings_of
from benchmarks.workload import GIB, packing
from fast.plan import Estimate, Plan
from llama.families import config_from_dict
from pipeline.models import pick_device, pick_dtype


def computed(settings: dict, dtype: torch.dtype) -> dict:
    """A row by formula: parameters, bytes of the quantised model, peak bytes of the training step"""
    config = config_from_dict(SHAPES[settings["shape"]])
    _, shape = packing(argparse.Namespace(**settings), config.vocab_size)
    options = {"bits": settings["bits"], "rank": settings["rank"], "targets": ",".join(settings["targets"])}
    estimate = Estimate(config, shape.tokens, shape.answers, dtype=dtype, **options)
    return {
        "model": settings["shape"],
        "bits": settings["bits"],
        "parameters": sum(torch.Size(size).numel() for size in tensors_of(config).values()),
        "computed_bytes": round(estimate.stored()),
        "estimated_peak_bytes": int(estimate.total(Plan())) + 1,
    }


def roomy(size: int) -> str:
    """A folder with room for `size` bytes: in memory where there is one, else on disk. Raises OSError."""
    folders = ["/dev/shm", tempfile.gettempdir()]
    for folder in folders:
        if Path(folder).is_dir() and shutil.disk_usage(folder).free > 1.1 * size:
            return folder
    raise OSError(f"no room for {size / GIB:.1f} GiB of weights in {' or '.join(folders)}; set TMPDIR to a larger disk")


def measured(rows: list[dict], settings: list[dict], time_limit: int) -> Iterator[dict]:
    """The rows of one model, each with what its process measured or with `failed`"""
    failed = None
    with ExitStack() as stack:
        try:
            folder = tempfile.TemporaryDirectory(prefix="random-", dir=roomy(2 * rows[0]["parameters"]))
            model = Path(stack.enter_context(folder)) / "model"
            write_apart(rows[0]["model"], model, time_limit)
        except (OSError, subprocess.SubprocessError) as error:
            failed = one_line(f"no weights: {error}")
        for row, asked in zip(rows, settings, strict=True):
            if failed:
                yield row | {"failed": failed}
                continue
            budget = str(row["estimated_peak_bytes"])
            own = {"impl": "ours", "checkpointing": "none", "model": str(model), "memory_budget": budget}
            result = measure_alone(asked | own, time_limit)
            if "failed" not in result:
                result["tokens_per_second"] = 1000 * mean(result["tokens"]) / median(result["step_ms"])
            yield row | result


COLUMNS = [  # heading, key of a row, format, unit
    ("weights, GiB computed", "computed_bytes", ".3f", GIB),
    ("GiB loaded", "loaded_bytes", ".3f", GIB),
    ("training, peak GiB estimated", "estimated_peak_bytes", ".2f", GIB),
    ("peak GiB", "peak_gib", ".2f", 1),
    ("tokens/s", "tokens_per_second", ",.0f", 1),
]


def show(rows: list[dict]) -> str:
    """Markdown: a line for each model, its bits side by side; below, why rows failed."""
    models: dict[str, dict[int, dict]] = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["bits"]] = row  # the last counts, where several files hold it
    rows = [row for of_model in models.values() for row in of_model.values()]
    bits = sorted({row["bits"] for row in rows})
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    header = ["model", "parameters", *(heading for heading, *_ in columns)]
    lines = [f"Numbers side by side: {' / '.join(map(str, bits))} bits.", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, of_model in models.items():
        cells = [PUBLISHED.get(name, name), f"{next(iter(of_model.values()))['parameters']:,}"]
        for _, key, form, unit in columns:
            values = [of_model.get(b, {}).get(key) for b in bits]
            cells.append(" / ".join("-" if value is None else format(value / unit, form) for value in values))
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"{row['model']}, {row['bits']} bits: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join(lines + [""] * bool(failed) + failed)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(FAMILIES)
    parser.add_argument(
        "--models", nargs="+", choices=SHAPES, default=list(FAMILIES), metavar="NAME",
        help=f"(default: {names}; with -tiny behind the name, three small layers of the same kind)",
    )  # fmt: skip
    parser.add_argument("--bits", nargs="+", type=int, choices=[4, 8, 16], default=[4, 8, 16])
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step (default: 16)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: 5)")
    parser.add_argument("--computed", action="store_true", help="formulas alone; measure nothing")
    parser.add_argument("--time-limit", type=int, default=120, help="seconds for one row (default: 120)")
    parser.add_argument("--json", type=Path, help="write everything to this file, after every row")
    parser.add_argument("--show", nargs="+", type=Path, metavar="JSON", help="the table of such files; runs nothing")
    args = parser.parse_args(argv)
    if min(args.batch, args.steps, args.time_limit) < 1:
        parser.error("--batch, --steps and --time-limit must be at least 1")
    return args


def run(args: argparse.Namespace) -> None:
    # What is only computed is for a GPU, whatever computes it.
    dtype = torch.bfloat16 if args.computed else pick_dtype("auto", pick_device("auto"))
    options = {"batch": args.batch, "steps": args.steps, "warmup": 3, "rank": None, "alpha": None, "targets": None}
    report = new_report("benchmarks.families", options | {"dtype": str(dtype).removeprefix("torch.")})
    for name in args.models:
        asked = [argparse.Namespace(**options, shape=name, bits=bits, memory_budget=None) for bits in args.bits]
        settings = [settings_of(one, Path()) for one in asked]
        rows = [computed(one, dtype) for one in settings]
        for row in rows if args.computed else measured(rows, settings, args.time_limit):
            report["machine"]["gpu"] = row.pop("gpu", report["machine"]["gpu"])
            report["rows"].append(row)
            if not args.computed:
                said = row.get("failed") or f"{row['tokens_per_second']:,.0f} tokens/s"
                print(f"---- {name}, {row['bits']} bits: {said}", file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=2) + "\n")
    if not args.computed:
        print(f"{report['machine']['gpu'] or 'no GPU: peak is resident memory'}\n")
    print(show(report["rows"]))


if __name__ == "__main__":
    args = parse_arguments()
    if args.show:
        print(show([row for file in args.show for row in json.loads(file.read_text())["rows"]]))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that directories and processes do not outlive it
        run(args)
