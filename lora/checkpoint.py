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
from safetensors.torch import load_file, save_file


@contextmanager
def write_directory(out: Path):
    """Yields a temporary directory beside `out`; on success it is fsynced and takes `out`'s place, else it vanishes.

    At every moment the old or the new directory is whole: the old one is moved aside, and put back on any failure.
    """
    out = Path(os.path.realpath(out))  # through a symbolic link, to where the files really lie
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
    old = part.with_name(part.name.replace(".part-", ".old-"))
    try:
        part.chmod(0o755)
        yield part
        for path in [*part.rglob("*"), part]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if out.exists():
            os.rename(out, old)
        os.rename(part, out)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_writable(out: Path) -> None:
    """Raises OSError or ValueError now, not after hours of training, where `write_directory(out)` could not work."""
    if os.path.ismount(out):
        raise ValueError(f"{out} is a mount point, which cannot be replaced; name a directory inside it")
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    os.rmdir(tempfile.mkdtemp(dir=out.parent))


def save_state(directory: Path, parameters: dict, optimiser: torch.optim.Optimizer, progress: dict) -> None:
    """Optimiser tensors by parameter name, the random state, and `progress`: how far the run is."""
    directory.mkdir()
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                tensors[f"{name}|{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, directory / "optimiser.safetensors")
    (directory / "progress.json").write_text(json.dumps(progress) + "\n")


def load_state(directory: Path, parameters: dict, optimiser: torch.optim.Optimizer) -> dict:
    """Put everything back; returns `progress`. Raises ValueError where the state does not fit the parameters."""
    try:
        tensors = load_file(directory / "optimiser.safetensors")
        progress = json.loads((directory / "progress.json").read_text())
    except Exception as error:  # SafetensorError, OSError and JSONDecodeError alike: there is nothing to resume from
        raise ValueError(f"{directory} holds no readable training state: {error}") from None
    if "random.cpu" not in tensors:
        raise ValueError(f"{directory} lacks the random state")
    torch.set_rng_state(tensors.pop("random.cpu"))
    cuda = tensors.pop("random.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    for key, value in tensors.items():
        name, _, field = key.partition("|")
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            raise ValueError(f"{directory}: the state of {name} fits no trainable tensor of this model")
        # AdamW keeps its step count on the CPU and its moments with the parameter.
        place = parameters[name].device if value.ndim else "cpu"
        optimiser.state[parameters[name]][field] = value.to(place)
    if progress["step"] and (without := [name for name, p in parameters.items() if not optimiser.state.get(p)]):
        raise ValueError(f"{directory} lacks the optimiser state of {without[0]}")
    return progress
