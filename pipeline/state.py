"""What a resumed run needs besides its weights: `state/`, the states of optimiser and randomness, and how far it is."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora.optim import FlatParameter, initialise


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
