"""Training speed and memory beside the peers: each implementation in a process of its own, then one table.

    python -m benchmarks.train_speed --shape 8b --batch 16 --json speed.json                       ours, PEFT, Unsloth
    python -m benchmarks.train_speed --impl ours unsloth --checkpointing none default --batch 4
    python -m benchmarks.train_speed --compare old.json speed.json

The work is described in workload.py, the peers in peers.py. The model is a directory of random weights, written the
first time (8b: 16 GB in the temporary directory); every implementation reads the same one, so the loss of the first
step has to be the same for all. An implementation that is not installed, fails or takes too long is a row that says so.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import mean, median

import torch

from benchmarks.peers import PEERS
from benchmarks.random_model import directory_of
from benchmarks.shapes import SHAPES
from benchmarks.workload import W8B, WORKLOADS, measure, packing, random_sequences
from pricing.evaluation.console import table

PACKAGES = ("torch", "triton", "bitsandbytes", "transformers", "peft", "unsloth", "unsloth_zoo")


def ours(args: argparse.Namespace, sequences: list[list[list[int]]], readable: bool = False) -> dict:
    """This repository's training step, the very one of train.py; returns what `measure` describes.

    `args` holds model (the directory), memory_budget, bits, rank, alpha, targets (names of linears), supervised (tokens
    at the end of each sequence that carry the loss), shape, batch, steps and warmup. Besides, the row holds
    loaded_bytes: what loading the quantised model left allocated on the GPU (None on a CPU).
    """
    # Here: a peer's process shall not load our kernels.
    from fast import install as fast
    from lora.inject import inject, lora_layers
    from lora.optim import FlatParameter, make_optimiser
    from pipeline.models import load_base, open_base, peak_memory, pick_device, pick_dtype
    from pipeline.steps import make_step
    from pricing.data.batch import batches, pack
    from pricing.distribution.decode import PriceTree
    from pricing.distribution.loss import AnswerLoss
    from train import optimiser_step

    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    config, tokenizer, directory = open_base(str(args.model))
    examples, shape = packing(args, config.vocab_size)
    plan, targets = fast.Plan(), ",".join(args.targets)
    if not readable:
        options = {"bits": args.bits, "dtype": dtype, "rank": args.rank, "targets": targets}
        plan, _ = fast.plan_training(config, shape.tokens, shape.answers, device, args.memory_budget, **options)
    options = argparse.Namespace(bits=args.bits, blocksize=64, double_quant=True, outlier_threshold=6.0)
    before = torch.cuda.memory_allocated()  # 0 without a GPU
    model = load_base(config, directory, device, dtype, options, plan.head8, plan.host_embed)
    loaded = torch.cuda.memory_allocated() - before if device.type == "cuda" else None
    inject(model, rank=args.rank, alpha=args.alpha, targets=targets)
    flat = FlatParameter(lora_layers(model))
    if not readable:
        fast.install(model, plan, flat, shape.tokens)
    loss = AnswerLoss("answer", PriceTree.build(tokenizer.encode_answer), 0.1, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimiser = make_optimiser(plan.optimiser, flat.parameter, 1e-4, 0.0)
    compute = partial(optimiser_step, model, loss, flat, optimiser, 1e9)
    take_step = make_step(compute, loss, flat, optimiser, shape, 1, not readable and fast.can_record(model))
    recorded = peak_memory(device)  # a replay allocates nothing: what it uses was counted when it was recorded
    stream = batches(examples, shape, seed=0)
    packed = [pack(next(stream), shape) for _ in sequences]
    read = [[e.prompt + e.answer[:-1] for e in batch.examples] for batch in packed]

    def step(number: int) -> torch.Tensor:
        return torch.tensor(take_step([packed[number]], 1e-4)()[0])

    kept = {k: v for k, v in vars(plan).items() if v not in (0, False, "adamw")}
    row = measure(args, read, step, f"{shape.tokens} tokens, {'readable' if readable else kept or 'graph'}")
    return row | {"peak_gib": max(row["peak_gib"], recorded), "loaded_bytes": loaded}


def ours_readable(args: argparse.Namespace, sequences: list[list[list[int]]]) -> dict:
    """The plain path of quant/linear.py, for comparison"""
    return ours(args, sequences, readable=True)


IMPLEMENTATIONS = {"ours": ours, "ours-readable": ours_readable} | PEERS


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, default=["ours", "peft", "unsloth"])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step")
    parser.add_argument(
        "--checkpointing",
        nargs="+",
        choices=["none", "default"],
        default=["default"],
        help="none: all activations are kept; default: what each implementation does by itself; a row for each",
    )
    parser.add_argument("--memory-budget", help="of ours, as for train.py (default: what is free)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    bits = "4: NF4, double quantisation; 8: LLM.int8(); 16: bf16"
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8, 16], help=bits)
    parser.add_argument("--rank", type=int, help="of LoRA (default: 32; smollm2: 16)")
    parser.add_argument("--alpha", type=float, help="of LoRA (default: 64; smollm2: 32)")
    parser.add_argument("--targets", help="as for train.py (default: attention; smollm2: all-linear)")
    parser.add_argument("--model", type=Path, help="directory (default: random weights of the shape, kept for later)")
    parser.add_argument("--time-limit", type=int, default=300, help="seconds for one implementation")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="compare two such files; runs nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # a row's settings as JSON, from `measure_alone`
    args = parser.parse_args(argv)
    if min(args.batch, args.steps, args.time_limit) < 1 or args.warmup < 0:
        parser.error("--batch, --steps and --time-limit must be at least 1, --warmup at least 0")
    return args


def work(settings: dict) -> None:
    """In the process of one implementation: run it, write its row (or why there is none) to `settings["result"]`."""
    args = argparse.Namespace(**settings)
    try:
        vocabulary = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
        sequences = random_sequences(WORKLOADS.get(args.shape, W8B), vocabulary, args.warmup + args.steps, args.batch)
        row = IMPLEMENTATIONS[args.impl](args, sequences)
        row["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    except Exception as error:
        traceback.print_exc()
        row = {"failed": one_line(f"{type(error).__name__}: {error}")}
    Path(args.result).write_text(json.dumps(row))


def measure_alone(settings: dict, time_limit: int) -> dict:
    """A row, measured in a new process, whose output goes to stderr; with `failed` where it came to nothing."""
    with tempfile.TemporaryDirectory() as directory:
        settings = settings | {"result": str(Path(directory) / "row.json"), "started": time.time()}
        command = [sys.executable, "-m", "benchmarks.train_speed", "--worker", json.dumps(settings)]
        # A group of its own: compilers start processes too, and none may outlive the row.
        process = subprocess.Popen(command, stdout=sys.stderr, process_group=0)
        try:
            code = process.wait(time_limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {time_limit} s"}
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # all of them ended by themselves
                pass
            process.wait()
        if not Path(settings["result"]).is_file():
            return {"failed": f"the process ended with code {code}"}
        return json.loads(Path(settings["result"]).read_text())


def settings_of(args: argparse.Namespace, model: Path) -> dict:
    """What all implementations are told."""
    from lora.inject import target_names  # here for the same reason as in `ours`

    workload = WORKLOADS.get(args.shape, W8B)
    return {
        "shape": args.shape,
        "model": str(model),
        "batch": args.batch,
        "memory_budget": args.memory_budget,
        "steps": args.steps,
        "warmup": args.warmup,
        "bits": args.bits,
        "rank": args.rank or workload.rank,
        "alpha": args.alpha or workload.alpha,
        "targets": target_names(args.targets or workload.targets),
        "supervised": workload.supervised,
    }


def new_report(module: str, settings: dict) -> dict:
    """What a JSON file says before its rows"""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "machine": {
            "gpu": None,
            "cpu_cores": os.cpu_count(),
            "platform": platform.platform(),
            "python": platform.python_version(),
        },
        # torch says its CUDA too, which the package's metadata leave out
        "versions": {name: installed(name) for name in PACKAGES} | {"torch": torch.__version__},
        "settings": settings,
        "rows": [],
    }


def run(args: argparse.Namespace) -> None:
    model = args.model or directory_of(args.shape)
    if not (model / "config.json").is_file():
        raise SystemExit(f"error: {model} is no complete model directory; remove it, or name another with --model")
    settings = settings_of(args, model)
    report = new_report("benchmarks.train_speed", settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `measure_alone` can clean up
    for impl, checkpointing in product(args.impl, args.checkpointing):
        print(f"---- {impl}, checkpointing {checkpointing}", file=sys.stderr, flush=True)
        row = {"impl": impl, "checkpointing": checkpointing}
        row |= measure_alone(settings | row, args.time_limit)
        if "failed" not in row:
            row["step_ms_median"] = median(row["step_ms"])
            row["tokens_per_second"] = 1000 * mean(row["tokens"]) / row["step_ms_median"]
            report["machine"]["gpu"] = row.pop("gpu")
        report["rows"].append(row)
        if args.json:  # after every row: what is measured stays, should a later one be cut off
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(show(report))


def show(report: dict) -> str:
    """What was run, and the table: in the last columns, tokens/s as a multiple of each peer's."""
    settings, machine = report["settings"], report["machine"]
    peers = [row for row in report["rows"] if not row["impl"].startswith("ours") and "failed" not in row]
    several = len({row["checkpointing"] for row in report["rows"]}) > 1
    header = ["implementation, settings", "step ms", "tokens/s", "peak GiB", "to first step s", "first loss"]
    header += [f"/ {row['impl']}" + f" {row['checkpointing']}" * several for row in peers]
    cells = []
    for row in report["rows"]:
        if "failed" in row:
            cells.append([f"{row['impl']:<15}failed: {row['failed']}"] + ["-"] * (len(header) - 1))
            continue
        cells.append([
            f"{row['impl']:<15}{row['settings']}", f"{row['step_ms_median']:,.1f}", f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_gib']:.2f}", f"{row['first_step_s']:.1f}", f"{row['losses'][0]:.4f}",
            *(f"{row['tokens_per_second'] / peer['tokens_per_second']:.2f}" for peer in peers),
        ])  # fmt: skip
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    return "\n".join([
        f"shape {settings['shape']}, batch {settings['batch']}, {settings['bits']} bits, LoRA rank {settings['rank']} "
        f"alpha {settings['alpha']:g} on {','.join(settings['targets'])}; median of {settings['steps']} steps",
        f"{machine['gpu'] or 'no GPU: peak is resident memory'}; Python {machine['python']}, {versions}",
        table(header, cells),
    ])  # fmt: skip


def compare(old_file: Path, new_file: Path) -> None:
    """The rows that two runs share, old, new and new over old; before them, whatever else differs between the runs."""
    old, new = (json.loads(file.read_text()) for file in (old_file, new_file))
    for part in ("machine", "versions", "settings"):
        for key in sorted((old[part] | new[part]).keys() - {"model"}):
            if old[part].get(key) != new[part].get(key):
                print(f"not the same {part}: {key} {old[part].get(key)}, now {new[part].get(key)}")
    before = {(row["impl"], row["checkpointing"]): row for row in old["rows"] if "failed" not in row}
    header = ["implementation, checkpointing"]
    header += [f"{name}{which}" for name in ("tokens/s", "GiB", "first step s") for which in (" old", " new", " ratio")]
    cells = []
    for row in new["rows"]:
        past = before.get((row["impl"], row["checkpointing"]))
        if past and "failed" not in row:
            cells.append([f"{row['impl']}, {row['checkpointing']}"])
            for key, digits in (("tokens_per_second", 0), ("peak_gib", 2), ("first_step_s", 1)):
                cells[-1] += [f"{past[key]:,.{digits}f}", f"{row[key]:,.{digits}f}", f"{row[key] / past[key]:.2f}"]
    print(table(header, cells) if cells else "no row is in both")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def one_line(text: str, most: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


if __name__ == "__main__":
    args = parse_arguments()
    if args.worker:
        work(json.loads(args.worker))
    elif args.compare:
        compare(*args.compare)
    else:
        run(args)
