"""Fine-tune a Llama in 4, 8 or 16 bits to tell a product's price from its text: QLoRA in one plain loop.

    python train.py --bits 4                                                 SmolLM2-135M on the built-in catalogue
    python train.py --bits 4 --data pc-parts                                                   real products
    python train.py --bits 4 --model meta-llama/Llama-3.1-8B --data items.jsonl --lr 1e-4      your own, on a GPU

Read it downward: data, batches, model, LoRA, loop, checkpoint. Its options are in options.py.
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

from common.cli import run_main
from common.files import check_writable, write_directory
from fast.graph import Step
from fast.plan import Plan, plan_for
from llama.model import Llama
from lora.adapter import load_adapter, save_adapter
from lora.inject import inject, lora_layers
from lora.optim import FlatFactors, make_optimiser
from pipeline.checkpoint import load_state, save_state
from pipeline.models import (
    check_same_data,
    load_base,
    memory_report,
    open_base,
    peak_memory,
    pick_device,
    pick_dtype,
    published_name,
    read_run,
    speed_up,
)
from pipeline.options import training_options
from pipeline.predictor import COMPLETE, MOST_HELD, Forecast, encode_run, forecast, write_held
from pipeline.states import adapter_digest, last_states
from pricing.data.batch import batches, count_batches, pack, shape_of
from pricing.data.items import Item, sample, unseen
from pricing.data.neighbours import INDEX, build, with_neighbours
from pricing.data.prompt import Example, encode_items, load_prompt
from pricing.data.sources import load_items
from pricing.distribution.decode import PriceTree
from pricing.distribution.loss import AnswerLoss
from pricing.distribution.quantile_head import Head, JointLoss, joint_head, joint_numbers, load_head, save_head
from pricing.evaluation.console import show_example

SIZED = 64  # prompts at most whose states say how large what the head reads is


def peak_rate(hidden_size: int) -> float:
    """The default of --lr: the wider a model, the smaller its steps. SmolLM2-135M (576) learns well at 2e-3, where
    Gemma 3 270M (640) ends half as far off again as at 5e-4, and Qwen2.5-Coder 1.5B (1536) is better at 5e-4 than at
    1e-4 (benchmarks/README.md); 8B models are tuned with 1e-4."""
    return 2e-3 if hidden_size <= 576 else 5e-4 if hidden_size < 2048 else 1e-4


def learning_rate(progress: float, peak: float, schedule: str, warmup: float) -> float:
    """The rate at `progress` (0 to 1 of the run): linear warm-up, then cosine, linear or constant."""
    if progress < warmup:
        return peak * progress / warmup
    rest = min((progress - warmup) / max(1 - warmup, 1e-9), 1.0)
    return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * rest)), "linear": 1 - rest, "constant": 1.0}[schedule]


def new_head(model: Llama, examples: list[Example], batch_tokens: int) -> Head:
    """A price head for the last token's state, to be trained with the adapter. Some prompts' states tell how large what
    it reads is; the last norm's weights do not (in Gemma they are 54, the states 3.5)."""
    settings = {"states": "tuned", "blocks": [len(model.layers)], "mean": False, "joint": True}
    states = last_states(model, [e.prompt for e in examples[:: len(examples) // SIZED + 1]], batch_tokens)
    size, prices = float(np.sqrt(np.square(states).mean())), np.array([e.price for e in examples])
    return joint_head(prices, model.config.hidden_size, size, settings, model.device)


def main() -> None:
    """Train every member; the first is the checkpoint --out itself, the others lie in its members/."""
    args = training_options()
    options = vars(args) | (read_run(args.out)["options"] if args.resume else {})
    for number in range(options["members"]):
        out = Path(args.out, "members", str(number)) if number else Path(args.out)
        chosen = options | {"out": str(out), "device": args.device, "resume": args.resume and out.is_dir()}
        chosen |= {"seed": options["seed"] + number, "members": 1 if number else options["members"]}
        if options["members"] > 1:
            print(f"member     {number + 1} of {options['members']}")
        earlier = read_run(args.out) if number or chosen["resume"] else {}  # of the same run: some things are settled
        train(argparse.Namespace(**chosen), earlier.get("plan"))
        gc.collect()  # what one member held, the plan of the next may use
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    print(f"now run    python evaluate.py --ckpt {args.out}/")


def train(args: argparse.Namespace, settled: dict | None = None) -> None:
    """One member. `settled`: the part of an earlier plan of the same run that decides the numbers (Plan.settled)"""
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
    all_val_items = unseen([item for item in items if item.split == "val"], train_items)
    val_items = sample(all_val_items, args.val_items)
    prompt = run["prompt"] if args.resume else load_prompt(args.prompt)
    if args.resume:
        check_same_data(run, identity)
    if not train_items:
        raise ValueError(f"{args.data}: none of the {len(items)} items is in the train split")
    if not val_items and (args.keep == "best" or args.patience):
        raise ValueError(f"{args.data}: no new item is in the val split, by which --keep best and --patience go")
    if not any(item.split == "test" for item in items):
        print(f"data       {args.data}: no item is in the test split; evaluate.py will have nothing to price")
    print(
        f"data       {args.data}: {len(items):,} items, {len(train_items):,} to train on"
        + (f"; left out: {skipped}" if skipped.counts else "")
    )

    # ---- tokens and batches ----------------------------------------------------------------------------------------
    config, tokenizer, directory = open_base(args.model)
    args.lr = args.lr or peak_rate(config.hidden_size)
    index = build(train_items) if args.neighbours else None
    templates = with_neighbours(train_items, prompt, index, args.neighbours)
    examples = encode_items(train_items, tokenizer, args.max_tokens, templates)
    tree = PriceTree.build(tokenizer.encode_answer)
    loss = AnswerLoss(
        args.loss, tree, args.soft_width, device, crps_weight=args.crps_weight, crps_scale=args.crps_scale
    )
    shape = shape_of(examples, args.batch_tokens)
    if shape.longest > (known := config.max_position_embeddings):
        raise ValueError(f"{args.model} knows {known:,} positions, an item has {shape.longest:,}; lower --max-tokens")

    # ---- model: each linear is quantised as it is read, then freeze and inject -------------------------------------
    started = time.perf_counter()
    fast = not (args.readable or args.dropout)
    plan, reasons = Plan(**settled or {"optimiser": args.optimiser}), []
    if fast:
        plan, reasons = plan_for(
            config, shape, device, args.memory_budget, args.optimiser, settled, bits=args.bits, dtype=dtype,
            rank=args.rank, targets=args.targets, blocksize=args.blocksize, double_quant=args.double_quant,
            head_numbers=joint_numbers(config.hidden_size) if args.head == "quantile" else 0,
        )  # fmt: skip
    model = load_base(config, tokenizer, directory, device, dtype, args, plan)
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
            head = new_head(model, examples, args.batch_tokens)
        if not head.settings.get("joint"):
            raise ValueError(f"{out}: its head was trained after the run, which cannot go on with it")
        loss = JointLoss(loss, head, args.head_weight, shape.items)
    factors = FlatFactors(lora_layers(model), list(head.parameters()) if head else [])
    optimiser = make_optimiser(plan.optimiser, factors.parameter, args.lr, args.weight_decay)
    groups = speed_up(model, plan, shape) if fast else []
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
        graph=bool(groups) and device.type == "cuda" and args.graph == "auto",
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
        f"steps      {total_steps:,} of {args.batch_tokens * args.accumulate:,} tokens at a peak rate of {args.lr:g}, "
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
            "plan": plan.settled,
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
        prompts = [e.prompt for e in encode_run(items, tokenizer, vars(args), prompt, index)]
        truth = np.array([item.price for item in items])
        model.eval()
        found = forecast(model, tree, prompts, head, batch_tokens=args.batch_tokens)
        model.train()
        return float(np.abs(found.median() - truth).mean()), found, truth

    def check() -> bool:
        """Price the validation items with the weights of now, and note it. Are they the best so far?"""
        error, *_ = validate(val_items)
        metrics.append({"step": step, "val_mae_dollars": error})
        checks.append((error, step))
        return min(checks)[1] == step

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
            saving |= check() and args.keep == "best"
            dollars = f", off by ${checks[-1][0]:.2f} on {len(val_items)} validation items"
            if args.patience and len(checks) - 1 - checks.index(min(checks)) >= args.patience:
                print(f"\nstopped    no better validation error in {args.patience} checks")
                break
        if saving:
            save()
            saved_at = step
    bar.close()

    if saved_at != step:  # a resumed run that was complete already has nothing to add
        if val_items:
            if not checks or checks[-1][1] != step:
                check()
            print(f"validation off by ${checks[-1][0]:.2f} on {len(val_items)} items")
        if args.keep == "last" or min(checks)[1] == step:
            progress["seconds"] = time.perf_counter() - began
            save()
        else:
            error, best = min(checks)
            print(f"kept       step {best}, off by ${error:.2f}: the best of {len(checks)} checks")
    (out / COMPLETE).touch()
    overall = (
        f"{progress['seconds']:,.0f} s, {progress['tokens'] / max(progress['seconds'], 1e-9):,.0f} tokens/s over all"
    )
    print(f"trained    {step:,} steps in {overall}; checkpoint in {out}/")


if __name__ == "__main__":
    run_main(main)
