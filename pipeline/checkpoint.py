"""A run on disk: `out/` holds the adapter in PEFT's format, the price head, run.json, metrics.jsonl and `state/`, which
a resumed run needs to go on as if it had never stopped. Whole or absent; JSON and safetensors, no pickle; manifest.json
has the sha256 of every file, and is checked whenever a run is opened. What else lies in `out/` is left alone.

    out/                      the first member, and what all share
    out/members/1, 2, ...     the further members of an ensemble, each a whole run
    out/state/complete        there once the run has come to its end: nothing is left to resume. It holds the sha256 of
                              the manifest that it is about
"""

import argparse
import hashlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays

from common.files import update_directory, whole_file
from common.manifest import MANIFEST, REMEDY, inside, read_whole, seal, seal_of
from llama.model import Llama
from lora.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from lora.optim import FlatParameter
from pipeline.base_digest import base_identity, check_base
from pipeline.data import TrainingData
from pipeline.hub import published_name
from pipeline.models import peak_memory
from pipeline.state import save_state
from pricing.distribution.intervals import LEVELS
from pricing.distribution.quantile_head import FILE, PriceHead, load_head, save_head
from quant.quantise import BITS

COMPLETE = "state/complete"  # a file in a checkpoint whose run has come to its end
CALIBRATION = "validation.safetensors"  # a run's own predictions of its validation items
# The files of a run; whatever else lies in its directory is the user's.
OWNED = (WEIGHTS, CONFIG, FILE, CALIBRATION, "run.json", "metrics.jsonl", "state/optimiser.safetensors")
OWNED += ("state/progress.json", COMPLETE, MANIFEST)
# What a run of before an option did, which its run.json does not say.
OLDER = {"head": "none", "members": 1, "train_items": None, "outlier_threshold": 6.0}
OLDER |= {"origin": None, "mix": None, "start_from": None}


@dataclass
class TrainingRun:
    """What train.py trains and this file saves."""

    args: argparse.Namespace
    directory: Path  # of the base model
    data: TrainingData
    model: Llama
    price_head: PriceHead | None
    flat: FlatParameter
    optimiser: torch.optim.Optimizer
    numerics: dict  # what memory decided of the numbers: the optimiser, an lm_head in 8 bits
    started_from: dict | None  # of the run of --start-from: its directory, data and options, and where it started from

    def __post_init__(self):
        self.base = base_identity(self.args.model, self.directory)  # now, not at a save: it may change in between


def read_run(ckpt: str | Path) -> dict:
    """run.json of a checkpoint directory. Raises ValueError where it is none."""
    path = inside(Path(ckpt), "run.json")
    if not path.is_file():
        why = "has no run.json" if Path(ckpt).is_dir() else "does not exist"
        raise ValueError(f"{ckpt} is no checkpoint of train.py: it {why}")
    try:
        run = json.loads(path.read_text())
        missing = {"model", "bits", "blocksize", "double_quant", "data", "size", "max_tokens"} - set(run["options"])
        if missing or not {"prompt", "data", "steps"} <= set(run):
            raise KeyError(", ".join(sorted(missing)))
        options = OLDER | run["options"]
        numbers = ("bits", "blocksize", "size", "max_tokens", "members", "batch_tokens", "rank")
        if wrong := [key for key in numbers if type(options.get(key, 1)) is not int]:
            raise TypeError(f"{wrong[0]} is {options[wrong[0]]!r}")
        if options["bits"] not in BITS or run["prompt"].count("{text}") != 1:
            raise TypeError(f"bits are {options['bits']!r}, the prompt is {run['prompt']!r}")
        if run.get("manifest") and not (Path(ckpt) / MANIFEST).is_file():
            raise ValueError(f"{Path(ckpt) / MANIFEST} is missing; {REMEDY}")
        if options.get("neighbours"):
            raise ValueError(f"{ckpt} was trained with --neighbours, which is gone: train again without it")
        return run | {"options": options}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error!r}") from None


def open_run(ckpt: str | Path) -> dict:
    """run.json of a checkpoint whose files are all as they were saved. Raises ValueError, one line that names the file
    that is not."""
    read_run(ckpt)  # says best what is no run at all
    return read_whole(ckpt, lambda: read_run(ckpt))


def is_complete(ckpt: str | Path) -> bool:
    """Whether a run has come to its end. Raises ValueError where another run was marked so."""
    path, sealed = inside(Path(ckpt), COMPLETE), seal_of(ckpt)
    if not path.is_file():
        return False
    if sealed and path.read_text(errors="replace").strip() != sealed:
        raise ValueError(f"{path} is of another save of the run, or damaged; remove it to go on with --resume")
    return True


def mark_complete(ckpt: str | Path) -> None:
    with whole_file(Path(ckpt) / COMPLETE) as part:
        part.write_text(f"{seal_of(ckpt)}\n")


def load_trained(model: Llama, ckpt: str, head: str) -> PriceHead | None:
    """The adapter of a run into `model`, and its price head where `head` is not "none"; both of one save"""

    def read() -> PriceHead | None:
        load_adapter(model, Path(ckpt))
        return None if head == "none" else load_head(Path(ckpt))

    return read_whole(ckpt, read)


def save_early(args: argparse.Namespace, progress, saved: int | None, store: Callable) -> str:
    """Save what a signal ends, but for weights that are not the best where those are kept; says how to go on."""
    if saved != progress.step and (args.keep == "last" or saved is None):
        progress.stop_clock()
        store()
        saved = progress.step
    out = Path(args.out).parents[1] if Path(args.out).parent.name == "members" else args.out
    done = f"after step {progress.step:,} of {progress.total:,}; {args.out} holds step {saved:,}"
    return f"{done}: python train.py --resume --out {out} goes on"


def load_metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl"""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def started_from(ckpt: str | None, directory: Path, earlier: dict | None) -> dict | None:
    """What run.json keeps of the run that --start-from names: its directory, options and data, and where that one
    started from: what any of them was trained on must not be priced. `directory` is of the base model; `earlier` is
    run.json of the run that --resume goes on with.

    Raises ValueError for an adapter of another base model, and where that of `earlier` is another by now.
    """
    check_base(earlier or {}, directory, "the run to go on with")
    if earlier or not ckpt:
        return earlier.get("started_from") if earlier else None
    run = open_run(ckpt)
    if run["base_model"]["directory"] != directory.name:
        raise ValueError(f"{ckpt} was trained on {run['base_model']['directory']}, which {directory.name} is not")
    check_base(run, directory, ckpt)
    return {"directory": str(ckpt)} | {key: run.get(key) for key in ("options", "data", "started_from")}


def member_path(ckpt: str | Path, number: int) -> Path:
    """The directory of a run's member; the first is the run's own"""
    return Path(ckpt, "members", str(number)) if number else Path(ckpt)


def member_paths(ckpt: str | Path, options: dict) -> list[Path]:
    """The checkpoints of a run: itself, and the further ones that `train.py --members` trained. Raises ValueError where
    some are missing."""
    paths, number = [Path(ckpt)], 1
    while (member_path(ckpt, number) / "run.json").is_file():
        path = member_path(ckpt, number)
        paths, number = [*paths, path], number + 1
    if len(paths) != (asked := options["members"]):
        raise ValueError(f"{ckpt} holds {len(paths)} of its {asked} members; go on with train.py --resume --out {ckpt}")
    return paths


def adapter_digest(ckpt: str | Path) -> str:
    """sha256 of the adapter's weights, by which a price head knows what it was trained beside"""
    return hashlib.sha256((Path(ckpt) / WEIGHTS).read_bytes()).hexdigest()


def save(
    run: TrainingRun, out: Path, counts: dict, metrics: list[dict], calibration: dict[str, np.ndarray], error
) -> None:
    """A whole checkpoint directory, under its name only when complete.

    `counts`: step, seconds, tokens; `metrics`: a dict a line; `calibration`: predictions of validation items, as
    `write_calibration` takes them, and `error`, in dollars, theirs.
    """
    args, data, device = run.args, run.data, run.model.device
    record = {
        "options": {k: v for k, v in vars(args).items() if k not in ("resume", "explain_memory")},
        "base_model": run.base,
        "data": data.identity | {"train": len(data.train)},
        "origins": data.origins,
        "started_from": run.started_from,
        "prompt": data.prompt,
        "validation": {"items": len(calibration.get("price", ())), "mae_dollars": error},
        "split": "by `split` column, else by hash of the title: 85 % train, 5 % val, 10 % test",
        "versions": {name: version(name) for name in ("torch", "bitsandbytes", "safetensors", "tiktoken")}
        | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "compute_dtype": str(run.model.compute_dtype).removeprefix("torch."),
        "plan": run.numerics,
        "manifest": MANIFEST,
        "steps": counts["step"],
        "seconds": round(counts["seconds"], 1),
        "tokens": counts["tokens"],
        "peak_memory_gib": round(peak_memory(device), 3),
    }
    members = [f"members/{path.name}/{name}" for path in out.glob("members/[0-9]*") for name in OWNED]
    with update_directory(out, [*OWNED, *members], last=MANIFEST) as part:  # the members are trained after it
        save_adapter(run.model, part, base_model=published_name(args.model))
        if run.price_head:
            run.price_head.settings["adapter"] = adapter_digest(part)
            save_head(run.price_head, part)
        if calibration:
            write_calibration(part, calibration)
        save_state(part / "state", run.flat, run.optimiser, counts)
        (part / "run.json").write_text(json.dumps(record, indent=2) + "\n")
        lines = [json.dumps(line, allow_nan=False) + "\n" for line in metrics]
        (part / "metrics.jsonl").write_text("".join(lines))
        seal(part, OWNED[:-2])


def write_calibration(ckpt: str | Path, calibration: dict[str, np.ndarray]) -> None:
    """`price` (m,) dollars, `digits` and `head` (m, 21) log dollars; whole or not at all"""
    with whole_file(Path(ckpt) / CALIBRATION) as part:
        save_arrays({key: np.ascontiguousarray(value, np.float64) for key, value in calibration.items()}, part)


def read_calibration(ckpt: str | Path) -> dict[str, np.ndarray]:
    """What `write_calibration` wrote; no items where a run has none. Raises ValueError where the file is damaged."""
    path = Path(ckpt) / CALIBRATION
    if not path.is_file():  # trained without validation items
        return {"price": np.zeros(0)}
    try:
        arrays = load_arrays(path)
        sizes = {key: (len(arrays["price"]), len(LEVELS)) for key in arrays} | {"price": arrays["price"].shape[:1]}
        if wrong := [key for key, value in arrays.items() if value.shape != sizes[key]]:
            raise ValueError(f"{wrong[0]} is {arrays[wrong[0]].shape}")
        return arrays
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
