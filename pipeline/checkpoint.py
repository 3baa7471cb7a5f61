"""Checkpoint directories that are whole or absent, and the optimiser's state without pickle.

`state/` holds what a resumed run needs to go on as if it had never stopped: optimiser tensors, step, random numbers.
"""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora.optim import FlatFactors, initialise


@contextmanager
def write_directory(out: Path):
    """Yields a temporary directory beside `out`; on success it is fsynced and takes `out`'s place, else it vanishes.

    At every moment the old or the new directory is whole: the old one is moved aside, and put back on any failure.
    """
    out = Path(os.path.realpath(out))  # through a symbolic link, to where the files really lie
    part = beside(out)
    old = part.with_name(part.name.replace(".part-", ".old-"))
    try:
        part.chmod(0o755)
        yield part
        for path in [*part.rglob("*"), part]:
            if path.is_file():
                path.chmod(0o644)  # safetensors writes for the owner alone
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if out.exists():
            os.rename(out, old)
        os.rename(part, out)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if old.exists() and not out.exists():
            os.rename(old, out)
        if isinstance(error, SafetensorError) and "while serializing" in str(error):  # a full disk, say
            raise OSError(f"{out} cannot be written: {error}") from None
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def beside(out: Path) -> Path:
    """A new temporary directory beside `out`. Raises OSError that names `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror}") from None


def check_writable(out: Path) -> None:
    """Raises OSError or ValueError now, not after hours of training, where `write_directory(out)` could not work."""
    if os.path.ismount(out):
        raise ValueError(f"{out} is a mount point, which cannot be replaced; name a directory inside it")
    os.rmdir(beside(Path(os.path.realpath(out))))


def save_state(directory: Path, factors: FlatFactors, optimiser: torch.optim.Optimizer, progress: dict) -> None:
    """The optimiser's state for the flat vector of factors, the random state, and `progress`: how far the run is."""
    directory.mkdir()
    tensors, numbers = {"random.cpu": torch.get_rng_state()}, {}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for key, value in initialise(optimiser, factors.parameter).items():
        if torch.is_tensor(value):
            tensors[f"optimiser.{key}"] = value.detach().cpu().contiguous()
        else:
            numbers[key] = value
    save_file(tensors, directory / "optimiser.safetensors")
    whole = {"progress": progress, "optimiser": numbers, "trained_numbers": factors.parameter.numel()}
    (directory / "progress.json").write_text(json.dumps(whole) + "\n")


def load_state(directory: Path, factors: FlatFactors, optimiser: torch.optim.Optimizer) -> dict:
    """Put everything back, in place; returns `progress`. Raises ValueError where the state does not fit."""
    try:
        tensors = load_file(directory / "optimiser.safetensors")
        whole = json.loads((directory / "progress.json").read_text())
        progress, numbers, trained = whole["progress"], whole["optimiser"], whole["trained_numbers"]
    except Exception as error:  # SafetensorError, OSError and JSONDecodeError alike: there is nothing to resume from
        raise ValueError(f"{directory} holds no readable training state: {error}") from None
    if "random.cpu" not in tensors:
        raise ValueError(f"{directory} lacks the random state")
    if trained != factors.parameter.numel():
        raise ValueError(
            f"{directory} is the state of {trained:,} trained numbers; this model has {factors.parameter.numel():,}"
        )
    torch.set_rng_state(tensors.pop("random.cpu"))
    cuda = tensors.pop("random.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    state = initialise(optimiser, factors.parameter)
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
