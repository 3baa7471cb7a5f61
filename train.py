"""Fine-tune a Llama in 4, 8 or 16 bits to tell a product's price from its text: QLoRA in one plain loop.

    python train.py --bits 4                                                 SmolLM2-135M on the built-in catalogue
    python train.py --bits 4 --data pc-parts                                                   real products
    python train.py --bits 4 --model meta-llama/Llama-3.1-8B --data items.jsonl --lr 1e-4      your own, on a GPU

Read it downward: options, data, model, LoRA, batches, loop, checkpoint.
"""

import argparse
import gc
import json
import math
import platform
import sys
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine import Step
from forecast import MOST_HELD, Forecast, adapter_digest, encode_run, forecast, last_states, write_held
from lora.adapter import load_adapter, save_adapter
from lora.checkpoint import check_writable, load_state, save_state, write_directory
from lora.inject import inject, lora_layers
from lora.optim import OPTIMISERS, FlatFactors, make_optimiser
from memory import Estimate, Plan, choose, free_memory, parse_bytes
from pricer import (
    add_model_arguments,
    check_same_data,
    load_base,
    memory_report,
    open_base,
    peak_memory,
    pick_device,
    pick_dtype,
    published_name,
    read_run,
    run_main,
    speed_up,
)
from pricing.batch import batches, count_batches, pack, shape_of
from pricing.console import show_example
from pricing.decode import PriceTree
from pricing.head import JointLoss, joint_head, joint_numbers, load_head, save_head
from pricing.items import Item, sample
from pricing.loss import CRPS_SCALES, LOSSES, AnswerLoss
from pricing.neighbours import INDEX, build, with_neighbours
from pricing.prompt import encode_items, load_prompt
from pricing.sources import load_items
from quant.linear import BITS

COMPLETE = "state/complete"  # a file in a checkpoint whose run has come to its end: nothing is left to resume
SIZED = 64  # prompts at most whose states say how large what the head reads is


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="smollm2", help="smollm2, gemma3-270m, a directory, a .gguf file or a hub id")
    group.add_argument("--bits", type=int, default=4, choices=BITS, help="4: NF4; 8: LLM.int8(); 16: not quantised")
    group.add_argument(
        "--blocksize", type=int, default=64, choices=[64, 128, 256, 512], help="weights that share one absmax"
    )
    group.add_argument(
        "--double-quant", action=argparse.BooleanOptionalAction, default=True, help="absmax in 8 bits too"
    )
    group.add_argument(
        "--outlier-threshold",
        type=float,
        default=6.0,
        help="8 bits: columns of a layer's input with a value this large stay in the compute dtype; 0 for none",
    )
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, default=16, help="width of the trained product")
    group.add_argument("--alpha", type=float, default=32.0, help="scaling is alpha / rank")
    group.add_argument("--dropout", type=float, default=0.0, help="share of the LoRA branch's inputs set to 0")
    group.add_argument("--rslora", action="store_true", help="scaling is alpha / sqrt(rank)")
    group.add_argument("--targets", default="all-linear", help="all-linear, attention, or names joined by commas")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default="catalogue", help="catalogue, pc-parts, a .jsonl/.csv/.parquet file or a hub data set"
    )
    group.add_argument("--size", type=int, default=3600, help="items the catalogue makes, all splits together")
    group.add_argument("--data-seed", type=int, default=0, help="the catalogue's seed")
    group.add_argument("--train-items", type=int, default=None, help="learn from a fixed sample of so many")
    group.add_argument("--prompt", default="first", help="first, second, compact, or a text file with {text} in it")
    group.add_argument("--max-tokens", type=int, default=176, help="tokens of the prompt; longer texts are cut")
    group.add_argument(
        "--neighbours", type=int, default=0, metavar="K",
        help="name the prices of the K most similar training items in the prompt",
    )  # fmt: skip
    group.add_argument("--strict", action="store_true", help="a bad row is an error instead of a count")
    group = parser.add_argument_group("training")
    group.add_argument(
        "--loss",
        default="answer",
        choices=LOSSES,
        help="answer: plain cross-entropy; price: without the .00; crps: price and the CRPS of its distribution; "
        "soft: near prices count as nearly right",
    )
    group.add_argument(
        "--soft-width",
        type=float,
        default=0.1,
        help="relative width of the soft loss's neighbourhood of the true price",
    )
    group.add_argument(
        "--crps-weight",
        type=float,
        default=1.0,
        help="nats for each unit of an item's CRPS (see --crps-scale; in dollars it is some 100 times larger)",
    )
    group.add_argument(
        "--crps-scale", default="log", choices=CRPS_SCALES, help="unit of the CRPS: ln price, or dollars"
    )
    group.add_argument(
        "--head", default="quantile", choices=["none", "quantile"],
        help="quantile: train a small network with the adapter that reads price quantiles off the last token's state",
    )  # fmt: skip
    group.add_argument(
        "--head-weight", type=float, default=50.0,
        help="nats for each unit of an item's pinball loss, in standard deviations of log price",
    )  # fmt: skip
    group.add_argument(
        "--members", type=int, default=1, help="train so many adapters, from one seed after the other; averaged"
    )
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the training items")
    group.add_argument("--max-steps", type=int, default=None, help="stop after this many optimiser steps")
    group.add_argument(
        "--max-minutes", type=float, default=None, help="stop (each member) after so many minutes"
    )
    group.add_argument(
        "--batch-tokens", type=int, default=1152, help="tokens in a forward pass: whole items packed, no padding"
    )
    group.add_argument("--accumulate", type=int, default=1, help="forward passes in an optimiser step")
    group.add_argument("--optimiser", default="adamw", choices=OPTIMISERS, help="sgd has momentum 0.9")
    group.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (8B models: 1e-4)")
    group.add_argument(
        "--schedule", default="cosine", choices=["cosine", "linear", "constant"], help="after the warm-up, to 0"
    )
    group.add_argument("--warmup", type=float, default=0.03, help="share of the steps over which the rate rises from 0")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of the LoRA factors and the head")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--seed", type=int, default=0, help="of LoRA's and the head's start and the order of items")
    group = parser.add_argument_group("reporting")
    group.add_argument("--val-items", type=int, default=48, help="validation items priced at each check; 0 for none")
    group.add_argument(
        "--val-every", "--eval-every", type=int, default=None, help="steps between checks (default: half of the run)"
    )
    group.add_argument(
        "--patience", type=int, default=None, help="stop after so many checks without a better validation error"
    )
    group.add_argument(
        "--keep", default="last", choices=["last", "best"], help="the weights that --out holds at the end"
    )
    group.add_argument("--log-every", type=int, default=1, help="steps between lines of metrics.jsonl")
    group.add_argument(
        "--save-every", type=int, default=None, help="steps between checkpoints (default: only at the end)"
    )
    group.add_argument("--out", default="out", help="checkpoint directory; an earlier run in it is replaced")
    group.add_argument("--resume", action="store_true", help="go on from --out, with the options it was started with")
    add_model_arguments(parser)
    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--memory-budget", default=None, metavar="6GiB", help="most that training may allocate (default: what is free)"
    )
    group.add_argument(
        "--graph", default="auto", choices=["auto", "off"], help="record a step once and replay it, on a GPU"
    )
    group.add_argument(
        "--readable", action="store_true", help="the plain path of quant/linear.py: no kernels, groups or graph"
    )
    args = parser.parse_args(argv)
    least_values = dict(size=1, max_tokens=1, batch_tokens=1, accumulate=1, log_every=1, val_items=0, warmup=0)
    least_values |= dict(members=1, neighbours=0)
    for name, least in least_values.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not 0 <= args.outlier_threshold < math.inf:
        parser.error(f"--outlier-threshold must be 0 (none) or greater, got {args.outlier_threshold}")
    if args.val_items == 0 and (args.keep == "best" or args.patience):
        parser.error("--keep best and --patience go by validation items; --val-items 0 leaves none")
    if args.memory_budget and (args.readable or args.dropout):
        parser.error("--memory-budget plans the fast path; leave out --readable and --dropout")
    given = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")}
    if args.resume and (others := given - {"--resume", "--out", "--device"}):
        parser.error(f"--resume goes on with the options of the first start; leave out {', '.join(sorted(others))}")
    above_zero = ("epochs", "lr", "clip", "soft_width", "crps_weight", "head_weight", "max_minutes", "max_steps")
    for name in (*above_zero, "val_every", "save_every", "patience", "train_items"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, got {value}")
    return args


def learning_rate(progress: float, peak: float, schedule: str, warmup: float) -> float:
    """The rate at `progress` (0 to 1 of the run): linear warm-up, then cosine, linear or constant."""
    if progress < warmup:
        return peak * progress / warmup
    rest = min((progress - warmup) / max(1 - warmup, 1e-9), 1.0)
    return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * rest)), "linear": 1 - rest, "constant": 1.0}[schedule]


def main() -> None:
    """Train every member; the first is the checkpoint --out itself, the others lie in its members/."""
    args = parse_arguments()
    # A run from before an option had it off.
    options = vars(args) | ({"head": "none"} | read_run(args.out)["options"] if args.resume else {})
    for number in range(options["members"]):
        out = Path(args.out, "members", str(number)) if number else Path(args.out)
        chosen = options | {"out": str(out), "device": args.device, "resume": args.resume and out.is_dir()}
        chosen |= {"seed": options["seed"] + number, "members": 1 if number else options["members"]}
        if options["members"] > 1:
            print(f"member     {number + 1} of {options['members']}")
        train(argparse.Namespace(**chosen))
        gc.collect()  # what one member held, the plan of the next may use
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    print(f"now run    python evaluate.py --ckpt {args.out}/")


def train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    device = pick_device(args.device)
    if args.resume:
        run = read_run(out)
        if (out / COMPLETE).is_file():
            return print(f"trained    {run['steps']:,} steps: {out}/ is complete")
    elif out.exists() and not (out / "run.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is no earlier run of train.py; choose another name")
    check_writable(out)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)

    # ---- data ------------------------------------------------------------------------------------------------------
    items, skipped, identity = load_items(args.data, args.size, args.data_seed, args.strict)
    train_items = sample([item for item in items if item.split == "train"], args.train_items)
    all_val_items = [item for item in items if item.split == "val"]
    val_items = sample(all_val_items, args.val_items)
    prompt = run["prompt"] if args.resume else load_prompt(args.prompt)
    if args.resume:
        check_same_data(run, identity)
    if not train_items:
        raise ValueError(f"{args.data}: none of the {len(items)} items is in the train split")
    print(
        f"data       {args.data}: {len(items):,} items, {len(train_items):,} to train on"
        + (f"; left out: {skipped}" if skipped.counts else "")
    )

    # ---- tokens and batches ----------------------------------------------------------------------------------------
    config, tokenizer, directory = open_base(args.model)
    index = build(train_items) if args.neighbours else None
    templates = with_neighbours(train_items, prompt, index, args.neighbours)
    examples = encode_items(train_items, tokenizer, args.max_tokens, templates)
    tree = PriceTree.build(tokenizer.encode_answer)
    loss = AnswerLoss(
        args.loss, tree, args.soft_width, device, crps_weight=args.crps_weight, crps_scale=args.crps_scale
    )
    shape = shape_of(examples, args.batch_tokens)

    # ---- model: each linear is quantised as it is read, then freeze and inject -------------------------------------
    started = time.perf_counter()
    graph = device.type == "cuda" and args.graph == "auto"
    if args.readable or args.dropout:
        trades, reasons = Plan(optimiser=args.optimiser), []
    else:
        estimate = Estimate(
            config, shape, bits=args.bits, dtype=dtype, rank=args.rank, targets=args.targets,
            blocksize=args.blocksize, double_quant=args.double_quant,
            head_numbers=joint_numbers(config.hidden_size) if args.head == "quantile" else 0,
        )  # fmt: skip
        budget = parse_bytes(args.memory_budget) if args.memory_budget else free_memory(device)
        trades, reasons = choose(estimate, budget, args.optimiser, gpu=device.type == "cuda")
    model = load_base(config, tokenizer, directory, device, dtype, args, trades)
    if args.resume:
        load_adapter(model, out)
    else:
        inject(model, rank=args.rank, alpha=args.alpha, dropout=args.dropout, rslora=args.rslora, targets=args.targets)
    model.train()
    head = None
    if args.head == "quantile":
        if args.resume:
            head = load_head(out).to(device).requires_grad_(True)
        else:
            settings = {"states": "tuned", "blocks": [len(model.layers)], "mean": False, "joint": True}
            # Some prompts tell how large what it reads is; the last norm's weights do not (Gemma's 54, the states 3.5).
            states = last_states(model, [e.prompt for e in examples[:: len(examples) // SIZED + 1]], args.batch_tokens)
            prices = np.array([item.price for item in train_items])
            head = joint_head(prices, config.hidden_size, float(np.sqrt(np.square(states).mean())), settings, device)
        if not head.settings.get("joint"):
            raise ValueError(f"{out}: its head was trained after the run, which cannot go on with it")
        loss = JointLoss(loss, head, args.head_weight, shape.items)
    factors = FlatFactors(lora_layers(model), list(head.parameters()) if head else [])
    optimiser = make_optimiser(trades.optimiser, factors.parameter, args.lr, args.weight_decay)
    groups = [] if args.readable or args.dropout else speed_up(model, trades, shape)
    loaded = f"loaded in {time.perf_counter() - started:.1f} s, peak {peak_memory(device):.2f} GiB"

    # ---- steps -----------------------------------------------------------------------------------------------------
    forward_passes = count_batches(examples, shape, args.seed, args.epochs)
    total_steps = min(math.ceil(forward_passes / args.accumulate), args.max_steps or 10**12)
    val_every = args.val_every or max(1, total_steps // 2)
    progress = {"step": 0, "seconds": 0.0, "tokens": 0}
    metrics = []
    if args.resume:
        progress = load_state(out / "state", factors, optimiser)
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # batches() never ends: cut to what this run still has to do.
    step, done = progress["step"], progress["step"] * args.accumulate
    stream = islice(batches(examples, shape, args.seed, start=done), max(0, forward_passes - done))
    train_step = Step(
        model, loss, factors, optimiser, groups, shape, accumulate=args.accumulate, clip=args.clip,
        graph=graph and bool(groups),
    )  # fmt: skip

    # ---- the truth, before anything is trained ---------------------------------------------------------------------
    lengths = [len(e.prompt) + len(e.answer) for e in examples]
    print(
        f"model      {args.model} ({directory}) on {device}, {args.bits} bits, "
        f"computing in {str(dtype).removeprefix('torch.')}; {loaded}"
    )
    print(memory_report(model, head))
    for reason in reasons:
        print(f"memory     {reason}")
    print(
        f"tokens     {sum(lengths):,} an epoch, {np.mean(lengths):.0f} an item, "
        f"of which {np.mean([loss.learnt(e) for e in examples]):.1f} carry the loss"
    )
    if cut := sum(e.cut for e in examples):
        print(f"           {cut:,} texts are longer than --max-tokens {args.max_tokens} and were cut")
    print(
        f"steps      {total_steps:,} of {args.batch_tokens * args.accumulate:,} tokens, "
        f"{'one recorded CUDA graph each' if train_step.replay else 'run line by line'}; "
        "first item, what is learnt in colour:"
    )
    first = next(batches(examples, shape, args.seed))[0]
    print(show_example(first, tokenizer, loss.learnt(first)), flush=True)

    def save() -> None:
        """A whole checkpoint directory, under its name only when complete."""
        held = sample(all_val_items, MOST_HELD) if val_items else []  # for price ranges that hold what they promise
        error, found, truth = validate(held) if held else (None, None, None)
        record = {
            "options": {k: v for k, v in vars(args).items() if k != "resume"},
            "base_model": {"name": args.model, "directory": directory.name},
            "data": identity | {"train": len(train_items)},
            "prompt": prompt,
            "validation": {"items": len(held), "mae_dollars": error},
            "split": "by `split` column, else by hash of the title: 85 % train, 5 % val, 10 % test",
            "versions": {name: version(name) for name in ("torch", "bitsandbytes", "safetensors", "tiktoken")}
            | {"python": platform.python_version()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "compute_dtype": str(dtype).removeprefix("torch."),
            "steps": step,
            "seconds": round(progress["seconds"], 1),
            "tokens": progress["tokens"],
            "peak_memory_gib": round(peak_memory(device), 3),
        }
        with write_directory(out) as part:
            save_adapter(model, part, base_model=published_name(args.model))
            if head:
                head.settings["adapter"] = adapter_digest(part)
                save_head(head, part)
            if index:
                index.save(part / INDEX)
            if held:
                heads = {} if head is None else {"head": found.head}
                write_held(part, {"price": truth, "digits": found.digits} | heads)
            save_state(part / "state", factors, optimiser, progress)
            (part / "run.json").write_text(json.dumps(record, indent=2) + "\n")
            (part / "metrics.jsonl").write_text("".join(json.dumps(m, allow_nan=False) + "\n" for m in metrics))

    def validate(items: list[Item]) -> tuple[float, Forecast, np.ndarray]:
        """Dollars of mean absolute error on `items`, what is thought of them, and their prices"""
        prompts = encode_run(items, tokenizer, vars(args), prompt, index)
        truth = np.array([item.price for item in items])
        model.eval()
        found = forecast(model, tree, prompts, head, batch_tokens=args.batch_tokens)
        model.train()
        return float(np.abs(found.median() - truth).mean()), found, truth

    def report(number: int, rate: float, real_tokens: int, outcome) -> None:
        """Read what a step gave (waiting for it), and write it down"""
        nonlocal bad_steps
        loss_value, norm, seconds = outcome.read()
        speed = real_tokens / seconds
        progress.update(step=number, seconds=time.perf_counter() - began, tokens=progress["tokens"] + real_tokens)
        finite = math.isfinite(loss_value) and math.isfinite(norm)
        bad_steps = 0 if finite else bad_steps + 1
        if not finite:  # the step has left the weights as they were
            tqdm.write(f"step {number}: loss {loss_value}, gradient {norm}: not finite, left out", file=sys.stderr)
            if bad_steps == 10:
                raise ValueError("ten steps in a row without a finite loss: lower --lr, or check the data")
        if number % args.log_every == 0 or number == total_steps:
            metrics.append({
                "step": number, "loss": round(loss_value, 5) if finite else None, "lr": rate,
                "grad_norm": round(norm, 4) if finite else None, "tokens": real_tokens,
                "tokens_per_second": round(speed, 1), "peak_memory_gib": round(peak_memory(device), 3),
            })  # fmt: skip
        bar.set_postfix_str(
            f"loss {loss_value:.3f}{dollars}, {speed:,.0f} tokens/s, {peak_memory(device):.2f} GiB", refresh=False
        )
        bar.update()

    # ---- loop: a step is queued before the one ahead of it is read, so that the GPU never waits --------------------
    bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)
    began = time.perf_counter() - progress["seconds"]
    dollars, bad_steps, saved_at, queued = "", 0, step if args.resume else None, None
    checks = [(m["val_mae_dollars"], m["step"]) for m in metrics if "val_mae_dollars" in m]
    while True:
        share = (step + 0.5) / total_steps  # of the run; the middle of the step, so that no rate is 0
        if args.max_minutes:
            share = max(share, (time.perf_counter() - began) / (60 * args.max_minutes))
        window = [] if share >= 1 else [pack(chosen, shape) for chosen in islice(stream, args.accumulate)]
        earlier, queued = queued, None
        if window:
            step += 1
            rate = learning_rate(share, args.lr, args.schedule, args.warmup)
            queued = step, rate, sum(batch.real_tokens for batch in window), train_step(window, rate)
        if earlier:
            report(*earlier)
        if not queued:
            break

        checking = bool(val_items) and step % val_every == 0 and step < total_steps
        saving = bool(args.save_every) and step % args.save_every == 0 and step < total_steps
        if checking or saving:  # both look at the weights that the queued step is about to leave
            report(*queued)
            queued = None
        if checking:
            error, *_ = validate(val_items)
            dollars = f", off by ${error:.2f} on {len(val_items)} validation items"
            metrics.append({"step": step, "val_mae_dollars": error})
            checks.append((error, step))
            saving |= args.keep == "best" and min(checks)[1] == step
            if args.patience and len(checks) - 1 - checks.index(min(checks)) >= args.patience:
                print(f"\nstopped    no better validation error in {args.patience} checks")
                break
        if saving and (args.keep == "last" or (checks and min(checks)[1] == step)):
            save()
            saved_at = step
    bar.close()

    if saved_at != step:  # a resumed run that was complete already has nothing to add
        better = True
        if val_items:
            error, *_ = validate(val_items)
            metrics.append({"step": step, "val_mae_dollars": error})
            better = args.keep == "last" or not checks or error < min(checks)[0]
            print(f"validation off by ${error:.2f} on {len(val_items)} items")
        if better:
            progress["seconds"] = time.perf_counter() - began
            save()
        else:
            error, best = min(checks)
            print(f"kept       step {best}, off by ${error:.2f}: the best of {len(checks) + 1} checks")
    (out / COMPLETE).touch()
    overall = (
        f"{progress['seconds']:,.0f} s, {progress['tokens'] / max(progress['seconds'], 1e-9):,.0f} tokens/s over all"
    )
    print(f"trained    {step:,} steps in {overall}; checkpoint in {out}/")


if __name__ == "__main__":
    run_main(main)
