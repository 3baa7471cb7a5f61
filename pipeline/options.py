"""What the scripts can be told: all of train.py's options, and those that it shares with evaluate.py and predict.py.

Nothing here imports PyTorch, so that `--help` and a mistyped option are answered at once. What is chosen from is
therefore named twice; tests/pipeline/test_options.py holds both lists equal.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from common.cli import Parser, make_parser

BITS = (4, 8, 16)
BASES = ("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
DTYPES = ("bf16", "fp32")
LOSSES = ("answer", "price", "soft")
OPTIMISERS = ("adamw", "adamw8bit", "paged-adamw8bit", "sgd", "lion8bit")
PICKS = ("median", "mean", "log-mean", "mode", "greedy")
RANGES = (50, 80, 90, 95)  # per cent of prices
# What an adapter belongs to, and what it is: of the run that --start-from begins with.
BASE_OPTIONS = {"--model", "--bits", "--blocksize", "--double-quant", "--no-double-quant", "--outlier-threshold"}
BASE_OPTIONS |= {"--rank", "--alpha", "--rslora", "--targets", "--dropout", "--head"}
PRUNE = 0.001
# Least and most of what is counted: more would neither fit into any memory nor end in anyone's time.
BOUNDS = dict(size=(1, 10**7), max_tokens=(1, 10**6), batch_tokens=(1, 10**7), rank=(1, 2**16), accumulate=(1, 10**5))
BOUNDS |= dict(log_every=(1, 10**12), val_items=(0, 10**9), members=(1, 1000), epochs=(0, 10**4))


def peak_rate(hidden_size: int) -> float:
    """The default of --lr: the wider a model, the smaller its steps. SmolLM2-135M (576) learns well at 2e-3, where
    Gemma 3 270M (640) ends half as far off again as at 5e-4, and Qwen2.5-Coder 1.5B (1536) is better at 5e-4 than at
    1e-4 (docs/results.md); 8B models are tuned with 1e-4."""
    return 2e-3 if hidden_size <= 576 else 5e-4 if hidden_size < 2048 else 1e-4


def add_model_arguments(parser) -> None:
    """The options that say where and in which precision a model runs."""
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="compute dtype of the linears (default: what is fast)",
    )


def add_batch_argument(parser) -> None:
    parser.add_argument(
        "--batch-tokens", type=int, default=None, help="tokens in a forward pass (16,384 on a GPU, 2,048 on a CPU)"
    )


def add_origin_argument(parser) -> None:
    parser.add_argument(
        "--origin", default=None, help="where the items come from, of the run's own origins (default: its first source)"
    )


def training_options(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    """What train.py is told, checked; `doc` is its docstring.

    Ends the script in one line, exit code 2, where an option is wrong, or where two do not fit together: before
    anything is read.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(doc, "train.py")
    for add in (add_base, add_data, add_loss, add_training, add_reporting, add_model_arguments, add_speed):
        add(parser)
    args = parser.parse_args(argv)
    if args.start_from:  # what is not said is as it was in that run
        parser.set_defaults(**options_of_run(parser, args.start_from, vars(args)))
        args = parser.parse_args(argv)
    if len(args.data) == 1:
        [args.data] = args.data
    check(parser, args, argv)
    return args


def options_of_run(parser: Parser, ckpt: str, known: dict) -> dict:
    """The options of the run in `ckpt`, but for those that are about one start alone"""
    try:
        options = json.loads(Path(ckpt, "run.json").read_text(encoding="utf-8"))["options"]
        options |= {"data": [options["data"]] if isinstance(options["data"], str) else options["data"]}
    except (OSError, ValueError, KeyError, TypeError):
        parser.error(f"--start-from {ckpt}: it holds no readable run.json of train.py")
    own = {"out", "resume", "start_from", "device", "dtype", "explain_memory", "memory_budget"}
    return {name: value for name, value in options.items() if name in known and name not in own}


def check(parser: Parser, args: argparse.Namespace, argv: list[str]) -> None:
    """Ends the script in one line where options do not fit together."""
    for name, (least, most) in BOUNDS.items():
        if (value := getattr(args, name)) is not None and not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most:,}"
            parser.error(f"--{name.replace('_', '-')} must be {bound}, got {value}")
    for name in ("alpha", "weight_decay"):
        if not math.isfinite(value := getattr(args, name)) or value < 0:
            parser.error(f"--{name.replace('_', '-')} must be a number of 0 or more, got {value}")
    if not 0 <= args.outlier_threshold < math.inf:
        parser.error(f"--outlier-threshold must be 0 (none) or greater, got {args.outlier_threshold}")
    if not 0 <= args.warmup < 1:
        parser.error(f"--warmup is a share of the run, from 0 to less than 1, got {args.warmup}")
    if args.val_items == 0 and (args.keep == "best" or args.patience):
        parser.error("--keep best and --patience go by validation items; --val-items 0 leaves none")
    if args.keep == "best" and args.save_every:
        parser.error("--keep best saves at every best check, and only there; leave out --save-every")
    if (args.memory_budget or args.explain_memory) and (args.readable or args.dropout):
        parser.error("--memory-budget and --explain-memory plan the fast path; leave out --readable and --dropout")
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    if args.resume and (others := given - {"--resume", "--out", "--device"}):
        parser.error(f"--resume goes on with the options of the first start; leave out {', '.join(sorted(others))}")
    if args.start_from and (fixed := given & BASE_OPTIONS):
        parser.error(f"--start-from goes on with that run's model and adapter; leave out {', '.join(sorted(fixed))}")
    if args.start_from and Path(args.start_from).resolve() == Path(args.out).resolve():
        parser.error("--out would replace the run that --start-from begins with; choose another name")
    count = 1 if isinstance(args.data, str) else len(args.data)
    if args.mix and (count == 1 or len(args.mix) != count or not all(0 < share < math.inf for share in args.mix)):
        parser.error("--mix takes a share greater than 0 for each source of --data, where there are several")
    above_zero = ("epochs", "lr", "clip", "soft_width", "head_weight", "max_minutes", "max_steps")
    for name in (*above_zero, "val_every", "save_every", "patience", "train_items"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, got {value}")


def add_base(parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="smollm2", help=f"{', '.join(BASES)}, a directory, a .gguf file or a hub id")
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


def add_data(parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", nargs="+", default=["catalogue"], metavar="SOURCE",
        help="catalogue, pc-parts, reference, a .jsonl/.csv/.parquet file or a hub data set; of several, the first is "
        "validated and tested on, the others add training items",
    )  # fmt: skip
    group.add_argument(
        "--origin", nargs="+", metavar="NAME",
        help="a name for each source, which the prompt carries (default where there are several: the source's)",
    )  # fmt: skip
    group.add_argument(
        "--mix", nargs="+", type=float, metavar="SHARE",
        help="a share of the training items for each source (default: all of each); the first is taken whole, the "
        "others are sampled or repeated",
    )  # fmt: skip
    group.add_argument("--size", type=int, default=3600, help="items the catalogue makes, all splits together")
    group.add_argument("--data-seed", type=int, default=0, help="the catalogue's seed")
    group.add_argument("--train-items", type=int, default=None, help="learn from a fixed sample of so many")
    group.add_argument("--prompt", default="first", help="first, second, compact, or a text file with {text} in it")
    group.add_argument(
        "--max-tokens", type=int, default=None,
        help="tokens of the prompt; longer texts are cut (default: the longest text's, 176 to 384)",
    )  # fmt: skip
    group.add_argument("--strict", action="store_true", help="a bad row is an error instead of a count")


def add_loss(parser) -> None:
    group = parser.add_argument_group("what is learnt")
    group.add_argument(
        "--loss",
        default="answer",
        choices=LOSSES,
        help="answer: plain cross-entropy; price: without the .00; soft: near prices count as nearly right",
    )
    group.add_argument(
        "--soft-width",
        type=float,
        default=0.1,
        help="relative width of the soft loss's neighbourhood of the true price",
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


def add_training(parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the training items")
    group.add_argument("--max-steps", type=int, default=None, help="stop after this many optimiser steps")
    group.add_argument("--max-minutes", type=float, default=None, help="stop (each member) after so many minutes")
    group.add_argument(
        "--batch-tokens", type=int, default=1152, help="tokens in a forward pass: whole items packed, no padding"
    )
    group.add_argument("--accumulate", type=int, default=1, help="forward passes in an optimiser step")
    group.add_argument("--optimiser", default="adamw", choices=OPTIMISERS, help="sgd has momentum 0.9")
    group.add_argument(
        "--lr", type=float, default=None, help="peak learning rate (default by the model's width: 2e-3, 5e-4 or 1e-4)"
    )
    group.add_argument(
        "--schedule", default="cosine", choices=["cosine", "linear", "constant"], help="after the warm-up, to 0"
    )
    group.add_argument("--warmup", type=float, default=0.03, help="share of the steps over which the rate rises from 0")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of the LoRA factors and the head")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--seed", type=int, default=0, help="of LoRA's and the head's start and the order of items")
    group.add_argument(
        "--start-from", default=None, metavar="CKPT",
        help="go on from the adapter and head of that run, with other data or options; what is not said is as there",
    )  # fmt: skip


def add_reporting(parser) -> None:
    group = parser.add_argument_group("reporting")
    group.add_argument("--val-items", type=int, default=48, help="validation items priced at each check; 0 for none")
    group.add_argument(
        "--val-every", "--eval-every", type=int, default=None, help="steps between checks (default: half of the run)"
    )
    group.add_argument(
        "--patience", type=int, default=None, help="stop after so many checks without a better validation error"
    )
    group.add_argument(
        "--keep", default="last", choices=["last", "best"],
        help="the weights that --out holds at the end; best saves at every best check, where --resume would go on",
    )
    group.add_argument("--log-every", type=int, default=1, help="steps between lines of metrics.jsonl")
    group.add_argument(
        "--save-every", type=int, default=None, help="steps between checkpoints (default: only at the end)"
    )
    group.add_argument("--out", default="out", help="checkpoint directory; an earlier run in it is replaced")
    group.add_argument("--resume", action="store_true", help="go on from --out, with the options it was started with")


def add_speed(parser) -> None:
    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--memory-budget", default=None, metavar="6GiB", help="most that training may allocate (default: what is free)"
    )
    group.add_argument(
        "--explain-memory", action="store_true", help="print what training would allocate, term by term, and end"
    )
    group.add_argument(
        "--graph", default="auto", choices=["auto", "off"], help="record a step once and replay it, on a GPU"
    )
    group.add_argument(
        "--readable", action="store_true", help="the plain path of llama/model.py and quant/linear.py: nothing of fast/"
    )


def evaluation_options(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    """What evaluate.py is told, checked; `doc` is its docstring."""
    parser = make_parser(doc, "evaluate.py")
    parser.add_argument("--ckpt", default="out", help="the directory that train.py wrote")
    parser.add_argument("--data", default=None, help="other data than the run's (its test split is priced)")
    add_origin_argument(parser)
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
    parser.add_argument("--interval", type=int, default=80, choices=RANGES, help="per cent of prices a range holds")
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
        "--guesses", nargs="+", action="extend", default=[], metavar="NAME=FILE.csv",
        help="anybody's guesses beside the model's: a column `guess` (or NAME), by `id`, or in predictions.csv's order",
    )  # fmt: skip
    parser.add_argument(
        "--compare", nargs=2, metavar="REPORT", help="only compare two report directories, item by item"
    )
    parser.add_argument("--quiet", action="store_true", help="no line for each item")
    add_batch_argument(parser)
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if (args.items is not None and args.items < 1) or not 0 <= args.prune < 0.5:
        parser.error("--items must be at least 1, --prune from 0 to 0.5")
    if wrong := [given for given in args.guesses if not all(given.partition("=")[::2])]:
        parser.error(f"--guesses takes NAME=FILE.csv, got {wrong[0]}")
    return args


def pricing_options(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    """What predict.py is told, checked; `doc` is its docstring."""
    parser = make_parser(doc, "predict.py")
    parser.add_argument("text", nargs="*", help="what to price")
    parser.add_argument("--ckpt", default="out", help="the directory that train.py wrote")
    parser.add_argument("--file", type=Path, help="a file of texts; writes CSV: text, price, low, high in dollars")
    parser.add_argument(
        "--decode", choices=["median", "head", "blend"],
        help="median of the digits' distribution, the head's, or both blended (default, where there is a head)",
    )  # fmt: skip
    parser.add_argument("--interval", type=int, default=80, choices=RANGES, help="per cent of prices a range holds")
    add_origin_argument(parser)
    add_batch_argument(parser)
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if bool(args.text) == bool(args.file):
        parser.error("give a text or --file, one of the two")
    return args
