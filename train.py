"""Fine-tune a Llama in 4 bits to tell a product's price from its text: QLoRA in one plain loop.

    python train.py --bits 4                                  SmolLM2-135M on the built-in catalogue, minutes on a
    laptop python train.py --bits 4 --data pc-parts                  real products
    python train.py --bits 4 --model meta-llama/Llama-3.1-8B --data items.jsonl --lr 1e-4        your own, on a GPU

Read it downward: options, data, model, LoRA, batches, loop, checkpoint.
"""

import argparse
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

from llama.attention import Layout
from lora.adapter import load_adapter, save_adapter
from lora.checkpoint import load_state, save_state, write_directory
from lora.inject import inject
from pricer import (
    add_model_arguments,
    distributions,
    load_base,
    memory_report,
    peak_memory,
    pick_device,
    pick_dtype,
    read_run,
    run_main,
)
from pricing.batch import batches, pack
from pricing.console import show_example
from pricing.decode import PriceTree, pick
from pricing.loss import LOSSES, AnswerLoss
from pricing.prompt import PROMPT, encode_items
from pricing.sources import load_items


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="smollm2", help="smollm2, a directory, a .gguf file or a hub id")
    group.add_argument("--bits", type=int, default=4, choices=[4, 16], help="4: NF4; 16: not quantised")
    group.add_argument(
        "--blocksize", type=int, default=64, choices=[64, 128, 256, 512], help="weights that share one absmax"
    )
    group.add_argument(
        "--double-quant", action=argparse.BooleanOptionalAction, default=True, help="absmax in 8 bits too"
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
    group.add_argument("--max-tokens", type=int, default=176, help="tokens of the prompt; longer texts are cut")
    group.add_argument("--strict", action="store_true", help="a bad row is an error instead of a count")
    group = parser.add_argument_group("training")
    group.add_argument(
        "--loss",
        default="answer",
        choices=LOSSES,
        help="answer: plain cross-entropy; soft: near prices count as nearly right",
    )
    group.add_argument(
        "--soft-width",
        type=float,
        default=0.1,
        help="relative width of the soft loss's neighbourhood of the true price",
    )
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the training items")
    group.add_argument("--max-steps", type=int, default=None, help="stop after this many optimiser steps")
    group.add_argument(
        "--max-minutes", type=float, default=None, help="stop after this many minutes; the schedule ends there too"
    )
    group.add_argument("--batch", type=int, default=16, help="items in a forward pass")
    group.add_argument("--accumulate", type=int, default=1, help="forward passes in an optimiser step")
    group.add_argument("--optimiser", default="adamw", choices=["adamw", "sgd"], help="sgd has momentum 0.9")
    group.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (8B models: 1e-4)")
    group.add_argument(
        "--schedule", default="cosine", choices=["cosine", "linear", "constant"], help="after the warm-up, to 0"
    )
    group.add_argument("--warmup", type=float, default=0.03, help="share of the steps over which the rate rises from 0")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of the LoRA factors")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--seed", type=int, default=0, help="of LoRA's start, dropout and the order of items")
    group = parser.add_argument_group("reporting")
    group.add_argument("--val-items", type=int, default=48, help="validation items priced at each check; 0 for none")
    group.add_argument("--val-every", type=int, default=None, help="steps between checks (default: half of the run)")
    group.add_argument("--log-every", type=int, default=1, help="steps between lines of metrics.jsonl")
    group.add_argument(
        "--save-every", type=int, default=None, help="steps between checkpoints (default: only at the end)"
    )
    group.add_argument("--out", default="out", help="checkpoint directory; an earlier run in it is replaced")
    group.add_argument("--resume", action="store_true", help="go on from --out, with the options it was started with")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    for name in ("size", "max_tokens", "batch", "accumulate", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("epochs", "lr", "clip", "soft_width", "max_minutes", "max_steps", "val_every", "save_every"):
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
    args = parse_arguments()
    out = Path(args.out)
    device = pick_device(args.device)
    if args.resume:
        run = read_run(out)
        args = argparse.Namespace(**run["options"] | {"resume": True, "out": args.out, "device": args.device})
    elif out.exists() and not (out / "run.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is no earlier run of train.py; choose another name")
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)

    # ---- data ------------------------------------------------------------------------------------------------------
    items, skipped, identity = load_items(args.data, args.size, args.data_seed, args.strict)
    train_items = [item for item in items if item.split == "train"]
    val_items = [item for item in items if item.split == "val"][: args.val_items]
    if not train_items:
        raise ValueError(f"{args.data}: none of the {len(items)} items is in the train split")
    print(
        f"data       {args.data}: {len(items):,} items, {len(train_items):,} to train on"
        + (f"; left out: {skipped}" if skipped.counts else "")
    )

    # ---- model: each linear is quantised as it is read (pricer.make_linear), then freeze and inject ----------------
    started = time.perf_counter()
    model, tokenizer, directory = load_base(args.model, device, dtype, args.bits, args.blocksize, args.double_quant)
    loaded = f"loaded in {time.perf_counter() - started:.1f} s, peak {peak_memory(device):.2f} GiB"
    if args.resume:
        load_adapter(model, out)
    else:
        inject(model, rank=args.rank, alpha=args.alpha, dropout=args.dropout, rslora=args.rslora, targets=args.targets)
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimiser == "adamw":
        optimiser = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.99), **settings)
    else:
        optimiser = torch.optim.SGD(parameters.values(), momentum=0.9, **settings)

    # ---- tokens and steps ------------------------------------------------------------------------------------------
    examples = encode_items(train_items, tokenizer, args.max_tokens)
    val_prompts = [e.prompt for e in encode_items(val_items, tokenizer, args.max_tokens)]
    val_truth = np.array([item.price for item in val_items])
    tree = PriceTree.build(tokenizer.encode_answer)
    answer_loss = AnswerLoss(args.loss, tree, args.soft_width, device)
    forward_passes = math.ceil(args.epochs * math.ceil(len(examples) / args.batch))  # an epoch's last one may be short
    total_steps = min(math.ceil(forward_passes / args.accumulate), args.max_steps or 10**12)
    val_every = args.val_every or max(1, total_steps // 2)
    step, spent, metrics = 0, 0.0, []  # step counts optimiser steps, spent counts seconds
    if args.resume:
        step, spent = load_state(out / "state", parameters, optimiser)
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # batches() never ends and yields (epoch, examples): cut to what this run still has to do.
    stream = islice(
        batches(examples, args.batch, args.seed, start=step * args.accumulate), forward_passes - step * args.accumulate
    )

    # ---- the truth, before anything is trained ---------------------------------------------------------------------
    lengths = [len(e.prompt) + len(e.answer) for e in examples]
    print(
        f"model      {args.model} ({directory}) on {device}, {args.bits} bits, "
        f"computing in {str(dtype).removeprefix('torch.')}; {loaded}"
    )
    print(memory_report(model))
    print(
        f"tokens     {sum(lengths):,} an epoch, {np.mean(lengths):.0f} an item, "
        f"of which {np.mean([len(e.answer) for e in examples]):.1f} carry the loss"
    )
    print(f"steps      {total_steps:,} of {args.batch * args.accumulate} items; first item, what is learnt in colour:")
    print(show_example(next(batches(examples, args.batch, args.seed))[1][0], tokenizer), flush=True)

    def save(done: int, seconds: float) -> None:
        """A whole checkpoint directory, under its name only when complete."""
        record = {
            "options": {k: v for k, v in vars(args).items() if k != "resume"},
            "base_model": {"name": args.model, "directory": directory.name},
            "data": identity
            | {"train": len(train_items), "mean_price": float(np.mean([i.price for i in train_items]))},
            "prompt": PROMPT,
            "split": "by `split` column, else by hash of the title: 85 % train, 5 % val, 10 % test",
            "versions": {name: version(name) for name in ("torch", "bitsandbytes", "safetensors", "tiktoken")}
            | {"python": platform.python_version()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "steps": done,
            "seconds": round(seconds, 1),
            "tokens": sum(m["tokens"] for m in metrics),
            "peak_memory_gib": round(peak_memory(device), 3),
        }
        with write_directory(out) as part:
            save_adapter(model, part, base_model=args.model)
            save_state(part / "state", parameters, optimiser, done, seconds)
            (part / "run.json").write_text(json.dumps(record, indent=2) + "\n")
            (part / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))

    # ---- loop ------------------------------------------------------------------------------------------------------
    bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)
    began, val_mae, bad_steps = time.perf_counter() - spent, None, 0
    saved_at = None
    while step < total_steps:
        started = time.perf_counter()
        progress = (
            step + 0.5
        ) / total_steps  # the middle of the step, so that neither the first nor the last rate is 0
        if args.max_minutes:
            progress = max(progress, (started - began) / (60 * args.max_minutes))
            if progress >= 1:
                break
        window = [pack(chosen) for _, chosen in islice(stream, args.accumulate)]
        if not window:
            break
        # One mean over every supervised token of the window: a mean of means would weigh short batches more.
        supervised = sum(len(batch.targets) for batch in window)
        total_loss = 0.0
        for batch in window:
            tokens = torch.tensor(batch.tokens, device=device)  # (N,)
            at = torch.tensor(batch.at, device=device)  # (M,)
            logits = model(tokens, Layout.packed(batch.lengths, device), at)  # (M, V)
            loss = answer_loss(logits, batch) / supervised  # a sum in nats, divided once for the whole window
            loss.backward()
            total_loss += loss.item()  # nats a supervised token
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), args.clip).item()
        rate = learning_rate(progress, args.lr, args.schedule, args.warmup)
        if math.isfinite(total_loss) and math.isfinite(norm):
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            bad_steps = 0
        else:  # leave the weights as they are, and say so
            bad_steps += 1
            tqdm.write(
                f"step {step + 1}: loss {total_loss} or gradient {norm} is not finite; step left out", file=sys.stderr
            )
            if bad_steps == 10:
                raise ValueError(
                    "ten steps in a row without a finite loss: lower --lr, or check the data; "
                    "the last checkpoint stands"
                )
        optimiser.zero_grad(set_to_none=True)
        step += 1

        n_tokens = sum(batch.real_tokens for batch in window)
        speed = n_tokens / (time.perf_counter() - started)
        if val_items and (step % val_every == 0 or step == total_steps):
            model.eval()
            guesses = pick(distributions(model, tree, val_prompts, args.batch, prune=1e-3), "median")
            val_mae = float(np.abs(guesses - val_truth).mean())
            model.train()
        if step % args.log_every == 0 or step == total_steps:
            metrics.append({
                "step": step, "loss": round(total_loss, 5), "lr": rate, "grad_norm": round(norm, 4), "tokens": n_tokens,
                "tokens_per_second": round(speed, 1), "peak_memory_gib": round(peak_memory(device), 3),
                "val_mae_dollars": val_mae,
            })  # fmt: skip
        dollars = "" if val_mae is None else f", off by ${val_mae:.2f} on {len(val_items)} validation items"
        bar.set_postfix_str(f"loss {total_loss:.3f}{dollars}, {speed:,.0f} tokens/s, {peak_memory(device):.2f} GiB")
        bar.update()
        if args.save_every and step % args.save_every == 0:
            save(step, time.perf_counter() - began)
            saved_at = step
    bar.close()

    if saved_at != step:
        save(step, time.perf_counter() - began)
    print(f"trained {step:,} steps in {time.perf_counter() - began:,.0f} s; checkpoint in {out}/")
    print(f"now run    python evaluate.py --ckpt {out}/")


if __name__ == "__main__":
    run_main(main)
