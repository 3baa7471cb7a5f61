"""A price head trained after the run, on the states of its frozen model: what `python -m pricing.head` does."""

import argparse
import time
from pathlib import Path

import numpy as np

from lora.adapter import load_adapter
from pipeline.models import load_run, pick_device, pick_dtype, read_run, run_items
from pipeline.predictor import MOST_HELD, encode_run, members, read_held, write_held
from pipeline.states import adapter_digest, kept_states
from pricing.data.items import sample, unseen
from pricing.data.neighbours import INDEX, Index
from pricing.distribution.quantile_head import FILE, Recipe, fit_head, load_head, save_head


def parse_blocks(text: str | None, layers: int) -> list[int]:
    """[10, 20, 30] from "10,20,30"; by default a third, two thirds and all of the model's `layers`."""
    if text is None:
        return sorted({max(1, round(layers / 3)), max(1, round(2 * layers / 3)), layers})
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--blocks takes numbers joined by commas, as in 10,20,30; got {text!r}") from None


def train_head(args: argparse.Namespace, recipe: Recipe) -> None:
    """What `python -m pricing.head` does: states of the run's training and validation items, a head on them."""
    run = read_run(args.ckpt)
    options, device = run["options"], pick_device(args.device)
    items = run_items(run)
    by_split = {split: [item for item in items if item.split == split] for split in ("train", "val")}
    by_split["train"] = sample(by_split["train"], options["train_items"])
    by_split["val"] = unseen(by_split["val"], by_split["train"])
    paths = members(args.ckpt, options)
    if args.items is not None:
        by_split["train"] = sample(by_split["train"], args.items)
    if not all(by_split.values()):
        raise ValueError(f"{options['data']}: a head needs training and validation items")
    model, tokenizer = load_run(args.ckpt, run, device, pick_dtype(args.dtype, device))
    index = Index.load(Path(args.ckpt) / INDEX) if options["neighbours"] else None
    blocks = parse_blocks(args.blocks, len(model.layers))
    joined = by_split["train"] + by_split["val"]
    held_items = sample(by_split["val"], MOST_HELD)
    for number, ckpt in enumerate(paths):
        if number:
            load_adapter(model, ckpt)
        held = read_held(ckpt)
        if (Path(ckpt) / FILE).is_file() and load_head(ckpt).settings.get("joint"):
            print("head       takes the place of the one that was trained with the adapter")
        settings = {"states": args.states, "blocks": blocks, "mean": args.mean, "adapter": adapter_digest(ckpt)}
        started, parts = time.perf_counter(), []
        for chosen in (*by_split.values(), held_items):
            prompts = [e.prompt for e in encode_run(chosen, tokenizer, options, run["prompt"], index)]
            parts.append(kept_states(ckpt, run, model, prompts, settings, args.batch_tokens))
        states = np.concatenate(parts[:2])
        print(
            f"states     {args.states}, after block {', '.join(map(str, blocks))}{' and their means' * args.mean}: "
            f"{states.shape[1]:,} numbers for each of {len(states):,} items in {time.perf_counter() - started:.1f} s"
        )
        started = time.perf_counter()
        head = fit_head(joined, states, recipe, device, settings, lambda line: print(f"head       {line}"))
        # Cut short between two of these writes, the forecasts lack the head's: the ranges are refused, not wrong.
        if "head" in held:
            write_held(ckpt, {key: value for key, value in held.items() if key != "head"})
        saved = save_head(head, ckpt)
        if len(held["price"]) == len(held_items):
            write_held(ckpt, held | {"head": head.quantiles(parts[2])})
        else:
            print(f"head       {ckpt} has no forecasts of its validation items: ranges will not be calibrated")
        print(
            f"head       validation off by ${head.settings['val_mae_dollars']:.2f} on {len(by_split['val']):,} items, "
            f"trained in {time.perf_counter() - started:.1f} s; saved as {saved}"
        )
    print(f"now run    python evaluate.py --ckpt {args.ckpt} --decode head")
