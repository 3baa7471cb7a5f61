"""Checkpoint directories that are whole or absent, and the optimiser's state without pickle.

`state/` holds what a resumed run needs to go on as if it had never stopped: optimiser tensors, step, random numbers.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@contextmanager
def write_directory(out: Path):
    """Yields a temporary directory beside `out`; on success it is fsynced and takes `out`'s place, else it vanishes."""
    out = Path(os.path.abspath(out))
    part, old = out.with_name(f".{out.name}.part-{os.getpid()}"), out.with_name(f".{out.name}.old-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if out.exists():
            os.rename(out, old)
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save_state(directory: Path, parameters: dict, optimiser: torch.optim.Optimizer, step: int, seconds: float) -> None:
    """Optimiser tensors by parameter name, the random state, and how far the run is."""
    directory.mkdir()
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                tensors[f"{name}|{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, directory / "optimiser.safetensors")
    (directory / "progress.json").write_text(json.dumps({"step": step, "seconds": seconds}) + "\n")


def load_state(directory: Path, parameters: dict, optimiser: torch.optim.Optimizer) -> tuple[int, float]:
    """Put everything back; returns (step, seconds). Raises ValueError where the state does not fit the parameters."""
    try:
        tensors = load_file(directory / "optimiser.safetensors")
        progress = json.loads((directory / "progress.json").read_text())
    except Exception as error:  # SafetensorError, OSError and JSONDecodeError alike: there is nothing to resume from
        raise ValueError(f"{directory} holds no readable training state: {error}") from None
    torch.set_rng_state(tensors.pop("random.cpu"))
    cuda = tensors.pop("random.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    for key, value in tensors.items():
        name, _, field = key.partition("|")
        if name not in parameters:
            raise ValueError(f"{directory}: the state of {name} belongs to no trainable tensor of this model")
        # AdamW keeps its step count on the CPU and its moments with the parameter.
        place = parameters[name].device if value.ndim else "cpu"
        optimiser.state[parameters[name]][field] = value.to(place)
    return progress["step"], progress["seconds"]
