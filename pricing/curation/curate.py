"""Curate raw product listings into items to train on: one Parquet file that `train.py --data` takes.

    python -m pricing.curation meta_Appliances.jsonl.gz meta_Electronics.jsonl.gz --out items.parquet --preset second

RAW are Amazon-Reviews-2023's `raw_meta_*` files (https://amazon-reviews-2023.github.io) as JSONL, JSONL.gz or Parquet;
`meta_Appliances` in the name of the file or of its folder gives the category. Step by step:

    rules         leave out broken records, no price, price out of range, too little text; scrub part numbers (rules.py)
    duplicates    leave out texts with the same words as an earlier one, then near-duplicates of one (duplicates.py)
    draw          by price and category, as the preset says (selection.py)
    split         by a seeded hash of the normalised title
    leaks         remove, or only count, training items whose text or title is a near-duplicate of a held-out one's
                  (leaks.py)
    write         id, title, text, category, price (dollars), split; and a .json beside it with the counts

Every record is counted once, by the first reason that left it out. The same inputs, options and seed give the same
file, byte for byte, with any `--workers` and however often the run was stopped: finished inputs are stored beside
`--out` and not read again. Memory does not grow with the inputs, but for 6 bytes a candidate, 20 an item drawn and a
few kB an item held out. What is stored beside `--out` until the end takes about 2 kB of disk a candidate.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from common.files import whole_file
from common.locks import held
from pricing.curation.candidates import SCHEMA, Candidates, read_inputs
from pricing.curation.duplicates import bands_for, check_threshold, drop_exact, drop_near
from pricing.curation.raw import Options, check_input
from pricing.curation.rules import BAD, PRESETS, RULES, Preset
from pricing.curation.selection import EXACT, LEFT_OUT, NEAR, SPLITS, TRAIN, draw, find_leaks, split


def write_items(candidates: Candidates, fate: np.ndarray, path: Path) -> None:
    """Write the items with their split to `path`, in the order of the inputs, a few thousand at a time."""
    schema = SCHEMA.append(pyarrow.field("split", pyarrow.string()))
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start, batch in candidates.batches(SCHEMA.names):
            fates = fate[start : start + len(batch)]
            here = np.flatnonzero(np.isin(fates, list(SPLITS)))
            table = pyarrow.Table.from_batches([batch]).select(SCHEMA.names).take(here)
            column = pyarrow.array([SPLITS[f] for f in fates[here].tolist()], pyarrow.string())
            if len(here):
                writer.write_table(table.append_column(schema.field("split"), column))


def work_directory(out: Path) -> Path:
    """What a run has read so far; removed when it has come to its end"""
    return out.parent / f".{out.name}.work"


def check(inputs: list[Path], out: Path, near: float, workers: int) -> None:
    """Raises ValueError, in one line, for options and inputs that would end the run later."""
    if out.suffix != ".parquet":
        raise ValueError(f"--out {out}: the name must end in .parquet")
    work, described = work_directory(out), out.with_suffix(".json")
    if work.is_dir() and described.is_file():  # of a run that was killed at its very end
        if out.exists():
            shutil.rmtree(work, ignore_errors=True)
        else:
            described.unlink(missing_ok=True)  # written first, by a run that goes on now
    for path in (out, described):
        if path.exists():
            raise ValueError(f"{path} exists; choose another name or remove it")
    if near:
        check_threshold(near)
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, not {workers}")
    seen = set()
    for path in inputs:
        check_input(path)
        if path.resolve() in seen:
            raise ValueError(f"{path} is named twice")
        seen.add(path.resolve())


def curate(
    inputs: list[Path],
    out: Path,
    preset: Preset,
    near: float = 0.8,
    leaks: str = "remove",
    seed: int = 0,
    workers: int = 1,
    strict: bool = False,
) -> dict:
    """Write `out` and the .json beside it. Returns what the .json holds, and `seconds` by stage.

    `near` is the least Jaccard similarity of near-duplicates (0 keeps them; the check for leaks then uses 0.8). Raises
    ValueError, in one line, for inputs that cannot be read or if no item is left, and with `strict` for the first
    broken record.
    """
    check(inputs, out, near, workers)
    work = work_directory(out)
    work.mkdir(parents=True, exist_ok=True)
    clock, seconds = time.perf_counter(), {}

    def lap(stage: str) -> None:
        nonlocal clock
        seconds[stage] = time.perf_counter() - clock
        clock = time.perf_counter()

    with held(work / "lock", f"another run is writing {out}:"):
        options = Options(preset, near, seed)
        directories = read_inputs(inputs, work, options, workers, strict)
        lap("read and rules")
        with Candidates(directories) as candidates:
            fate = np.zeros(len(candidates), np.uint8)
            drop_exact(candidates.column(0), fate, EXACT)
            lap("exact duplicates")
            if near:
                bands = (candidates.column(2 + band) for band in range(bands_for(near)[0]))
                drop_near(bands, candidates.shingles, near, fate, NEAR)
                lap("near-duplicates")
            draw(candidates, fate, preset, seed)
            split(candidates, fate, preset.sizes, seed)
            lap("draw and split")
            if TRAIN not in fate:
                raise ValueError(f"no item is left to train on: {reasons_of(summary(candidates, fate, {}))}")
            leaking = find_leaks(candidates, fate, near or 0.8, leaks == "remove")
            lap("leaks")
            report = summary(candidates, fate, leaking)
            with whole_file(out) as items, whole_file(out.with_suffix(".json")) as described:
                write_items(candidates, fate, items)
                described.write_text(json.dumps(report, indent=2) + "\n")
            lap("write")
        shutil.rmtree(work)
    return report | {"seconds": seconds}


def summary(candidates: Candidates, fate: np.ndarray, leaking: dict) -> dict:
    """The counts of all records, for the .json and the terminal."""
    counts, first = Counter(), {}
    for read in candidates.summaries:
        counts.update(read["counts"])
        for reason, number in read["first"].items():
            first.setdefault(reason, f"{read['file']}, record {number}")
    codes = np.bincount(fate, minlength=9).tolist()
    return {
        "records": sum(read["records"] for read in candidates.summaries),
        "broken": {reason: counts[reason] for reason in BAD},
        "rules": {reason: counts[reason] for reason in RULES},
        "candidates": len(candidates),
        "left_out": {reason: codes[code] for code, reason in LEFT_OUT.items()},
        "items": {name: codes[code] for code, name in SPLITS.items()},
        "leaking": leaking,
        "first": first,
        "inputs": candidates.summaries,
    }


def reasons_of(report: dict) -> str:
    """How many records were left out for each reason, in one line."""
    reasons = report["broken"] | report["rules"] | report["left_out"]
    return "; ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count) or "no candidates"


def show(report: dict, near: float, remove: bool) -> None:
    """Print the counts of a run"""

    def line(count: int, what: str, indent: str = "  ") -> None:
        print(f"{count:>13,}{indent}{what}")

    line(report["records"], "records read", " ")
    for reason, count in (report["broken"] | report["rules"]).items():
        if count:
            line(-count, f"{reason.removeprefix('records ')}   (first: {report['first'][reason]})")
    line(report["candidates"], "candidates", " ")
    for reason, count in report["left_out"].items():
        if count:
            line(-count, reason)
    line(sum(report["items"].values()), "items", " ")
    for name, count in report["items"].items():
        line(count, name)
    verb = "had, before they were removed from train and val," if remove else "have"
    for name, other in (("test", "train or val"), ("val", "train or test")):
        leaking = report["leaking"][name]
        if not report["items"][name]:
            continue
        print(f"{leaking['any']:,} {name} items {verb} a near-duplicate ({near:g}) in {other}: "
              f"{leaking['text']:,} by text, {leaking['title']:,} by title")  # fmt: skip
    print(f"{report['leaking']['train']['any']:,} train items {'were' if remove else 'are'} near-duplicates of those")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pricing.curation", description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=Path, nargs="+", help="raw_meta_* files: .jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="the .parquet file to write; must not exist")
    parser.add_argument(
        "--preset", default="second", choices=PRESETS, help="the rules, see pricing/curation/rules.py (default: second)"
    )
    sizes = dict(type=int, nargs=3, metavar=("TRAIN", "VAL", "TEST"))
    parser.add_argument("--sizes", **sizes, help="items of each split (default: the preset's)")
    parser.add_argument("--max-tokens", type=int, help="tokens at which texts are cut (default: the preset's)")
    parser.add_argument(
        "--near", type=float, default=0.8,
        help="share of their pairs of words that near-duplicates have in common; 0 keeps them (default: 0.8)",
    )  # fmt: skip
    parser.add_argument(
        "--leaks", default="remove", choices=["remove", "report"],
        help="what to do with training items that are near-duplicates of held-out ones (default: remove)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the draw, the split and MinHash (default: 0)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that read and sift (default: one a core)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first broken record instead of counting it")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    preset = PRESETS[args.preset]
    try:
        if args.sizes:
            if min(args.sizes) < 0 or not args.sizes[0]:
                raise ValueError(f"--sizes {' '.join(map(str, args.sizes))}: TRAIN must be at least 1, the others 0")
            preset = replace(preset, sizes=tuple(args.sizes))
        if args.max_tokens is not None:
            if args.max_tokens < preset.least_tokens:
                raise ValueError(f"--max-tokens must be at least {preset.least_tokens} with preset {args.preset}")
            preset = replace(preset, most_tokens=args.max_tokens)
        if args.seed < 0:
            raise ValueError(f"--seed must be 0 or more, not {args.seed}")
        report = curate(args.raw, args.out, preset, args.near, args.leaks, args.seed, args.workers, args.strict)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on, without the inputs that are finished", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    show(report, args.near or 0.8, args.leaks == "remove")
    took = report["seconds"]
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in took.items())
    print(f"{report['records'] / sum(took.values()):,.0f} records/s: {stages}")
    print(f"wrote {args.out} and {args.out.with_suffix('.json').name}; now run    python train.py --data {args.out}")
