"""Price the held-out items of a run, honestly: how far off, in dollars, beside guesses that need no language model.

    python evaluate.py --ckpt out/
    python evaluate.py --ckpt out/ --decode head                   by the head alone
    python evaluate.py --ckpt out/ --baselines                     a random forest and others beside it
    python evaluate.py --compare a/report b/report                 which of two runs is better, and how surely

The items are the run's own test split, never trained on. Writes out/report/ (report.html is the page to open).
"""

import argparse
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.checkpoint import write_directory
from pipeline.models import pick_device, pick_dtype, run_items, run_main
from pipeline.options import Parser, add_batch_argument, add_model_arguments
from pipeline.predictor import Run, forecast, tree_functions
from pipeline.states import forward_tokens, without_adapter
from pricing.curation.leaks import leaks
from pricing.data.batch import length_batches
from pricing.data.catalogue import least_error
from pricing.data.items import MIN_PRICE, Item, normalise_title, sample, unseen
from pricing.data.sources import load_items
from pricing.distribution.decode import PICKS, PRUNE, greedy_prices, pick
from pricing.distribution.intervals import SHARES, calibrated_range, cross_calibrated_range
from pricing.evaluation.baselines import run_baselines
from pricing.evaluation.compare import compare_reports
from pricing.evaluation.console import show_guess, table
from pricing.evaluation.metrics import colour, paired_difference, score
from pricing.evaluation.report import comparison_table, headline, write_report

BLEND = "fine-tuned, blended with forest and network"
BLENDED = ("random forest", "residual network")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ckpt", default="out", help="the directory that train.py wrote")
    parser.add_argument("--data", default=None, help="other data than the run's (its test split is priced)")
    parser.add_argument(
        "--split", default="test", choices=["test", "val"], help="val: to choose settings by, into report_val/"
    )
    parser.add_argument("--items", type=int, default=None, help="price a fixed sample of so many test items")
    parser.add_argument(
        "--decode",
        choices=[*PICKS, "head", "blend"],
        help="how one price is chosen from the digits' distribution; head: not from it, but the head's median; blend: "
        "half way between the two medians, in log price (default, where there is a head; else median)",
    )
    shares = [round(100 * share) for share in SHARES]
    parser.add_argument("--interval", type=int, default=80, choices=shares, help="per cent of prices a range holds")
    parser.add_argument(
        "--prune", type=float, default=PRUNE, help="digit-tree nodes with less of what names a price are not opened"
    )
    parser.add_argument(
        "--untuned", action=argparse.BooleanOptionalAction, default=True, help="price with the untuned model too"
    )
    parser.add_argument(
        "--baselines", action="store_true", help="all baselines, not only the quick ones; computed once and kept"
    )
    parser.add_argument(
        "--compare", nargs=2, metavar="REPORT", help="only compare two report directories, item by item"
    )
    parser.add_argument("--quiet", action="store_true", help="no line for each item")
    add_batch_argument(parser)
    add_model_arguments(parser)
    args = parser.parse_args()
    if (args.items is not None and args.items < 1) or not 0 <= args.prune < 0.5:
        parser.error("--items must be at least 1, --prune from 0 to 0.5")
    return args


def greedy(run: Run, prompts: list[list[int]], batch_tokens: int | None) -> np.ndarray:
    """What the model writes, likeliest token by likeliest token; NaN where that is no price  # (items,) dollars"""
    if len(run.paths) > 1:
        raise ValueError(f"--decode greedy reads one model's text; {run.paths[0]} has {len(run.paths)} members")
    functions, guesses = tree_functions(run.model, prompts), np.full(len(prompts), np.nan)
    for indices in length_batches(prompts, forward_tokens(run.model, batch_tokens)):
        guesses[indices] = greedy_prices(*functions, [prompts[i] for i in indices], run.tree)
    return guesses


def blended(guess: np.ndarray, forest: np.ndarray, network: np.ndarray) -> np.ndarray:
    """Weighted mean in log price: 0.65, 0.175 and 0.175, chosen on validation items (benchmarks/README.md)"""
    parts = (guess, 0.65), (forest, 0.175), (network, 0.175)
    return np.exp(sum(weight * np.log(np.maximum(part, MIN_PRICE)) for part, weight in parts))


def items_of(args: argparse.Namespace, run: Run) -> tuple[list[Item], list[Item]]:
    """What the run was trained on, and what it is asked to price: nothing of the former"""
    items, options = run_items(run.about), run.options
    train = sample([item for item in items if item.split == "train"], options["train_items"])
    if args.data:  # priced by the same run and the same baselines, which know its own training items only
        items, skipped, _ = load_items(args.data, options["size"], options["data_seed"])
        print(f"data       {args.data}: {len(items):,} items" + (f"; left out: {skipped}" if skipped.counts else ""))
    test = [item for item in items if item.split == args.split]
    if not test:
        raise ValueError(f"{args.data or options['data']}: none of the {len(items)} items is in the {args.split} split")
    if left_out := len(test) - len(new := unseen(test, train)):
        print(f"data       {left_out:,} items left out: the run was trained on the same texts")
    if not new:
        raise ValueError(f"{args.data or options['data']}: all items of the {args.split} split were trained on")
    return train, sample(new, args.items)


def price(args: argparse.Namespace, run: Run, test: list[Item], prompts: list, fallback: float) -> tuple:
    """(guesses, (low, high) of their ranges, what metrics.json says of the pricing), a line on the screen an item.

    A greedy text that is no price says nothing: it is priced like an unknown product, at `fallback` dollars.
    """
    truth = np.array([item.price for item in test])
    decode, share = run.decoding(args.decode), args.interval / 100
    ranged = decode if decode in ("head", "blend") else "median"  # what the price ranges go by
    held = run.held(ranged)
    bar = tqdm(total=len(test), unit="item", dynamic_ncols=True)

    def guess_of(found) -> np.ndarray:
        return found.median(decode) if decode in ("median", "head", "blend") else pick(found.distribution, decode)

    def show(indices, guesses):
        bar.update(len(indices))
        for i, guess in zip(indices, guesses, strict=True):
            if not args.quiet:
                guess = fallback if np.isnan(guess) else guess
                tqdm.write(show_guess(test[i].title, truth[i], guess, colour(truth[i], guess)))

    started = time.perf_counter()
    written = greedy(run, prompts, args.batch_tokens) if decode == "greedy" else None
    found = run.forecast(
        prompts, args.batch_tokens, args.prune,
        lambda indices, part: show(indices, guess_of(part) if written is None else written[indices]),
    )  # fmt: skip
    guess = guess_of(found) if written is None else written
    said = {"parse_failures": int(np.isnan(guess).sum())}
    guess = np.where(np.isnan(guess), fallback, guess)
    if args.split == "val":
        low, high, calibrated = cross_calibrated_range(found.quantiles(ranged), guess, share, truth)
    else:
        low, high, calibrated = calibrated_range(found.quantiles(ranged), guess, share, *held)
    bar.close()
    if not calibrated:
        print("ranges     are the model's own: there are too few validation items to calibrate them")
    seconds = round(time.perf_counter() - started, 2)
    return guess, (low, high), said | {"seconds": seconds, "decode": decode, "share": share, "calibrated": calibrated}


def about(run: Run, args: argparse.Namespace, decode: str, trained: int) -> str:
    """What the report says of the run, in one sentence"""
    by = {"head": "the head's median", "blend": "the medians of head and distribution, blended"}
    by = by.get(decode, f"{decode} of the distribution over whole dollars")
    by += f", mean of {len(run.paths)} members" if len(run.paths) > 1 else ""
    options = run.options
    return (
        f"{options['model']}, {options['bits']} bits, LoRA rank {options['rank']} on {options['targets']}, "
        f"{run.about['steps']:,} steps on {trained:,} items of {options['data']}; {by}; "
        f"{args.split} items of {args.data or options['data']}, split by title."
    )


def main() -> None:
    args = parse_arguments()
    if args.compare:
        return print(compare_reports(*args.compare))
    device = pick_device(args.device)
    run = Run(args.ckpt, device, pick_dtype(args.dtype, device))
    train, test = items_of(args, run)
    truth, categories = np.array([item.price for item in test]), [item.category for item in test]
    products = [normalise_title(item.title) for item in test]
    constant, fallback = float(np.mean([i.price for i in train])), float(np.median([i.price for i in train]))
    prompts = run.prompts(test)
    guess, interval, said = price(args, run, test, prompts, fallback)
    metrics = score(truth, guess, constant, categories, interval=interval, groups=products)
    metrics |= said | {"train_items": len(train), "members": len(run.paths)}
    comparison = {"fine-tuned": metrics}

    def add(name: str, other: np.ndarray, seconds: float) -> None:
        above = paired_difference(np.abs(truth - other), np.abs(truth - guess), products)
        scored = score(truth, other, constant, categories, groups=products)
        comparison[name] = scored | {"seconds": seconds, "above": above}

    # ---- the same model without its adapter, and predictors that read no language ----------------------------------
    if args.untuned:
        started = time.perf_counter()
        with tqdm(total=len(test), unit="item", desc="untuned model") as bar, without_adapter(run.model):
            plain = forecast(
                run.model, run.tree, prompts, batch_tokens=args.batch_tokens, prune=args.prune,
                on_batch=lambda indices, _: bar.update(len(indices)),
            )  # fmt: skip
        add("untuned model", plain.median(), round(time.perf_counter() - started, 2))
    others = {}
    for name, result in run_baselines(train, test, args.baselines, device).items():
        others[name] = result["guess"]
        add(name, result["guess"], result["seconds"])
    if args.baselines:
        parts = guess, others["random forest"], others["residual network"]
        add(BLEND, blended(*parts), said["seconds"] + sum(comparison[name]["seconds"] for name in BLENDED))
    kept = ("mae", "mae_ci95", "median_error", "rmsle", "hits", "ratio", "seconds", "above")
    metrics["comparison"] = {name: {k: m[k] for k in kept if k in m} for name, m in comparison.items()}
    leaked = leaks([item.text for item in train], [item.text for item in test])
    errors = np.abs(truth - guess)
    metrics["leaks"] = {"share": len(leaked) / len(test), "threshold": 0.8}
    for name, chosen in (("mae_with", leaked), ("mae_without", np.setdiff1d(np.arange(len(test)), leaked))):
        metrics["leaks"][name] = float(errors[chosen].mean()) if len(chosen) else None
    if all(item.fair_price is not None for item in test):
        metrics["least_mae"] = float(np.mean([least_error(item.fair_price) for item in test]))

    # ---- report ----------------------------------------------------------------------------------------------------
    out = Path(args.ckpt) / ("report" if args.split == "test" else "report_val")
    with write_directory(out) as part:
        write_report(part, metrics, test, guess, interval, comparison, about(run, args, said["decode"], len(train)))
    print(table(*comparison_table(comparison)))
    print(headline(metrics, fallback))
    print(f"report in {out}/report.html")


if __name__ == "__main__":
    run_main(main)
