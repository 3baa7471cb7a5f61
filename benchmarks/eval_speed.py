"""Seconds to price items: the full distribution over whole dollars, after loading.

    python -m benchmarks.eval_speed --shape 8b --items 250         random weights and texts of 100 to 182 tokens
    python -m benchmarks.eval_speed --ckpt out --items 1000        a run of train.py, on its own test items

The first pass warms up (kernels are compiled and chosen), the others are measured.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.random_model import directory_of
from benchmarks.shapes import SHAPES
from benchmarks.workload import W8B, random_sequences
from fast.install import install
from fast.plan import Plan, free_memory
from pipeline.data import run_items
from pipeline.models import load_base, open_base, pick_device, pick_dtype
from pipeline.prediction import predict
from pipeline.predictor import Predictor
from pricing.data.items import sample
from pricing.distribution.decode import PRUNE, PriceTree

QUESTION = 12  # tokens that all texts begin with, as real prompts do


def held_out_prompts(predictor: Predictor, count: int | None = None) -> list[list[int]]:
    """The prompts of a run's own test items, or of a fixed sample of so many"""
    items = [item for item in run_items(predictor.record) if item.split == "test"]
    return predictor.prompts(sample(items, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--ckpt", help="price the test items of this run instead")
    parser.add_argument("--items", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, help="tokens in a forward pass (default: as for evaluate.py)")
    parser.add_argument("--prune", type=float, default=PRUNE, help="as for evaluate.py")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    device = pick_device("auto")
    dtype, started = pick_dtype("auto", device), time.perf_counter()
    if args.ckpt:
        predictor = Predictor(args.ckpt, device, dtype)
        prompts, price = held_out_prompts(predictor, args.items), predictor.predict
    else:
        config, tokenizer, directory = open_base(str(directory_of(args.shape)))
        options = argparse.Namespace(bits=4, blocksize=64, double_quant=True, outlier_threshold=6.0)
        model = load_base(config, directory, device, dtype, options).eval()
        install(model, Plan(keep=config.num_hidden_layers) if free_memory(device) > 40 << 30 else Plan())
        (prompts,) = random_sequences(W8B, config.vocab_size, 1, args.items)
        prompts = [prompts[0][:QUESTION] + prompt[QUESTION:] for prompt in prompts]
        price = partial(predict, model, PriceTree.build(tokenizer.encode_answer))
    loaded, times = time.perf_counter() - started, []
    for _ in range(args.repeats + 1):
        started = time.perf_counter()
        price(prompts, batch_tokens=args.batch_tokens, prune=args.prune)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    tokens, seconds = sum(map(len, prompts)), median(times[1:])
    print(
        f"{args.ckpt or args.shape}: {len(prompts):,} items of {tokens / len(prompts):.0f} tokens in {seconds:.2f} s "
        f"(median of {args.repeats}; the first pass took {times[0]:.2f} s, loading {loaded:.1f} s): "
        f"{len(prompts) / seconds:,.0f} items/s, {tokens / seconds:,.0f} tokens/s"
    )
    if args.json:
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
        figures = {"gpu": gpu, "items": len(prompts), "tokens": tokens, "seconds": times[1:], "first": times[0]}
        args.json.write_text(json.dumps(figures | {"loading": loaded}, indent=2) + "\n")


if __name__ == "__main__":
    main()
