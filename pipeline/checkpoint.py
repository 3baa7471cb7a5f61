"""A run on disk: `out/` holds the adapter in PEFT's format, the price head, run.json, metrics.jsonl and `state/`, which
a resumed run needs to go on as if it had never stopped. Whole or absent; JSON and safetensors, no pickle.

    out/                      the first member, and what all share
    out/members/1, 2, ...     the further members of an ensemble, each a whole run
    out/state/complete        there once the run has come to its end: nothing is left to resume
"""

import argparse
import hashlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from common.files import check_writable, whole_file, write_directory
from llama.model import Llama
from lora.adapter import WEIGHTS, save_adapter
from lora.optim import FlatParameter, initialise
from pipeline.base_digest import base_identity, check_base
from pipeline.data import TrainingData
from pipeline.hub import published_name
from pipeline.models import peak_memory
from pipeline.options import LOSSES
from pricing.distribution.intervals import LEVELS
from pricing.distribution.quantile_head import PriceHead, save_head
from quant.quantise import BITS

COMPLETE = "state/complete"  # a file in a checkpoint whose run has come to its end
CALIBRATION = "validation.safetensors"  # a run's own predictions of its validation items
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
    path = Path(ckpt) / "run.json"
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
        if options.get("neighbours"):
            raise ValueError(f"{ckpt} was trained with --neighbours, which is gone: train again without it")
        return run | {"options": options}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error!r}") from None


def check_start(out: Path, earlier: dict | None) -> None:
    """Raises ValueError or OSError now, not after hours of training, where `save` could not write `out` or would
    replace what is no earlier run of train.py, and where `earlier` (run.json) was started with a loss that is gone."""
    if earlier and (loss := earlier["options"].get("loss", "answer")) not in LOSSES:
        raise ValueError(f"{out} was started with --loss {loss}, which is gone: train again with {', '.join(LOSSES)}")
    if not earlier and out.exists() and not (out / "run.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is no earlier run of train.py; choose another name")
    check_writable(out)


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
    run = read_run(ckpt)
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
    while (path := member_path(ckpt, number)).is_dir():
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
        "steps": counts["step"],
        "seconds": round(counts["seconds"], 1),
        "tokens": counts["tokens"],
        "peak_memory_gib": round(peak_memory(device), 3),
    }
    with write_directory(out) as part:
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


def save_state(directory: Path, flat: FlatParameter, optimiser: torch.optim.Optimizer, progress: dict) -> None:
    """The optimiser's state for the flat vector of factors, the random state, and `progress`: how far the run is."""
    directory.mkdir()
    tensors, numbers = {"random.cpu": torch.get_rng_state()}, {}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for key, value in initialise(optimiser, flat.parameter).items():
        if torch.is_tensor(value):
            tensors[f"optimiser.{key}"] = value.detach().cpu().contiguous()
        else:
            numbers[key] = value
    save_file(tensors, directory / "optimiser.safetensors")
    whole = {"progress": progress, "optimiser": numbers, "trained_numbers": flat.parameter.numel()}
    (directory / "progress.json").write_text(json.dumps(whole) + "\n")


def load_state(directory: Path, flat: FlatParameter, optimiser: torch.optim.Optimizer) -> dict:
    """Put everything back, in place; returns `progress`. Raises ValueError where the state does not fit."""
    try:
        tensors = load_file(directory / "optimiser.safetensors")
        whole = json.loads((directory / "progress.json").read_text())
        progress, numbers, trained = whole["progress"], whole["optimiser"], whole["trained_numbers"]
    except Exception as error:  # SafetensorError, OSError and JSONDecodeError alike: there is nothing to resume from
        raise ValueError(f"{directory} holds no readable training state: {error}") from None
    if "random.cpu" not in tensors:
        raise ValueError(f"{directory} lacks the random state")
    if trained != flat.parameter.numel():
        raise ValueError(
            f"{directory} is the state of {trained:,} trained numbers; this model has {flat.parameter.numel():,}"
        )
    torch.set_rng_state(tensors.pop("random.cpu"))
    cuda = tensors.pop("random.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    state = initialise(optimiser, flat.parameter)
    for key, value in state.items():
        if not torch.is_tensor(value):
            state[key] = numbers.pop(key, value)
            continue
        saved = tensors.pop(f"optimiser.{key}", None)
        if saved is None or saved.shape != value.shape:
            raise ValueError(f"{directory} lacks the optimiser's {key}, or it fits no trainable tensor of this model")
        value.copy_(saved)
    if tensors or numbers:
        raise ValueError(f"{directory}: {next(iter([*tensors, *numbers]))} belongs to another optimiser")
    return progress
