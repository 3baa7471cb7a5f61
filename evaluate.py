"""Price the held-out items of a run, honestly: how far off, in dollars, beside guesses that need no language model.

    python evaluate.py --ckpt out/
    python evaluate.py --ckpt out/ --decode head                   by the head alone
    python evaluate.py --ckpt out/ --baselines                     a random forest and others beside it
    python evaluate.py --ckpt out/ --guesses me=mine.csv           anybody's guesses beside it
    python evaluate.py --compare a/report b/report                 which of two runs is better, and how surely

The items are the run's own test split, never trained on. Writes out/report/ (report.html is the page to open).
"""

from pipeline.options import evaluation_options

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds: --help and typing errors answer at once
    ARGUMENTS = evaluation_options(__doc__)

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import run_main
from common.files import update_directory
from pipeline.checkpoint import read_run
from pipeline.data import run_items, sources, trained_on, training_items
from pipeline.models import pick_device, pick_dtype
from pipeline.prediction import forward_tokens, predict, tree_functions, without_adapter
from pipeline.predictor import Predictor, origin_of
from pricing.curation.leaks import leaks
from pricing.data.batch import length_batches
from pricing.data.catalogue import least_error
from pricing.data.items import MIN_PRICE, Item, normalise_title, sample, unseen
from pricing.data.sources import load_items
from pricing.distribution.decode import greedy_prices, pick
from pricing.distribution.intervals import calibrated_range, cross_calibrated_range
from pricing.evaluation.baselines import run_baselines, same_origin
from pricing.evaluation.compare import compare_reports
from pricing.evaluation.console import show_guess, table
from pricing.evaluation.guesses import is_reference, published_guesses, read_guesses
from pricing.evaluation.metrics import colour, error_apart, paired_difference, score
from pricing.evaluation.report import REPORT, comparison_table, headline, write_report
from pricing.evaluation.stated import stated

BLEND = "fine-tuned, blended with forest and network"
BLENDED = ("random forest", "residual network")


def greedy(predictor: Predictor, prompts: list[list[int]], batch_tokens: int | None) -> np.ndarray:
    """What the model writes, likeliest token by likeliest token; NaN where that is no price  # (items,) dollars"""
    if len(predictor.paths) > 1:
        members = f"{predictor.paths[0]} has {len(predictor.paths)} members"
        raise ValueError(f"--decode greedy reads one model's text; {members}")
    functions, guesses = tree_functions(predictor.model, prompts), np.full(len(prompts), np.nan)
    for indices in length_batches(prompts, forward_tokens(predictor.model, batch_tokens)):
        guesses[indices] = greedy_prices(*functions, [prompts[i] for i in indices], predictor.tree)
    return guesses


def blended(guess: np.ndarray, forest: np.ndarray, network: np.ndarray) -> np.ndarray:
    """Weighted mean in log price: 0.65, 0.175 and 0.175, chosen on validation items (benchmarks/README.md)"""
    parts = (guess, 0.65), (forest, 0.175), (network, 0.175)
    return np.exp(sum(weight * np.log(np.maximum(part, MIN_PRICE)) for part, weight in parts))


def other_items(args: argparse.Namespace, options: dict, own: dict) -> list[Item]:
    """Of --data. All rows of a file that have no split are priced: nothing of another file was trained on. Those of the
    run's `own` file (run.json's data) are in the split that they were in."""
    size, seed = options["size"], options["data_seed"]
    items, skipped, identity = load_items(args.data, size, seed)
    known = [own, *own.get("sources", [])]
    print(f"data       {args.data}: {len(items):,} items" + (f"; left out: {skipped}" if skipped.counts else ""))
    if "sha256" not in identity or any(source.get("sha256") == identity["sha256"] for source in known):
        return items
    everything, _, _ = load_items(args.data, size, seed, default_split=args.split)
    if moved := sum(a.split != b.split for a, b in zip(items, everything, strict=True)):
        print(f"data       {moved:,} of them lie in no split and are not the run's: all are priced")
    return everything


def items_of(args: argparse.Namespace, record: dict) -> tuple[list[Item], list[Item], bool]:
    """What the run was trained on; what it is asked to price, nothing of the former nor of what the runs that it
    started from were trained on; and whether these are the reference's own test items"""
    options, origin = record["options"], origin_of(record, args.origin)
    items = run_items(record)
    train = training_items(items, options)
    if args.data:  # priced by the same run and the same baselines, which know its own training items only
        items = other_items(args, options, record["data"])
    if args.data or args.origin is not None:
        items = [replace(item, origin=origin) for item in items]
    name, test = args.data or " + ".join(sources(options)), [item for item in items if item.split == args.split]
    if not test:
        raise ValueError(f"{name}: none of the {len(items)} items is in the {args.split} split")
    new = unseen(test, train + trained_on(record.get("started_from")))
    if left_out := len(test) - len(new):
        print(f"data       {left_out:,} items left out: the run was trained on the same texts")
    if not new:
        raise ValueError(f"{name}: all items of the {args.split} split were trained on")
    return train, sample(new, args.items), is_reference(test)


def price(args: argparse.Namespace, predictor: Predictor, test: list[Item], prompts: list, fallback: float) -> tuple:
    """(guesses, (low, high) of their ranges, what metrics.json holds of the pricing), a line on the screen an item.

    A greedy text that is no price says nothing: it is priced like an unknown product, at `fallback` dollars.
    """
    truth = np.array([item.price for item in test])
    decode, share = predictor.decoding(args.decode), args.interval / 100
    ranged = decode if decode in ("head", "blend") else "median"  # what the price ranges go by
    calibration = predictor.calibration(ranged)
    bar = tqdm(total=len(test), unit="item", dynamic_ncols=True)

    def guess_of(prediction) -> np.ndarray:
        median = decode in ("median", "head", "blend")
        return prediction.median(decode) if median else pick(prediction.distribution, decode)

    def show(indices, guesses):
        bar.update(len(indices))
        for i, guess in zip(indices, guesses, strict=True):
            if not args.quiet:
                guess = fallback if np.isnan(guess) else guess
                tqdm.write(show_guess(test[i].title, truth[i], guess, colour(truth[i], guess)))

    started = time.perf_counter()
    written = greedy(predictor, prompts, args.batch_tokens) if decode == "greedy" else None
    prediction = predictor.predict(
        prompts, args.batch_tokens, args.prune,
        lambda indices, part: show(indices, guess_of(part) if written is None else written[indices]),
    )  # fmt: skip
    guess = guess_of(prediction) if written is None else written
    failures = int(np.isnan(guess).sum())
    guess = np.where(np.isnan(guess), fallback, guess)
    if args.split == "val":
        low, high, calibrated = cross_calibrated_range(prediction.quantiles(ranged), guess, share, truth)
    else:
        low, high, calibrated = calibrated_range(prediction.quantiles(ranged), guess, share, *calibration)
    bar.close()
    if not calibrated:
        print("ranges     are the model's own: there are too few validation items to calibrate them")
    seconds = round(time.perf_counter() - started, 2)
    pricing = {"parse_failures": failures, "seconds": seconds, "decode": decode, "share": share}
    return guess, (low, high), pricing | {"calibrated": calibrated}


def describe(predictor: Predictor, args: argparse.Namespace, decode: str, trained: int) -> str:
    """What the report says of the run, in one sentence"""
    by = {"head": "the head's median", "blend": "the medians of head and distribution, blended"}
    by = by.get(decode, f"{decode} of the distribution over whole dollars")
    by += f", mean of {len(predictor.paths)} members" if len(predictor.paths) > 1 else ""
    options = predictor.options
    return (
        f"{options['model']}, {options['bits']} bits, LoRA rank {options['rank']} on {options['targets']}, "
        f"{predictor.record['steps']:,} steps on {trained:,} items of {' + '.join(sources(options))}; {by}; "
        f"{args.split} items of {args.data or sources(options)[0]}."
    )


def untuned(args: argparse.Namespace, predictor: Predictor, prompts: list[list[int]]) -> np.ndarray:
    """The guesses of the same model without its adapter  # (items,) dollars"""
    with tqdm(total=len(prompts), unit="item", desc="untuned model") as bar, without_adapter(predictor.model):
        plain = predict(
            predictor.model, predictor.tree, prompts, batch_tokens=args.batch_tokens, prune=args.prune,
            on_batch=lambda indices, _: bar.update(len(indices)),
        )  # fmt: skip
    return plain.median()


def main(args: argparse.Namespace) -> None:
    if args.compare:
        return print(compare_reports(*args.compare))
    train, test, recognised = items_of(args, read_run(args.ckpt))
    given = [read_guesses(words, test) for words in args.guesses]
    device = pick_device(args.device)
    predictor = Predictor(args.ckpt, device, pick_dtype(args.dtype, device), args.origin)
    truth, categories = np.array([item.price for item in test]), [item.category for item in test]
    products = [normalise_title(item.title) for item in test]
    alike = [item.price for item in same_origin(train, test)]
    constant, fallback = float(np.mean(alike)), float(np.median(alike))
    prompts = predictor.prompts(test)
    guess, interval, pricing = price(args, predictor, test, prompts, fallback)
    metrics = score(truth, guess, constant, categories, interval=interval, groups=products)
    metrics |= pricing | {"train_items": len(train), "members": len(predictor.paths)}
    comparison = {"fine-tuned": metrics}

    def add(name: str, other: np.ndarray, seconds: float | None = None, at=slice(None)) -> None:
        """Of the items `at`"""
        price, titles, kinds = truth[at], np.array(products)[at], np.array(categories)[at]
        above = paired_difference(np.abs(price - other), np.abs(price - guess[at]), titles)
        scored = score(price, other, constant, kinds, groups=titles)
        comparison[name] = scored | {"seconds": seconds, "above": above}

    # ---- the same model without its adapter, and predictors that read no language ----------------------------------
    if args.untuned:
        started, plain = time.perf_counter(), untuned(args, predictor, prompts)
        add("untuned model", plain, round(time.perf_counter() - started, 2))
    others = {}
    for name, result in run_baselines(train, test, args.baselines, device).items():
        others[name] = result["guess"]
        add(name, result["guess"], result["seconds"])
    if args.baselines:
        parts = guess, others["random forest"], others["residual network"]
        add(BLEND, blended(*parts), pricing["seconds"] + sum(comparison[name]["seconds"] for name in BLENDED))
    for other in given + (published_guesses(test) if recognised else []):
        name = other.name if len(other.items) == len(test) else f"{other.name}, {len(other.items):,} of the items"
        if other.guess is None:
            comparison[name] = other.metrics | {"ratio": other.metrics["mae"] / metrics["constant_mae"]}
        else:
            add(name, other.guess, at=other.items)
    keys = ("mae", "mae_ci95", "median_error", "rmsle", "hits", "ratio", "seconds", "above")
    metrics["comparison"] = {name: {k: m[k] for k in keys if k in m} for name, m in comparison.items()}
    leaked = leaks([item.text for item in train], [item.text for item in test])
    errors = np.abs(truth - guess)
    metrics["leaks"] = error_apart(errors, leaked) | {"threshold": 0.8}
    metrics["stated"] = error_apart(errors, stated(test))
    if all(item.fair_price is not None for item in test):
        metrics["least_mae"] = float(np.mean([least_error(item.fair_price) for item in test]))

    # ---- report ----------------------------------------------------------------------------------------------------
    out = Path(args.ckpt) / ("report" if args.split == "test" else "report_val")
    print(table(*comparison_table(comparison)))
    print(headline(metrics, fallback))
    if out.is_symlink():
        print(f"{out} was a symbolic link, which a directory replaces; {out.resolve()} is as it was", file=sys.stderr)
        out.unlink()
    with update_directory(out, REPORT) as part:
        sentence = describe(predictor, args, pricing["decode"], len(train))
        write_report(part, metrics, test, guess, interval, comparison, sentence)
    print(f"report in {out}/report.html")


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
