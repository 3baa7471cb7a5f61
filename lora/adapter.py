"""The adapter on disk, in PEFT's format: adapter_model.safetensors + adapter_config.json.

PEFT names a factor after the module in transformers' model:
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. Our names are the same without the leading
`base_model.model.` and `model.` (transformers wraps the decoder as `.model`). A key that matches nothing is an error:
a silently ignored adapter answers like the base model.

Phi-3's layers have other names and shapes in such a file: phi3.py translates them, and nothing here does for any other
model.
"""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora import phi3
from lora.inject import inject, lora_layers, target_names
from lora.layer import PREFIX

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What these keys of PEFT's ask for, this code does not compute.
UNSUPPORTED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layers_to_transform",
)  # fmt: skip


def save_adapter(model: nn.Module, directory: Path, base_model: str) -> None:
    """Write both files into `directory` (which the caller makes whole by a rename). `base_model` is for PEFT's reader:
    the hub id, or the directory, of what the adapter belongs to."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()  # (R, I)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()  # (O, R)
    names, metadata, patterns = {name.rpartition(".")[2] for name in layers}, {"format": "pt"}, {}
    if phi3.is_fused(model):
        tensors, split = phi3.fuse(model, tensors)
        names, metadata["split"] = phi3.fused_names(tensors), json.dumps(split)
        patterns = phi3.patterns(split, first.rank, first.alpha, first.rslora)
    save_file(tensors, directory / WEIGHTS, metadata=metadata)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "target_modules": sorted(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        **patterns,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Inject the LoRA layers that the config names into a fresh model and fill them. Where the model has an adapter of
    the same kind already, its factors are replaced.

    Raises ValueError that names the file and the key for anything missing, left over, mis-shaped, or of a PEFT
    variant that this code does not compute (DoRA, biases, saved modules, per-layer ranks).
    """
    path, weights = Path(directory) / CONFIG, Path(directory) / WEIGHTS
    config, tensors, split = read_files(path, weights)
    if split:
        if not phi3.is_fused(model):
            raise ValueError(f"{weights} was written for a model with {', '.join(split)}: another base model?")
        config = phi3.without_patterns(config, split, path, weights)
    refuse_variants(config, path)
    targets = last_names(config["target_modules"])
    if phi3.is_fused(model):
        targets = phi3.unfused_targets(targets, split)
        tensors = phi3.unfuse(model, tensors, split, config["r"])
    make_layers(model, config, targets, path)
    fill_factors(model, tensors, weights)


def read_files(path: Path, weights: Path) -> tuple[dict, dict[str, Tensor], dict[str, dict]]:
    """adapter_config.json, the factors by PEFT's names, and how Phi-3's are made of blocks (else empty).

    Raises ValueError where a file is missing, damaged, or no LoRA adapter's.
    """
    for needed in (path, weights):
        if not needed.is_file():
            raise ValueError(f"{needed} does not exist: {path.parent} is no adapter directory")
    try:
        config = json.loads(path.read_text())
        tensors, split = load_file(weights), phi3.read_split(weights)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"the adapter in {path.parent} is damaged or cut short: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r} is not supported, only LORA")
    return config, tensors, split


def refuse_variants(config: dict, path: Path) -> None:
    """Raises ValueError for a variant of LoRA that this code does not compute, and for a key that is missing."""
    for key in UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias={config['bias']!r} is not supported")
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]:
        raise ValueError(f"{path} lacks {missing[0]}")


def last_names(targets: str | list[str]) -> list[str]:
    """`target_modules` -> last names of layers, sorted. For small models PEFT writes whole paths; where those are not
    the paths of all layers, `fill_factors` misses a factor."""
    targets = target_names(targets) if isinstance(targets, str) else targets
    return sorted({target.rpartition(".")[2] for target in targets})


def make_layers(model: nn.Module, config: dict, targets: list[str], path: Path) -> None:
    """The LoRA layers to fill: new ones, or those that the model has. Raises ValueError where they scale otherwise."""
    alpha, rslora = config["lora_alpha"], config.get("use_rslora", False)
    if layers := list(lora_layers(model).values()):
        if {(layer.alpha, layer.rslora) for layer in layers} != {(alpha, rslora)}:
            raise ValueError(f"{path}: its alpha is not that of the adapter in the model, which it is to replace")
        return
    dropout = config.get("lora_dropout", 0.0)
    inject(model, rank=config["r"], alpha=alpha, dropout=dropout, rslora=rslora, targets=",".join(targets))


def fill_factors(model: nn.Module, tensors: dict[str, Tensor], weights: Path) -> None:
    """Copy every factor into its layer. Raises ValueError for one that is missing, mis-shaped or left over."""
    left = dict(tensors)
    for name, layer in lora_layers(model).items():
        for factor in ("lora_A", "lora_B"):
            key = f"{PREFIX}{name}.{factor}.weight"
            tensor = left.pop(key, None)
            if tensor is None:
                raise ValueError(f"{weights} lacks {key}")
            parameter = getattr(layer, factor)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{weights}: {key} is {tuple(tensor.shape)}, the model needs {tuple(parameter.shape)}")
            parameter.data.copy_(tensor)
    if left:
        raise ValueError(f"{weights}: {next(iter(left))} matches no layer of the model ({len(left)} such keys)")
